"""The file that keeps figures, and adding up several of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from compressor.checkpoint.atomic_files import put_in_place, with_own_memory
from compressor.errors import CheckpointError
from compressor.observe.reductions import Statistics, joined_figures

FORMAT = 2
Loaded = tuple[dict[str, dict[str, dict[str, Tensor]]], dict[str, Any]]
"""(pass → layer path → name → figures, what they are about)"""


def save_statistics(path: Path, passes: Mapping[str, Statistics], about: Mapping[str, Any]) -> None:
    """Write the figures of all passes, as `PASS/LAYER/FIGURE` (a pass: `0.expert_pruning`), and `about` as JSON."""
    tensors = {
        f"{name}/{layer}/{figure}": with_own_memory(tensor)
        for name, statistics in sorted(passes.items())
        for layer, figures in sorted(statistics.items())
        for figure, tensor in sorted(figures.items())
    }
    # one entry: the order in which safetensors writes several of them varies
    metadata = {"header": json.dumps({"format": FORMAT, "about": about}, sort_keys=True)}
    temporary = path.with_name(path.name + ".partial")
    safetensors.torch.save_file(tensors, temporary, metadata=metadata)
    put_in_place(temporary, path)


def load_statistics(path: Path) -> tuple[dict[str, dict[str, dict[str, Tensor]]], dict[str, Any]]:
    """A file's (pass → layer → figure → tensor, about). Raises CheckpointError for damage, or another format."""
    passes: dict[str, dict[str, dict[str, Tensor]]] = {}
    if path.is_dir():
        raise CheckpointError(f"{path}: found a folder, expected a run's statistics.safetensors, in its `compressor`.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            header = dict(json.loads(metadata.get("header", "{}")))
            is_old = "about" in metadata  # format 1 had two entries
            found = header.get("format", metadata["format"] if is_old else None)
            if found != FORMAT:
                kind = "no statistics file" if found is None else f"a statistics file of format {found}"
                raise CheckpointError(f"{path}: it is {kind}; this version reads format {FORMAT}. Observe again.")
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                pass_name, layer, figure = name.split("/")
                passes.setdefault(pass_name, {}).setdefault(layer, {})[figure] = file.get_tensor(name)
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as a statistics file: {error}") from error
    return passes, header["about"]


def merge_statistics(loaded: Sequence[Loaded]) -> tuple[dict[str, dict[str, dict[str, Tensor]]], dict[str, Any]]:
    """Add up figures of several runs of one model, as one over all their text: domains of one name are added, others
    stand side by side; what cannot be added is left out and named in `about["dropped_figures"]`. Raises CheckpointError
    for other models or tokenizers, text counted twice, and progressive figures.
    """
    passes, about = loaded[0]
    merged = {name: {layer: dict(of) for layer, of in layers.items()} for name, layers in passes.items()}
    result: dict[str, Any] = {**about}
    for other_passes, other in loaded[1:]:
        _refuse_mixing(result, other)
        shared = [name for name in merged if name in other_passes and _saw_same_layers(name, result, other)]
        if not shared:
            raise CheckpointError(
                f"the statistics have no pass over the same layers in common: {', '.join(merged)}; "
                f"{', '.join(other_passes)}."
            )
        dropped: set[str] = set(result.get("dropped_figures", []))
        together: dict[str, dict[str, dict[str, Tensor]]] = {}
        passes_about: dict[str, Any] = {}
        for name in shared:
            ours, theirs = result["passes"][name]["domains"], other["passes"][name]["domains"]
            domains = list(dict.fromkeys([*ours, *theirs]))
            places = [[domains.index(domain) for domain in one] for one in (ours, theirs)]
            together[name] = {}
            for layer in (one for one in merged[name] if one in other_passes[name]):
                both = (merged[name][layer], other_passes[name][layer])
                together[name][layer], lost = joined_figures(both, places, len(domains))
                dropped |= set(lost)
            passes_about[name] = {**result["passes"][name], "domains": domains}
            held_out = {one: None for of in (result, other) for one in of["passes"][name].get("held_out", ())}
            if held_out:
                passes_about[name]["held_out"] = list(held_out)
        merged = together
        joined = _joined_domains(result["domains"], other["domains"])
        result |= {"passes": passes_about, "domains": joined, "dropped_figures": sorted(dropped)}
    return merged, result


def _saw_same_layers(name: str, *abouts: Mapping[str, Any]) -> bool:
    """Whether a pass found the same layers in both runs, and not what other passes had left of them."""
    one, other = (about["passes"][name]["layers"] for about in abouts)
    return _alike(one, other)


def _alike(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether descriptions of layers agree in all that both say: an older file says less."""
    return len(ours) == len(theirs) and all(
        one[key] == other[key] for one, other in zip(ours, theirs, strict=True) for key in one.keys() & other.keys()
    )


def _refuse_mixing(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    cannot = "the statistics cannot be added up"
    models = [about["model"].get("fingerprint") for about in (one, other)]
    if models[0] != models[1]:
        raise CheckpointError(f"{cannot}: they are of different models, {models[0]} and {models[1]}.")
    if one["tokenizer"] != other["tokenizer"]:
        raise CheckpointError(
            f"{cannot}: the text was cut by different tokenizers, {one['tokenizer']} and {other['tokenizer']}."
        )
    if not _alike(one["layers"], other["layers"]):
        raise CheckpointError(f"{cannot}: the models have different MoE layers.")
    for name, found in [*one["passes"].items(), *other["passes"].items()]:
        if found["progressive"]:
            raise CheckpointError(
                f"{cannot}: those of {name} are progressive, each layer having seen the layers before it as they were "
                f"pruned then."
            )
    texts = [
        {text for domain in about["domains"] for text in domain["fingerprint"].split("+")} for about in (one, other)
    ]
    twice = texts[0] & texts[1]
    if twice:
        raise CheckpointError(f"{cannot}: the same text would count twice ({min(twice)}).")


def _joined_domains(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {domain["name"]: dict(domain) for domain in ours}
    for domain in theirs:
        numbers = [key for key in ("sequences", "asked", "tokens") if domain.get(key) is not None]
        same = found.setdefault(domain["name"], {**domain, **dict.fromkeys(numbers, 0), "fingerprint": ""})
        same |= {key: same.get(key, 0) + domain[key] for key in numbers}
        same["fingerprint"] = "+".join(filter(None, (same["fingerprint"], domain["fingerprint"])))
    return list(found.values())
