"""Models of the hub, in its local cache: everything but weights first, and of the weights those that are read.

All of a model comes from one commit: the one that its small files were found at.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from compressor.checkpoint.files import SINGLE, WEIGHTS, names_of_weights, read_index
from compressor.errors import CheckpointError
from compressor.machine import network


def download_side_files(repository: str) -> Path:
    """The folder of the hub's cache with all of a model's files but weights. Raises CheckpointError."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _errors_named(repository):
        try:
            return Path(snapshot_download(repository, ignore_patterns=list(WEIGHTS)))
        except LocalEntryNotFoundError:  # no network, and not all of it is here: what is may do
            config = try_to_load_from_cache(repository, "config.json")
            if not isinstance(config, str):
                raise
            return Path(config).parent


def download_weights(repository: str, folder: Path) -> None:
    """Have the weights that are read in `folder`, of its commit. Raises CheckpointError where that cannot be."""
    from huggingface_hub import snapshot_download

    if not (missing := missing_weights(repository, folder)):
        return
    with _errors_named(repository):
        snapshot_download(repository, revision=folder.name, allow_patterns=[glob.escape(name) for name in missing])
    _refuse([name for name in missing if not (folder / name).exists()], repository, "are not in the hub's local cache")


def missing_weights(repository: str, folder: Path) -> list[str]:
    """Files of weights to download. Raises CheckpointError where the hub answers and has none that can be read."""
    weight_map = read_index(folder)
    wanted = sorted(set(weight_map.values())) if weight_map else [SINGLE]
    missing = [name for name in wanted if not (folder / name).exists()]
    there = _listing(repository, folder.name) if missing else None
    if there is not None:
        missing = names_of_weights(there, weight_map, repository)
        _refuse([name for name in missing if name not in there], repository, "are not on the hub")
    return missing


def _refuse(names: Sequence[str], repository: str, where: str) -> None:
    if names:
        raise CheckpointError(f"{repository}: {len(names)} file(s) of weights {where}: {', '.join(names[:3])}.")


def _listing(repository: str, commit: str) -> set[str] | None:
    """The names of all files of a commit; None where the hub does not answer, and its cache has to do."""
    from huggingface_hub import HfApi

    try:
        with network.not_waited_for():
            return set(HfApi().list_repo_files(repository, revision=commit))
    except Exception:  # its HTTP client's own kinds, another client's in another version
        return None


@contextmanager
def _errors_named(repository: str) -> Iterator[None]:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    here, unreachable = Path(repository).absolute(), None
    try:
        with network.not_waited_for() as unreachable:
            yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository}: access is gated; accept its licence on the hub and log in first."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: there is no folder {here}, and there is no such model on the hub, or it is private."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{repository}: there is no folder {here}, it is not in the hub's cache, and the hub cannot be reached "
            f"({unreachable or type(error).__name__}). Download it where there is a network, and give its folder."
        ) from error
