"""A pass may turn the checkpoint into another one, by code of its own (`Method.external`, `Method.train`).

The checkpoint is handed over as a folder, which must stay as it is; what is left in another one is compared with it
here, and loaded by the run, as it would be served. Refused is what anybody would stumble over: files that do not
belong together, other experts, another vocabulary, other text for the same words.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint import headers
from compressor.checkpoint.files import files_beside
from compressor.checkpoint.find import Checkpoint, load_config
from compressor.checkpoint.load import load_model, load_tokenizer, unquantised_skeleton
from compressor.checkpoint.output import OutputFolder
from compressor.checkpoint.save import save_checkpoint
from compressor.data.sequences import TokenBatch, tokenizer_fingerprint
from compressor.edit.backend import Backend
from compressor.edit.stored_matrices import StoredMatrices
from compressor.errors import CheckpointError, CompressorError, PluginError, ProgramError
from compressor.method import Decision, Method, OptionError, Training
from compressor.model.adapter import structure_of
from compressor.model.config_entry import read_entry
from compressor.model.constants import replaced_experts
from compressor.model.structure import Structure
from compressor.observe.divergence import kl_divergences
from compressor.run.job import Job


def carry_out(
    job: Job,
    piece: Backend,
    method: Method[Any],
    decision: Decision,
    probe: TokenBatch,
    folder: OutputFolder,
    target: Path,
    training: Training,
    given: Path | None,
) -> dict[str, float]:
    """Have the method write another checkpoint into `target`, unless a run before has left it there, whole; `given`:
    the model as files, where a pass before has written them. Returns what the method tells of it. Raises PluginError
    where it fails, touches what it was given, or leaves what cannot be compared.
    """
    name = f"turned {target.name}"
    noted = job.journal.noted(name) if job.journal is not None else None
    if noted is not None and _is_there(target, noted["fingerprint"]):
        return dict(noted["told"])
    stage = target.with_name(f"{target.name}.source")
    for left in (stage, target):  # by a run that was stopped
        shutil.rmtree(left, ignore_errors=True)
    if given is not None:
        source = Checkpoint(str(given), given, job.recipe.trust_remote_code)
    else:
        source = piece.stored(folder, probe, stage)
    torch.nn.Module.to(piece.model, "meta")  # its weights are not needed any more
    target.mkdir(parents=True)
    training.work.mkdir(exist_ok=True)
    if job.journal is not None and type(method).train is not Method.train:
        job.journal.note(f"begun {target.name}", {})  # what it keeps in its work folder would be lost
    method.matrices = StoredMatrices(source, piece.adapters)
    job.progress.say(f"{method.name}: turning the checkpoint into another one")
    with _left_alone(source, target.parent):
        try:
            told = dict(method.train(source.folder, target, decision, training) or {})
        except (OptionError, ProgramError):  # they get their place
            raise
        except Exception as error:  # whatever it calls may fail in any way; the run stops, naming it
            raise PluginError(f"its external step failed: {type(error).__name__}: {error}") from error
    turned = Checkpoint(str(target), target, source.trust_remote_code)
    with refused_by_name():
        refuse_files(target)
        if method.leaves_model:
            compare(source, turned, piece.moe.structure)
    if job.journal is not None and method.leaves_model:
        job.journal.note(name, {"fingerprint": headers.fingerprint(target, turned.shards), "told": told})
    for left in (stage, training.work):
        shutil.rmtree(left, ignore_errors=True)
    return told


def training(
    job: Job,
    text: tuple[Sequence[TokenBatch], Sequence[TokenBatch]],
    original: Checkpoint | None,
    device: str,
    target: Path,
) -> Training:
    """What a method that trains is given beside the checkpoint; `text`: to train on, and held-out text."""
    folder = original.folder if original is not None else None
    work = target.with_name(f"{target.name}.work")

    def loaded(folder: Path) -> Any:
        found = Checkpoint(str(folder), folder, job.recipe.trust_remote_code)
        return load_model(found, device=device, adapters=job.plugins.adapters)

    def save(model: Any, source: Path, target: Path) -> None:
        structure = structure_of(type(model), model.config, job.plugins.adapters)
        save_checkpoint(model, source, target, structure.counts_in(model.config))

    return Training(*text, folder, work, device, job.recipe.seed, job.progress, loaded, save)


def _is_there(target: Path, fingerprint: str) -> bool:
    try:
        return headers.fingerprint(target, headers.verify_files(target)) == fingerprint
    except (OSError, CheckpointError):  # it was stopped while it wrote, or while the output was put together
        return False


@contextmanager
def _left_alone(source: Checkpoint, work: Path) -> Iterator[None]:
    """Raise PluginError where a file of the checkpoint has changed; one of ours in `work` is removed then."""
    files, fingerprint = _files(source), headers.fingerprint(source.folder, source.shards)
    try:
        yield
    finally:
        is_changed = _files(source) != files or headers.fingerprint(source.folder, source.shards) != fingerprint
        if is_changed and source.folder.is_relative_to(work):
            shutil.rmtree(source.folder)
        if is_changed and isinstance(sys.exception(), Exception | None):  # also where it has failed, but for Ctrl-C
            raise PluginError(f"its external step has changed {source.folder}, which it was given to read.")


def _files(source: Checkpoint) -> list[tuple[Path, int, int]]:
    """Every file's path, size and time of its last change."""
    files = sorted(path for path in source.folder.rglob("*") if path.is_file())
    return [(path, (found := path.stat()).st_size, found.st_mtime_ns) for path in files]


@contextmanager
def refused_by_name() -> Iterator[None]:
    """What is wrong with the checkpoint that the external step has left is the plugin's fault."""
    try:
        yield
    except CompressorError as error:
        raise PluginError(f"what its external step has left is refused: {error}") from error


def refuse_files(folder: Path) -> None:
    """Raise CheckpointError where files are links, or there are none."""
    shutil.rmtree(folder / "compressor", ignore_errors=True)  # copied: it tells of another model
    if links := sorted(path.name for path in folder.rglob("*") if path.is_symlink()):
        raise CheckpointError(f"{folder}: {links[0]} is a link; files are to be there themselves.")
    if not any(path.is_file() for path in folder.rglob("*")):
        raise CheckpointError(f"{folder}: there is no file in it.")


def compare(source: Checkpoint, turned: Checkpoint, structure: Structure) -> None:
    """Raise CheckpointError unless the checkpoint is whole, with the experts and vocabulary of its source. Where it has
    no tokenizer it gets the source's, with what else lies beside the weights.
    """
    folder = turned.folder
    config, given = load_config(turned), load_config(source)
    _ = turned.shards
    if config.model_type != given.model_type:
        raise CheckpointError(f"{folder}: its model_type is {config.model_type!r}; expected {given.model_type!r}.")
    for leaf, number in structure.counts_in(given).items():
        if leaf.get(config) != number:
            raise CheckpointError(f"{folder}: its config has {leaf} = {leaf.get(config)}; expected {number}.")
    if read_entry(config) != read_entry(given):
        raise CheckpointError(
            f"{folder}: its config has lost, or changed, `compressor`, which says what layers have or skip."
        )
    if turned.quantisation is not None and "skipping" in read_entry(config):
        raise CheckpointError(f"{folder}: it is quantised, and nothing reads a quantised one that skips experts.")
    if turned.quantisation is not None and replaced_experts(config):
        raise CheckpointError(f"{folder}: it is quantised, and no reader puts constants beside quantised experts.")
    rows = [unquantised_skeleton(one).get_input_embeddings().weight.shape[0] for one in (turned, source)]
    if rows[0] != rows[1]:
        raise CheckpointError(f"{folder}: its vocabulary has {rows[0]} entries; expected {rows[1]}.")
    if not turned.has_tokenizer:
        beside = files_beside(source.folder)
        lacking = tuple(name for name in beside.carried if not (folder / name).exists())
        dataclasses.replace(beside, carried=lacking).copy(folder)
    if tokenizer_fingerprint(load_tokenizer(turned)) != tokenizer_fingerprint(load_tokenizer(source)):
        raise CheckpointError(f"{folder}: its tokenizer is another one; leave that of {source.folder}, or none.")


def difference(given_NV: Tensor, found_NV: Tensor, max_kl: float | None = None) -> dict[str, float]:
    """How far the logits are from those of the model that was handed over, relative to their norm, and as KL in nats a
    token. Raises CheckpointError where they are not finite, or their KL is larger than `max_kl`.
    """
    given, found = given_NV.cpu().double(), found_NV.cpu().double()
    if not torch.isfinite(found).all():
        raise CheckpointError("it answers NaN or infinity to calibration text.")
    kl = float(kl_divergences(given, found).mean())
    if max_kl is not None and kl > max_kl:
        raise CheckpointError(
            f"its answers are {kl:.3g} nats a token from those of the checkpoint that went in; expected at most "
            f"{max_kl:g} (`max_kl`)."
        )
    relative = float((found - given).norm() / given.norm().clamp_min(1e-30))
    return {"external_difference": relative, "external_kl": kl}
