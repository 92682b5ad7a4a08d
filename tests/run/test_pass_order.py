"""What each pass is given by those before it, and the orders of passes in which one would undo another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest

from compressor.errors import PluginError, RecipeError
from compressor.plugin import Decision, Method, MoELayer, Options, Plan, SkipRule, fewer_experts
from compressor.plugins import load_plugins
from compressor.recipe.schema import LoadedRecipe, load_recipe
from compressor.run import check

PLUGINS = load_plugins()


class NoOptions(Options):
    pass


class _Planned(Method[NoOptions]):
    """A pass of which only what it plans matters."""

    version = "1"
    api = 2
    options_type: ClassVar[type[Options]] = NoOptions
    given: ClassVar[list[Sequence[MoELayer]]] = []

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        self.given.append(layers)
        return self.plan(layers)

    def plan(self, layers: Sequence[MoELayer]) -> Plan:
        raise NotImplementedError

    def statistic(self, layer: MoELayer) -> None:
        return None

    def decide(self, layers: Sequence[MoELayer], statistics: Any) -> Decision:
        raise NotImplementedError

    def edit(self, layer: Any, decision: Decision) -> None:
        raise NotImplementedError


def method(name: str, plan: Callable[[Sequence[MoELayer]], Plan]) -> type[Method[Any]]:
    return type(name, (_Planned,), {"name": name, "given": [], "plan": lambda self, layers: plan(layers)})


def sets(name: str, *, changes_values: bool = True, first: int | None = None, **changes: Any) -> type[Method[Any]]:
    """A pass that sets these fields of all layers, or of the `first`."""
    return method(
        name,
        lambda layers: Plan(
            [*(dataclasses.replace(layer, **changes) for layer in layers[:first]), *(layers[first:] if first else [])],
            changes_values=changes_values,
        ),
    )


METHODS = {
    one.name: one
    for one in (
        sets("two_of_four", zeros="2:4"),
        sets("unstructured", zeros="unstructured", first=3),
        sets("rescale"),
        sets("fill", zeros=None, first=1),
        sets("int4", bits=4.25),
        sets("int8", bits=8),
        sets("unpack", bits=None, changes_values=False),
    )
}


def loaded(*passes: str | dict[str, Any], own: Sequence[type[Method[Any]]] = ()) -> LoadedRecipe:
    settings = {
        "model": "demo",
        "calibration": {"data": [{"demo": "code", "samples": 1, "length": 8}]},
        "passes": [{one: {}} if isinstance(one, str) else one for one in passes],
    }
    methods = {**PLUGINS.methods, **METHODS, **{one.name: one for one in own}}
    return load_recipe(settings, methods=methods, criteria=PLUGINS.criteria)


PRUNE: dict[str, Any] = {"expert_pruning": {"keep": 6}}
MERGE: dict[str, Any] = {"expert_merging": {"keep": 4}}
FILLED = "there are 2:4 zeros in 4 layers by then, and {} would fill them: put it before the pass that makes them"
STORED = "weights are stored with 4.25 bits by then, and nothing edits that: put {} before the pass that stores them so"


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        (["two_of_four", MERGE], f"passes[1].expert_merging: {FILLED.format('expert_merging')}"),
        (["two_of_four", PRUNE, "rescale", MERGE], f"passes[3].expert_merging: {FILLED.format('expert_merging')}"),
        (
            ["unstructured", "fill"],
            "passes[1].fill: there are unstructured zeros in 1 layer by then, and fill would fill them: put it before "
            "the pass that makes them",
        ),
        (["int4", MERGE], f"passes[1].expert_merging: {STORED.format('expert_merging')}"),
        (["int4", PRUNE, "rescale"], f"passes[2].rescale: {STORED.format('rescale')}"),
        (["int4", "int8"], f"passes[1].int8: {STORED.format('int8')}"),
        (["int4", "unpack"], f"passes[1].unpack: {STORED.format('unpack')}"),
    ],
)
def test_what_an_earlier_pass_has_made_is_not_undone(passes: list[Any], says: str) -> None:
    with pytest.raises(RecipeError) as error:
        check.check(loaded(*passes))
    assert says in str(error.value)


@pytest.mark.parametrize(
    "passes",
    [
        [MERGE, "two_of_four", "int4"],
        ["two_of_four", PRUNE, {"dynamic_skipping": {}}],
        ["unstructured", "two_of_four", "rescale", "int4", PRUNE],  # other zeros in the same places, or more of them
    ],
)
def test_what_undoes_nothing_may_follow(passes: list[Any]) -> None:
    assert check.check(loaded(*passes)).plan["layers"]


def test_a_pass_is_given_what_those_before_it_leave() -> None:
    """Experts, top-k, zeros, bits and the rules by which the model skips by then."""
    last = sets("last", changes_values=False)
    passes = ("two_of_four", "int4", {"expert_pruning": {"keep": {0: 6, 1: 5, 2: 6, 3: 8}}}, {"dynamic_skipping": {}})
    plan = check.check(loaded(*passes, "last", own=[last])).plan
    ((*layers,),) = last.given
    assert [layer.num_experts for layer in layers] == [6, 5, 6, 8] == [layer["kept"] for layer in plan["layers"]]
    assert {(layer.top_k, layer.zeros, layer.bits) for layer in layers} == {(2, "2:4", 4.25)}
    assert {layer.skip_rule.rule for layer in layers} == {"ratio"}


def test_a_rule_that_knows_its_experts_knows_those_that_stay() -> None:
    """A rule of a later pass is asked about the experts that it will have."""
    norms = sets("norms", skip_rule=SkipRule("contribution", True, beta=0.5, expert_norms=(1.0,) * 8))
    last = sets("last")
    check.check(loaded("norms", PRUNE, "last", own=[norms, last]))
    assert {len(layer.skip_rule.expert_norms) for layer in last.given[0]} == {6}


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (lambda layers: Plan(layers[1:]), "should have the layers that it was given, model.layers.0."),
        (lambda layers: Plan(layers[::-1]), "should have the layers that it was given, model.layers.0."),
        (lambda layers: Plan([]), "; found none."),
        (lambda layers: Plan({layer.path: 6 for layer in layers}), "; found 'model.layers.0."),
        (
            lambda layers: Plan([one.with_count(9) for one in layers]),
            "0.mlp: 8 experts, top-2) becomes MoELayer(model.layers.0.mlp: 9 experts, top-2); a pass",
        ),
        (
            lambda layers: Plan([one.with_count(0) for one in layers]),
            "becomes MoELayer(model.layers.0.mlp: 0 experts, top-2)",
        ),
        (
            lambda layers: Plan([one.with_count(1) for one in layers]),
            "becomes MoELayer(model.layers.0.mlp: 1 experts, top-2)",
        ),
        (
            lambda layers: Plan([dataclasses.replace(one, top_k=3) for one in layers]),
            "becomes MoELayer(model.layers.0.mlp: 8 experts, top-3)",
        ),
        (
            lambda layers: Plan([dataclasses.replace(one, top_k=0) for one in layers]),
            "becomes MoELayer(model.layers.0.mlp: 8 experts, top-0)",
        ),
    ],
)
def test_a_plan_of_other_layers_is_the_plugins_fault(plan: Any, says: str) -> None:
    with pytest.raises(PluginError) as error:
        check.check(loaded("odd", own=[method("odd", plan)]))
    assert str(error.value).startswith("odd: ")
    assert says in str(error.value)


def test_a_count_that_is_made_by_hand_leaves_a_rule_of_other_experts() -> None:
    norms = sets("norms", skip_rule=SkipRule("contribution", True, beta=0.5, expert_norms=(1.0,) * 8))
    by_hand = sets("by_hand", num_experts=6)
    with pytest.raises(
        RecipeError, match=r"passes\[1\]\.by_hand: .* could not go on skipping: the rule knows 8 experts"
    ):
        check.check(loaded("norms", "by_hand", own=[norms, by_hand]))


def test_an_option_is_named_where_fewer_experts_cannot_be(make_layer: Callable[..., MoELayer]) -> None:
    assert fewer_experts(make_layer(8, 2, zeros="2:4", bits=4), 6, "keep") == make_layer(6, 2, zeros="2:4", bits=4)
    assert fewer_experts(make_layer(8, 4), 3, "keep", top_k=2) == make_layer(3, 2)
    with pytest.raises(ValueError, match="it has 8 experts and cannot keep 9") as error:
        fewer_experts(make_layer(8, 2), 9, "drop")
    assert error.value.option == "drop"
