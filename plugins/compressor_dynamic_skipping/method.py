"""The method `dynamic_skipping`: thresholds per layer below which a token's experts are not evaluated.

What needs torch is imported where it is used, so that options can be listed and checked without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    StrictFloat,
    StrictInt,
    Tag,
    model_validator,
)

from compressor.plugin import Column, Decision, Description, Method, OptionError, Options, Plan, check_layer_names

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.plugin import Gathered, LayerWeights, MoELayer, MoEModel, SkipRule, Statistic
    from compressor_dynamic_skipping.curves import FixedCount
    from compressor_dynamic_skipping.thresholds import Curve, Reached

_PRECISION = 0.1
_TARGETS = ("threshold", "mean_experts", "keep_mass", "top_k")


def _possible_threshold(beta: int | float) -> int | float:
    if not 0 < beta <= 1:
        raise ValueError(f"found {beta}; a threshold is a number above 0, up to 1, or median")
    return beta


def _mass_that_may_go(keep_mass: float) -> float:
    """The threshold of tail_mass: without the digits that subtracting has brought in."""
    return round(1 - keep_mass, 12)


def _possible_mass(keep_mass: float) -> float:
    if not _mass_that_may_go(keep_mass):
        raise ValueError(f"found {keep_mass!r}, of which nothing may go; give a smaller share, such as 0.9")
    return keep_mass


def _as_text(key: Any) -> Any:
    return str(key) if isinstance(key, int) and not isinstance(key, bool) else key


def _not_empty(by_layer: dict[str, Any]) -> dict[str, Any]:
    if not by_layer:
        raise ValueError("found an empty mapping; name at least one layer, such as {3: 0.3}, or give one threshold")
    return by_layer


def _kind(threshold: Any) -> str:
    return "layers" if isinstance(threshold, Mapping) else "amount"


Beta = Annotated[StrictInt | StrictFloat, AfterValidator(_possible_threshold)]
Mass = Annotated[StrictFloat, Field(gt=0, lt=1), AfterValidator(_possible_mass)]
LayerName = Annotated[str, BeforeValidator(_as_text)]
BetasOfLayers = Annotated[dict[LayerName, Literal["median"] | Beta], AfterValidator(_not_empty)]
Threshold = Annotated[
    Annotated[Literal["median"] | Beta, Tag("amount")] | Annotated[BetasOfLayers, Tag("layers")],
    Discriminator(_kind),
]


class DynamicSkippingOptions(Options):
    """How much is skipped (one of `threshold`, `mean_experts`, `keep_mass` and `top_k`), and by which rule."""

    rule: Literal["ratio", "tail_mass", "contribution"] | None = Field(
        default=None,
        description="what is small: ratio (a weight against the token's largest), tail_mass (the smallest weights "
        "together against all), contribution (weight times the expert's mean output norm, against the largest); "
        "default ratio with `threshold`, else tail_mass",
    )
    threshold: Threshold | None = Field(
        default=None,
        description="skip what is below: median (of each layer's calibration text; the paper's, and the default where "
        "a token chooses 2 experts), a number above 0 up to 1, or numbers by layer ({0: 0.3, 5: median}: layers not "
        "named skip nothing)",
    )
    mean_experts: StrictInt | StrictFloat | None = Field(
        default=None,
        allow_inf_nan=False,
        description="experts that a token is to use on average over all layers, such as 5.5: by one threshold for all, "
        "so layers that choose with less doubt use fewer",
    )
    keep_mass: Mass | None = Field(
        default=None,
        description="share of its weights that a token keeps, such as 0.9: at least, for every token (tail_mass), or "
        "on average in each layer (the other rules)",
    )
    top_k: StrictInt | None = Field(
        default=None,
        ge=1,
        description="evaluate so many experts of every token, the largest; their weights stay as the router gave them, "
        "or as `normalise_over` says",
    )
    normalise_over: StrictInt | None = Field(
        default=None,
        ge=1,
        description="with `top_k`, where the router renormalises: divide weights by the sum of so many best ones; "
        "default those that the model chooses",
    )
    precision: StrictInt | StrictFloat | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="how well the calibration text must tell a mean number of experts per token, averaged over the "
        "layers: two standard errors, in experts; default 0.1",
    )

    @model_validator(mode="after")
    def _one_target(self) -> DynamicSkippingOptions:
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"`{given[0]}` and `{given[1]}` both say how much is skipped; leave one of them out")
        if self.normalise_over is not None and self.top_k is None:
            raise ValueError("`normalise_over` would have no effect without `top_k`: leave it out")
        if self.rule is not None and self.top_k is not None:
            raise ValueError("`rule` would have no effect beside `top_k`: the largest weights stay; leave it out")
        if self.normalise_over is not None and self.top_k is not None and self.normalise_over < self.top_k:
            raise ValueError(
                f"`normalise_over` should be at least `top_k`, found {self.normalise_over} and {self.top_k}"
            )
        by_mass = self.keep_mass is not None and self.skip_by != "tail_mass"
        calibrated = self.mean_experts is not None or by_mass or self._by_median
        if self.precision is not None and not calibrated:
            raise ValueError("`precision` would have no effect: nothing is calibrated; leave it out")
        return self

    @property
    def _by_median(self) -> bool:
        if isinstance(self.threshold, dict):
            return "median" in self.threshold.values()
        return self.threshold == "median" or all(getattr(self, name) is None for name in _TARGETS)

    @property
    def target(self) -> str:
        """The option that says how much is skipped."""
        return next((name for name in _TARGETS if getattr(self, name) is not None), "threshold")

    @property
    def skip_by(self) -> Literal["ratio", "tail_mass", "contribution"]:
        """The rule that applies."""
        return self.rule or ("ratio" if self.target == "threshold" else "tail_mass")

    def threshold_of(self, layer: MoELayer) -> str | float | None:
        """What was said of a layer's threshold: a number, median, or None where it is to skip nothing."""
        if isinstance(self.threshold, dict):
            return next((self.threshold[name] for name in layer.names if name in self.threshold), None)
        return "median" if self.threshold is None else self.threshold


class DynamicSkipping(Method[DynamicSkippingOptions]):
    """Skip a token's experts whose weights are small against its others (arXiv 2402.14800, section 3.3)."""

    name = "dynamic_skipping"
    version = "1"
    api = 2
    options_type: ClassVar[type[Options]] = DynamicSkippingOptions

    # check

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """Something to skip, a target that can be reached, layers that exist."""
        options = self.options
        top_k = max(layer.top_k for layer in layers)
        if top_k < 2:
            raise OptionError(None, f"{layers[0].path}: each token chooses one expert, so there is nothing to skip.")
        if options.target == "threshold" and options.threshold is None and top_k > 2:
            raise OptionError(
                None,
                f"{layers[0].path}: each token chooses {top_k} experts. The median is the paper's threshold for 2, and "
                f"is known to ruin models that choose more. Say how much to skip: `mean_experts: {0.75 * top_k:g}`, "
                f"`keep_mass: 0.9` or a `threshold`, such as `threshold: median` if it is meant.",
            )
        if isinstance(options.threshold, dict):
            check_layer_names(layers, "threshold", options.threshold)
        self._check_mean(layers)
        for layer in layers:
            self._check_layer(layer)
        rules = [
            self._planned_rule() if layer.top_k >= 2 and options.threshold_of(layer) is not None else None
            for layer in layers
        ]
        skipping = [replace(layer, skip_rule=rule) for layer, rule in zip(layers, rules, strict=True)]
        return Plan(skipping, self._notes(layers))

    def _planned_rule(self) -> SkipRule:
        """A layer's rule, but for what calibration finds: thresholds, norms, whether its router renormalises."""
        from compressor.plugin import SkipRule

        options = self.options
        if options.top_k is None:
            return SkipRule("ratio", False, beta=1.0)
        over = options.normalise_over
        return SkipRule("top_k", over is not None, top_k=options.top_k, normalise_over=over)

    def _check_mean(self, layers: Sequence[MoELayer]) -> None:
        mean, chosen = self.options.mean_experts, [layer.top_k for layer in layers if layer.top_k >= 2]
        most = sum(chosen) / len(chosen)
        if mean is not None and not 1 <= mean < most:
            raise OptionError(
                "mean_experts",
                f"found {mean:g}; a token chooses {most:g} experts and keeps at least 1: a mean lies from 1 up to, and "
                f"not at, {most:g}.",
            )

    def _check_layer(self, layer: MoELayer) -> None:
        options = self.options
        if options.top_k is not None and layer.top_k >= 2:
            if options.top_k >= layer.top_k:
                raise OptionError(
                    "top_k",
                    f"{layer.path}: each token chooses {layer.top_k} experts, so {options.top_k} skips nothing.",
                )
            over = options.normalise_over
            if over is not None and over > layer.num_experts // layer.num_groups * layer.num_chosen_groups:
                raise OptionError("normalise_over", f"{layer.path}: its router has no {over} experts to choose among.")
            if over is not None and over > layer.top_k and layer.wider_problem:
                raise OptionError("normalise_over", f"{layer.path}: {layer.wider_problem}.")
        if options.skip_by == "contribution" and options.top_k is None and layer.watch_problem:
            raise OptionError("rule", f"{layer.watch_problem}; the rules ratio and tail_mass need no such answers.")

    def _notes(self, layers: Sequence[MoELayer]) -> Sequence[str]:
        options, top_k = self.options, layers[0].top_k
        if options.top_k is not None:
            over = options.normalise_over or top_k
            return [
                f"each token uses the {options.top_k} largest of {top_k} experts, with weights normalised over {over}"
            ]
        words = {
            "ratio": "weights small against the token's largest",
            "tail_mass": "the smallest weights of a token, together small against all of them",
            "contribution": "weight times mean output norm small against the token's largest",
        }
        how = {
            "mean_experts": f"so that a token uses {options.mean_experts} experts on average, now {top_k}",
            "keep_mass": f"so that {options.keep_mass} of its weights stay",
            "threshold": "thresholds as given"
            if options.threshold not in (None, "median")
            else "thresholds: the median",
        }
        skipped = [layer.path for layer in layers if layer.top_k < 2]
        notes = [f"experts are skipped by {options.skip_by}: {words[options.skip_by]}; {how[options.target]}"]
        notes += [f"{', '.join(skipped)}: each token chooses one expert, nothing to skip"] if skipped else []
        notes.append("plain transformers loads the checkpoint and runs it unskipped; compressor.load skips")
        return notes

    # observe

    @property
    def held_out(self) -> bool:
        """What thresholds do is told for text that they were not found on, too."""
        return True

    def _fixed(self, layer: MoELayer) -> FixedCount | None:
        from compressor_dynamic_skipping.curves import FixedCount

        top_k = self.options.top_k
        return None if top_k is None else FixedCount(top_k, self.options.normalise_over or layer.top_k)

    def statistic(self, layer: MoELayer) -> Statistic | None:
        """Curves for every rule and threshold; nothing where nothing can be skipped."""
        from compressor_dynamic_skipping.curves import SkipCurves

        if layer.top_k < 2:
            return None
        return SkipCurves(layer, self._fixed(layer))

    # decide

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> Decision:
        """Per layer: the rule with its numbers, and what it reaches on the text that was observed."""
        calibration = [d for d, name in enumerate(statistics.domains) if name not in statistics.held_out]
        held_out = [d for d, name in enumerate(statistics.domains) if name in statistics.held_out]
        active = [layer for layer in layers if layer.top_k >= 2 and layer.path in statistics]
        if not active:
            raise OptionError(None, "nothing was gathered to decide by; observe again.")
        self._refuse_unseen(layers, active)
        if self.options.top_k is not None:
            found = {one.path: self._fixed_count(one, statistics, calibration, held_out) for one in active}
        else:
            found = self._thresholds(active, statistics, calibration, held_out)
        decision = Decision(
            {"layers": {layer.path: found.get(layer.path) or _unskipped(layer.top_k, held_out) for layer in layers}}
        )
        if not any(layer["mean_experts"] < _chosen(statistics[path], calibration) for path, layer in found.items()):
            raise OptionError(
                self.options.target,
                "no layer would skip a single expert on the calibration text, so this would have no effect; ask for "
                "more to be skipped.",
            )
        decision["mean_experts"] = _mean([layer["mean_experts"] for layer in found.values()])
        if held_out:
            decision["held_out_mean_experts"] = _mean([layer["held_out"]["mean_experts"] for layer in found.values()])
        decision |= self._for_other_engines(active, found, statistics, calibration)
        return decision

    def _for_other_engines(
        self,
        layers: Sequence[MoELayer],
        found: Mapping[str, Mapping[str, Any]],
        statistics: Gathered,
        domains: Sequence[int],
    ) -> dict[str, Any]:
        """What one threshold for all layers does, where they have several; ik_llama.cpp's option, which takes one."""
        from compressor_dynamic_skipping.other_engines import one_threshold, ser

        if self.options.top_k is not None or self.options.skip_by != "ratio":
            return {"ser": ser(found, statistics, None)}
        one = None
        if len({layer.get("beta") for layer in found.values()}) > 1:
            one = one_threshold([statistics[layer.path] for layer in layers], found, domains)
        return ({"one_threshold": one} if one else {}) | {"ser": ser(found, statistics, one)}

    def _refuse_unseen(self, layers: Sequence[MoELayer], active: Sequence[MoELayer]) -> None:
        """A layer that is named must have been seen."""
        for layer in layers:
            if isinstance(self.options.threshold, dict) and layer not in active and self.options.threshold_of(layer):
                raise OptionError(
                    "threshold", f"{layer.path}: no token of the calibration text comes to this layer, or it is top-1."
                )

    def _thresholds(
        self, layers: Sequence[MoELayer], statistics: Gathered, calibration: Sequence[int], held_out: Sequence[int]
    ) -> dict[str, dict[str, Any]]:
        from compressor_dynamic_skipping.curves import expert_norms
        from compressor_dynamic_skipping.thresholds import Curve

        rule = self.options.skip_by
        try:
            curves = {layer.path: Curve.of(rule, statistics[layer.path], calibration) for layer in layers}
        except KeyError:
            raise OptionError(
                "rule" if self.options.rule else None,
                f"the figures hold nothing to find thresholds of the rule {rule} by; observe again.",
            ) from None
        betas = self._betas(layers, statistics, curves)
        self._check_precision(curves, betas)
        found = {}
        for layer in layers:
            beta, figures, curve = betas[layer.path], statistics[layer.path], curves[layer.path]
            if beta is None:
                found[layer.path] = _unskipped(curve.most, held_out)
                continue
            norms = expert_norms(figures, calibration).tolist() if rule == "contribution" else None
            found[layer.path] = {
                "rule": rule,
                "renormalise": bool(figures["same.renormalises"]),
                "beta": beta,
                **({"expert_norms": norms} if norms is not None else {}),
                **_figures(curve.reached(beta)),
                **_held_out(Curve.of(rule, figures, held_out).reached(beta) if held_out else None),
            }
        return found

    def _betas(
        self, layers: Sequence[MoELayer], statistics: Gathered, curves: Mapping[str, Curve]
    ) -> dict[str, float | None]:
        """Layer path → threshold, None where nothing is to be skipped."""
        from compressor_dynamic_skipping.thresholds import beta_for_mean

        options = self.options
        if options.mean_experts is not None:
            try:
                return dict.fromkeys(curves, beta_for_mean(list(curves.values()), options.mean_experts))
            except ValueError as error:
                raise OptionError("mean_experts", f"{error}.") from error
        if options.keep_mass is not None:
            if options.skip_by == "tail_mass":  # every token keeps it, whatever the text
                return dict.fromkeys(curves, _mass_that_may_go(options.keep_mass))
            return {path: curve.beta_for_mass(options.keep_mass) for path, curve in curves.items()}
        found: dict[str, float | None] = {}
        for layer in layers:
            beta = options.threshold_of(layer)
            if beta == "median":
                beta = self._median(layer, statistics[layer.path])
            found[layer.path] = None if beta is None else float(beta)
        return found

    def _median(self, layer: MoELayer, figures: Mapping[str, Tensor]) -> float:
        name = f"skip.{self.options.skip_by}.median"
        if name not in figures:
            raise OptionError(
                "threshold",
                f"{layer.path}: the median of added-up figures is not known; give a number, or `mean_experts`.",
            )
        return max(float(figures[name]), 2.0**-16)

    def _check_precision(self, curves: Mapping[str, Curve], betas: Mapping[str, float | None]) -> None:
        """The text must tell what was asked as well as `precision` says."""
        from compressor_dynamic_skipping.thresholds import uncertainty

        options = self.options
        if options.target == "threshold" and not options._by_median:
            return
        if options.keep_mass is not None and options.skip_by == "tail_mass":
            return
        reached = {path: curves[path].reached(beta).mean_experts for path, beta in betas.items() if beta is not None}
        if not reached:
            return
        error = _mean([uncertainty(curves[path], mean) for path, mean in reached.items()])
        tokens = min(curve.tokens for curve in curves.values())
        precision = _PRECISION if options.precision is None else options.precision
        if error > precision:
            needed = tokens * (error / precision) ** 2
            raise OptionError(
                options.target,
                f"{int(tokens)} tokens of calibration text tell how many experts a token uses to ±{error:.2g}, and "
                f"±{precision:g} is asked for (`precision`). Calibrate on about {_round_up(needed):,} tokens, "
                f"or ask for less precision.",
            )

    def _fixed_count(
        self, layer: MoELayer, statistics: Gathered, calibration: Sequence[int], held_out: Sequence[int]
    ) -> dict[str, Any]:
        from compressor_dynamic_skipping.thresholds import Reached

        options, figures, fixed = self.options, statistics[layer.path], self._fixed(layer)
        assert fixed is not None
        if fixed.figure not in figures:
            raise OptionError("top_k", f"{layer.path}: these numbers were not measured; observe again.")
        renormalises = bool(figures["same.renormalises"])
        if options.normalise_over is not None and not renormalises:
            raise OptionError(
                "normalise_over",
                f"{layer.path}: its router does not renormalise its weights; leave `normalise_over` out.",
            )

        def reached(domains: Sequence[int]) -> Reached:
            at = list(domains)
            tokens = float(figures["sums.skip.tokens"][at].sum())
            gone, share, error = figures[fixed.figure][at].sum(0).tolist()
            squared = figures.get("sums.skip.squared_output")
            loss = None if squared is None else (error / max(float(squared[at].sum()), 1e-300)) ** 0.5
            return Reached(_chosen(figures, at) - gone / tokens, 1 - share / tokens, loss)

        over = {"normalise_over": fixed.normalise_over} if renormalises else {}
        return {
            "rule": "top_k",
            "renormalise": renormalises,
            "top_k": fixed.top_k,
            **over,
            **_figures(reached(calibration)),
            **_held_out(reached(held_out) if held_out else None),
        }

    # edit

    def preview(self, moe: MoEModel, decision: Decision) -> AbstractContextManager[object]:
        """Skipped means a weight of 0."""
        from compressor.plugin import SkipRule

        layers = decision["layers"].items()
        return moe.zeroed({path: SkipRule.of(layer) for path, layer in layers if layer.get("rule", "") is not None})

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        """From now on the layer skips; the model's config says how."""
        from compressor.plugin import SkipRule

        decided = decision["layers"][layer.path]
        if decided.get("rule", "") is not None:
            layer.skip(SkipRule.of(decided))

    # shown

    def describe(self, decision: Decision) -> Description:
        """How many experts a token uses, and what that does to each layer."""
        used = "experts per token"
        columns = [
            *(Column("rule", detail=True), Column("beta", "β"), Column("mean_experts", "experts a token", plot=used)),
            *(Column("held_out mean_experts", "on held-out text", plot=used), Column("kept_mass", "mass kept")),
            Column("relative_loss", plot="relative loss"),
            *(Column(key, detail=True) for key in ("renormalise", "top_k", "normalise_over")),
        ]
        return Description(columns, list(_notes(decision)))


def _chosen(figures: Mapping[str, Tensor], domains: Sequence[int]) -> float:
    """Experts that a token chooses on average, skipped or not."""
    tokens, experts = (float(figures[f"sums.skip.{one}"][list(domains)].sum()) for one in ("tokens", "experts"))
    return experts / tokens


def _unskipped(chosen: float, held_out: Sequence[int]) -> dict[str, Any]:
    from compressor_dynamic_skipping.thresholds import Reached

    whole = Reached(float(chosen), 1.0, 0.0)
    return {"rule": None, **_figures(whole), **_held_out(whole if held_out else None)}


def _figures(reached: Reached) -> dict[str, float]:
    loss = {} if reached.relative_loss is None else {"relative_loss": reached.relative_loss}
    return {"mean_experts": reached.mean_experts, "kept_mass": reached.kept_mass, **loss}


def _held_out(reached: Reached | None) -> dict[str, Any]:
    return {} if reached is None else {"held_out": _figures(reached)}


def _notes(decision: Decision) -> Iterator[str]:
    """By what rule experts are skipped, and how many a token uses."""
    rules = [layer for layer in decision["layers"].values() if layer.get("rule")]
    if rules:
        over = f" normalised over {rules[0]['normalise_over']}" if "normalise_over" in rules[0] else ""
        rule = f"the {rules[0]['top_k']} largest{over}" if "top_k" in rules[0] else f"the rule {rules[0]['rule']}"
        where = {"mean_experts": "calibration", "held_out_mean_experts": "held-out"}
        used = [f"{decision[name]:.4g} experts on {text} text" for name, text in where.items() if name in decision]
        tells = f"; a token uses {', '.join(used)}, mean of the layers" if used else ""
        number = len(decision["layers"])
        yield f"by {rule}, in {len(rules)} of {number} {'layer' if number == 1 else 'layers'}{tells}"
    if one := decision.get("one_threshold"):
        loss = (
            f", and lose {one['relative_loss']:.3g} instead of {one['instead_of']:.3g}" if "instead_of" in one else ""
        )
        yield f"one threshold for all layers, {one['beta']:.4g}, would use as many experts{loss}, mean of the layers"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _round_up(tokens: float) -> int:
    """To two digits."""
    unit: int = 10 ** max(0, len(str(int(tokens))) - 2)
    return int((int(tokens) // unit + 1) * unit)
