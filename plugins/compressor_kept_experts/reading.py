"""Files of other tools → the experts that stay, or a figure for each. Nothing is ever unpickled.

What is read was found in the tools' own sources, as the README says. Dimensions: L layers, E experts, K chosen, T
tokens, X experts or chosen.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from compressor.plugin import MoELayer

V = TypeVar("V")
Array = np.ndarray[Any, Any]

KEPT = (
    "kept",
    "keep",
    "kept_experts",
    "kept_expert_ids",
    "retained",
    "retained_experts",
    "retained_expert_ids",
    "survivors",
)
DROPPED = ("dropped", "pruned", "pruned_experts", "pruned_expert_ids", "removed")
MEANINGS = {**dict.fromkeys(KEPT, "kept"), **dict.fromkeys(DROPPED, "dropped")}
LAYERS = ("layers", "selection", "per_layer")
"""What may stand around the layers and says nothing of the ids."""
NAMES = ("layer", "layer_idx", "path")
COUNTED = ("original_expert_count", "num_experts")
MODELS = ("model", "base_model", "model_id", "model_name")
ARRAYS = ("logical_count", "routed_experts")
MOST = 1e300
"""Of a figure."""
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin")


class UnfitFileError(ValueError):
    """Why a file cannot be read, or is not of these layers; its name comes before, a full stop behind."""


def refuse_other(file: Path, sha256: str | None) -> None:
    """Raise UnfitFileError where the file has another digest than this, if one is given."""
    if sha256 not in (None, found := hashlib.sha256(_read(file)).hexdigest()):
        raise UnfitFileError(f"its SHA-256 is {found}, and not {sha256}, as `sha256` has it: it is another file")


def kept_ids(file: Path, layers: Sequence[MoELayer], ids: str | None, model: str) -> tuple[dict[str, list[int]], str]:
    """(layer path → the ids that stay, ascending, how the layers were told). `ids`: what they are, if that was said."""
    data = _json(file)
    _refuse_other_model(data, model)
    if isinstance(data, Mapping) and "passes" in data:
        raise UnfitFileError("it is a decision of this library; `compressor apply` takes it")
    entries = _entries(data, None, layers)
    meanings = {what for _, what in entries.values() if what}
    if len(meanings) > 1 or (ids and meanings - {ids}):
        raise UnfitFileError(f"it calls its ids {' and '.join(sorted(meanings))}" + (f", and `ids` {ids}" * bool(ids)))
    if not meanings and ids is None and file.name.startswith("pruneset"):
        raise UnfitFileError(
            "a pruneset of HOPE holds the ids that go: say `ids: dropped`, or `ids: kept` if not so here"
        )
    is_dropped = (ids or next(iter(meanings), "kept")) == "dropped"
    found, how = _by_layer({name: one for name, (one, _) in entries.items()}, layers, lambda one: not one)
    kept = {layer.path: _kept_of(layer, found[layer.path], is_dropped=is_dropped) for layer in layers}
    if all(len(kept[layer.path]) == layer.num_experts for layer in layers):
        raise UnfitFileError("it keeps every expert of every layer, so nothing would change")
    return kept, f"{file.name}: ids that {'go' if is_dropped else 'stay'}, layers by {how}"


def _kept_of(layer: MoELayer, ids: Any, *, is_dropped: bool) -> list[int]:
    if not isinstance(ids, list) or any(type(one) is not int for one in ids):
        raise UnfitFileError(f"{layer.path}: expected a list of expert ids, found {_short(ids)}")
    if twice := sorted({one for one in ids if ids.count(one) > 1}):
        raise UnfitFileError(f"{layer.path}: it names the expert {twice[0]} twice")
    if beyond := [one for one in ids if not 0 <= one < layer.num_experts]:
        raise UnfitFileError(
            f"{layer.path}: it names the expert {beyond[0]}, and ids go from 0 to {layer.num_experts - 1}"
        )
    kept = [one for one in range(layer.num_experts) if (one in ids) != is_dropped]
    size = layer.num_experts // layer.num_groups
    by_group = [sum(one // size == group for one in kept) for group in range(layer.num_groups)]
    if len(set(by_group)) > 1:
        raise UnfitFileError(f"{layer.path}: its {layer.num_groups} groups must keep equally many, found {by_group}")
    return kept


def most_chosen(file: Path, layers: Sequence[MoELayer], keep: int, model: str) -> tuple[dict[str, list[int]], str]:
    """(layer path → the `keep` experts of the largest figures, equally many of each group, how they were read)."""
    figures, how = _figures(file, layers, model)
    kept = {}
    for layer in layers:
        found, size = figures[layer.path], layer.num_experts // layer.num_groups
        groups = [range(start, start + size) for start in range(0, layer.num_experts, size)]
        ranked = [sorted(group, key=lambda one, found=found: (-found[one], one)) for group in groups]  # type: ignore[misc]
        kept[layer.path] = sorted(one for group in ranked for one in group[: keep // layer.num_groups])
    return kept, f"{file.name}: {how}; experts of the largest stay"


def _figures(file: Path, layers: Sequence[MoELayer], model: str) -> tuple[Mapping[str, Sequence[float]], str]:
    _refuse_pickle(file)
    head = _read(file)[:4]
    if head == b"\x89HDF":
        found, how = _by_layer(_observations(file), layers, lambda one: False)
        return _checked(found, layers), f"how often each is chosen, of HOPE, layers by {how}"
    if head in (b"\x93NUM", b"PK\x03\x04"):
        return _of_array(*_named_array(_loaded(_read(file))), layers)
    data = _json(file)
    _refuse_other_model(data, model)
    if isinstance(data, Mapping) and "choices" in data:  # an answer of vLLM's server
        return _of_array("routed_experts", _of_choices(data["choices"]), layers)
    if isinstance(data, Mapping) and (names := [one for one in ARRAYS if one in data]):
        return _of_array(names[0], _of_text(data[names[0]]), layers)
    if isinstance(data, list) and data and isinstance(data[0], list) and data[0] and isinstance(data[0][0], list):
        return _of_array(None, _of_text(data), layers)
    entries = _entries(data, None, layers)
    found, how = _by_layer({name: one for name, (one, _) in entries.items()}, layers, lambda one: not one)
    return _checked(found, layers), f"a figure for every expert, layers by {how}"


def _checked(found: Mapping[str, Any], layers: Sequence[MoELayer]) -> Mapping[str, Sequence[float]]:
    for layer in layers:
        _check_numbers(layer, found[layer.path])
    _refuse_unseen(found)
    return found


def _check_numbers(layer: MoELayer, figures: Any) -> None:
    is_numbers = isinstance(figures, list) and all(type(one) in (int, float) and abs(one) <= MOST for one in figures)
    if not is_numbers or len(figures) != layer.num_experts:
        raise UnfitFileError(f"{layer.path}: expected {layer.num_experts} numbers, found {_short(figures)}")


def _refuse_unseen(counts: Mapping[str, Sequence[float]]) -> None:
    if unseen := [path for path, one in counts.items() if not any(one)]:
        raise UnfitFileError(f"{unseen[0]}: it counts no token there, so nothing tells which experts stay")


def _of_array(name: str | None, array: Array, layers: Sequence[MoELayer]) -> tuple[Mapping[str, Sequence[float]], str]:
    """Figures of counts [.., L, E] or of chosen ids [.., L, K]: which, the name tells, or else the last dimension."""
    sizes = {(layer.num_experts, layer.top_k) for layer in layers}
    if len(sizes) > 1:
        raise UnfitFileError("the layers differ in experts or choices, so no one array is of all; give JSON by layer")
    [(num_experts, top_k)] = sizes
    kinds = {"logical_count": num_experts, "routed_experts": top_k}
    kind = name or next((one for one, size in kinds.items() if array.shape[-1:] == (size,)), None)
    if kind is None or array.ndim < 2 or array.shape[-1] != kinds[kind]:
        raise UnfitFileError(
            f"its shape is {list(array.shape)}; expected counts [.., layers, {num_experts}] or chosen ids "
            f"[.., layers, {top_k}]"
        )
    if array.dtype.kind not in ("iu" if kind == "routed_experts" else "iuf") or not np.isfinite(array).all():
        raise UnfitFileError(f"expected numbers of tokens or ids, found {array.dtype}, or numbers that are not finite")
    flat_TLX = array.reshape(-1, *array.shape[-2:])
    found, how = _by_layer(
        {str(n): flat_TLX[:, n] for n in range(flat_TLX.shape[1])}, layers, lambda one: not one.any()
    )
    if kind == "logical_count":
        if (array < 0).any():
            raise UnfitFileError("a count is negative")
        counts = {path: one.sum(0).tolist() for path, one in found.items()}
        _refuse_unseen(counts)
        return counts, f"counted tokens, layers by {how}"
    for path, ids_TK in found.items():
        if not 0 <= ids_TK.min(initial=0) <= ids_TK.max(initial=0) < num_experts:
            raise UnfitFileError(f"{path}: it names an expert outside of 0 to {num_experts - 1}")
        if (np.diff(np.sort(ids_TK, axis=1), axis=1) == 0).any():
            raise UnfitFileError(f"{path}: a token names an expert twice, so these are no choices of this layer")
    counts = {path: np.bincount(one.ravel(), minlength=num_experts).tolist() for path, one in found.items()}
    _refuse_unseen(counts)
    return counts, f"chosen experts of {len(flat_TLX):,} tokens, layers by {how}"


def _observations(file: Path) -> dict[str, list[float]]:
    """How often each expert was chosen, by the layer's place among the MoE layers, of all tasks."""
    try:
        h5py = import_module("h5py")
    except ImportError:
        raise UnfitFileError("HDF5 is read by h5py, which is not installed: `pip install h5py`") from None
    found: dict[str, Array] = {}
    try:
        with h5py.File(file, "r") as opened:
            for task in opened.values():
                for name, of_layer in task.items():
                    if re.fullmatch(r"layer_\d+", name):
                        found[name] = found.get(name, 0) + np.diagonal(of_layer["coselect_counts"][()])
    except (OSError, KeyError, AttributeError, ValueError) as error:
        raise UnfitFileError(f"it is not what HOPE observes (TASK/layer_N/coselect_counts): {error}") from error
    return {name: one.tolist() for name, one in found.items()}


# --- layers


def _entries(data: Any, meaning: str | None, layers: Sequence[MoELayer]) -> dict[str, tuple[Any, str | None]]:
    """What the file calls a layer → (what it says of it, whether that is kept or dropped ids, if it says so)."""
    if isinstance(data, list):
        names = [_first(one, NAMES, number) if isinstance(one, dict) else number for number, one in enumerate(data)]
        if len({str(name) for name in names}) < len(names):
            raise UnfitFileError("it names a layer twice")
        data = dict(zip(map(str, names), data, strict=True))
    elif not isinstance(data, dict):
        raise UnfitFileError(f"expected layers, found {_short(data)}")
    elif words := [one for one in (*MEANINGS, *LAYERS) if isinstance(data.get(one), dict | list)]:
        return _entries(data[words[0]], MEANINGS.get(words[0], meaning), layers)
    found = {name: one for name, one in data.items() if _number(name) is not None or isinstance(one, dict | list)}
    if not found or any(_number(name) is None for name in found):
        raise UnfitFileError(
            f"expected layers by number or path (or a key such as kept, dropped or layers around them), found the keys "
            f"{_short(list(data))}"
        )
    return {name: _entry(one, meaning, layers) for name, one in found.items()}


def _entry(one: Any, meaning: str | None, layers: Sequence[MoELayer]) -> tuple[Any, str | None]:
    if not isinstance(one, dict):
        return one, meaning
    counted, most = _first(one, COUNTED), sorted({layer.num_experts for layer in layers})
    if counted is not None and counted not in most:
        raise UnfitFileError(f"it is of layers of {_short(counted)} experts, and these have {_short(most)[1:-1]}")
    word = next((one_word for one_word in MEANINGS if one_word in one), None)
    if word is None:
        raise UnfitFileError(f"expected ids under a key such as kept or dropped, found the keys {_short(list(one))}")
    return one[word], MEANINGS[word]


def _by_layer(
    entries: Mapping[str, V], layers: Sequence[MoELayer], is_empty: Callable[[V], bool]
) -> tuple[dict[str, V], str]:
    """(layer path → what is said of it, how the layers were told). What is empty may be of layers without experts."""
    paths = [layer.path for layer in layers]
    if set(paths) == entries.keys():
        return {path: entries[path] for path in paths}, "path"
    own = [_number(layer.number or "") for layer in layers]
    if None in own or len(set(own)) < len(own):
        raise UnfitFileError(
            f"a number tells no layer of this model from another; name them by path, such as {paths[0]}"
        )
    found: dict[int | None, V] = {}
    for name, one in entries.items():
        if _number(name) in found:
            raise UnfitFileError(f"it names layer {_number(name)} twice")
        found[_number(name)] = one
    if set(own) <= found.keys() and all(is_empty(found[one]) for one in found.keys() - set(own)):
        return {path: found[one] for path, one in zip(paths, own, strict=True)}, "number"
    if found.keys() == set(range(len(layers))):
        return {path: found[place] for place, path in enumerate(paths)}, "place among the MoE layers"
    named, wanted = (", ".join(map(str, sorted(filter(lambda n: n is not None, of)))) for of in (found, own))  # type: ignore[type-var]
    raise UnfitFileError(f"it names the layers {_short(named)}, and the MoE layers are {_short(wanted)}")


def _number(name: str) -> int | None:
    """The decoder layer's number in what a file calls a layer: the one integer there."""
    found = re.findall(r"[0-9]+", str(name))
    return int(found[0]) if len(found) == 1 and len(found[0]) < 10 else None


# --- files


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UnfitFileError(f"it cannot be read: {error.strerror}") from error


def _refuse_pickle(file: Path) -> None:
    whole = _read(file)
    is_torch = whole[:2] == b"PK" and b"data.pkl" in whole[:4096]
    if file.suffix in PICKLES or whole[:1] == b"\x80" or is_torch:
        raise UnfitFileError(
            "it is a pickle, which can run any code and is never opened here; write its ids or counts as JSON, or as "
            ".npy, with the tool that made it"
        )


def _json(file: Path) -> Any:
    _refuse_pickle(file)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1]:
            raise UnfitFileError(f"it has the key {twice[0]} twice")
        return dict(pairs)

    try:
        return json.loads(_read(file).decode("utf-8"), object_pairs_hook=once)
    except UnfitFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnfitFileError(f"it is no JSON: {error}") from error


def _loaded(whole: bytes) -> Any:
    """What NumPy has saved: an array, or several by name."""
    try:
        return np.load(io.BytesIO(whole), allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UnfitFileError(f"it is not what NumPy saves, or objects in it are pickled: {error}") from error


def _named_array(found: Any) -> tuple[str | None, Array]:
    if isinstance(found, np.ndarray):
        return None, found
    named = [one for one in ARRAYS if one in found.files] or (found.files if len(found.files) == 1 else [])
    if not named:
        raise UnfitFileError(f"expected {' or '.join(ARRAYS)}, or one array, found {', '.join(found.files) or 'none'}")
    try:
        return named[0] if named[0] in ARRAYS else None, found[named[0]]
    except (ValueError, zipfile.BadZipFile) as error:
        raise UnfitFileError(f"{named[0]}: {error}") from error


def _of_text(found: Any) -> Array:
    """An array from nested lists, or from a text as vLLM's server sends it: base64 of a .npy."""
    try:
        if isinstance(found, str):
            return _named_array(_loaded(base64.b64decode(found, validate=True)))[1]
        return np.asarray(found)
    except (ValueError, binascii.Error) as error:
        raise UnfitFileError(f"expected an array, as nested lists of equal length: {error}") from error


def _of_choices(choices: Any) -> Array:
    """The tokens of all answers."""
    try:
        return np.concatenate([_of_text(one["routed_experts"]) for one in choices])
    except (KeyError, TypeError, ValueError) as error:
        raise UnfitFileError(f"expected `routed_experts` of every choice, as arrays of one form: {error}") from error


def _refuse_other_model(data: Any, model: str) -> None:
    """Names of one model may differ in what stands before their last part: a hub's owner, folders."""
    named = _first(data, MODELS) if isinstance(data, Mapping) else None
    if isinstance(named, str) and model and Path(named).name.casefold() != Path(model).name.casefold():
        raise UnfitFileError(
            f"it says that it is of {named}, and this is {model}; take the file of this model, or take that key out if "
            f"its ids are meant here"
        )


def _first(data: Mapping[str, Any], names: Sequence[str], default: Any = None) -> Any:
    return next((data[name] for name in names if name in data), default)


def _short(found: Any) -> str:
    text = found if isinstance(found, str) else json.dumps(found)
    return text if len(text) <= 60 else f"{text[:57]}..."
