"""Options: what can be said, what has no effect, and what a model cannot do, each by its text."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from compressor.model.find_structure import find_structure
from compressor.plugin import Gathered, OptionError
from compressor.testing.tiny import model_class, tiny_config
from compressor_dynamic_skipping import DynamicSkipping, DynamicSkippingOptions
from compressor_dynamic_skipping.curves import NUM_BINS


def method(**options):
    return DynamicSkipping(DynamicSkippingOptions.model_validate(options))


def layers(name="mixtral", **changes):
    return find_structure(model_class(name), tiny_config(name, **changes)).layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.3, "mean_experts": 1.5}, "`threshold` and `mean_experts` both say how much is skipped"),
        ({"keep_mass": 0.9, "top_k": 1}, "`keep_mass` and `top_k` both say how much is skipped"),
        ({"threshold": 0}, "found 0; a threshold is a number above 0, up to 1, or median"),
        ({"threshold": 1.2}, "found 1.2; a threshold is a number above 0"),
        ({"threshold": -0.1}, "found -0.1; a threshold is a number above 0"),
        ({"threshold": {}}, "found an empty mapping; name at least one layer"),
        ({"threshold": {0: 3.0}}, "found 3.0; a threshold is a number above 0"),
        ({"keep_mass": 1.0}, "less than 1"),
        ({"keep_mass": 0.0}, "greater than 0"),
        ({"keep_mass": 0.9999999999999}, "found 0.9999999999999, of which nothing may go; give a smaller share"),
        ({"top_k": 0}, "greater than or equal to 1"),
        ({"normalise_over": 8}, "`normalise_over` would have no effect without `top_k`"),
        ({"top_k": 4, "normalise_over": 2}, "`normalise_over` should be at least `top_k`, found 2 and 4"),
        ({"top_k": 4, "rule": "ratio"}, "`rule` would have no effect beside `top_k`"),
        ({"threshold": 0.3, "precision": 0.1}, "`precision` would have no effect: nothing is calibrated"),
        ({"rule": "softmax"}, "'ratio', 'tail_mass' or 'contribution'"),
        ({"colour": 3}, "Extra inputs are not permitted"),
        ({"mean_experts": 1.5, "precision": float("inf")}, "finite number"),
        ({"mean_experts": 1.5, "precision": 0}, "greater than 0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValidationError) as error:
        method(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "options", "option", "message"),
    [
        (
            "mixtral",
            {},
            {"mean_experts": 0.5},
            "mean_experts",
            "found 0.5; a token chooses 2 experts and keeps at least 1",
        ),
        ("mixtral", {}, {"mean_experts": 2.0}, "mean_experts", "a mean lies from 1 up to, and not at, 2."),
        ("mixtral", {}, {"mean_experts": 3.5}, "mean_experts", "found 3.5"),
        ("mixtral", {"top_k": 4}, {}, None, "each token chooses 4 experts. The median is the paper's threshold for 2"),
        ("mixtral", {}, {"threshold": {9: 0.3}}, "threshold", "there is no MoE layer 9; the MoE layers are 0, 1, 2"),
        (
            "mixtral",
            {},
            {"threshold": {0: 0.3, "model.layers.0.mlp": 0.2}},
            "threshold",
            "named twice, as model.layers.0.mlp and as 0",
        ),
        ("mixtral", {}, {"top_k": 2}, "top_k", "each token chooses 2 experts, so 2 skips nothing"),
        ("mixtral", {}, {"top_k": 1, "normalise_over": 9}, "normalise_over", "its router has no 9 experts"),
        ("deepseek_v3", {}, {"top_k": 1, "normalise_over": 5}, "normalise_over", "its router has no 5 experts"),
        ("gemma4_text", {}, {"top_k": 1, "normalise_over": 4}, "normalise_over", "its router reads from the config"),
        ("phimoe", {}, {"top_k": 1, "normalise_over": 4}, "normalise_over", "names 2 experts, whatever it is asked"),
        ("jetmoe", {}, {"rule": "contribution"}, "rule", "its block sorts (token, expert) pairs"),
        ("switch_transformers", {}, {}, None, "each token chooses one expert, so there is nothing to skip"),
        ("zaya", {}, {"mean_experts": 1.0}, None, "each token chooses one expert, so there is nothing to skip"),
    ],
)
def test_models_that_cannot(name, changes, options, option, message):
    with pytest.raises(OptionError) as error:
        method(**options).check(layers(name, **changes))
    assert error.value.option == option
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "top_k", "says"),
    [
        ({}, 2, "by ratio: weights small against the token's largest; thresholds: the median"),
        ({"threshold": "median"}, 4, "thresholds: the median"),
        ({"threshold": 0.3}, 4, "thresholds as given"),
        ({"mean_experts": 2.5}, 4, "so that a token uses 2.5 experts on average, now 4"),
        ({"keep_mass": 0.9}, 4, "by tail_mass: the smallest weights of a token, together small"),
        ({"keep_mass": 0.9, "rule": "ratio"}, 4, "by ratio"),
        ({"mean_experts": 2.5}, 4, "by tail_mass"),
        ({"top_k": 2}, 4, "each token uses the 2 largest of 4 experts, with weights normalised over 4"),
        ({"top_k": 2, "normalise_over": 8}, 4, "normalised over 8"),
    ],
)
def test_what_check_says(options, top_k, says):
    given = layers("mixtral", top_k=top_k)
    plan = method(**options).check(given)
    assert says in plan.notes[0]
    assert all(layer.skip_rule is not None for layer in plan.layers)
    assert [dataclasses.replace(layer, skip_rule=None) for layer in plan.layers] == list(given)


# deciding from figures made by hand


def figures(steps, tokens=1000.0, top_k=2, held_out=None, renormalises=1):
    """(score, share, error) of each expert that may be skipped, `tokens` / 10 times each."""
    from compressor_dynamic_skipping.curves import bins_of

    domains = [steps, *([held_out] if held_out else [])]
    found = {
        "same.renormalises": torch.tensor(renormalises),
        "sums.skip.tokens": torch.full((len(domains),), tokens, dtype=torch.float64),
        "sums.skip.experts": torch.full((len(domains),), tokens * top_k, dtype=torch.float64),
        "sums.skip.squared_output": torch.full((len(domains),), 100.0, dtype=torch.float64),
        "sums.skip.norm": torch.full((len(domains), 8), 50.0, dtype=torch.float64),
        "sums.skip.chosen": torch.full((len(domains), 8), 25.0, dtype=torch.float64),
        "skip.ratio.median": torch.tensor(sorted(score for score, _, _ in steps)[len(steps) // 2]),
    }
    for rule in ("sums.skip.ratio", "sums.skip.tail_mass", "skip.contribution"):
        found[rule] = torch.zeros(len(domains), NUM_BINS, 3, dtype=torch.float64)
        for domain, of_domain in enumerate(domains):
            for score, share, error in of_domain:
                row = torch.tensor([tokens / 10, share * tokens / 10, error], dtype=torch.float64)
                found[rule][domain, bins_of(torch.tensor([score]))] += row
    return found


TEN = [(0.05 + 0.1 * number, 0.1, 1.0) for number in range(10)]


def decided(options, gathered=None, **changes):
    found = layers()
    if gathered is None:
        gathered = Gathered({layer.path: figures(TEN) for layer in found}, ["text"])
    return method(**options).decide(found, gathered)


def test_a_number_for_all_layers():
    decision = decided({"threshold": 0.5})
    for layer in decision["layers"].values():
        assert (layer["rule"], layer["beta"], layer["renormalise"]) == ("ratio", 0.5, True)
        assert layer["mean_experts"] == pytest.approx(1.5)
        assert layer["kept_mass"] == pytest.approx(0.95)
        assert layer["relative_loss"] == pytest.approx(0.05**0.5)
    assert decision["mean_experts"] == pytest.approx(1.5)


def test_thresholds_by_layer():
    decision = decided({"threshold": {0: 0.5, "model.layers.2.mlp": "median"}})
    first, second, third = decision["layers"].values()
    assert first["beta"] == 0.5
    assert second == {"rule": None, "mean_experts": 2.0, "kept_mass": 1.0, "relative_loss": 0.0}
    assert third["beta"] == pytest.approx(0.55)
    assert decision["mean_experts"] == pytest.approx((1.5 + 2.0 + 1.5) / 3, abs=0.02)


def test_a_mean_is_met_over_the_layers_together():
    """The first layer's scores are half as large: it gives two of three skipped experts, at one threshold."""
    found = layers()
    low = [(score / 2, share, error) for score, share, error in TEN]
    gathered = Gathered({layer.path: figures(low if "0" in layer.path else TEN) for layer in found}, ["text"])
    decision = decided({"mean_experts": 1.6, "rule": "ratio"}, gathered)
    first, second, third = decision["layers"].values()
    assert first["beta"] == second["beta"] == third["beta"]
    assert (first["rule"], first["mean_experts"]) == ("ratio", pytest.approx(1.4))
    assert second["mean_experts"] == third["mean_experts"] == pytest.approx(1.7)
    assert decision["mean_experts"] == pytest.approx(1.6)


def test_a_mass_for_every_token_or_on_average():
    for layer in decided({"keep_mass": 0.9})["layers"].values():
        assert (layer["rule"], layer["beta"]) == ("tail_mass", 0.1)
    for layer in decided({"keep_mass": 0.965, "rule": "ratio"})["layers"].values():
        assert layer["kept_mass"] == pytest.approx(0.97)
        assert layer["rule"] == "ratio"


def test_contribution_carries_the_norms():
    for layer in decided({"mean_experts": 1.5, "rule": "contribution"})["layers"].values():
        assert layer["expert_norms"] == [2.0] * 8


def test_held_out_text_is_reported_and_decides_nothing():
    found = layers()
    other = [(0.99, 0.1, 1.0)] * 10
    both = Gathered({layer.path: figures(TEN, held_out=other) for layer in found}, ["text", "rest"], ["rest"])
    alone = decided({"threshold": "median"})
    decision = decided({"threshold": "median"}, both)
    for path, layer in decision["layers"].items():
        assert layer["beta"] == alone["layers"][path]["beta"]
        assert layer["mean_experts"] == alone["layers"][path]["mean_experts"]
        assert layer["held_out"]["mean_experts"] == pytest.approx(2.0)
    assert decision["held_out_mean_experts"] == pytest.approx(2.0)


def test_layers_without_a_token_skip_nothing():
    found = layers()
    gathered = Gathered({layer.path: figures(TEN) for layer in found[1:]}, ["text"])
    decision = decided({"threshold": 0.5}, gathered)
    assert decision["layers"][found[0].path]["rule"] is None
    assert decision["layers"][found[1].path]["rule"] == "ratio"


def test_a_layer_that_is_named_must_have_been_seen():
    found = layers()
    gathered = Gathered({layer.path: figures(TEN) for layer in found[1:]}, ["text"])
    with pytest.raises(OptionError, match=r"layers\.0\.mlp: no token of the calibration text comes to this layer"):
        decided({"threshold": {0: 0.3, 1: 0.3}}, gathered)
    assert decided({"threshold": {1: 0.3}}, gathered)["layers"][found[0].path]["rule"] is None


def test_a_fixed_count():
    """1000 tokens of 4 experts, 2000 of these gone with 300 tokens' weight; √(5 / 100)."""
    found = layers("mixtral", top_k=4)
    fixed = {"sums.skip.top_k.2.8": torch.tensor([[2000.0, 300.0, 5.0]], dtype=torch.float64)}
    gathered = Gathered({layer.path: figures(TEN, top_k=4) | fixed for layer in found}, ["text"])
    for layer in method(top_k=2, normalise_over=8).decide(found, gathered)["layers"].values():
        assert (layer["rule"], layer["top_k"], layer["normalise_over"]) == ("top_k", 2, 8)
        assert layer["mean_experts"] == pytest.approx(2.0)
        assert layer["kept_mass"] == pytest.approx(0.7)
        assert layer["relative_loss"] == pytest.approx(0.05**0.5)


def test_same_figures_same_decision():
    assert decided({"mean_experts": 1.4}) == decided({"mean_experts": 1.4})


@pytest.mark.parametrize(
    ("options", "tokens", "message"),
    [
        ({}, 50, "50 tokens of calibration text tell how many experts a token uses to ±0.14, and ±0.1 is asked for"),
        ({"mean_experts": 1.5, "precision": 0.015}, 1000, "Calibrate on about 4,500 tokens, or ask for less precision"),
        ({"keep_mass": 0.95, "rule": "ratio"}, 20, "20 tokens of calibration text"),
    ],
)
def test_too_few_tokens_for_the_precision_asked(options, tokens, message):
    found = layers()
    gathered = Gathered({layer.path: figures(TEN, tokens=float(tokens)) for layer in found}, ["text"])
    with pytest.raises(OptionError) as error:
        decided(options, gathered)
    assert message in str(error.value)
    # what needs no text is not asked how much there was
    decided({"threshold": 0.5}, gathered)
    decided({"keep_mass": 0.9}, gathered)


def test_figures_that_cannot_answer():
    found = layers()
    few = {name: tensor for name, tensor in figures(TEN).items() if "median" not in name and "top_k" not in name}
    added_up = Gathered({layer.path: few for layer in found}, ["text"])
    for options, option, message in (
        ({}, "threshold", "the median of added-up figures is not known; give a number, or `mean_experts`"),
        ({"top_k": 1}, "top_k", "these numbers were not measured; observe again"),
    ):
        with pytest.raises(OptionError, match=message) as error:
            decided(options, added_up)
        assert error.value.option == option
    other = Gathered(
        {layer.path: {"sums.tokens": torch.ones(1, 8), "same.renormalises": torch.tensor(1)} for layer in found}, ["t"]
    )
    with pytest.raises(OptionError, match="the figures hold nothing to find thresholds of the rule tail_mass by"):
        decided({"keep_mass": 0.9}, other)
    with pytest.raises(OptionError, match="nothing was gathered to decide by"):
        decided({}, Gathered({}, ["text"]))


def test_a_mean_that_the_text_cannot_be_brought_to():
    """By contribution the largest weight and the largest contribution both stay: more than one expert a token."""
    found = layers()
    gathered = Gathered({layer.path: figures(TEN[:5]) for layer in found}, ["text"])
    with pytest.raises(OptionError, match=r"can be brought from 2 down to 1\.5") as error:
        decided({"mean_experts": 1.2, "rule": "contribution"}, gathered)
    assert error.value.option == "mean_experts"


@pytest.mark.parametrize(
    "options",
    [{"threshold": 0.01}, {"threshold": 1e-46}, {"keep_mass": 0.99}, {"threshold": {0: 0.01}}, {"mean_experts": 1.99}],
)
def test_what_skips_nothing_of_the_text_has_no_effect(options):
    """The smallest of its scores is 0.05."""
    with pytest.raises(OptionError, match="no layer would skip a single expert on the calibration text, so this"):
        decided({"rule": "ratio", **options} if "mean_experts" in options else options)


def test_normalising_over_where_the_router_does_not():
    found = layers("mixtral", top_k=4)
    fixed = {"sums.skip.top_k.2.4": torch.tensor([[2000.0, 300.0, 5.0]], dtype=torch.float64)}
    gathered = Gathered({layer.path: figures(TEN, top_k=4, renormalises=0) | fixed for layer in found}, ["text"])
    with pytest.raises(OptionError, match="its router does not renormalise"):
        method(top_k=2, normalise_over=4).decide(found, gathered)
