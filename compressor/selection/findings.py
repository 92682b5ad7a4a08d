"""What is shown of experts that were chosen: columns, and a sentence for each kind of finding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compressor.report.description import Column, Description
from compressor.serving.rules import kernel_counts
from compressor.wording import counted, ids_said

Layers = Mapping[str, Mapping[str, Any]]
"""Layer path → what was decided of it."""


def shown(decision: Mapping[str, Any], id_lists: Sequence[str]) -> Description:
    """What each layer loses, by domain if several; who stays; how that was chosen; what is odd, in `id_lists`."""
    layers: Layers = decision["layers"]
    domains = list(dict.fromkeys(name for layer in layers.values() for name in layer.get("domains", ())))
    columns = [
        Column("kl"),
        *(Column("loss", detail=bool(domains)), Column("relative_loss", plot="relative loss")),
        *(Column(key, detail=bool(domains)) for key in ("objective", "sets", "median_loss", "swaps")),
        Column("score_kept"),
        *(Column(f"domains {name}", name, plot="relative loss") for name in domains),
        *map(Column, ("kept", "dropped")),
        *(Column(key, detail=True) for key in ("search", "uncovered", "loss_before_swaps", *id_lists)),
    ]
    return Description(columns, [*_choosing(decision), *_notes(layers)])


def _choosing(decision: Mapping[str, Any]) -> Iterator[str]:
    """How counts were shared out, and what the choice was compared with."""
    budget, chosen = decision.get("budget", {}), decision.get("chosen")
    if "summed_kl" in budget:
        yield (
            f"counts are shared out by what the answers lose when one layer alone is smaller (kl, nats a token); these "
            f"add up to {budget['summed_kl']:.3g}, all layers together may lose more or less"
        )
    if even := budget.get("even"):
        made = " and ".join(map(str, kernel_counts(even["count"])))
        yield (
            f"an even split with {even['count']} experts in every layer, which every engine reads, would lose "
            f"{even['summed_kl']:.3g} instead of {budget['summed_kl']:.3g}; vLLM's router kernels are made for {made}"
        )
    if chosen:
        costs = sorted((one["cost"], name) for name, one in chosen["alternatives"].items())
        listed = "; ".join(f"{name} {cost:.3g}" for cost, name in costs)
        yield f"chosen by what the answers lose on {chosen['tokens']:,} tokens, in nats a token: {listed}"


def _notes(layers: Layers) -> Iterator[str]:
    """What a reader should know of some layers, one sentence for each kind of finding."""
    if unreached := {path: layer["unreached"] for path, layer in layers.items() if layer.get("unreached")}:
        number = sum(map(len, unreached.values()))
        more = f"; and {counted(len(unreached) - 3, 'more layer')}" if len(unreached) > 3 else ""
        yield (
            f"no token of the calibration text reached {counted(number, 'expert')}, so nothing is known of "
            f"{'it' if number == 1 else 'them'}; a criterion drops {'it' if number == 1 else 'them'} first "
            f"({_where(dict(list(unreached.items())[:3]))}{more})"
        )
    if supers := {path: layer["super_experts"] for path, layer in layers.items() if layer.get("super_experts")}:
        lost = {
            path: [expert for expert in ids if expert in layers[path].get("dropped", ())]
            for path, ids in supers.items()
        }
        fate = f"dropped of these, which can ruin a model: {_where(lost)}" if any(lost.values()) else "all of them stay"
        yield f"super experts, whose outputs are extreme: {_where(supers)}; {fate}"
    short = max((layer.get("uncovered", 0.0) for layer in layers.values()), default=0.0)
    if short > 0:
        yield f"up to {short:.2%} of a layer's tokens have fewer known ranks than they choose experts"


def _where(ids: Mapping[str, Sequence[int]]) -> str:
    """`PATH: 0–2, 5; PATH: 7`, of the layers that have some."""
    return "; ".join(f"{path}: {ids_said(of_layer)}" for path, of_layer in ids.items() if of_layer)
