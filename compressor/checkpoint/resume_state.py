"""What a run has done so far, kept so that it can go on after anything: a kill, a power cut, a full disk, Ctrl-C.

    run.json                      what the run is about; compared when it goes on
    NAME.json                     something measured, by name
    PASS/LAYER.safetensors        the figures of a layer that is done
    PASS/done.json                all layers are, and which of them have figures
    PASS/streams-RANK-UNIT/       where the calibration text stands before a decoder layer: what those before it have
                                  put out last, a file a batch, and standing.json when all are there

Every file is written beside its name, forced to the disk and renamed, so it is whole or not there. One that cannot be
read all the same is named, and what it held is done again; only without run.json there is no going on.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from compressor.checkpoint.atomic_files import force_to_disk, put_in_place, with_own_memory, write_json
from compressor.errors import CheckpointError

_ABOUT = "run.json"
_DONE = "done.json"
_STANDING = "standing.json"
_T = TypeVar("_T")
Say = Callable[[str], None]


def _nothing(text: str) -> None:
    """Says nothing."""


class Journal:
    """The journal of a run, in a folder of its own. `about`: the run, as JSON; `say` is told of unreadable files."""

    def __init__(self, folder: Path, about: Mapping[str, Any] | None = None, say: Say = _nothing) -> None:
        self.folder = folder
        self.about: Any = json.loads(json.dumps(about or {}))
        self._say = cache(say)  # a file may be read twice; its damage is said once

    @property
    def has_work(self) -> bool:
        """Whether a layer's figures, or anything measured, would be lost with it."""
        return any(path.name != _ABOUT for path in self.folder.rglob("*") if path.suffix in (".json", ".safetensors"))

    def begin(self) -> None:
        """Start anew."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_json(self.folder / _ABOUT, self.about)

    def go_on(self) -> None:
        """Resume where a run stopped. Raises CheckpointError where it was about something else, naming what."""
        path = self.folder / _ABOUT
        try:
            before = _read_json(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"the run cannot go on: {path} cannot be read: {error}. Put it back, or start anew with --overwrite."
            ) from error
        differences = list(_differences(before, self.about))
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise CheckpointError(
                f"the run cannot go on: {'; '.join(differences[:3])}{more}. Set it back, or say --overwrite."
            )

    def note(self, name: str, value: Any) -> None:
        """Keep something measured, as JSON."""
        write_json(self.folder / f"{name}.json", value)

    def noted(self, name: str) -> Any | None:
        """What was noted under a name; None if nothing was, or it cannot be read."""
        return _unless_damaged(_read_json, self.folder / f"{name}.json", self._say)

    def observation(self, name: str, rank: int = 0) -> ObservationJournal:
        """The part for one walk through the layers, for one of several processes."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return ObservationJournal(folder, rank, json.dumps(self.about, sort_keys=True), self._say)


@dataclass(frozen=True)
class Standing:
    """Where a batch stands before a decoder layer. `outputs`: of each module list's last layer run, by path, an array
    of tensors and their arrangement (see `flatten`); `digest`: of the arguments for the next layer.
    """

    outputs: Mapping[str, tuple[Any, Sequence[Tensor]]]
    digest: str


@dataclass(frozen=True)
class Snapshot:
    """Where all batches stand: before `unit`, through `passed`; `figures`: the MoE layers with figures by then."""

    unit: str
    passed: Sequence[str]
    num_batches: int
    figures: Sequence[str]


class ObservationJournal:
    """What one walk through the layers has done; the first process keeps figures, each where its batches stand."""

    def __init__(self, folder: Path, rank: int = 0, about: str = "", say: Say = _nothing) -> None:
        self.folder, self.rank, self._say = folder, rank, say
        self.run = f"{zlib.crc32(about.encode()):08x}"

    def figures(self, layer: str) -> dict[str, Tensor] | None:
        """The figures of a layer that is done; None of others, and where they cannot be read."""
        found = _unless_damaged(_load, self._layer(layer), self._say)
        return None if found is None else found[0]

    def _all_there(self, layers: Iterable[str]) -> bool:
        """Whether the figures of all these layers can be read, as far as this process has them."""
        return self.rank > 0 or all(self.figures(layer) is not None for layer in layers)

    def put(self, layer: str, figures: Mapping[str, Tensor]) -> None:
        """A layer is done."""
        _save(self._layer(layer), figures, {})

    def _layer(self, layer: str) -> Path:
        return self.folder / f"{layer}.safetensors"

    def put_streams(
        self, unit: str, passed: Sequence[str], standing: Iterable[Standing], figures: Sequence[str]
    ) -> None:
        """Where the batches stand now; they are looked at one after another. `figures` as in Snapshot."""
        folder = self._streams(unit)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        count = 0
        for number, one in enumerate(standing):
            trees = {path: [tree, len(held)] for path, (tree, held) in one.outputs.items()}
            tensors = {
                f"{path}/{place}": tensor
                for path, (_, held) in one.outputs.items()
                for place, tensor in enumerate(held)
            }
            header = {"outputs": trees, "digest": one.digest}
            _save(folder / f"{number}.safetensors", tensors, header, at_once=False)
            count = number + 1
        for path in folder.iterdir():  # together: one after another takes many times as long
            force_to_disk(path)
        about = {"run": self.run, "unit": unit, "passed": list(passed), "num_batches": count, "figures": list(figures)}
        write_json(folder / _STANDING, about)

    def _streams(self, unit: str) -> Path:
        return self.folder / f"streams-{self.rank}-{unit}"

    def snapshots(self) -> dict[str, Snapshot]:
        """Decoder layers before which all batches have stood, in order, and behind which no figures are missing."""
        found = [
            _unless_damaged(self._snapshot, path, self._say)
            for path in sorted(self.folder.glob(f"streams-{self.rank}-*/{_STANDING}"))
        ]
        usable = [one for one in found if one is not None and self._all_there(one.figures)]
        return {one.unit: one for one in sorted(usable, key=lambda one: len(one.passed))}

    def _snapshot(self, path: Path) -> Snapshot | None:
        about = _read_json(path)
        if about["run"] != self.run:  # each machine may have a disk of its own, and on it the work of other runs
            return None
        return Snapshot(about["unit"], about["passed"], about["num_batches"], about["figures"])

    def standing(self, unit: str, number: int) -> Standing | None:
        """Where one batch stood before a layer, None if that cannot be read. Tensors are on the CPU."""
        return _unless_damaged(_read_standing, self._streams(unit) / f"{number}.safetensors", self._say)

    def forget_streams(self, *, but: str | None = None) -> None:
        """Where the batches stood is of no use any more, but for one layer."""
        for path in self.folder.glob(f"streams-{self.rank}-*"):
            if but is None or path != self._streams(but):
                shutil.rmtree(path, ignore_errors=True)

    @property
    def is_done(self) -> bool:
        """Whether the walk has come to its end, and all that it has found can be read."""
        done = _unless_damaged(_read_json, self.folder / _DONE, self._say)
        return done is not None and self._all_there(done.get("figures", ()))

    def close(self, figures: Sequence[str], *, first: bool = True) -> None:
        """The walk has come to its end, with figures of these layers; the first process says so."""
        if first:
            write_json(self.folder / _DONE, {"figures": list(figures)})
        self.forget_streams()


# Arguments and outputs as tensors and JSON -----------------------------------------------------------------


class NotPlainError(TypeError):
    """A value is no arrangement of tensors that could be written down."""


def flatten(value: Any) -> tuple[Any, list[Tensor]]:
    """(arrangement as JSON, tensors) of tensors in tuples, lists and dictionaries. Raises NotPlainError for others."""
    leaves, spec = pytree.tree_flatten(value, is_leaf=lambda part: type(part) not in (tuple, list, dict))
    for leaf in leaves:
        if not isinstance(leaf, Tensor | bool | int | float | str | None):
            raise NotPlainError(f"{type(leaf).__name__} cannot be written down")
    inside = [{"device": str(leaf.device)} if isinstance(leaf, Tensor) else {"value": leaf} for leaf in leaves]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return {"spec": pytree.treespec_dumps(spec), "leaves": inside}, tensors


def unflatten(tree: Any, tensors: Sequence[Tensor]) -> Any:
    given = iter(tensors)
    leaves = [one["value"] if "value" in one else next(given).to(one["device"]) for one in tree["leaves"]]
    return pytree.tree_unflatten(leaves, pytree.treespec_loads(tree["spec"]))


def digest(value: Any) -> str:
    """Tells arguments of a forward apart, by all tensors that can be found in them."""
    found = 0
    for tensor in tensors_in(value, depth=4):
        held = tensor.detach().cpu().contiguous()
        found = zlib.crc32(str((tuple(held.shape), held.dtype)).encode(), found)
        if held.numel():
            found = zlib.crc32(held.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


# Files -----------------------------------------------------------------------------------------------------


def _save(path: Path, tensors: Mapping[str, Tensor], header: Any, *, at_once: bool = True) -> None:
    temporary = path.with_name(path.name + ".partial")
    held = {name: with_own_memory(tensor.detach().cpu()) for name, tensor in sorted(tensors.items())}
    safetensors.torch.save_file(held, temporary, metadata={"header": json.dumps(header)})
    if at_once:
        put_in_place(temporary, path)
    else:
        temporary.replace(path)


def _unless_damaged(read: Callable[[Path], _T], path: Path, say: Say) -> _T | None:
    """What a file holds; None where it is not there, or cannot be read, which is said."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        say(f"{path}: this part of the journal is damaged, and what it held is done again: {error}")
        return None


def _read_json(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object, found {type(data).__name__}")
    return data


def _load(path: Path) -> tuple[dict[str, Tensor], Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})["header"])
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (no mapping)


def _read_standing(path: Path) -> Standing:
    tensors, header = _load(path)
    outputs = {
        name: (tree, [tensors[f"{name}/{place}"] for place in range(count)])
        for name, (tree, count) in header["outputs"].items()
    }
    return Standing(outputs, header["digest"])


def _differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            inside = f"{path}.{key}" if path else key
            if key not in before or key not in now:
                yield f"{inside} was {before.get(key, 'not there')}, is {now.get(key, 'not there')}"
            else:
                yield from _differences(before[key], now[key], inside)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from _differences(one, other, f"{path}.{number}")
    elif before != now:
        yield f"{path} was {before!r}, is {now!r}"


def tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    """All tensors in tuples, lists and dictionaries, some levels deep."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, tuple | list):
        for one in value:
            yield from tensors_in(one, depth - 1)
    elif depth and isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one, depth - 1)
