"""Choosing the experts that stay, as a method: what expert pruning and task-specific pruning have in common.

A layer's experts are chosen on one of three routes:

    criterion   sums per expert → scores → the largest stay
    exact       the paper's objective for every set of kept experts
    greedy      the same objective, searched, where there are too many sets

The sums are gathered on every route, so that `compressor decide` can answer other criteria and counts afterwards.

What needs torch is imported where it is used, so that options can be listed and checked without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, TypeVar

from compressor.method import Decision, Measuring, Method, OptionError, Plan
from compressor.report.description import Description
from compressor.selection import layer_plan
from compressor.selection.findings import shown
from compressor.selection.layer_plan import LayerPlan
from compressor.selection.options import SelectionOptions
from compressor.wording import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.model.layer_weights import LayerWeights
    from compressor.model.moe_model import MoEModel
    from compressor.model.structure import MoELayer
    from compressor.observe.statistic import Gathered, Statistic
    from compressor.selection.activation_sums import ExpertSums
    from compressor.selection.choose import Choice
    from compressor.selection.greedy import GreedySearch

_CONSTANTS = "constants"
"""A layer's tensor in a decision."""
_MANY_DROPPED = 0.6
_STARTS_WHERE_MANY_GO = 2

OptionsT = TypeVar("OptionsT", bound=SelectionOptions)


class ExpertSelection(Method[OptionsT]):
    """Keep, in every MoE layer, the experts that are chosen by a search or by a criterion."""

    expert_ids = ("kept", "dropped", "unreached", "super_experts", "protected_super_experts")

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """Possible counts only; few enough sets to look at all of them; nothing asked for that has no effect."""
        _check_criterion(self.options.criterion, self.criteria)
        _check_text(self.options, needs_text=self.needs_text)
        options, wanted = self.options, self.measuring(layers)
        layer_plan.check_top_k(layers, options.top_k)
        layer_plan.check_names(layers, options)
        searched: list[str] = []
        for one in self._kinds:
            plans = [one._plan(layer) for layer in layers]
            for plan in plans:
                plan.check()
            planned = layer_plan.planned_counts(plans, one.options)
            if options.is_measured:
                layer_plan.check_measured(plans, one.options)
            searched += filter(None, [plan.search_note() for plan in plans])
        notes = _criterion_notes(self.criteria, plans, needs_text=self.needs_text) or sorted(set(searched))
        notes += layer_plan.rounding_notes(plans, options)
        if options.budget:
            notes += layer_plan.sharing_notes(plans, planned, wanted)
        notes += layer_plan.choosing_notes([name for one in self._kinds for name in one._rivals(layers, ())], wanted)
        notes += layer_plan.switch_notes(layers, planned, options)
        after = [plan.after(planned[plan.path]) for plan in plans]
        notes += [] if options.replacement == "none" else layer_plan.constants_notes(after, options)
        open_ = {
            "num_experts": options.budget and options.share != "even",
            "constants": options.replacement == "measured",
        }
        return Plan(after, notes, found=[name for name, is_so in open_.items() if is_so], padded=options.padded)

    # observe, decide, edit

    @property
    def progressive(self) -> bool:
        """Whether layers are observed on what comes out of the layers already pruned."""
        return self.options.progressive

    def check_domains(self, domains: Sequence[str]) -> None:
        """Weights are given to domains that exist."""
        layer_plan.check_blend(self.options, domains)

    @property
    def needs_text(self) -> bool:
        """Not for a criterion that looks at none, unless figures of text are to be gathered besides."""
        criterion, options = self.criteria.get(self.options.criterion or ""), self.options
        is_measured = options.is_measured or options.chooses or options.replacement in ("constants", "measured")
        return criterion is None or criterion.needs_text or bool(options.gather) or is_measured

    def statistic(self, layer: MoELayer) -> Statistic | None:
        """Sums for every criterion, and what the search needs; nothing where nothing changes."""
        plans = [plan for one in self._all_kinds if (plan := one._plan(layer)).changes]
        criterion = self.criteria[self.options.criterion] if self.options.criterion is not None else None
        return _gathered(plans, criterion, constants_asked=self.options.replace is not None) if plans else None

    def bytes_per_token(self, layer: MoELayer) -> float:
        """The search's Gram matrix of each token's ranks, and what it knows of each rank."""
        return _bytes_of_search([one._plan(layer) for one in self._all_kinds])

    def bytes_of_sums(self, layer: MoELayer, hidden: int, num_domains: int) -> int:
        """Constants: Σ w_i w_j E_i of every pair of experts, float64."""
        plans = [one._plan(layer) for one in self._all_kinds if one.options.with_constants]
        return 8 * num_domains * layer.num_experts**2 * hidden if any(plan.changes for plan in plans) else 0

    def measuring(self, layers: Sequence[MoELayer]) -> Measuring | None:
        """Counts of every layer, where a mean is shared out by them."""
        if not any(one.options.is_measured or one._compares for one in self._totals):
            return None
        tokens, _ = layer_plan.measured_amount(self._kinds[0].options, len(layers))
        return Measuring(tokens, _num_candidates(layers, self._all_kinds))

    def observing_for(self, others: Sequence[Self]) -> Self:
        """One search for all counts, and what is measured for some mean is."""
        found = type(self)(self.options, self.criteria)
        found._totals = [self, *others]
        return found

    @cached_property
    def _totals(self) -> Sequence[Self]:
        """The methods that its figures are for: itself, unless others are decided by them too."""
        return [self]

    @cached_property
    def _kinds(self) -> Sequence[Self]:
        """The same method for each that may stand in the place of experts that go."""
        if self.options.replacement != "measured":
            return [self]
        return [type(self)(options, self.criteria) for options in self.options.kinds]

    @cached_property
    def _all_kinds(self) -> Sequence[Self]:
        """Those of all methods that its figures are for."""
        return [kind for one in self._totals for kind in one._kinds]

    def _known(self, statistics: Gathered) -> Sequence[Self]:
        """Those of them that the figures tell of, where it is left to us whether constants are asked for."""
        from compressor.selection.constants import ERRORS

        lacks = self.options.replace is None and any(ERRORS not in figures for figures in statistics.values())
        return self._kinds[:1] if lacks else self._kinds

    def plainer(self) -> tuple[Self, str] | None:
        """Without constants, where nobody asked for them."""
        if self.options.replace is not None or len(self._kinds) == 1:
            return None
        plain = [one._with({"replace": "none"}) for one in self._totals]
        return plain[0].observing_for(plain[1:]), "constants"

    def _with(self, changes: Mapping[str, Any]) -> Self:
        return type(self)(self.options.model_copy(update=changes), self.criteria)

    def __init__(self, options: OptionsT, criteria: Mapping[str, Any] | None = None) -> None:
        super().__init__(options, criteria)
        self._plans: dict[int, LayerPlan] = {}

    def _plan(self, layer: MoELayer) -> LayerPlan:
        """What the options mean for a layer, thought over once; it holds the layer, so that its id stays its own."""
        return self._plans.setdefault(id(layer), LayerPlan(layer, self.options))

    @property
    def _compares(self) -> bool:
        """Whether whole decisions are compared by what the model's answers lose."""
        return self.options.chooses or len(self._kinds) > 1

    def candidates(self, layers: Sequence[MoELayer], layer: MoELayer, statistics: Gathered) -> list[Decision]:
        """What would be decided for each count that is measured, in each way; the same set once."""
        if len(self._all_kinds) > 1:
            kinds = [kind for one in self._totals for kind in one._known(statistics)]
            offered = [one for kind in kinds for one in kind.candidates(layers, layer, statistics)]
            return [*{_sets(one): one for one in reversed(offered)}.values()][::-1]
        found: dict[tuple[int, ...], Choice] = {}
        plans = [LayerPlan(layer, way) for way in _ways(self, layers)]
        for count in layer_plan.measured_counts(self._plan(layer), len(layers)):
            for plan in plans:
                one, _ = self._chosen(plan, statistics, count)
                found.setdefault(tuple(one["kept"]), one | {"constants": self.options.with_constants})
        whole = {} if self.options.top_k is None else {"top_k": self.options.top_k}
        decisions = [Decision({"layers": {layer.path: one}, **whole}) for one in found.values()]
        return [_replacing(self.options, one, statistics) for one in decisions]

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> Decision:
        """Per layer: the ids kept and dropped, how they were found, and what they lose where a search has told. Of
        several kinds the one whose measured counts cost least, else the first.
        """
        if len(self._kinds) > 1:
            all_asked = self.options.replace is not None
            return _least_of(self._known(statistics), layers, statistics, all_asked=all_asked)
        plans = [self._plan(layer) for layer in layers]
        decision, costs = Decision({"layers": {}}), dict[str, float]()
        num_kept = [(plan, plan.counts[0]) for plan in plans if not self.options.budget]
        if self.options.budget:
            from compressor.selection.sharing import shared

            ways = [[LayerPlan(layer, way) for layer in layers] for way in _ways(self, layers)]
            how = (statistics, lambda plan, count: self._chosen(plan, statistics, count))
            decision["budget"], num_kept, costs = shared(ways, *how)
        for plan, count in num_kept:
            found, _ = self._chosen(plan, statistics, count)
            decision["layers"][plan.path] = found | ({"kl": costs[plan.path]} if plan.path in costs else {})
        if self.options.top_k is not None:
            decision["top_k"] = self.options.top_k
        if self.options.padded:
            decision["padded"] = True
        return _replacing(self.options, decision, statistics)

    def _chosen(self, plan: LayerPlan, statistics: Gathered, num_kept: int) -> tuple[Choice, float]:
        """What is decided for a count, and its cost. Raises OptionError where the figures cannot tell."""
        from compressor.selection.deciding import decided

        return decided(plan, statistics, num_kept, self.criteria)

    def alternatives(self, layers: Sequence[MoELayer], statistics: Gathered) -> dict[str, Decision]:
        """What is asked for, other ways of sharing out and of choosing experts, as far as the figures can tell."""
        if not self._compares:
            return {}
        by_kind = [one._named(layers, statistics) for one in self._known(statistics)]
        _tell_even([one for found in by_kind for one in found.values()])
        by_kind.sort(key=lambda found: _summed_kl(next(iter(found.values()))))
        same: dict[object, Decision] = {}
        return {name: same.setdefault(_sets(one), one) for found in by_kind for name, one in found.items()}

    def _rivals(self, layers: Sequence[MoELayer], domains: Sequence[str]) -> dict[str, dict[str, Any]]:
        return layer_plan.rivals(self.options, self.criteria, domains, several=len(_ways(self, layers)) > 1)

    def _named(self, layers: Sequence[MoELayer], statistics: Gathered) -> dict[str, Decision]:
        found: dict[str, Decision] = {}
        for name, changes in self._rivals(layers, statistics.domains).items():
            try:
                found[name] = self._with(changes).decide(layers, statistics)
            except OptionError:
                if not found:  # what was asked for
                    raise
        return found

    def cost(self, kl: Mapping[str, float]) -> float:
        """As the option `blend` says."""
        from compressor.selection.sharing import blended

        return blended(list(kl.values()), list(kl), self.options.blend)

    def preview(self, moe: MoEModel, decision: Decision) -> AbstractContextManager[object]:
        """Removed means masked; or such an expert answers a constant."""
        if decision.get("replace") == "constants":
            found = {path: _constants(decision, path) for path in decision["layers"]}
            return moe.replaced({path: one for path, one in found.items() if one})
        kept = {path: layer["kept"] for path, layer in decision["layers"].items()}
        return moe.masked(kept, top_k=decision.get("top_k"))

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        """Remove the experts that are not kept, let them answer constants, or never be chosen."""
        kept = decision["layers"][layer.path]["kept"]
        if decision.get("replace") == "constants":
            layer.replace(_constants(decision, layer.path))
        elif decision.get("replace") == "never_chosen":
            layer.replace(dict.fromkeys(expert for expert in range(layer.num_experts) if expert not in kept))
        else:
            layer.keep(kept, top_k=decision.get("top_k"), padded=decision.get("padded", False))

    # shown, and compared with chance

    def describe(self, decision: Decision) -> Description:
        """What each layer loses, in each domain where there are several; who stays; what is odd."""
        found = shown(decision, self.expert_ids[2:])
        if decision.get("replace") != "constants":
            return found
        note = "what is dropped answers a constant, whatever it is given, with the weight that the router gives it"
        return replace(found, notes=[note, *found.notes])

    def by_expert(
        self, layers: Sequence[MoELayer], statistics: Gathered, decision: Decision
    ) -> Mapping[str, Mapping[str, Sequence[float | None]]]:
        """Use, output and score, as far as they were gathered."""
        from compressor.selection.deciding import by_expert

        plans = [self._plan(layer) for layer in layers if statistics.get(layer.path)]
        return {plan.path: by_expert(plan, statistics, decision["layers"][plan.path], self.criteria) for plan in plans}

    def control(self, decision: Decision, layers: Sequence[MoELayer], seed: int) -> Decision | str:
        """As many experts of every layer; what goes answers its own constant, if that is asked for."""
        from compressor.selection.reference import kept_at_random

        kind = self._kinds[-1 if decision.get("replace") == "constants" else 0]
        drawn = kept_at_random(decision, [kind._plan(layer).free for layer in layers], seed)
        if isinstance(drawn, Decision):
            drawn.tensors = decision.tensors
        return drawn


def _ways(method: ExpertSelection[Any], layers: Sequence[MoELayer]) -> list[SelectionOptions]:
    """The ways in which sets are chosen that are measured."""
    if not method.options.is_measured:
        return [method.options]
    most = max(len(layer_plan.measured_counts(method._plan(layer), len(layers))) for layer in layers)
    return layer_plan.measured_ways(method.options, method.criteria, len(layers), most)


def _bytes_of_search(plans: Sequence[LayerPlan]) -> float:
    """What a search keeps of a token at one layer, by these plans of it."""
    counts = [min(plan.counts) for plan in plans if plan.changes and plan.route == "greedy"]
    if not counts:
        return 0.0
    from compressor.selection.greedy import most_bytes_of_token, ranks_looked_at

    layer, options = plans[0].layer, plans[0].options
    ranks = ranks_looked_at(layer, min(counts), options.top_k, options.ranks)
    return most_bytes_of_token(layer, ranks, options.top_k or layer.top_k, has_residual=options.progressive)


def _sets(decision: Decision) -> object:
    """What decisions have in common that say the same of the model."""
    return decision.get("replace"), *((path, *one["kept"]) for path, one in decision["layers"].items())


def _num_candidates(layers: Sequence[MoELayer], methods: Sequence[ExpertSelection[Any]]) -> int:
    """Sets of a layer that are measured at most, whatever answers in the place of the experts that go."""
    found = 0
    for kind in {one.options.replacement for one in methods}:
        of_kind = [one for one in methods if one.options.replacement == kind and one.options.is_measured]
        counts = [
            {n for one in of_kind for n in layer_plan.measured_counts(one._plan(layer), len(layers))}
            for layer in layers
        ]
        found += max((len(_ways(one, layers)) for one in of_kind), default=0) * max(map(len, counts))
    return found


def _least_of(
    kinds: Sequence[Method[Any]], layers: Sequence[MoELayer], statistics: Gathered, *, all_asked: bool
) -> Decision:
    """The decision whose measured counts cost least; of those that figures tell of, unless all were asked for."""
    found, refused = list[Decision](), list[OptionError]()
    for one in kinds:
        try:
            found.append(Decision.of(one.decide(layers, statistics)))
        except OptionError as error:
            refused.append(error)
    if refused and (all_asked or not found):
        raise refused[0]
    _tell_even(found)
    return min(found, key=_summed_kl)


def _tell_even(found: Sequence[Decision]) -> None:
    """Say in all what an even split of a mean would lose where experts are removed, which every engine reads."""
    even = next((one["budget"]["even"] for one in found if "even" in one.get("budget", {})), None)
    for one in (one for one in found if even and "summed_kl" in one.get("budget", {})):
        one["budget"].setdefault("even", even)


def _summed_kl(decision: Decision) -> float:
    """What the counts of a mean cost, as far as they were measured."""
    return float(decision.get("budget", {}).get("summed_kl", 0.0))


def _constants(decision: Decision, path: str) -> dict[int, Tensor]:
    """Expert → what it answers, of those of a layer that are not kept."""
    values_EH = decision.tensors.get(path, {}).get(_CONSTANTS, ())
    kept = set(decision["layers"][path]["kept"])
    return {expert: value_H for expert, value_H in enumerate(values_EH) if expert not in kept}


def _check_criterion(name: str | None, criteria: Mapping[str, Any]) -> None:
    """Raise OptionError unless it is known."""
    if name is not None and name not in criteria:
        known = ", ".join(sorted(criteria))
        raise OptionError(
            "criterion", f"there is no criterion {name!r}{did_you_mean(name, criteria)} Known are {known}."
        )


def _check_text(options: SelectionOptions, *, needs_text: bool) -> None:
    """Raise OptionError where an option is about text and none is read."""
    idle = {"progressive": options.progressive, "blend": options.blend != "mean"}
    for option in (option for option, given in idle.items() if given and not needs_text):
        raise OptionError(
            option, f"it would have no effect, since `criterion: {options.criterion}` looks at no text; leave it out."
        )


def _criterion_notes(criteria: Mapping[str, Any], plans: Sequence[LayerPlan], *, needs_text: bool) -> list[str]:
    name = plans[0].options.criterion
    if name is None or not any(plan.changes for plan in plans):
        return []
    notes = [f"experts are kept by their score: {name} ({criteria[name].source})"]
    if not needs_text:
        notes.append(
            "no calibration text is read for it, so super experts are not known and not protected (with "
            "`gather: [outputs]` some is, and they are)"
        )
    return sorted(notes)


def _gathered(plans: Sequence[LayerPlan], criterion: Any, *, constants_asked: bool) -> Statistic:
    """What is gathered of one layer for these plans of it, and for a criterion, if that decides."""
    from compressor.observe.statistic import JoinedStatistic
    from compressor.selection.activation_sums import ExpertSums
    from compressor.selection.constants import ConstantErrors
    from compressor.selection.exact import SubsetErrors
    from compressor.selection.pair_losses import PairLosses

    layer, options = plans[0].layer, plans[0].options
    needs = {*options.gather, *(criterion.needs if criterion else ())}
    sums = ExpertSums(layer, outputs="outputs" in needs)
    parts: list[Statistic] = [sums]
    if criterion is not None and criterion.statistic is not None:
        parts.append(criterion.statistic(layer))
    if "pairs" in needs:
        parts.append(PairLosses(layer))
    if any(plan.options.with_constants for plan in plans):
        parts.append(ConstantErrors(layer, must=constants_asked))
    if exact := [plan for plan in plans if plan.route == "exact"]:
        parts.append(SubsetErrors(layer, sorted({n for plan in exact for n in plan.counts}), options.top_k))
    if greedy := [plan for plan in plans if plan.route == "greedy"]:
        parts.append(_greedy_search(greedy, sums))
    return JoinedStatistic(parts)


def _greedy_search(plans: Sequence[LayerPlan], sums: ExpertSums) -> GreedySearch:
    from compressor.selection.deciding import fixed
    from compressor.selection.greedy import GreedySearch

    plan = min(plans, key=lambda one: one.counts[0])
    layer, options, fewest = plan.layer, plan.options, plan.counts[0]

    def protected() -> list[int]:
        return fixed(plan, sums.largest(), fewest).staying

    budget, starts = options.budget, options.starts
    many_go = not budget and layer.num_experts - fewest > _MANY_DROPPED * layer.num_experts  # of a mean, the path
    return GreedySearch(
        layer,
        sorted({one.counts[0] for one in plans}),  # of a mean the fewest, since the path tells the others
        top_k=options.top_k,
        blend=options.blend,
        protected=protected,
        forbidden=plan.forbidden,
        num_ranks=options.ranks,
        num_starts=(_STARTS_WHERE_MANY_GO if many_go else 0) if starts is None else starts,
    )


def _replacing(options: SelectionOptions, decision: Decision, statistics: Gathered) -> Decision:
    """The decision with what becomes of experts that go; each layer's constants [E, H] if they answer some."""
    from compressor.selection.constants import values_of

    if options.replacement != "none":
        decision["replace"] = options.replacement
    if options.with_constants:
        changed = [path for path, one in decision["layers"].items() if one["dropped"]]
        decision.tensors = {path: {_CONSTANTS: values_of(statistics[path])} for path in changed}
    return decision
