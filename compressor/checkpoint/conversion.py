"""What transformers' loader makes of the tensors on disk (other names, other shapes, several stacked in one), and back.

No function of transformers called here is a documented interface, and no other file calls them. `testing.checks` holds
on every architecture that what is read so, and what is edited on disk, is what `from_pretrained` gives, to the bit.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.headers import TORCH
from compressor.checkpoint.quiet import quiet_transformers
from compressor.errors import CheckpointError
from compressor.model.constants import VALUE, constant_experts
from compressor.model.modules import tensor_at
from compressor.model.structure import MoELayer


class Conversion:
    """Between a checkpoint and a model, on the meta device or not; `quantiser` dequantises what is read."""

    def __init__(self, model: Any, quantiser: Any = None) -> None:
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._model, self._quantiser = model, quantiser
        self.tensors: dict[str, Tensor] = model.state_dict()
        self._steps = get_model_conversion_mapping(model, hf_quantizer=quantiser)
        self._renamings = [step for step in self._steps if isinstance(step, loading.WeightRenaming)]
        self._converters = [step for step in self._steps if isinstance(step, loading.WeightConverter)]
        self._by_pattern = {pattern: step for step in self._converters for pattern in step.source_patterns}

    def rename(self, name: str) -> tuple[str, str | None]:
        """(the model's tensor that one on disk becomes, or the first of those that it is a part of; the converter's
        pattern that fits, None where it stays as it is). The model need not have a tensor of that name.
        """
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self.tensors)
        if renamed not in self.tensors and name in self.tensors:
            renamed, pattern = rename_source_key(name, [], [], prefix, self.tensors)
        return renamed, pattern

    def ignored(self, names: Iterable[str]) -> set[str]:
        """Those of the names on disk that are nothing of the model, and that its class says may be ignored."""
        renamed = {name: self.rename(name)[0] for name in names}
        unknown = set(renamed.values()) - self.tensors.keys()
        info = SimpleNamespace(missing_keys=set(), unexpected_keys=unknown)
        self._model._adjust_missing_and_unexpected_keys(info)
        return {name for name, new in renamed.items() if new in unknown - info.unexpected_keys}

    def targets(self, first: str, pattern: str) -> list[str]:
        """All tensors of the model that a converter makes together with its first one."""
        patterns = self._by_pattern[pattern].target_patterns
        return [first.replace(patterns[0], other, 1) for other in patterns]

    def convert(self, first: str, sources: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """The model's tensors from what is on disk: pattern → tensors in the order of their names."""
        converter = copy.deepcopy(self._by_pattern[next(iter(sources))])
        for pattern, tensors in sources.items():
            for tensor in tensors:
                converter.add_tensor(first, first, pattern, tensor)
        made = converter.convert(first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def load(self, tensors: Mapping[str, Any], device: str) -> None:
        """Give tensors on disk to the model, on a device. Raises CheckpointError where some cannot be converted."""
        info = self._load(tensors, device)
        problems = [*info.conversion_errors.values(), *info.error_msgs, *map(str, info.mismatched_keys)]
        if problems:
            raise CheckpointError(f"{self._model.config._name_or_path}: cannot be converted: {problems[0]}")

    def _load(self, tensors: Mapping[str, Any], device: str) -> Any:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(
            device_map={"": device}, dtype=self._model.dtype, weight_mapping=self._steps, hf_quantizer=self._quantiser
        )
        before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # one tensor of the model after another
        try:
            with quiet_transformers():
                info, _ = convert_and_load_state_dict_in_model(self._model, tensors, config, None)
        finally:
            if before is None:
                del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
            else:
                os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before
        return info

    def as_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model, into which some were loaded, as files have them: name on disk → tensor."""
        return as_stored(self._model, tensors)


def as_stored(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, of a model that is not read into."""
    from transformers.core_model_loading import revert_weight_conversion

    with quiet_transformers():
        return dict(revert_weight_conversion(model, tensors))


def is_by_expert(model: Any, layer: MoELayer) -> bool:
    """Whether files hold each expert of a layer in tensors of its own, beside which a constant can stand."""
    prefix = stored_prefix(model, layer.experts)
    own = layer.experts_tensors.items()  # of the first expert: the others are stored like it
    names = as_stored(model, {name: tensor_at(model, name).narrow(axis.dim, 0, axis.stride) for name, axis in own})
    return all(name.startswith(prefix) and name[len(prefix) :].partition(".")[0].isdecimal() for name in names)


def stored_prefix(model: Any, experts: str) -> str:
    """What the names of a module's experts begin with in files, up to their numbers."""
    [name] = as_stored(model, {f"{experts}.0.{VALUE}": torch.empty(0)})
    return name.removesuffix(f"0.{VALUE}")


def wrong_experts(model: Any, names: Iterable[str]) -> str | None:
    """Which experts have weights on disk where the config says others, in a model whose experts answer constants:
    transformers' loader takes them in their order, whatever their numbers.
    """
    if not (there := constant_experts(model)):
        return None
    conversion = Conversion(model)
    found: dict[str, set[int]] = {path: set() for path in there}
    for name in names:
        target, pattern = conversion.rename(name)
        module = target.rpartition(".")[0]
        if pattern is not None and module in found:
            found[module].add(next(int(part) for part in reversed(name.split(".")) if part.isdecimal()))
    for path, ids in found.items():
        if ids != set(there[path].kept):
            return f"{path}: by config.json experts {list(there[path].kept)} have weights, found {sorted(ids)}"
    return None


def tensors_to_save(model: Any) -> dict[str, Tensor]:
    """All tensors of a model as its files have them, what is tied once; for `save_pretrained` without conversion. An
    expert keeps its number where others answer constants.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = model._keys_to_ignore_on_save or ()
    held = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    found = as_stored(model, remove_tied_weights_from_state_dict(held, model))
    for path, ours in constant_experts(model).items():
        prefix = stored_prefix(model, path)
        places = {f"{prefix}{place}": f"{prefix}{expert}" for place, expert in enumerate(ours.kept)}

        def renamed(name: str) -> str:
            head, _, leaf = name.removeprefix(prefix).partition(".")  # noqa: B023 - called within the loop
            is_own = name.startswith(prefix) and head.isdecimal() and leaf != VALUE  # noqa: B023
            return f"{places[prefix + head]}.{leaf}" if is_own else name  # noqa: B023

        found = {renamed(name): tensor for name, tensor in found.items()}
    return found


def loading_info(model: Any, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, set[Any]]:
    """What transformers' own loader says to tensors of these dtypes (safetensors' names) and shapes: keys missing,
    mismatched and unexpected. The model is on the meta device, and stays as it is.
    """
    shared: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        shared.setdefault(id(tensor), []).append(name)
    on_meta = {
        name: torch.empty(shape, dtype=TORCH.get(dtype, torch.uint8), device="meta")
        for name, (dtype, shape) in tensors.items()
    }
    info = Conversion(copy.deepcopy(model))._load(on_meta, "meta")
    for names in shared.values():
        if not set(names) <= info.missing_keys:
            info.missing_keys -= set(names)
    model._adjust_missing_and_unexpected_keys(info)
    return {
        "missing_keys": {*info.missing_keys, *info.conversion_errors},
        "mismatched_keys": info.mismatched_keys,
        "unexpected_keys": info.unexpected_keys,
    }


def in_loading_order(names: Iterable[str]) -> list[str]:
    """Names on disk in the order in which transformers' loader takes them: numbers in them as numbers."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)


def make_buffers(model: Any) -> None:
    """Give a skeleton on the meta device its computed buffers (rotary frequencies), on the CPU."""
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    model._move_missing_keys_from_meta_to_device(set(), None, None, None)
    model._initialize_missing_keys(False)
