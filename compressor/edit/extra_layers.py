"""Extra prediction layers (multi-token prediction, next-n heads) carried over to a smaller checkpoint, file to file.

transformers does not build them, so no text reaches them here: experts stay by the norms of their router's rows, how
far their logits can stand out (Chowdhury et al. 2024, arXiv 2405.16646, prune by its change). The model verifies
drafts, so what these layers lose costs speed and no answer. Engines take their number of experts from the decoder's.

An extra layer's tensors go by what becomes of those of the same name in a decoder layer (`tensor_map`).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.conversion import Conversion
from compressor.checkpoint.extra_layers import LeftOut
from compressor.checkpoint.files import INDEX, SINGLE, read_index
from compressor.checkpoint.headers import read_header, refuse_changed, verify_files
from compressor.checkpoint.layerwise_weights import stored_tensors
from compressor.edit.checkpoint_edit import in_order, meta_model, modules_after, moved, rename_modules
from compressor.edit.safetensors_writer import ShardEdit, TensorEdit, finish, write_shard
from compressor.edit.tensor_map import Fate, fates
from compressor.errors import UnsupportedModelError
from compressor.model.adapter import Adapter
from compressor.model.structure import MoELayer

_EXPERTS = re.compile(r"\.experts\.")


@dataclass(frozen=True)
class ExtraLayers:
    """What an output gets beside the model's own weights: known, and refused, before anything is written."""

    left_out: LeftOut
    shards: Sequence[ShardEdit]
    kept: Mapping[str, Sequence[int]]
    """Extra layer → its experts that stay, where they are pruned."""

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor that stays."""
        return [edit.num_bytes for shard in self.shards for edit in shard.kept]

    def write(self, folder: Path) -> dict[str, Any]:
        """Add them to a checkpoint that was written without them, as files of their own that its index names; what the
        record says of them.
        """
        path, left_out = folder / INDEX, self.left_out
        weight_map = read_index(folder) or dict.fromkeys(read_header(folder / SINGLE).tensors, SINGLE)
        metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"] if path.exists() else {}
        for number, shard in enumerate(self.shards, start=1):
            refuse_changed(shard.shard)
            name = f"model_mtp-{number:05}-of-{len(self.shards):05}.safetensors"
            if temporary := write_shard(shard, folder / name, hard_link=False):
                finish(temporary, folder / name)
            weight_map |= {tensor.new_name: name for tensor in shard.kept}
        headers = [read_header(folder / name) for name in sorted({*weight_map.values()})]
        metadata["total_size"] = sum(sum(header.sizes.values()) for header in headers)
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        edits = {edit.name: edit for shard in self.shards for edit in shard.tensors}
        rename_modules(folder, modules_after([edits[name] for name in left_out.names]), left_out.found.reference)
        verify_files(folder)
        about: dict[str, Any] = {"choice": left_out.choice, "layers": [*left_out.layers]}
        about |= {"tensors": len(self.sizes), "bytes": sum(self.sizes)}
        return about | ({"kept": self.kept} if self.kept else {})


def plan_extra_layers(
    left_out: LeftOut | None, before: Sequence[MoELayer], after: Sequence[MoELayer], adapters: Sequence[Adapter] = ()
) -> ExtraLayers | None:
    """What becomes of a checkpoint's extra layers beside a smaller model with the MoE layers `after`; None where they
    are dropped. Raises UnsupportedModelError where they could not be read beside it, or cannot be pruned.
    """
    if left_out is None or left_out.choice == "drop":
        return None
    if why := uneven_problem(before) or uneven_problem(after):
        raise _refused(left_out, why)
    shards, kept = left_out.found.shards, dict[str, list[int]]()
    stored = {name: about for shard in shards for name, about in shard.tensors.items()}
    edits = {name: TensorEdit(name, "dropped", name, *about, about[1]) for name, about in stored.items()}
    edits |= {name: moved(name, *stored[name], Fate(name), {}) for name in left_out.names}
    num_experts, num_kept = before[0].num_experts, after[0].num_experts
    if num_kept < num_experts and any(map(_EXPERTS.search, left_out.names)):
        if left_out.choice == "keep":
            numbers = f"they have {num_experts} experts, the smaller model will have {num_kept}, and engines read one"
            raise _refused(left_out, f"{numbers} number for both; say `mtp: prune` or `mtp: drop`")
        kept, pruned = _pruned(left_out, num_kept, adapters)
        edits |= pruned
    own = [shard for shard in shards if not shard.tensors.keys().isdisjoint(left_out.names)]
    return ExtraLayers(left_out, [ShardEdit(one, in_order([edits[name] for name in one.tensors])) for one in own], kept)


def uneven_problem(layers: Sequence[MoELayer]) -> str | None:
    """Why extra layers cannot stand beside a model with these MoE layers; None where they can."""
    counts = {layer.num_experts for layer in layers}
    why = (
        f"layers have {min(counts)} to {max(counts)} experts, and nothing that reads such a model runs extra prediction"
    )
    return f"{why} layers; keep equally many in every layer, or say `mtp: drop`" if len(counts) > 1 else None


def _refused(left_out: LeftOut, why: str) -> UnsupportedModelError:
    layers = ", ".join(left_out.layers)
    return UnsupportedModelError(f"{left_out.found.reference}: its extra prediction layers, {layers}: {why}.")


def _pruned(
    left_out: LeftOut, num_kept: int, adapters: Sequence[Adapter]
) -> tuple[dict[str, list[int]], dict[str, TensorEdit]]:
    """(each extra layer → its experts that stay, what becomes of the tensors in its MoE block)"""
    before, on_disk = meta_model(left_out.found, adapters), stored_tensors(left_out.found.shards)
    conversion = Conversion(before.model)
    layer = next((one for one in reversed(before.layers) if not one.id_tensors), before.layers[0])
    routers = [name for name in on_disk if conversion.rename(name)[0] == layer.router_weights[0]]
    path, number, tail = next(iter(routers), "").partition(f".{layer.number}.")
    path += number[:-1]  # of the decoder layer that they are like, in files, and then its router's
    kept = {}
    expected = before.model.state_dict()[layer.router_weights[0]].shape
    for name in (name for name in left_out.names if tail and name.endswith(f".{tail}")):
        stored = on_disk[name]
        if stored.shape != expected or stored.dtype not in ("F32", "BF16", "F16"):
            is_, wanted = f"{stored.dtype} {list(stored.shape)}", f"a router in numbers, {list(expected)}"
            raise _refused(left_out, f"{name} is {is_}, expected {wanted}")
        kept[name.removesuffix(f".{tail}")] = _with_longest_rows(stored[...], layer, num_kept)
    inside = tuple(f"{prefix}." for prefix in kept)
    if lost := next((name for name in left_out.names if _EXPERTS.search(name) and not name.startswith(inside)), None):
        raise _refused(left_out, f"{lost} is an expert's, and no router is called {tail or 'as in a decoder layer'}")
    after, edits = copy.deepcopy(before), {}
    after.keep({one.path: next(iter(kept.values())) for one in after.layers})
    for prefix, ids in kept.items():
        alike = {path + name.removeprefix(prefix): name for name in left_out.names if name.startswith(f"{prefix}.")}
        block = [name for name in alike if layer.holds(conversion.rename(name)[0])]
        of_layers = {one.path: ids for one in before.layers}
        shapes = {name: on_disk[alike[name]].shape for name in block}
        for name, fate in fates(before, after, of_layers, shapes, quantisation=left_out.found.quantisation).items():
            own = None if fate.name is None else prefix + fate.name.removeprefix(path)
            dtype = on_disk[alike[name]].dtype
            edits[alike[name]] = moved(alike[name], dtype, shapes[name], replace(fate, name=own), of_layers)
    return kept, edits


def _with_longest_rows(rows: Tensor, layer: MoELayer, num_kept: int) -> list[int]:
    """The experts whose rows of a router are longest, equally many of every group."""
    rows_EH = rows.float().movedim(layer.tensors[layer.router_weights[0]].dim, 0).flatten(1)[: layer.num_experts]
    norms_GE = rows_EH.norm(dim=1).reshape(layer.num_groups, -1)
    best_GK = norms_GE.sort(dim=1, descending=True, stable=True).indices[:, : num_kept // layer.num_groups]
    first_G1 = torch.arange(layer.num_groups)[:, None] * norms_GE.shape[1]
    return sorted((first_G1 + best_GK).flatten().tolist())
