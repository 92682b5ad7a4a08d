"""Checkpoints whose weights are stored in fewer bits.

    observe, measure    as the numbers that the stored weights stand for: transformers' own loader dequantises each
                        tensor when it is read, one decoder layer at a time (`layerwise_weights`)
    edit                as they are stored (`checkpoint_edit`): nothing is dequantised, so nothing is quantised anew
    measure alone       the same numbers, in memory too; what cannot be read so as transformers' quantiser loads it

So a quantised checkpoint goes in, and a smaller one of the same format comes out. Which formats can be read is
transformers' to say: those with a load operation that dequantises (FP8; MXFP4; compressed-tensors, with its package).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from compressor.errors import UnsupportedModelError

_KEY = "quantization_config"
MODELOPT = "hf_quant_config.json"
"""Where modelopt says it too; its first releases only there."""


def quantisation_of(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a config.json says of quantisation, its own or a part's; None for a checkpoint that is not quantised."""
    for holder in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        if isinstance(found := holder.get(_KEY), dict):
            return found
    return None


def format_of(quantisation: Mapping[str, Any]) -> str:
    return str(quantisation.get("quant_method", "a format without a name"))


def without_quantisation(config: Any) -> Any:
    """The config, in place, as that of a model whose weights are numbers."""
    for holder in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if getattr(holder, _KEY, None) is not None:
            delattr(holder, _KEY)
    return config


def to_dequantise(config: Any, quantisation: Mapping[str, Any]) -> Any:
    """The config, in place, with which transformers' loader gives the numbers that the stored weights stand for."""
    setattr(without_quantisation(config), _KEY, {**quantisation, "dequantize": True})
    return config


def quantiser(quantisation: Mapping[str, Any], reference: str) -> Any:
    """Transformers' object that loads it dequantised. UnsupportedModelError, naming the format, where none can."""
    if why := reading_problem(quantisation):
        raise refusal(quantisation, reference, why)
    return _quantiser({**quantisation, "dequantize": True}, None)


def reading_problem(quantisation: Mapping[str, Any]) -> str | None:
    """Why the weights of such a checkpoint cannot be read as numbers; None where they can."""
    return (
        _missing(quantisation)
        or _packed_only(quantisation.get("quant_method"))
        or global_scale_problem(quantisation)
        or _problem({**quantisation, "dequantize": True}, None)
    )


def loading_problem(quantisation: Mapping[str, Any], device: str) -> str | None:
    """Why transformers cannot load such a checkpoint as it is on this machine, in its words; None where it can."""
    return _missing(quantisation) or _problem(quantisation, {"": device})


def _quantiser(quantisation: Mapping[str, Any], device_map: dict[str, str] | None) -> Any:
    from transformers.quantizers import AutoHfQuantizer

    found: Any = AutoHfQuantizer.from_config(dict(quantisation), pre_quantized=True)
    found.validate_environment(device_map=device_map)
    return found


def _problem(quantisation: Mapping[str, Any], device_map: dict[str, str] | None) -> str | None:
    try:
        _quantiser(quantisation, device_map)
    except Exception as error:  # many kinds: a package that is missing, options it does not know
        return str(error).strip().rstrip(".")
    return None


def _missing(quantisation: Mapping[str, Any]) -> str | None:
    """That the package of a format is not here which our extra brings; transformers would name its own ways."""
    if quantisation.get("quant_method") != "compressed-tensors" or find_spec("compressed_tensors"):
        return None
    return 'the package compressed-tensors is missing (`pip install "moe-compressor[quantised]"`)'


def global_scale_problem(quantisation: Mapping[str, Any]) -> str | None:
    """Why NVFP4's experts cannot be dequantised: transformers 5.24 leaves their global scale out, without a word."""
    groups = quantisation.get("config_groups") or {}
    weights = [group.get("weights") or {} for group in groups.values() if isinstance(group, dict)]
    if not any(one.get("strategy") == "tensor_group" for one in weights):
        return None
    return "transformers dequantises experts in NVFP4 without their global scale"


def refusal(quantisation: Mapping[str, Any], reference: str, why: str) -> UnsupportedModelError:
    """The error for a checkpoint that cannot be dequantised, with what helps."""
    return UnsupportedModelError(
        f"{reference}: the checkpoint is quantised ({format_of(quantisation)}), and its weights cannot be read as "
        f"numbers: {why}. {what_helps(quantisation, reference)}"
    )


def what_helps(quantisation: Mapping[str, Any], reference: str) -> str:
    """How to a smaller checkpoint of a format that cannot be read, in one sentence."""
    if quantisation.get("quant_method") == "torchao":
        return "Prune the unquantised model, then quantise the result; `compressor evaluate` measures both."
    return (
        f"Decide on the unquantised model, then apply the decision to this one, which keeps its format: `compressor "
        f"apply RUN/compressor/decision.json {reference} --other-model`."
    )


def _packed_only(name: object) -> str | None:
    """Why transformers' loader cannot dequantise a format; None if it can."""
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    known = {"bitsandbytes" if key.startswith("bitsandbytes_") else key for key in AUTO_QUANTIZER_MAPPING}
    if name not in known:
        return "transformers does not know this format"
    cls = AUTO_QUANTIZER_MAPPING.get(name, object)
    if not hasattr(HfQuantizer, "get_load_operations"):
        return "that needs transformers 5.23 or newer"
    try:
        operations = cls.get_load_operations(cls.__new__(cls))  # without its package, which may not be here
    except Exception:  # it needs the package even to say so, or never says so
        operations = {}
    return None if "dequantize" in operations else "transformers reads this format in its packed form only"
