"""Figures gathered at MoE layers, and the file that keeps them.

A statistic adds up one batch after another. What it returns are raw sums, one row per batch or one number per expert,
so that figures of several files, processes or domains can be joined later.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from compressor.errors import CheckpointError
from compressor.journal import put_in_place, with_own_memory
from compressor.moe import RankedChunk, RoutedTokens
from compressor.processes import Processes
from compressor.wording import counted, shortened

FORMAT = 2

Statistics = Mapping[str, Mapping[str, Tensor]]
"""Layer path → name → figures."""

Loaded = tuple[dict[str, dict[str, dict[str, Tensor]]], dict[str, Any]]
"""(pass → layer path → name → figures, what they are about)"""


Rule = Literal["summed", "spread", "largest", "total", "batches", "columns", "same"]
"""How figures of several runs, or of several processes of one run, become one:

    summed      [D, …]  added, domain by domain
    spread      [D, E]  as `joined_spread` says, domain by domain
    largest     [D, …]  the largest of them, domain by domain
    total       […]     added, where domains are not kept apart
    batches     [B, …]  one batch after another
    columns     […, B]  the same, with the batches in the last dimension
    same                alike in all of them, or else they do not belong together
"""

RULES: Mapping[str, Rule] = {
    "sums.": "summed",
    "sums.largest": "largest",
    "sums.spread": "spread",
    "pairs.loss": "summed",
    "batch.": "batches",
    "subsets.squared_error": "batches",
    "subsets.": "same",
    "weights.": "same",
    "same.": "same",
}
"""Name of a figure, or how it begins → its rule. A statistic whose figures are named so can be joined as it is."""


class Gathered(dict[str, Mapping[str, Tensor]]):
    """What was observed: layer path → name → figures.

    `domains` are the names of the calibration sources, in the order in which figures kept apart by source have them;
    those of `held_out` among them were observed to see what a decision does to other text, not to decide by.
    """

    def __init__(self, layers: Statistics, domains: Sequence[str] = ("",), held_out: Sequence[str] = ()) -> None:
        super().__init__(layers)
        self.domains = tuple(domains)
        self.held_out = tuple(held_out)

    def __repr__(self) -> str:
        return f"Gathered({counted(len(self), 'layer')}; {shortened(', '.join(filter(None, self.domains)), 160)})"


class Statistic(ABC):
    """Accumulates figures over the calibration batches at one MoE layer."""

    weight_norms: bool = False
    """Whether the layer's figures should hold the norms of its experts' weights too: `weights.l1`, `weights.squared`,
    `weights.count`, [E] each.
    """
    optional: bool = False
    """Whether it is no error if no token comes to the layer: there are no figures of it then."""

    own_rules: Mapping[str, Rule] = {}
    """How figures that belong to one run are joined over its processes, where their names do not follow `RULES`. In
    several processes any other figure is refused.
    """
    processes: Processes = Processes()

    def share(self, processes: Processes) -> None:
        """Told before the first batch which processes share the batches: each sees some of them."""
        self.processes = processes

    @abstractmethod
    def update(self, tokens: RoutedTokens) -> None:
        """Add one batch. Padding tokens are not among `tokens`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The figures of this process's batches so far, on the CPU; sums in float64. The core joins them with those of
        other processes, by `RULES` and `own_rules`; a process that no token came to is not asked.
        """

    def again(self) -> bool:
        """Whether every batch has to be seen once more, in the same order, before the figures are whole.

        Asked when all batches have been seen. A statistic that says True gets them all again through `update`. Asked in
        every process, also where no token came to the layer; so this is the place to exchange what `tensors` needs,
        and the answers must be the same.
        """
        return False


class RankedStatistic(Statistic):
    """A statistic of the outputs of each token's best-ranked experts. Several of them can share these outputs."""

    @abstractmethod
    def num_ranks(self, tokens: RoutedTokens) -> int:
        """How many of each token's ranks are needed; the first ones are the experts chosen."""

    @abstractmethod
    def add(self, tokens: RoutedTokens, chunk: RankedChunk) -> None:
        """Add some of a batch's tokens: exactly `num_ranks` ranks of them. Chunks come in order."""

    def end_batch(self, tokens: RoutedTokens) -> None:
        """All tokens of the batch have been added; `tokens.output_TH` is there."""

    def update(self, tokens: RoutedTokens) -> None:
        """Add one batch."""
        num_ranks = self.num_ranks(tokens)
        for chunk in tokens.ranked_outputs(num_ranks):
            self.add(tokens, chunk)
        self.end_batch(tokens)


class JoinedStatistic(RankedStatistic):
    """Several statistics of the same expert outputs, which are computed once. Their figures have different names."""

    def __init__(self, parts: Sequence[RankedStatistic]) -> None:
        self.parts = parts
        self.weight_norms = any(part.weight_norms for part in parts)
        self.own_rules = {name: rule for part in parts for name, rule in part.own_rules.items()}

    def share(self, processes: Processes) -> None:
        """Tell all of them."""
        for part in self.parts:
            part.share(processes)

    def update(self, tokens: RoutedTokens) -> None:
        """Add one batch to all of them; a second time only to those that asked for it, each in its own way."""
        if self._again is None:
            super().update(tokens)
        for part in self._again or ():
            part.update(tokens)

    def num_ranks(self, tokens: RoutedTokens) -> int:
        """The most that one of them needs."""
        return max(part.num_ranks(tokens) for part in self.parts)

    def add(self, tokens: RoutedTokens, chunk: RankedChunk) -> None:
        """Give each of them the ranks that it needs."""
        for part in self.parts:
            part.add(tokens, chunk.first(part.num_ranks(tokens)))

    def end_batch(self, tokens: RoutedTokens) -> None:
        """Tell all of them."""
        for part in self.parts:
            part.end_batch(tokens)

    def again(self) -> bool:
        """Whether one of them wants the batches again."""
        self._again = [part for part in (self.parts if self._again is None else self._again) if part.again()]
        return bool(self._again)

    def tensors(self) -> dict[str, Tensor]:
        """The figures of all of them."""
        return {name: tensor for part in self.parts for name, tensor in part.tensors().items()}

    _again: Sequence[RankedStatistic] | None = None


def save_statistics(path: Path, passes: Mapping[str, Statistics], about: Mapping[str, Any]) -> None:
    """Write the figures of all passes into one safetensors file; `about` (JSON) says where they come from.

    Tensors are named `PASS/LAYER/FIGURE`, a pass being `0.expert_pruning`. The same figures give the same bytes.
    """
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
    """Read a file written by `save_statistics`: (pass → layer → figure → tensor, about).

    Raises CheckpointError where it is none, is damaged, or is of another format.
    """
    passes: dict[str, dict[str, dict[str, Tensor]]] = {}
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
    """Add up figures gathered in several runs of one model on different text, as one run over all of it would have.

    Domains of the same name are added, others stand side by side. Figures that cannot be added, such as the path of a
    greedy search, are left out and named in `about["dropped_figures"]`. Raises CheckpointError where the runs were of
    other models or tokenizers, where text would count twice, or where figures are progressive.
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


def joined_figures(
    parts: Sequence[Mapping[str, Tensor]],
    places: Sequence[Sequence[int]],
    num_domains: int,
    *,
    rules: Mapping[str, Rule] = RULES,
    order_B: Tensor | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """One layer's figures from several parts of the text: (figures, names of those that cannot be joined).

    `places` says where each part's domains stand in the result; `order_B` puts all batches, which come one part after
    another, into another order.
    """
    found: dict[str, Tensor] = {}
    lost: list[str] = []
    sets = [
        torch.cat([figures.get(name, torch.empty(0)).reshape(-1) for name in ("subsets.counts", "subsets.top_k")])
        for figures in parts
    ]
    has_same_sets = _alike_in_all(sets)
    for name in sorted({name for figures in parts for name in figures}):
        rule = _rule_of(name, rules)
        given = [figures[name] for figures in parts if name in figures]
        if len(given) < len(parts) or rule is None or (name.startswith("subsets.") and not has_same_sets):
            lost.append(name)  # also the path of a search, or losses of other sets
        elif rule in ("summed", "largest"):
            found[name] = _over_domains(given, places, num_domains, rule)
        elif rule == "spread":
            found[name] = _spread_over_domains(parts, places, num_domains)
        elif rule == "total":
            found[name] = torch.stack(given).sum(0)
        elif rule == "same":
            if _alike_in_all(given):
                found[name] = given[0]
            else:
                lost.append(name)
        else:
            if name == "batch.domain":
                given = [torch.tensor(at)[domain_B] for domain_B, at in zip(given, places, strict=True)]
            dim = 0 if rule == "batches" else -1
            whole = torch.cat(given, dim)
            found[name] = whole if order_B is None else whole.index_select(dim, order_B)
    return found, lost


def _rule_of(name: str, rules: Mapping[str, Rule]) -> Rule | None:
    """That of the name itself, or else of the longest beginning, `sums.skip.` before `sums.`."""
    beginnings = [one for one in rules if one == name or (one.endswith(".") and name.startswith(one))]
    return rules[max(beginnings, key=len)] if beginnings else None


def _over_domains(given: Sequence[Tensor], places: Sequence[Sequence[int]], num_domains: int, rule: Rule) -> Tensor:
    whole = given[0].new_zeros(num_domains, *given[0].shape[1:])
    for figures, at in zip(given, places, strict=True):
        present = whole[list(at)]
        whole[list(at)] = present + figures if rule == "summed" else torch.maximum(present, figures)
    return whole


def _spread_over_domains(
    parts: Sequence[Mapping[str, Tensor]], places: Sequence[Sequence[int]], num_domains: int
) -> Tensor:
    spread_DE = parts[0]["sums.spread"]
    whole_DE = spread_DE.new_zeros(num_domains, spread_DE.shape[1])
    for domain in range(num_domains):
        rows = [(of, at.index(domain)) for of, at in zip(parts, map(list, places), strict=True) if domain in at]
        names = ("sums.spread", "sums.tokens", "sums.output")
        whole_DE[domain] = joined_spread(*(torch.stack([of[name][row] for of, row in rows]) for name in names))
    return whole_DE


def joined_spread(spread_GE: Tensor, tokens_GE: Tensor, output_GEH: Tensor) -> Tensor:
    """[E] float64: Σ ‖f − mean f‖² over the tokens of all G groups, from each group's own, its number of tokens and
    its Σ f.

    What lies within the groups, and Σ_g n_g ‖mean_g − mean‖² between them: nothing large is taken from something large,
    as in Σ‖f‖² − ‖Σf‖²/n, which leaves rounding where the spread is small. Sums of float32 numbers are exact in float64
    as long as these are alike, so an expert with one token, or with the same answer to all, has a spread of exactly 0
    on every machine, however the text was shared out.
    """
    mean_GEH = output_GEH / tokens_GE.clamp_min(1)[..., None]
    mean_EH = output_GEH.sum(0) / tokens_GE.sum(0).clamp_min(1)[..., None]
    between_GE = tokens_GE * (mean_GEH - mean_EH).square().sum(-1)
    return (spread_GE + between_GE).sum(0)


def _alike_in_all(given: Sequence[Tensor]) -> bool:
    return all(one.shape == given[0].shape and torch.allclose(one.double(), given[0].double()) for one in given[1:])
