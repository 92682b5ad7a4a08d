"""Edit on disk: a smaller checkpoint from a larger one, its tensors copied in pieces, without loading the model.

    config.json ► meta_model ► method.edit ► MoEModel, its removals ─┐
    headers of the shards ► tensor_map: what becomes of each tensor ◄┘
                                │
                                ▼
    plan_edit ► Edit: every tensor copied, renamed, dropped, cut or rewritten; sizes ► checked with transformers' loader
                                │                                                      on the meta device
                                ▼
    Edit.write ► shards under their old names, index, config.json, all other files

Bytes are copied as they are, so a quantised checkpoint stays quantised. Memory does not grow with the model: only what
gets other values is read as a tensor (tables of expert ids, biases that switch experts off), and the headers.

Not covered: experts packed together in one quantised tensor.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from compressor.checkpoint.classes import model_class
from compressor.checkpoint.conversion import loading_info
from compressor.checkpoint.extra_layers import LeftOut
from compressor.checkpoint.files import INDEX
from compressor.checkpoint.find import Checkpoint, load_config
from compressor.checkpoint.headers import BITS, TORCH, first_dtype, refuse_changed
from compressor.checkpoint.layerwise_weights import StoredTensor, stored_tensors
from compressor.checkpoint.load import refuse_bad_keys, uneven_experts
from compressor.checkpoint.quantization import MODELOPT, without_quantisation
from compressor.checkpoint.save import write_beside_weights
from compressor.edit.naming import Names, renamed
from compressor.edit.safetensors_writer import Becomes, ShardEdit, TensorEdit, finish, sync_folder, write_shard
from compressor.edit.tensor_map import Fate, fates
from compressor.errors import CheckpointError, UnsupportedModelError, VerificationError
from compressor.model.adapter import Adapter, structure_of
from compressor.model.config_entry import read_entry
from compressor.model.constants import VALUE
from compressor.model.masking import relabelled
from compressor.model.moe_model import Kept, MoEModel
from compressor.model.router_probe import SWITCHED_OFF
from compressor.model.structure import ExpertAxis, MoELayer
from compressor.model.uneven import is_uneven, settle, uneven_class

_QUANTISATION_FILES = (MODELOPT, "quantize_config.json", "quant_config.json")


def meta_model(found: Checkpoint, adapters: Sequence[Adapter] = ()) -> MoEModel:
    """The checkpoint's model on the meta device, to remove from; a quantised one's as it was before. Raises
    UnsupportedModelError where the structure cannot be understood.
    """
    config = without_quantisation(load_config(found))
    cls = model_class(found, config)
    structure = structure_of(cls, config, adapters, plain=True)
    build = uneven_class(cls, config, structure) if is_uneven(config) else cls
    with torch.device("meta"):
        model = build(copy.deepcopy(config))
    if is_uneven(config):
        settle(model)
    moe = MoEModel(model.eval(), structure)
    if "skipping" in read_entry(config):
        moe.restore_skipping()
    return moe


@dataclass(frozen=True)
class Edit:
    """What a smaller checkpoint will be, known before anything is written: every file and tensor, and their sizes."""

    found: Checkpoint
    after: MoEModel
    """The smaller model, on the meta device; its config is what config.json will say."""
    shards: tuple[ShardEdit, ...]
    left_out: LeftOut | None = None
    modules: Names = field(default_factory=dict)
    """Modules by their names on disk → their names afterwards, None where they go."""

    @property
    def tensors(self) -> Mapping[str, TensorEdit]:
        """Every tensor on disk by its name now."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def bytes_before(self) -> int:
        """Bytes of the weights' files as they are."""
        return sum(edit.shard.num_bytes for edit in self.shards)

    @property
    def bytes_after(self) -> int:
        """Bytes of the weights' files as they will be."""
        return sum(edit.num_bytes for edit in self.shards)

    def num_bytes_to_write(self, *, hard_link: bool = False) -> int:
        """Bytes of weights that need room on the disk: files that are linked need none."""
        return sum(edit.num_bytes for edit in self.shards if not (hard_link and edit.unchanged))

    def write(
        self, folder: Path, *, hard_link: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> Checkpoint:
        """Write the smaller checkpoint into a folder without weights; returns it. A file appears when it is whole and
        on the disk; with `hard_link` unchanged files are linked where that can be, so neither folder may be written in
        place. `progress`: bytes done and in all. Raises CheckpointError where a source file is not as its header said,
        VerificationError where what was written is not what was planned.
        """
        done = 0
        with ThreadPoolExecutor(1) as beside:  # one file goes to the disk while the next is copied
            waiting: list[Future[None]] = []
            for edit in self.shards:
                refuse_changed(edit.shard)
                if edit.kept:
                    path = folder / edit.shard.path.relative_to(self.found.folder)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if temporary := write_shard(edit, path, hard_link=hard_link):
                        waiting.append(beside.submit(finish, temporary, path))
                done += edit.num_bytes
                if progress:
                    progress(done, self.bytes_after)
        for finished in waiting:
            finished.result()
        self._write_index(folder)
        self._write_config(folder)
        sync_folder(folder)
        written = Checkpoint(str(folder), folder, self.found.trust_remote_code)
        self._verify(written)
        return written

    def _write_index(self, folder: Path) -> None:
        source = self.found.folder / INDEX
        if not source.exists():
            return
        index = json.loads(source.read_text(encoding="utf-8"))
        metadata = dict(index.get("metadata") or {})
        metadata["total_size"] = sum(tensor.num_bytes for edit in self.shards for tensor in edit.kept)
        if "total_parameters" in metadata:
            metadata["total_parameters"] = self.after.structure.num_parameters
        weight_map = {
            tensor.new_name: edit.shard.path.relative_to(self.found.folder).as_posix()
            for edit in self.shards
            for tensor in edit.kept
        }
        index |= {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write_config(self, folder: Path) -> None:
        """config.json and all other files; lists of modules that are not quantised get the experts' new names."""
        config, source = self.after.config, self.found.folder
        counts = self.after.structure.counts_in(config)
        changes = dict(self.after.config_changes)
        if self.found.quantisation is None and (dtype := self._dtype()):
            changes["dtype"] = dtype
        write_beside_weights(source, folder, config, None, counts, self.left_out, changes)
        rename_modules(folder, self.modules, self.found.reference)

    def _dtype(self) -> str | None:
        """The dtype that transformers loads an unquantised checkpoint in: its config's, or else its first tensor's."""
        dtype = getattr(self.after.config, "dtype", None) or first_dtype([e.shard for e in self.shards])
        return None if dtype is None else str(dtype).removeprefix("torch.")

    def _verify(self, found: Checkpoint) -> None:
        written = {name: about for shard in found.shards for name, about in shard.tensors.items()}
        planned = {tensor.new_name: (tensor.dtype, tensor.new_shape) for edit in self.shards for tensor in edit.kept}
        if written != planned:
            wrong = min(name for name in written.keys() | planned if written.get(name) != planned.get(name))
            raise VerificationError(
                f"{found.folder}: {wrong} was written as {written.get(wrong)}, and was planned as {planned.get(wrong)}."
            )


def rename_modules(folder: Path, modules: Names, reference: str) -> None:
    """Give modules their new names wherever a checkpoint's JSON files speak of quantised ones. Raises
    UnsupportedModelError, with the pattern, where that cannot be.
    """
    for path in filter(Path.exists, (folder / name for name in ("config.json", *_QUANTISATION_FILES))):
        found = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "config.json":
            for holder in (found, *(value for value in found.values() if isinstance(value, dict))):
                if "quantization_config" in holder:
                    holder["quantization_config"] = renamed(holder["quantization_config"], modules, reference)
        else:
            found = renamed(found, modules, reference)
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def plan_edit(
    found: Checkpoint,
    before: MoEModel,
    after: MoEModel,
    left_out: LeftOut | None = None,
    edited: Mapping[str, StoredTensor] | None = None,
) -> Edit:
    """What becomes of every tensor when `before`, on the meta device, becomes `after`, its copy that a method has
    edited; by headers alone. `left_out`: what transformers does not build; `edited`: tensors with other numbers and all
    of `before`'s experts. Raises CheckpointError where checkpoint and config do not fit, UnsupportedModelError, naming
    the tensor, where experts cannot be taken out on disk.
    """
    return _EditPlan(found, before, after, left_out, edited or {}).edit()


class _EditPlan:
    def __init__(
        self,
        found: Checkpoint,
        before: MoEModel,
        after: MoEModel,
        left_out: LeftOut | None,
        edited: Mapping[str, StoredTensor],
    ) -> None:
        self.found, self.before, self.after, self.left_out, self.edited = found, before, after, left_out, edited
        self.shards = found.shards
        self.on_disk = {name: about for shard in self.shards for name, about in shard.tensors.items()}
        self.shard_of = {name: shard for shard in self.shards for name in shard.tensors}
        self.quantisation = found.quantisation
        self.kept = {layer.path: list(range(layer.num_experts)) for layer in before.layers}
        off: dict[str, set[int]] = {}
        for removal in after.removals:
            for path, ids in removal.kept.items():
                self.kept[path] = [self.kept[path][expert] for expert in ids]
                off.setdefault(path, set()).update(self.kept[path][new] for new in removal.switched_off.get(path, ()))
        for path, ids in after.never_chosen.items():
            off.setdefault(path, set()).update(self.kept[path][new] for new in ids)
        self.switched_off = {
            path: [new for new, expert in enumerate(self.kept[path]) if expert in gone] for path, gone in off.items()
        }

    def edit(self) -> Edit:
        self._check_before()
        self._check_dtypes()
        values = dict(self._new_values())
        edits = {name: self._tensor_edit(name, fate, values.get(name)) for name, fate in self.fates.items()}
        shards = tuple(ShardEdit(shard, in_order([edits[name] for name in shard.tensors])) for shard in self.shards)
        self._check_after(edits)
        carried = self.left_out.names if self.left_out and self.left_out.choice != "drop" else ()
        modules = modules_after([edit for name, edit in edits.items() if name not in set(carried)])
        return Edit(self.found, self.after, shards, self.left_out, modules)

    @cached_property
    def fates(self) -> dict[str, Fate]:
        shapes = {name: shape for name, (_, shape) in self.on_disk.items()}
        return fates(self.before, self.after, self.kept, shapes, quantisation=self.quantisation)

    @cached_property
    def at(self) -> dict[str, str]:
        """The model's tensor → its name on disk, where it is there as it is."""
        return {fate.target: name for name, fate in self.fates.items() if fate.target is not None}

    # against the model

    def _check_before(self) -> None:
        """What is on disk must be what the config speaks of, by transformers' own loader."""
        if self.quantisation is not None:
            return
        info = loading_info(self.before.model, self.on_disk)
        if any(info.values()):
            if why := uneven_experts(self.shards):
                raise CheckpointError(f"{self.found.reference}: {why}")
            refuse_bad_keys(self.found, info)

    def _check_after(self, edits: Mapping[str, TensorEdit]) -> None:
        """The same for what will be there, and the smaller model. Transformers' loader would make other modules for a
        quantised one: there every list must be as long as the smaller model says.
        """
        new = {edit.new_name: (edit.dtype, edit.new_shape) for edit in edits.values() if edit.becomes != "dropped"}
        if self.quantisation is not None:
            whole = {layer.path: range(layer.num_experts) for layer in self.after.layers}
            shapes = {name: shape for name, (_, shape) in new.items()}
            again = fates(self.after, self.after, whole, shapes, quantisation=self.quantisation)
            assert all(fate.name == name for name, fate in again.items())
            return
        info = loading_info(self.after.model, new)
        for kind, keys in info.items():
            if keys:
                first = min(map(str, keys))
                raise UnsupportedModelError(
                    f"{self.found.reference}: cannot be edited on disk: of the smaller checkpoint transformers would "
                    f"say that {len(keys)} {kind.replace('_', ' ')}, such as {first}."
                )

    def _check_dtypes(self) -> None:
        """Numbers where the model has numbers, ids where it has ids."""
        expected = self.before.model.state_dict()
        for target, name in self.at.items():
            dtype = TORCH.get(self.on_disk[name][0])
            if self.quantisation is None and dtype is not None and target in expected:
                wanted = expected[target].dtype
                if wanted.is_floating_point != dtype.is_floating_point:
                    raise CheckpointError(
                        f"{self.found.reference}: {name} holds {self.on_disk[name][0]}, where the model has numbers "
                        f"like {str(wanted).removeprefix('torch.')}."
                    )

    # values

    def _new_values(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Name on disk → what makes its new values: tables of expert ids, and biases that switch experts off."""
        for layer in self.before.layers:
            if self.kept[layer.path] != list(range(layer.num_experts)):
                for target in layer.id_tensors:
                    table, rows = self._stored(target), self._stored(layer.router_weights[0])
                    yield table, partial(self._relabelled, layer, table, rows)
            if off := self.switched_off.get(layer.path):
                for target in layer.selection_biases:
                    bias, axis = self._stored(target), layer.tensors[target]
                    yield bias, partial(self._with_off, layer, bias, axis, off)

    def _stored(self, target: str) -> str:
        """The name on disk of a tensor that is there as the model has it."""
        name = self.at.get(target)
        if name is None or self.on_disk[name][1] != tuple(self.before.model.state_dict()[target].shape):
            raise UnsupportedModelError(
                f"{target}: its values have to change, and on disk it is not stored as the model has it."
            )
        return name

    def _relabelled(self, layer: MoELayer, table: str, rows: str) -> Tensor:
        ids, rows_EH = self._read(table), self._read(rows)[: layer.num_experts]
        for removal in self.after.removals:
            kept = list(removal.kept[layer.path])
            ids = relabelled(ids, dataclasses.replace(layer, num_experts=len(rows_EH)), kept, rows_EH)
            rows_EH = rows_EH[kept]
        return ids

    def _with_off(self, layer: MoELayer, bias: str, axis: ExpertAxis, off: Sequence[int]) -> Tensor:
        kept = self._read(bias).index_select(axis.dim, axis.rows(self.kept[layer.path], layer.num_experts))
        return kept.index_fill_(axis.dim, torch.tensor(off), SWITCHED_OFF)

    def _cut(self, name: str, axis: ExpertAxis | None, rows: Sequence[int]) -> Tensor:
        tensor = self._read(name)
        return tensor if axis is None else tensor.index_select(axis.dim, torch.tensor(rows))

    def _read(self, name: str) -> Tensor:
        if name in self.edited:
            return self.edited[name][...]
        return stored_tensors([self.shard_of[name]])[name][...]

    # one tensor

    def _tensor_edit(self, name: str, fate: Fate, values: Callable[[], Tensor] | None) -> TensorEdit:
        edit = moved(name, *self.on_disk[name], fate, self.kept)
        dtype, new_shape = edit.dtype, edit.new_shape
        if edit.becomes == "dropped":
            return edit
        if values is None and name in self.edited:
            values = partial(self._cut, name, edit.axis, edit.rows)
        if fate.constant is not None and fate.layer is not None:
            constant = self.after.constants[fate.layer.path][fate.constant].detach()
            held = self.after.model.state_dict()[f"{fate.layer.experts}.{fate.constant}.{VALUE}"].dtype
            values, new_shape = lambda: constant.cpu().to(held).to(TORCH[dtype]), tuple(constant.shape)
        if fate.gather is not None:
            gather = fate.gather
            values, new_shape = lambda: self._read(name).flatten()[gather], tuple(gather.shape)
        if values is None:
            return edit
        return dataclasses.replace(edit, becomes="rewritten", new_shape=new_shape, values=values)


def moved(name: str, dtype: str, shape: tuple[int, ...], fate: Fate, kept: Kept) -> TensorEdit:
    """A tensor whose numbers stay as they are: dropped, copied, or cut. UnsupportedModelError: within a byte."""
    if fate.name is None:
        return TensorEdit(name, "dropped", name, dtype, shape, shape)
    becomes: Becomes = "copied" if fate.name == name else "renamed"
    if fate.axis is None or fate.layer is None:
        return TensorEdit(name, becomes, fate.name, dtype, shape, shape)
    dim, rows = fate.axis.dim, tuple(fate.axis.rows(kept[fate.layer.path], fate.layer.num_experts).tolist())
    if len(rows) == shape[dim]:
        return TensorEdit(name, becomes, fate.name, dtype, shape, shape)
    if BITS[dtype] * prod(shape[dim + 1 :]) % 8:
        raise UnsupportedModelError(f"{name}: {dtype} {list(shape)} cannot be cut between bytes.")
    new_shape = (*shape[:dim], len(rows), *shape[dim + 1 :])
    return TensorEdit(name, "cut", fate.name, dtype, shape, new_shape, fate.axis, rows)


def in_order(edits: Sequence[TensorEdit]) -> tuple[TensorEdit, ...]:
    """A file's tensors as safetensors puts them, large numbers first, so aligned; by name, if they are now."""
    if all(edit.becomes == "copied" for edit in edits):
        return tuple(edits)
    size = list(BITS).index
    by_name = sorted(edits, key=lambda edit: (-size(edit.dtype), edit.name))
    if by_name == list(edits):
        return tuple(sorted(edits, key=lambda edit: (-size(edit.dtype), edit.new_name)))
    return tuple(sorted(edits, key=lambda edit: -BITS[edit.dtype]))


def modules_after(edits: Iterable[TensorEdit]) -> Names:
    """Modules on disk → their new name, None where they go; without those that lose a part of what they hold."""
    seen: dict[str, set[str | None]] = {}
    for edit in edits:
        parts, others = edit.name.split("."), None if edit.becomes == "dropped" else edit.new_name.split(".")
        for end in range(1, len(parts)):
            new = None if others is None else ".".join(others[:end])
            seen.setdefault(".".join(parts[:end]), set()).add(new)
    return {name: next(iter(new)) for name, new in seen.items() if len(new) == 1}
