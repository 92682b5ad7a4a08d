"""An output on the Hugging Face hub: what it is first, then its weights, and last what makes a model of them, so that
nobody loads a half. What is there is not uploaded again: an interrupted push goes on when it is called again.

Not uploaded are hidden files, and statistics, whose header names files of this machine; what we wrote goes without
absolute paths. The token is the one that huggingface_hub finds.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from compressor.checkpoint.files import SINGLE, read_index
from compressor.checkpoint.headers import verify_files
from compressor.errors import CheckpointError
from compressor.machine import network
from compressor.machine.progress import Progress
from compressor.recipe.schema import LoadedRecipe
from compressor.report.html import page
from compressor.run.record import RECORD, STATISTICS
from compressor.wording import counted, human_bytes, is_hub_id, without_paths

_RECORD = f"compressor/{RECORD}"
_UPLOADED = re.compile(rf"(?!compressor/{re.escape(STATISTICS)}$)(\.eval_results/)?[^.][^/]*(/[^.][^/]*)*")
_REFUSALS = {401: "the token is not valid", 403: "the token may not write there"}


def push(
    folder: str | Path, repo: str, *, private: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> str:
    """Upload what `compress` or `apply` has written to `repo`, `owner/name`, which is made (`private`) where it is not
    there; what is in it is replaced only with `overwrite`. Returns its address. Raises CheckpointError.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder, api = Path(folder), HfApi()
    ours, weights = _written(folder, repo), {*(read_index(folder) or {"": SINGLE}).values()}
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in files.items() if _UPLOADED.fullmatch(name)}
    again = f"compressor push {folder} {repo}{' --private' * private}"
    with _errors_named(repo, f" All is in {folder}: `{again}{' --overwrite' * overwrite}` goes on."):
        there = _there(repo, ours[_RECORD], private=private)
        if there and not overwrite:
            how = f"name another one, or replace them: `{again} --overwrite`"
            raise CheckpointError(f"{repo}: it holds {counted(len(there), 'file')} of something else; {how}.")
        api.create_repo(repo, private=private or None, exist_ok=True)
        size = human_bytes(sum(path.stat().st_size for path in files.values()))
        (progress or Progress()).say(f"uploading {size} to {repo}")
        first = [CommitOperationAdd(_RECORD, ours[_RECORD])]
        first += [CommitOperationDelete(name) for name in there if name != _RECORD]
        api.create_commit(repo, first, commit_message="What this will be")
        only = [glob.escape(name) for name in weights]
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=only, commit_message="Weights")
        last = [CommitOperationAdd(name, ours.get(name, path)) for name, path in files.items() if name not in weights]
        api.create_commit(repo, last, commit_message="Made with moe-compressor")
    return f"{api.endpoint}/{repo}"


def push_as_asked(loaded: LoadedRecipe, progress: Progress, *, may_push: bool) -> None:
    """Push a run's output where its recipe says, if that is allowed; else say how it can be done."""
    asked, output = loaded.recipe.push, loaded.recipe.output
    if asked is None or output is None:
        return
    if may_push:
        progress.say(f"pushed to {push(output, asked.repo, private=asked.private, progress=progress)}")
    else:
        how = f"compressor push {output} {asked.repo}{' --private' * asked.private}"
        progress.say(f"not pushed to {asked.repo}, which takes --push (`push=True`); `{how}` does it now")


def check_push(loaded: LoadedRecipe, *, may_push: bool, make: bool = False) -> list[str]:
    """What becomes of the recipe's `push`, as notes. Raises, where it is allowed, what `push` would; only to `make` the
    repository, empty, is certain.
    """
    from huggingface_hub import HfApi

    asked, output = loaded.recipe.push, loaded.recipe.output
    if asked is None and may_push:
        raise loaded.error((), "--push (`push=True`) has nowhere to push to; give `push: owner/name`")
    if asked is None or not may_push:
        return [f"the output is pushed to {asked.repo} only with --push"] if asked else []
    if output is None or not loaded.passes[-1].method.leaves_model:
        raise loaded.error(("push",), "there will be no checkpoint to push; it takes an `output`, and a model in it")
    with loaded.at("push"), _errors_named(asked.repo):
        if there := _there(asked.repo, b"", private=asked.private):
            how = "name another one, or run without --push, and then `compressor push --overwrite`"
            raise CheckpointError(f"{asked.repo}: it holds {counted(len(there), 'file')} already; {how}")
        if make:
            HfApi().create_repo(asked.repo, private=asked.private or None, exist_ok=True)
    return [f"the output will be pushed to {asked.repo}"]


def _written(folder: Path, repo: str) -> dict[str, bytes]:
    """The texts that we wrote, without paths. Raises CheckpointError for what is no whole checkpoint of ours."""
    if not is_hub_id(repo):
        raise CheckpointError(f"{repo}: expected a repository on the hub, owner/name.")
    try:
        record = without_paths(json.loads((folder / _RECORD).read_text(encoding="utf-8")))
        by, _ = record.get("files_only"), record["model"]["reference"]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: it has no {_RECORD}, as what `run` and `apply` write has.") from error
    if by:
        raise CheckpointError(f"{folder}: what {by} has left was never loaded, and is not pushed.")
    verify_files(folder)
    texts = {name: folder / name for name in ("README.md", "compressor/decision.json", "compressor/recipe.yaml")}
    found = {name: without_paths(path.read_text(encoding="utf-8")) for name, path in texts.items() if path.exists()}
    found |= {_RECORD: json.dumps(record, indent=1) + "\n", "compressor/report.html": page(record)}
    load = partial(re.sub, r'compressor\.load\("[^"]*"\)', f'compressor.load("{repo}")')
    return {name: load(text).encode() for name, text in found.items()}


def _there(repo: str, record: bytes, *, private: bool) -> list[str]:
    """The files in a repository that are not of the output with this record. Raises CheckpointError where the token may
    not write there, as far as that can be told without writing.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api, git = HfApi(), hashlib.sha1(b"blob %d\0" % len(record) + record, usedforsecurity=False)
    me = api.whoami()
    names = [me["name"], *(one["name"] for one in me.get("orgs", []) if one.get("roleInOrg") != "read")]
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise CheckpointError(f"{repo}: the token of {me['name']} may only read; take one that may write.")
    try:
        found = api.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError:
        if repo.partition("/")[0] in names:
            return []
        raise CheckpointError(f"{repo}: {me['name']} may write as {', '.join(names)} only.") from None
    api.auth_check(repo, write=True)
    if private and not found.private:
        raise CheckpointError(f"{repo}: it is there already, and public; make it private there, or name another one.")
    files = {one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id for one in found.siblings}
    is_same = files.get(_RECORD) in (git.hexdigest(), hashlib.sha256(record).hexdigest())
    return [] if is_same else [name for name in files if name != ".gitattributes"]


@contextmanager
def _errors_named(repo: str, then: str = "") -> Iterator[None]:
    """What goes wrong with the hub is one CheckpointError, which says `then` how to go on."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with network.not_waited_for() as unreachable:
            if unreachable:
                raise CheckpointError(f"{repo}: nothing can be pushed: {unreachable}.{then}")
            yield
    except (*HfHubHTTPError.__bases__, RuntimeError, ValueError) as error:  # its HTTP client's kinds, and xet's
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        root = str(error.__cause__ or error)  # it says of an upload only that it failed, and why in what caused that
        said = _REFUSALS.get(status) or root.partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{repo}: {said.rstrip('.')}.{then}") from error
