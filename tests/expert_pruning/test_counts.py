"""Counts by layer, a mean, fewer experts per token, padding: what the options accept, what is planned and decided."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from pydantic import ValidationError

from compressor.errors import RecipeError
from compressor.plugin import Decision, Gathered, OptionError
from compressor.recipe.schema import load_recipe
from compressor.selection.exact import dropped_subsets, num_subsets
from compressor.selection.layer_plan import LayerPlan, measured_amount, measured_counts
from compressor.selection.scores import SUMS
from compressor.selection.sharing import costs_between
from compressor_expert_pruning import ExpertPruning, ExpertPruningOptions
from compressor_expert_pruning.criteria import CRITERIA

BY_NAME = {criterion.name: criterion for criterion in CRITERIA}


def method(**options):
    return ExpertPruning(ExpertPruningOptions(**options))


@pytest.fixture
def layers(make_layer):
    """Decoder layers 0, 1 and 3 of eight experts; each token chooses two."""
    return [make_layer(8, 2, path=f"model.layers.{number}.mlp") for number in (0, 1, 3)]


def refusal(layers, **options):
    with pytest.raises(OptionError) as caught:
        method(**options).check(layers)
    return caught.value.option, str(caught.value)


def counts(plan):
    return [layer.num_with_weights for layer in plan.layers]


def planned(layers, **options):
    return counts(method(**options).check(layers))


# In a recipe -----------------------------------------------------------------------------------------------

RECIPE = """\
model: demo
calibration: {data: [{demo: mix}]}
passes:
  - expert_pruning: {keep: 6}
"""


@pytest.fixture
def resolved(tmp_path):
    """A recipe's text after `keep:`, and overrides → the options."""

    def load(keep, *overrides):
        path = tmp_path / "r.yaml"
        path.write_text(RECIPE.replace("6", keep))
        loaded = load_recipe(path, overrides=overrides, methods={"expert_pruning": ExpertPruning})
        again = tmp_path / "again.yaml"
        again.write_text(loaded.to_yaml())
        same = load_recipe(again, methods={"expert_pruning": ExpertPruning})
        assert same.fingerprint == loaded.fingerprint
        return json.loads(json.dumps(loaded.to_mapping()))["passes"][0]["expert_pruning"]

    return load


def test_numbers_of_layers_as_yaml_writes_them(resolved):
    assert resolved("{0: 8, 1: 6, 3: 0.5}")["keep"] == {"0": 8, "1": 6, "3": 0.5}
    assert resolved('{"0": 8, model.layers.1.mlp: 6}')["keep"] == {"0": 8, "model.layers.1.mlp": 6}
    assert resolved("{mean: 5.5}")["keep"] == {"mean": 5.5}


def test_overrides(resolved):
    option = "passes.0.expert_pruning.keep"
    assert resolved("6", option + "={0: 8, 1: 6}")["keep"] == {"0": 8, "1": 6}
    assert resolved("{0: 8, 1: 6}", option + ".1=4", option + ".3=5")["keep"] == {"0": 8, "1": 4, "3": 5}
    assert resolved("{mean: 6}", option + ".mean=5")["keep"] == {"mean": 5}
    assert resolved("6", "passes.0.expert_pruning.top_k=1")["top_k"] == 1


def test_numbers_of_layers_in_python():
    given = {"model": "demo", "calibration": {"data": [{"demo": "mix"}]}}
    recipe = {**given, "passes": [{"expert_pruning": {"keep": {0: 8, 3: 4}}}]}
    loaded = load_recipe(recipe, methods={"expert_pruning": ExpertPruning})
    assert loaded.to_mapping()["passes"][0]["expert_pruning"]["keep"] == {"0": 8, "3": 4}
    assert ExpertPruningOptions(keep={0: 8, "3": 4}).keep == {"0": 8, "3": 4}


PLACE = "r.yaml:4:28 passes[0].expert_pruning.keep"
NO_MEAN = "a mean is a number of experts such as 6 or 5.5, or a fraction such as 0.75"


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ("{0: six}", "passes[0].expert_pruning.keep.0: found 'six', expected a number"),
        ("{0: yes}", "keep.0: found yes, which YAML reads as true, expected a number"),
        ("{0: null}", "keep.0: found null, expected a number"),
        ("{0: {1: 2}}", "keep.0: found a mapping, expected a number"),
        ("{0: 0}", "keep.0: found 0; keep at least 1 expert, and at least as many as a token chooses"),
        ("{0: 1.5}", "keep.0: found 1.5; a fraction lies between 0 and 1, a count is a whole number"),
        ("{}", PLACE + ": found an empty mapping; name at least one layer, such as {3: 4}, or give a count"),
        ("{mean: 6, 3: 4}", "keep.3: unknown key. Known keys: mean"),
        ("{mean: six}", "keep.mean: found 'six', expected a number"),
        ("{mean: 0}", f"keep.mean: found 0; {NO_MEAN}"),
        ("{mean: 1.0}", f"keep.mean: found 1.0; {NO_MEAN}"),
        ("{mean: .inf}", f"keep.mean: found inf; {NO_MEAN}"),
        ("{mean: .nan}", f"keep.mean: found nan; {NO_MEAN}"),
        ("[6]", PLACE + ": found a list, expected a number"),
        ("six", PLACE + ": found 'six', expected a number"),
        ("{010: 4}", 'found the key 010, which YAML reads as int; put it in quotes: "010"'),
        ("{-1: 4}", 'found the key -1, which YAML reads as int; put it in quotes: "-1"'),
        ("{1.5: 4}", 'found the key 1.5, which YAML reads as float; put it in quotes: "1.5"'),
        ("{yes: 4}", 'found the key yes, which YAML reads as bool; put it in quotes: "yes"'),
        ("{3: 4, '3': 5}", "keep.3: given twice, first at "),
        ("6, top_k: 0", "top_k: found 0, expected a number of at least 1"),
        ("6, top_k: one", "top_k: found 'one', expected a whole number"),
        ("6, padded: 1", "padded: found 1, expected true or false"),
    ],
)
def test_wrong_values(resolved, keep, says):
    with pytest.raises(RecipeError) as caught:
        resolved(keep)
    assert says in str(caught.value)


def test_a_key_of_another_kind_in_python():
    with pytest.raises(ValidationError):
        ExpertPruningOptions(keep={True: 4})
    with pytest.raises(ValidationError):
        ExpertPruningOptions(keep={(1, 2): 4})


# By layer --------------------------------------------------------------------------------------------------


def test_layers_that_are_not_named_keep_all(layers):
    assert planned(layers, keep={0: 8, 3: 4}) == [8, 8, 4]
    assert planned(layers, keep={1: 0.5}) == [8, 4, 8]
    assert planned(layers, keep={"model.layers.3.mlp": 6, 0: 5}) == [5, 8, 6]


def test_layers_that_keep_all_need_no_figures(layers):
    by_layer = method(keep={0: 8, 3: 4})
    assert by_layer.statistic(layers[0]) is None
    assert by_layer.statistic(layers[1]) is None
    assert by_layer.statistic(layers[2]) is not None


def test_a_number_may_fit_several_blocks(make_layer):
    both = [make_layer(8, 2, path=path) for path in ("encoder.layers.1.mlp", "decoder.layers.1.mlp")]
    assert planned(both, keep={1: 6}) == [6, 6]
    assert planned(both, keep={"decoder.layers.1.mlp": 6}) == [8, 6]


def test_the_number_is_the_first_in_the_path(make_layer):
    layer = make_layer(8, 2, path="encoder.block.5.layer.2.mlp")
    assert planned([layer], keep={5: 6}) == [6]
    assert "there is no MoE layer 2; the MoE layers are 5 (or by path," in refusal([layer], keep={2: 6})[1]


def test_a_block_without_a_number_goes_by_its_path(make_layer):
    layer = make_layer(8, 2, path="moe")
    assert planned([layer], keep={"moe": 6}) == [6]
    assert "there is no MoE layer 0; the MoE layers are moe (or by path" in refusal([layer], keep={0: 6})[1]


def test_names_that_fit_no_layer(layers):
    known = "the MoE layers are 0, 1, 3 (or by path, such as model.layers.0.mlp)."
    assert refusal(layers, keep={0: 4, 2: 4}) == ("keep", f"there is no MoE layer 2; {known}")
    assert refusal(layers, keep={"layers.3": 4}) == ("keep", f"there is no MoE layer layers.3; {known}")


def test_a_layer_named_twice(layers):
    said = "model.layers.3.mlp: named twice, as model.layers.3.mlp and as 3; keep one of them."
    assert refusal(layers, keep={3: 4, "model.layers.3.mlp": 6}) == ("keep", said)


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ({3: 8}, "model.layers.0.mlp: all 8 experts would stay: nothing to prune."),
        ({3: 9}, "model.layers.3.mlp: it has 8 experts and cannot keep 9."),
        ({0: 6, 3: 1}, "model.layers.3.mlp: cannot keep 1 experts: each token chooses 2, and fewer than 2 is no choi"),
    ],
)
def test_counts_that_cannot_be(layers, keep, said):
    option, message = refusal(layers, keep=keep)
    assert option == "keep"
    assert said in message


def test_one_count_where_only_some_layers_shrink(make_layer):
    """After a pass before, say."""
    different = [make_layer(8, 2, path="layers.0.mlp"), make_layer(6, 2, path="layers.1.mlp")]
    assert planned(different, keep=6) == [6, 6]
    assert "cannot keep 7" in refusal(different, keep=7)[1]


def test_sets_are_said_by_count(layers):
    assert list(method(keep={0: 6, 3: 4}).check(layers).notes) == [
        "28 sets of 6 experts per layer, all of them looked at",
        "70 sets of 4 experts per layer, all of them looked at",
    ]


# A mean ----------------------------------------------------------------------------------------------------


def test_a_mean_is_planned_evenly(layers):
    plan = method(keep={"mean": 6}, replace="none").check(layers)
    assert counts(plan) == [6, 6, 6]
    assert list(plan.notes) == [
        "247 sets of 2 to 8 experts per layer, all of them looked at",
        "18 experts stay in 3 layers; how many in which is found on the calibration text, an even split is shown: up "
        "to 6 sets of each layer are measured on 3,840 tokens, as much work as 46,080 tokens more",
        "2 choices are compared by what the answers lose on 7,680 tokens, as much work as 23,040 tokens more: search, "
        "measured counts; search, even counts",
    ]
    assert planned(layers, keep={"mean": 5.5}) == [5, 6, 6]  # 16.5 experts: halves upwards
    assert planned(layers, keep={"mean": 0.75}) == [6, 6, 6]
    assert planned(layers, keep={"mean": 5.2}) == [5, 5, 6]  # 15.6


@pytest.mark.parametrize(
    ("mean", "said"),
    [
        (9, "a mean of 9 is 27 experts in 3 layers, which cannot be: what the layers can keep adds up to 6 at least "
            "and 24 at most. The nearest possible mean is 8."),
        (1, "a mean of 1 is 3 experts in 3 layers, which cannot be: what the layers can keep adds up to 6 at least "
            "and 24 at most. The nearest possible mean is 2."),
        (0.2, "a mean of 0.2 is 5 experts in 3 layers, which cannot be: what the layers can keep adds up to 6 at least "
              "and 24 at most. The nearest possible mean is 2."),
        (8, "model.layers.0.mlp: all 8 experts would stay: nothing to prune."),
    ],
)  # fmt: skip
def test_means_that_cannot_be(layers, mean, said):
    assert refusal(layers, keep={"mean": mean}) == ("keep", said)


def test_a_mean_of_layers_with_groups(make_layer):
    layers = [make_layer(8, 2, num_groups=2, path=f"layers.{number}.mlp") for number in range(3)]
    assert sorted(planned(layers, keep={"mean": 6}, replace="none")) == [6, 6, 6]  # 4, 6 and 8 are possible
    assert sorted(planned(layers, keep={"mean": 5.4}, replace="none")) == [4, 6, 6]
    assert refusal(layers, keep={"mean": 5}) == (
        "keep",
        "a mean of 5 is 15 experts in 3 layers, which cannot be: what the layers can keep adds up to 12 at least and "
        "24 at most, in steps. The nearest possible mean is 4.66667.",
    )
    assert sum(planned(layers, keep={"mean": 4.66667})) == 14  # what is named can be asked for


def test_a_mean_counts_the_sets_of_all_counts(make_layer):
    layer = make_layer(16, 2)
    assert refusal([layer], keep={"mean": 8}, search="exact") == (
        "search",
        "layers.0.mlp: keeping from 2 to 16 of 16 experts means 65,519 possible sets per layer, too many to look at "
        "all of them: the limit is 20,000 (`max_subsets`). Say `search: greedy`, or leave it out.",
    )
    notes = method(keep={"mean": 8}, max_subsets=65_519).check([layer]).notes
    assert notes[0] == "65,519 sets of 2 to 16 experts per layer, all of them looked at"
    notes = method(keep={"mean": 8}).check([layer]).notes
    assert notes[0] == "65,519 sets of 2 to 16 experts per layer, searched: greedy removal, then best swaps"


def figures(layer, counts, loss_of, norm=100.0):
    """One batch in which set S of r experts loses loss_of(r), plus a little by which the first is the best."""
    losses = [loss_of(count) + place / 1000 for count in counts for place in range(num_subsets(layer, count))]
    return {
        "subsets.squared_error": torch.tensor([losses], dtype=torch.float64).square(),
        "subsets.counts": torch.tensor(counts),
        "batch.squared_output": torch.tensor([norm**2], dtype=torch.float64),
        "batch.domain": torch.tensor([0]),
        "sums.tokens": torch.ones(1, layer.num_experts),
        "sums.largest": torch.ones(1, layer.num_experts),
    }


def test_a_mean_is_shared_out_by_squared_losses(make_layer):
    layers = [make_layer(4, 2, path=f"layers.{number}.mlp") for number in (0, 1)]
    counts = [2, 3, 4]
    # squares 9, 4, 0 and 36, 1, 0; five experts stay: 3 + 2 costs 4 + 36, 2 + 3 costs 9 + 1, 4 + … cannot be with 1
    found = {
        "layers.0.mlp": figures(layers[0], counts, {2: 3.0, 3: 2.0, 4: 0.0}.get),
        "layers.1.mlp": figures(layers[1], counts, {2: 6.0, 3: 1.0, 4: 0.0}.get),
    }
    five = method(keep={"mean": 2.5}, share="loss")
    decision = five.decide(layers, Gathered(found))
    assert decision == json.loads(json.dumps(decision))
    assert [layer["kept"] for layer in decision["layers"].values()] == [[2, 3], [1, 2, 3]]
    assert decision["budget"] == {
        "asked_mean": 2.5,
        "share": "loss",
        "mean": 2.5,
        "num_kept": 5,
        "num_experts": 8,
        "summed_squared_loss": pytest.approx(10.0),
    }
    first = decision["layers"]["layers.0.mlp"]
    assert first.keys() == {"kept", "dropped", "loss", "relative_loss", "search", "median_loss", "sets"}
    assert (first["dropped"], first["sets"]) == ([0, 1], 6)
    assert (first["loss"], first["relative_loss"]) == (pytest.approx(3.0), pytest.approx(0.03))
    six = method(keep={"mean": 3}, share="loss").decide(layers, Gathered(found))  # 9 + 0, 4 + 1, 0 + 36
    assert [len(layer["kept"]) for layer in six["layers"].values()] == [3, 3]


def test_deciding_again_changes_nothing(make_layer):
    layers = [make_layer(4, 2, path=f"layers.{number}.mlp") for number in (0, 1)]
    found = {layer.path: figures(layer, [2, 3, 4], {2: 2.0, 3: 1.0, 4: 0.0}.get) for layer in layers}
    copies = {path: {name: tensor.clone() for name, tensor in one.items()} for path, one in found.items()}
    shared = method(keep={"mean": 3}, share="loss")
    assert shared.decide(layers, Gathered(found)) == shared.decide(layers, Gathered(found))
    assert all(torch.equal(copies[path][name], found[path][name]) for path in found for name in found[path])


def test_layers_without_figures_keep_all(layers):
    by_layer = method(keep={3: 7})
    decision = by_layer.decide(layers, Gathered({layers[2].path: figures(layers[2], [7], {7: 1.0}.get)}))
    kept = {path: layer["kept"] for path, layer in decision["layers"].items()}
    assert kept == {
        "model.layers.0.mlp": list(range(8)),
        "model.layers.1.mlp": list(range(8)),
        "model.layers.3.mlp": list(range(1, 8)),
    }
    assert decision["layers"]["model.layers.0.mlp"] == {
        "kept": list(range(8)), "dropped": [], "loss": 0.0, "relative_loss": 0.0,
    }  # fmt: skip
    assert decision.keys() == {"layers"}
    assert dropped_subsets(layers[2], 7)[0] == (0,)


# Multiples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_experts", "options", "count"),
    [
        (60, {"keep": 0.75, "multiple_of": 8}, 48),  # 45 lies between 40 and 48
        (60, {"keep": 0.7, "multiple_of": 8}, 40),  # 42
        (60, {"drop": 16, "multiple_of": 8}, 48),  # 44: halves upwards
        (64, {"keep": 0.75, "multiple_of": 8}, 48),
        (64, {"keep": 40, "multiple_of": 8}, 40),
        (8, {"keep": 0.1, "multiple_of": 3}, 3),  # a token chooses 2
    ],
)
def test_the_nearest_multiple(make_layer, num_experts, options, count):
    plan = method(search="greedy", **options).check([make_layer(num_experts, 2)])
    assert counts(plan) == [count]


def test_what_a_multiple_changes_is_said(make_layer):
    layer = make_layer(60, 2)
    plan = method(keep=0.75, multiple_of=8).check([layer])
    assert plan.notes[-1] == "multiple_of 8: 48 of 60 experts stay instead of 45"
    assert not any("multiple" in note for note in method(keep=0.8, multiple_of=8).check([layer]).notes)  # 48 anyway


def test_groups_keep_multiples_together(make_layer):
    """As many stay of each of 4 groups, so the count is a multiple of 4 and of 6: 12, 24, 36, …"""
    layer = make_layer(64, 4, num_groups=4, num_chosen_groups=2)
    assert planned([layer], keep=0.4, multiple_of=6, search="greedy") == [24]  # 25.6
    assert planned([layer], keep=0.5, multiple_of=6, search="greedy") == [36]  # 32


def test_a_count_must_be_a_multiple(make_layer, layers):
    said = "layers.0.mlp: 50 is no multiple of 8 (`multiple_of`); nearest: 48 and 56."
    assert refusal([make_layer(64, 2)], keep=50, multiple_of=8) == ("keep", said)
    option, said = refusal(layers, keep={0: 4, 1: 0.6}, multiple_of=3)
    assert option == "keep"
    assert said.startswith("model.layers.0.mlp: 4 is no multiple of 3 (`multiple_of`); nearest: 3")
    said = "model.layers.3.mlp: 8 is no multiple of 3 (`multiple_of`); nearest: 6."
    assert refusal(layers, keep={0: 6, 1: 0.6}, multiple_of=3) == ("keep", said)  # all of it would stay


def test_multiples_that_cannot_be(layers):
    said = "model.layers.0.mlp: none of the counts that it can keep is a multiple of 9; it has 8 experts."
    assert refusal(layers, keep=0.5, multiple_of=9) == ("multiple_of", said)
    said = "model.layers.0.mlp: all 8 experts would stay (`multiple_of: 8`): nothing to prune."
    assert refusal(layers, keep=0.5, multiple_of=8) == ("keep", said)
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        method(keep=4, multiple_of=1)


def test_a_mean_is_shared_out_among_multiples(make_layer):
    layers = [make_layer(4, 2, path=f"layers.{number}.mlp") for number in (0, 1)]
    # squares 9, 0 and 36, 0: a mean of 2.5 is 5 experts, of which 4 and 6 can be; 2 + 4 costs 9, 4 + 2 costs 36
    found = {
        "layers.0.mlp": figures(layers[0], [2, 4], {2: 3.0, 4: 0.0}.get),
        "layers.1.mlp": figures(layers[1], [2, 4], {2: 6.0, 4: 0.0}.get),
    }
    shared = method(keep={"mean": 2.5}, multiple_of=2, share="loss")
    plan = shared.check(layers)
    assert counts(plan) == [2, 4]
    assert "multiple_of 2: 6 experts stay in all instead of 5" in plan.notes
    assert plan.notes[0] == "7 sets of 2 to 4 experts per layer, all of them looked at"
    decision = shared.decide(layers, Gathered(found))
    assert [len(layer["kept"]) for layer in decision["layers"].values()] == [2, 4]
    assert (decision["budget"]["asked_mean"], decision["budget"]["num_kept"]) == (2.5, 6)
    assert decision["budget"]["summed_squared_loss"] == pytest.approx(9.0)


# Fewer experts per token -----------------------------------------------------------------------------------


def test_fewer_experts_per_token(layers):
    plan = method(keep=8, top_k=1).check(layers)
    assert {layer.top_k for layer in plan.layers} == {1}
    assert counts(plan) == [8, 8, 8]
    assert list(plan.notes) == ["each token chooses 1 of a layer's experts, now 2"]
    assert method(keep=8, top_k=1).statistic(layers[0]) is not None
    assert {layer.top_k for layer in method(keep=6).check(layers).layers} == {layers[0].top_k}


def test_a_lower_count_is_possible_then(make_layer):
    layer = make_layer(8, 4)
    assert "cannot keep 3 experts: each token chooses 4" in refusal([layer], keep=3)[1]
    assert planned([layer], keep=3, top_k=2) == [3]
    assert "cannot keep 2 experts: each token chooses 3" in refusal([layer], keep=2, top_k=3)[1]


@pytest.mark.parametrize(
    ("top_k", "said"),
    [
        (2, "model.layers.0.mlp: each token chooses 2 experts already; leave `top_k` out."),
        (3, "model.layers.0.mlp: each token chooses 2 experts, which can be lowered but not raised to 3."),
    ],
)
def test_top_k_that_cannot_be(layers, top_k, said):
    assert refusal(layers, keep=6, top_k=top_k) == ("top_k", said)


def test_top_k_that_the_class_fixes(make_layer):
    layer = make_layer(8, 2, top_k_fixed=True)
    said = "layers.0.mlp: its class chooses 2 experts per token whatever the config says."
    assert refusal([layer], keep=6, top_k=1) == ("top_k", said)
    assert planned([layer], keep=6) == [6]


class FakeModel:
    def __init__(self):
        self.calls = []

    def masked(self, kept, **others):
        self.calls.append(("masked", kept, others))


class FakeLayer:
    def __init__(self, path, calls):
        self.path, self.calls = path, calls

    def keep(self, kept, **others):
        self.calls.append(("keep", {self.path: kept}, others))


@pytest.mark.parametrize(
    ("options", "top_k", "padded"),
    [({"keep": 3}, None, False), ({"keep": 3, "top_k": 1}, 1, False), ({"keep": {0: 3}, "padded": True}, None, True)],
)
def test_the_decision_says_all_that_is_done(make_layer, options, top_k, padded):
    layer, model = make_layer(4, 2), FakeModel()
    chosen = method(**options)
    decision = json.loads(json.dumps(chosen.decide([layer], Gathered({layer.path: figures(layer, [3], {3: 1.0}.get)}))))
    method(keep=2).preview(model, decision)
    for path in decision["layers"]:
        method(keep=2).edit(FakeLayer(path, model.calls), decision)
    kept = {"layers.0.mlp": [1, 2, 3]}
    assert model.calls == [("masked", kept, {"top_k": top_k}), ("keep", kept, {"top_k": top_k, "padded": padded})]


# Padding, and layers that cannot be watched ----------------------------------------------------------------


def test_padding_says_what_it_does_not_save(make_layer):
    layers = [
        dataclasses.replace(make_layer(8, 2, path=f"layers.{number}.mlp"), parameters_per_expert=1000)
        for number in range(4)
    ]
    note = list(method(keep={0: 7, 1: 6, 2: 4, 3: 7}, padded=True).check(layers).notes)[-1]
    # the largest count is 7: 1 of layer 1 and 3 of layer 2 stay
    assert note == "padded to 7 experts in every layer: 4,000 parameters of 4 dropped experts stay in the checkpoint"
    note = list(method(keep={"mean": 6}, padded=True).check(layers).notes)[-1]
    assert note == "padded to the largest layer's count: what the other layers drop beyond that saves no memory"


@pytest.mark.parametrize("options", [{"keep": 6}, {"drop": 2}, {"keep": {0: 6, 1: 6, 3: 6}}])
def test_nothing_to_pad(layers, options):
    said = "every layer keeps 6 experts, so there is nothing to pad; leave it out."
    assert refusal(layers, **options, padded=True) == ("padded", said)


def test_layers_that_cannot_be_padded(make_layer):
    layers = [make_layer(8, 2, path="layers.0.mlp"), make_layer(8, 2, path="layers.1.mlp", padding_problem="no bias")]
    said = "layers.1.mlp: cannot be padded: no bias."
    assert refusal(layers, keep={1: 6}, padded=True) == ("padded", said)
    assert refusal(layers, keep={"mean": 6}, padded=True) == ("padded", said)
    assert planned(layers, keep={0: 6}, padded=True) == [6, 8]  # that one keeps the largest count


def test_layers_that_cannot_be_watched(make_layer):
    layers = [make_layer(8, 2, path="layers.0.mlp"), make_layer(8, 2, path="layers.1.mlp", watch_problem="it hides")]
    for options in ({"keep": 6}, {"keep": {1: 6}}, {"keep": {"mean": 6}}, {"keep": 8, "top_k": 1}):
        assert refusal(layers, **options) == ("keep", "it hides.")
    assert refusal(layers, drop=2) == ("drop", "it hides.")
    assert planned(layers, keep={0: 6}) == [6, 8]


# Shared out by what the answers lose -----------------------------------------------------------------------


def measured_figures(layer, counts, kl):
    """`kl`: count → nats a token, in each of two domains of 10 tokens."""
    found = figures(layer, [2, 3, 4], lambda count: 4.0 - count)
    kept = [{"kept": list(range(count))} for count in counts]
    return found | {
        "measured.kl": torch.tensor([kl[count] for count in counts], dtype=torch.float64) * 10,
        "measured.tokens": torch.tensor([10, 10]),
        "measured.domain": torch.tensor([0, 1]),
        "measured.candidates": torch.frombuffer(bytearray(json.dumps(kept).encode()), dtype=torch.uint8),
    }


@pytest.fixture
def measured(make_layer):
    layers = [make_layer(4, 2, path=f"layers.{number}.mlp") for number in (0, 1)]
    found = {
        "layers.0.mlp": measured_figures(layers[0], [2, 3], {2: (0.4, 0.0), 3: (0.1, 0.0)}),
        "layers.1.mlp": measured_figures(layers[1], [2, 3], {2: (0.1, 0.5), 3: (0.0, 0.4)}),
    }
    return layers, Gathered(found, ("one", "two"))


def test_a_mean_is_shared_out_by_measured_nats(measured):
    layers, found = measured
    # means 0.2, 0.05, 0 and 0.3, 0.2, 0: five experts stay as 2 + 3 for 0.4 or 3 + 2 for 0.35, six as 2 + 4 for 0.2,
    # 3 + 3 for 0.25 or 4 + 2 for 0.3
    five = method(keep={"mean": 2.5}).decide(layers, found)
    assert [len(layer["kept"]) for layer in five["layers"].values()] == [3, 2]
    assert [layer["kl"] for layer in five["layers"].values()] == [pytest.approx(0.05), pytest.approx(0.3)]
    assert (five["budget"]["share"], five["budget"]["summed_kl"]) == ("measured", pytest.approx(0.35))
    assert five["budget"]["measured"]["layers.1.mlp"][2]["kl"] == {"one": pytest.approx(0.1), "two": pytest.approx(0.5)}
    six = method(keep={"fraction": 0.75}).decide(layers, found)
    assert [len(layer["kept"]) for layer in six["layers"].values()] == [2, 4]
    assert six["budget"]["summed_kl"] == pytest.approx(0.2)
    # evenly: two each cost 0.2 + 0.3, three each 0.05 + 0.2
    assert five["budget"]["even"] == {"count": 2, "summed_kl": pytest.approx(0.5)}
    assert six["budget"]["even"] == {"count": 3, "summed_kl": pytest.approx(0.25)}
    assert (
        "an even split with 3 experts in every layer, which every engine reads, would lose 0.25 instead of 0.2; vLLM's "
        "router kernels are made for 2 and 4"
    ) in method(keep={"mean": 3}).describe(six).notes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"blend": "worst"}, [2, 4]),  # 0.4 + 0, 0.1 + 0.4, 0 + 0.5
        ({"blend": {"one": 1}}, [3, 3]),  # 0.4 + 0, 0.1 + 0, 0 + 0.1: a tie, in which the first layer keeps fewer
        ({"keep": {"mean": 3, "min": 3}}, [3, 3]),
        ({"keep": {"mean": 3, "max": 3}}, [3, 3]),
        ({"share": "even"}, [3, 3]),
        ({"share": "loss"}, [3, 3]),  # squares 4 + 0, 1 + 1, 0 + 4
    ],
)
def test_how_nats_are_blended_and_counts_bounded(measured, options, expected):
    layers, found = measured
    decision = method(**({"keep": {"mean": 3}} | options)).decide(layers, found)
    assert [len(layer["kept"]) for layer in decision["layers"].values()] == expected


def test_counts_between_those_measured_cost_in_between():
    assert costs_between({2: 1.0, 4: 0.4, 8: 0.0}, [1, 2, 3, 4, 6, 7, 8]) == {
        2: 1.0, 3: pytest.approx(0.7), 4: 0.4, 6: pytest.approx(0.2), 7: pytest.approx(0.1), 8: 0.0,
    }  # fmt: skip


def test_which_counts_are_measured(make_layer):
    def counts_of(num_experts, chosen, num_layers=4, **options):
        return measured_counts(LayerPlan(make_layer(num_experts, chosen), method(**options).options), num_layers)

    assert counts_of(8, 2, keep={"mean": 4}) == [2, 3, 4, 5, 6, 7]
    assert counts_of(64, 8, keep={"fraction": 0.5}) == [8, 16, 24, 32, 40, 48, 56]
    assert counts_of(64, 8, 32, keep={"fraction": 0.5}) == [16, 24, 32, 40]  # 4 · 33 / 2 · 3840 tokens
    assert counts_of(64, 8, 32, keep={"fraction": 0.75}, measured_counts=2) == [40, 48]
    assert counts_of(8, 2, keep={"mean": 4, "min": 4}) == [4, 5, 6, 7]
    assert counts_of(8, 2, keep={"mean": 4}, top_k=1)[-1] == 8  # then all experts are something else too
    assert measured_amount(method(keep={"mean": 4}).options, 32) == (3840, 4)
    assert measured_amount(method(keep={"mean": 4}).options, 61) == (2816, 3)
    for num_layers in (2, 8, 32, 61, 94):
        tokens, counts = measured_amount(method(keep={"mean": 4}).options, num_layers)
        assert tokens * counts * (num_layers + 1) / 2 <= 128 * 2048


def test_what_was_not_measured_is_not_shared_out(make_layer):
    layers = [make_layer(4, 2, path=f"layers.{number}.mlp") for number in (0, 1)]
    found = {layer.path: figures(layer, [2, 3, 4], lambda count: 4.0 - count) for layer in layers}
    with pytest.raises(OptionError, match=r"layers.0.mlp: what its counts cost was not measured; share the mean"):
        method(keep={"mean": 3}).decide(layers, Gathered(found))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": {"mean": 3, "fraction": 0.5}}, "one of `mean` and `fraction`"),
        ({"keep": {"mean": 3, "min": 4, "max": 2}}, "`min` 4 above `max` 2"),
        ({"keep": 3, "share": "even"}, "`share` would have no effect"),
        ({"keep": {"mean": 3}, "share": "loss", "measured_tokens": 512}, "`measured_tokens` would have no effect"),
        ({"keep": {"mean": 3}, "share": "loss", "criterion": "reap"}, "knows no loss"),
    ],
)
def test_options_of_sharing_that_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        method(**options)


def test_each_layer_takes_the_set_that_was_measured_to_lose_least(make_layer):
    """The search keeps the last experts, weighted EAN the first ones; what was measured says who is right."""
    layers = [make_layer(4, 2, path=f"layers.{number}.mlp") for number in (0, 1)]
    costs = {(2, 3): 0.5, (0, 1): 0.2, (1, 2, 3): 0.1, (0, 1, 2): 0.3}
    kept = [{"kept": list(one)} for one in costs]
    found = {}
    for number, layer in enumerate(layers):
        sums = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
        kl = [[(number + 1) * cost * 10] for cost in costs.values()]
        found[layer.path] = figures(layer, [2, 3, 4], {2: 2.0, 3: 1.0, 4: 0.0}.get) | {
            **{f"sums.{name}": sums for name in SUMS},
            "measured.kl": torch.tensor(kl, dtype=torch.float64),
            "measured.tokens": torch.tensor([10]),
            "measured.domain": torch.tensor([0]),
            "measured.candidates": torch.frombuffer(bytearray(json.dumps(kept).encode()), dtype=torch.uint8),
        }
    chooses = ExpertPruning(ExpertPruningOptions(keep={"mean": 2.5}), BY_NAME)
    decision = chooses.decide(layers, Gathered(found))
    # 2 + 3 experts cost 0.2 + 2 · 0.1, 3 + 2 cost 0.1 + 2 · 0.2
    assert [layer["kept"] for layer in decision["layers"].values()] == [[0, 1], [1, 2, 3]]
    assert decision["budget"]["summed_kl"] == pytest.approx(0.4)
    given = ExpertPruning(ExpertPruningOptions(keep={"mean": 2.5}, choose="given"), BY_NAME)
    decision = given.decide(layers, Gathered(found))
    # its own sets: 0.5 + 0.2, or 0.1 + 1.0
    assert [layer["kept"] for layer in decision["layers"].values()] == [[2, 3], [1, 2, 3]]
    assert decision["budget"]["summed_kl"] == pytest.approx(0.7)


def test_chance_keeps_groups_even_only_where_experts_are_removed(make_layer):
    layer, chance = make_layer(8, 2, num_groups=2), method(keep=4, replace="measured").control
    for kind, num_kept in ({"replace": "constants"}, 5), ({}, 4):
        decision = Decision({"layers": {layer.path: {"kept": [0, 1, 2, 3, 4]}}, **kind})
        assert len(chance(decision, [layer], 0)["layers"][layer.path]["kept"]) == num_kept


# What a mean leaves room for -------------------------------------------------------------------------------


def test_a_layer_with_more_protected_than_the_mean_keeps_them_however_it_is_shared(layers):
    most, all_of_it = {0: list(range(7))}, {0: list(range(8))}
    for share in ("even", "loss", "measured"):
        assert planned(layers, keep={"mean": 5}, share=share, protect=most) == [7, 4, 4]
        assert planned(layers, keep={"mean": 5}, share=share, protect=all_of_it) == [8, 3, 4]
    assert planned(layers, keep={"mean": 5}, forbid={1: list(range(5))}) == [6, 3, 6]
    shared = method(keep={"mean": 5}, protect=all_of_it)
    assert [shared.statistic(layer) is None for layer in layers] == [True, False, False]


def test_a_mean_within_bounds_that_no_layer_can_keep(layers):
    assert refusal(layers, keep={"mean": 5, "min": 9}) == (
        "keep",
        "model.layers.0.mlp: of its 8 experts it can keep no such number.",
    )
    crowded = refusal(layers, keep={"mean": 4, "max": 4}, protect={0: list(range(6))})
    assert crowded[0] == "protect"


def test_counts_that_are_measured_reach_the_total(layers):
    """Known before anything is observed."""
    far = {"keep": {"mean": 4}, "protect": {0: list(range(8))}}
    assert refusal(layers, **far, measured_counts=2) == (
        "measured_counts",
        "12 experts are to stay in 3 layers, and the counts that would be measured, those nearest the mean, add up to "
        "14 at least and 24 at most: say a larger `measured_counts`.",
    )
    assert planned(layers, **far, measured_counts=4) == [8, 2, 2]
