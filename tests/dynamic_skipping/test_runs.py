"""Whole runs: skip; prune, then skip; skip, then prune; saved, loaded, decided again, applied; refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from reference_pages import unexplained
from tiny_models import random_model, tiny_folder, token_ids, write_checkpoint, write_token_file
from transformers import AutoModelForCausalLM

import compressor
from compressor import MoEModel, RecipeError, SkipRule
from compressor.observe.statistics_file import load_statistics, merge_statistics
from compressor.plugin import OptionError
from compressor.plugins import load_plugins
from compressor.recipe.schema import load_recipe
from compressor.report.figures import alone_table
from compressor.report.html import page
from compressor.run import check as checking
from compressor.run.apply import apply
from compressor_dynamic_skipping import DynamicSkipping


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A Qwen3-MoE whose tokens choose four of eight experts, as a checkpoint."""
    return write_checkpoint(
        random_model("qwen3_moe", num_experts_per_tok=4), tmp_path_factory.mktemp("models") / "top4"
    )


@pytest.fixture
def tokens(tmp_path):
    """Thirty sequences of 24 ids; `samples: 24` leaves six that are held out."""
    return write_token_file(tmp_path / "tokens.jsonl", token_ids(30, 24).tolist())


def recipe(model, tokens, *passes, **others):
    return {
        "model": str(model),
        "calibration": {"batch_size": 8, "data": [{"tokens": str(tokens), "samples": 24}]},
        "passes": list(passes),
        **others,
    }


def logits(model):
    with torch.no_grad():
        return model(token_ids(2, 15, seed=9)).logits


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_median_of_a_top_2_model(tokens, tmp_path):
    folder = tiny_folder("mixtral")
    result = compressor.compress(recipe(folder, tokens, {"dynamic_skipping": {}}), output=tmp_path / "out")
    (done,) = result.record["passes"]
    assert [one["name"] for one in done["held_out"]] == ["held-out tokens"]
    assert done["held_out"][0]["sequences"] == 6
    assert done["domains"] == ["tokens"]
    assert [one["name"] for one in result.record["calibration"]] == ["tokens"]
    for layer in done["decision"]["layers"].values():
        assert layer["mean_experts"] == pytest.approx(1.5, abs=0.01)
        assert 1.2 < layer["held_out"]["mean_experts"] < 1.8
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    rules = {
        path: SkipRule("ratio", layer["renormalise"], beta=layer["beta"])
        for path, layer in done["decision"]["layers"].items()
    }
    with MoEModel(original).zeroed(rules):
        expected = logits(original)
    model, tokenizer = compressor.load(tmp_path / "out")
    assert tokenizer is not None
    close(logits(model), expected)
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(original))
    apply(tmp_path / "out" / "compressor" / "decision.json", str(folder), tmp_path / "applied")
    close(logits(compressor.load(tmp_path / "applied")[0]), expected)
    assert result.record["skipping"] == {path: rule.to_json() for path, rule in rules.items()}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Tokens skip experts in 3 layers" in card
    assert "run it unskipped" in card


def test_figures_outlive_a_run_that_cannot_decide_by_them(eight, tokens, tmp_path):
    passes = {"dynamic_skipping": {"mean_experts": 2.75, "precision": 1e-4}}
    with pytest.raises(RecipeError, match=r"Calibrate on about .* What was observed is kept: `compressor decide"):
        compressor.compress(recipe(eight, tokens, passes), output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out.statistics.safetensors"]
    statistics = tmp_path / "out.statistics.safetensors"
    decided = compressor.decide(statistics, "dynamic_skipping", mean_experts=2.75, precision=0.5)
    passes["dynamic_skipping"]["precision"] = 0.5
    whole = compressor.compress(recipe(eight, tokens, passes), output=tmp_path / "out")
    assert decided["passes"][0]["decision"] == whole.record["passes"][0]["decision"]


def test_a_mean_is_reached_by_the_running_model(eight, tokens, tmp_path):
    """The counter, on the calibration text, says what the decision says; with all layers skipping, nearly."""
    passes = {"dynamic_skipping": {"mean_experts": 2.75, "precision": 0.5}}
    result = compressor.compress(recipe(eight, tokens, passes), output=tmp_path / "out")
    decision = result.record["passes"][0]["decision"]
    assert decision["mean_experts"] == pytest.approx(2.75, abs=0.02)
    first = next(iter(decision["layers"]))
    rows = [json.loads(line)["input_ids"] for line in tokens.read_text().splitlines()[:24]]
    with MoEModel(result.model).counted() as counter, torch.no_grad():
        result.model(torch.tensor(rows))
    used = counter.experts_per_token
    assert used[first] == pytest.approx(decision["layers"][first]["mean_experts"], abs=1e-3)
    assert sum(used.values()) / 3 == pytest.approx(2.75, abs=0.15)


@pytest.mark.parametrize(
    "options",
    [
        {"keep_mass": 0.8},
        pytest.param({"keep_mass": 0.8, "rule": "contribution", "precision": 1.0}, marks=pytest.mark.nightly),
        {"mean_experts": 2.5, "rule": "contribution", "precision": 1.0},
        {"threshold": "median", "rule": "tail_mass", "precision": 1.0},
        pytest.param({"threshold": {1: 0.4}}, marks=pytest.mark.nightly),
        pytest.param({"top_k": 2}, marks=pytest.mark.nightly),
        {"top_k": 2, "normalise_over": 8},
    ],
    ids=str,
)
def test_every_target_travels(eight, tokens, tmp_path, options):
    result = compressor.compress(recipe(eight, tokens, {"dynamic_skipping": options}), output=tmp_path / "out")
    assert result.record["passes"][0]["checks"]["edited_against_preview"] < 1e-4
    model, _ = compressor.load(tmp_path / "out")
    assert MoEModel(model).skip_rules
    close(logits(model), logits(result.model))
    assert not torch.allclose(logits(model), logits(AutoModelForCausalLM.from_pretrained(eight)), atol=1e-2)


def test_prune_then_skip(eight, tokens, tmp_path):
    """Thresholds are found on the pruned model: the same as those of a run on what pruning alone has saved."""
    prune, skip = {"expert_pruning": {"keep": 6}}, {"dynamic_skipping": {"mean_experts": 3.0, "precision": 1.0}}
    both = compressor.compress(recipe(eight, tokens, prune, skip), output=tmp_path / "both")
    compressor.compress(recipe(eight, tokens, prune), output=tmp_path / "pruned")
    after = compressor.compress(recipe(tmp_path / "pruned", tokens, skip), output=tmp_path / "after")
    assert both.record["passes"][1]["decision"] == after.record["passes"][0]["decision"]
    close(logits(both.model), logits(after.model))
    model, _ = compressor.load(tmp_path / "both")
    close(logits(model), logits(both.model))
    assert [layer.num_experts for layer in MoEModel(model).layers] == [6, 6, 6]
    apply(tmp_path / "both" / "compressor" / "record.json", str(eight), tmp_path / "applied")
    close(logits(compressor.load(tmp_path / "applied")[0]), logits(both.model))


@pytest.mark.nightly
def test_a_further_pass_over_a_model_that_skips(eight, tokens, tmp_path):
    """Skip, save, prune what was saved: it still skips, by what is left of its rules, and is measured skipping."""
    skip = {"dynamic_skipping": {"mean_experts": 3.0, "rule": "contribution", "precision": 1.0}}
    compressor.compress(recipe(eight, tokens, skip), output=tmp_path / "skips")
    evaluate = {"perplexity": [{"tokens": str(tokens), "samples": 4}]}
    prune = recipe(tmp_path / "skips", tokens, {"expert_pruning": {"keep": 6}}, evaluate=evaluate)
    result = compressor.compress(prune, output=tmp_path / "out")
    for side in ("before", "after"):
        used = result.record["evaluation"][side]["experts_per_token"]["tokens"]
        assert all(1 < number < 4 for number in used.values())
    kept = result.record["passes"][0]["decision"]["layers"]
    before = MoEModel(compressor.load(tmp_path / "skips")[0]).skip_rules
    model, _ = compressor.load(tmp_path / "out")
    after = MoEModel(model).skip_rules
    assert after == {path: rule.of_experts(kept[path]["kept"]) for path, rule in before.items()}
    close(logits(model), logits(result.model))


@pytest.mark.parametrize(
    ("skip", "prune", "message"),
    [
        (
            {"mean_experts": 3},
            {"keep": 6, "top_k": 1},
            "passes[1].expert_pruning.top_k: model.layers.0.mlp: the model skips experts by then, and could "
            "not go on skipping: each token chooses one expert, so there is nothing to skip. Prune first, and let the "
            "pruned model skip",
        ),
        (
            {"top_k": 2},
            {"keep": 6, "top_k": 2},
            "passes[1].expert_pruning.top_k: model.layers.0.mlp: the model skips experts by then, and could not go on "
            "skipping: each token chooses 2 experts, so keeping the largest 2 skips nothing",
        ),
        (
            {"top_k": 2, "normalise_over": 8},
            {"keep": 6},
            "passes[1].expert_pruning.keep: model.layers.0.mlp: the model skips experts by then, and could not go on "
            "skipping: it has 6 experts, so there are no 8 to normalise over",
        ),
        (
            {"top_k": 2, "normalise_over": 5},
            {"drop": 4},
            "passes[1].expert_pruning.drop: model.layers.0.mlp: the model skips experts by then, and could not go on "
            "skipping: it has 4 experts, so there are no 5 to normalise over",
        ),
    ],
)
def test_pruning_that_leaves_nothing_to_skip_is_refused_by_check(eight, tokens, tmp_path, skip, prune, message):
    """Wherever the model got its rules from: a pass before, or its own config."""
    plugins = load_plugins()

    def check(settings):
        checking.check(load_recipe(settings, methods=plugins.methods, criteria=plugins.criteria))

    passes = [{"dynamic_skipping": skip}, {"expert_pruning": prune}]
    with pytest.raises(RecipeError) as error:
        check(recipe(eight, tokens, *passes))
    assert message in str(error.value)
    options = {"precision": 1.0, **skip} if "mean_experts" in skip else skip
    compressor.compress(recipe(eight, tokens, {"dynamic_skipping": options}), output=tmp_path / "skips")
    with pytest.raises(RecipeError) as error:
        check(recipe(tmp_path / "skips", tokens, passes[1]))
    assert message.removeprefix("passes[1]") in str(error.value)
    check(recipe(tmp_path / "skips", tokens, {"expert_pruning": {"keep": 8, "top_k": 3}}))
    check(recipe(eight, tokens, passes[0], {"expert_pruning": {"keep": 8, "top_k": 3}}))


@pytest.mark.parametrize("weights", ["memory", pytest.param("disk", marks=pytest.mark.nightly)])
def test_pruning_of_which_only_the_figures_tell_that_it_leaves_nothing_to_skip(eight, tokens, tmp_path, weights):
    """A mean that is shared out leaves some layer fewer experts than its rule normalises over."""
    prune = {"keep": {"mean": 6}, "replace": "none"}
    passes = [{"dynamic_skipping": {"top_k": 2, "normalise_over": 6}}, {"expert_pruning": prune}]
    with pytest.raises(
        RecipeError,
        match=r"passes\[1\]\.expert_pruning: what was decided cannot be carried out: the model skips experts, and "
        r"could not go on like this: .*: it has \d experts, so there are no 6 to normalise over",
    ):
        compressor.compress(recipe(eight, tokens, *passes, weights=weights), output=tmp_path / "out")


def test_padding_is_not_counted_from_disk_either(eight, tokens, tmp_path):
    """There all batches pass a layer before the next one is read: each has its own padding."""
    lengths = (24, 5, 17, 9, 24, 3)
    rows = [row[:length] for row, length in zip(token_ids(6, 24).tolist(), lengths, strict=True)]
    text = write_token_file(tmp_path / "text.jsonl", rows)
    evaluate = {"perplexity": [{"tokens": str(text)}], "batch_size": 2}
    used = []
    for weights in ("memory", "disk"):
        settings = recipe(eight, tokens, {"dynamic_skipping": {"threshold": 0.5}}, evaluate=evaluate, weights=weights)
        result = compressor.compress(settings, output=tmp_path / weights)
        used += result.record["evaluation"]["after"]["experts_per_token"].values()
    assert used[0] == used[1]
    model, _ = compressor.load(tmp_path / "memory")
    with MoEModel(model).counted() as counter, torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    assert used[0] == pytest.approx(counter.experts_per_token, abs=1e-3)


def test_skip_again_replaces_the_rules(eight, tokens, tmp_path):
    compressor.compress(recipe(eight, tokens, {"dynamic_skipping": {"threshold": 0.3}}), output=tmp_path / "one")
    again = recipe(tmp_path / "one", tokens, {"dynamic_skipping": {"threshold": 0.5}})
    compressor.compress(again, output=tmp_path / "two")
    rules = MoEModel(compressor.load(tmp_path / "two")[0]).skip_rules
    assert {rule.beta for rule in rules.values()} == {0.5}


def test_a_live_model_is_left_alone(tokens):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("mixtral")).eval()
    before = logits(model)
    settings = recipe("live", tokens, {"dynamic_skipping": {}})
    result = compressor.compress(settings, model=model)
    assert torch.equal(logits(model), before)
    assert not hasattr(model.config, "compressor")
    assert not torch.equal(logits(result.model), before)


def test_decided_again_without_the_model(eight, tokens, tmp_path):
    first = compressor.compress(
        recipe(eight, tokens, {"dynamic_skipping": {"mean_experts": 3.0, "precision": 1.0}}), output=tmp_path / "out"
    )
    statistics = tmp_path / "out" / "compressor" / "statistics.safetensors"
    options = {"mean_experts": 3.0, "precision": 1.0}
    same = compressor.decide(statistics, "dynamic_skipping", **options)
    assert same["passes"][0]["decision"] == first.record["passes"][0]["decision"]
    other = compressor.decide(statistics, "dynamic_skipping", mean_experts=2.0, rule="tail_mass", precision=1.0)
    assert other["passes"][0]["decision"]["mean_experts"] == pytest.approx(2.0, abs=0.05)
    file = tmp_path / "other.json"
    file.write_text(json.dumps(other))
    apply(file, str(eight), tmp_path / "applied")
    assert {rule.rule for rule in MoEModel(compressor.load(tmp_path / "applied")[0]).skip_rules.values()} == {
        "tail_mass"
    }
    with pytest.raises(RecipeError, match=r"dynamic_skipping\.top_k: .* these numbers were not measured"):
        compressor.decide(statistics, "dynamic_skipping", top_k=2)
    with pytest.raises(RecipeError, match=r"dynamic_skipping: model.layers.0.mlp: each token chooses 4 experts"):
        compressor.decide(statistics, "dynamic_skipping")


def test_a_decision_that_skips_nothing_is_not_applied(eight, tokens, tmp_path):
    compressor.compress(recipe(eight, tokens, {"dynamic_skipping": {"threshold": 0.5}}), output=tmp_path / "out")
    decision = json.loads((tmp_path / "out" / "compressor" / "decision.json").read_text())
    for layer in decision["passes"][0]["decision"]["layers"].values():
        layer["rule"] = None
    file = tmp_path / "nothing.json"
    file.write_text(json.dumps(decision))
    with pytest.raises(RecipeError, match="the decision says of every layer that nothing changes"):
        apply(file, str(eight), tmp_path / "applied")
    assert not (tmp_path / "applied").exists()


@pytest.mark.nightly
def test_decided_on_a_run_of_another_method(eight, tokens, tmp_path):
    """Figures gathered for pruning tell nothing of thresholds, and those of a pruned model nothing of the original."""
    prune, skip = {"expert_pruning": {"keep": 6}}, {"dynamic_skipping": {"mean_experts": 3.0, "precision": 1.0}}
    compressor.compress(recipe(eight, tokens, prune), output=tmp_path / "pruned")
    compressor.compress(recipe(eight, tokens, prune, skip), output=tmp_path / "both")
    compressor.compress(recipe(eight, tokens, skip), output=tmp_path / "skips")
    one, two, three = (
        tmp_path / name / "compressor" / "statistics.safetensors" for name in ("pruned", "both", "skips")
    )
    with pytest.raises(RecipeError, match="the figures hold nothing to find thresholds of the rule tail_mass by"):
        compressor.decide(one, "dynamic_skipping", mean_experts=3.0)
    with pytest.raises(RecipeError, match=r"figures of 1\.dynamic_skipping are of what the passes before it left"):
        compressor.decide(two, "dynamic_skipping", mean_experts=3.0)
    assert compressor.decide(two, "expert_pruning", keep=6)["passes"][0]["method"] == "expert_pruning"
    with pytest.raises(RecipeError, match="its figures were gathered for another method than expert_pruning"):
        compressor.decide(three, "expert_pruning", keep=4)


def test_figures_of_two_texts_are_added_up(eight, tmp_path):
    files = []
    for number in (1, 2):
        text = write_token_file(tmp_path / f"text{number}.jsonl", token_ids(20, 24, seed=number).tolist())
        out = tmp_path / f"out{number}"
        compressor.compress(recipe(eight, text, {"dynamic_skipping": {"threshold": 0.3}}), output=out)
        files.append(out / "compressor" / "statistics.safetensors")
    passes, about = merge_statistics([load_statistics(file) for file in files])
    names = about["passes"]["0.dynamic_skipping"]
    assert names["domains"] == ["text1", "text2"]
    assert "held_out" not in names  # all of the 20 sequences were wanted
    (figures,) = passes.values()
    one = figures["model.layers.0.mlp"]
    assert one["sums.skip.tokens"].tolist() == [480.0, 480.0]
    assert "skip.ratio.median" in about["dropped_figures"]
    decided = compressor.decide(files, "dynamic_skipping", mean_experts=3.0, precision=1.0)
    assert decided["passes"][0]["decision"]["mean_experts"] == pytest.approx(3.0, abs=0.02)
    with pytest.raises(RecipeError, match="the median of added-up figures is not known"):
        compressor.decide(files, "dynamic_skipping", threshold="median")


def test_a_decision_for_another_model_is_refused(eight, tokens, tmp_path):
    compressor.compress(recipe(eight, tokens, {"dynamic_skipping": {"threshold": 0.3}}), output=tmp_path / "out")
    decision = tmp_path / "out" / "compressor" / "decision.json"
    deeper = write_checkpoint(random_model("qwen3_moe", num_hidden_layers=4), tmp_path / "deeper")
    with pytest.raises(RecipeError, match=r"was decided on .* is another model"):
        apply(decision, str(deeper), tmp_path / "applied")
    with pytest.raises(
        RecipeError, match=r"made for 3 MoE layers, the model has 4: model.layers.3.mlp: it says nothing"
    ):
        apply(decision, str(deeper), tmp_path / "applied", other_model=True)
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.mlp: the model has no such MoE layer"):
        apply(decision, str(tiny_folder("deepseek_v3")), tmp_path / "applied", other_model=True)
    data = json.loads(decision.read_text())
    layer = next(iter(data["passes"][0]["decision"]["layers"].values()))
    layer["beta"] = 7
    decision.write_text(json.dumps(data))
    with pytest.raises(RecipeError, match=r"`beta` should be a number above 0, up to 1, found 7"):
        apply(decision, str(eight), tmp_path / "applied")
    assert not (tmp_path / "applied").exists()


def test_layers_that_text_does_not_reach_are_left_as_they_are(tmp_path):
    """The vision experts of a composite: text never comes to them."""
    from compressor.testing.tiny import tiny_model

    folder = tmp_path / "model"
    tiny_model("ernie4_5_vl_moe").save_pretrained(folder)
    text = write_token_file(tmp_path / "ids.jsonl", (token_ids(24, 16) + 3).tolist())
    result = compressor.compress(recipe(folder, text, {"dynamic_skipping": {}}), output=tmp_path / "out")
    layers = result.record["passes"][0]["decision"]["layers"]
    assert {layer["rule"] for path, layer in layers.items() if "vision" in path} == {None}
    assert {layer["rule"] for path, layer in layers.items() if "text_moe" in path} == {"ratio"}


@pytest.mark.nightly
def test_every_pass_alone(tokens, tmp_path):
    """None, each, both: measured on fresh copies, and the table that shows it."""
    evaluate = {"each_pass": True, "perplexity": [{"tokens": str(tokens), "samples": 4}], "speed": True}
    settings = recipe(
        tiny_folder("mixtral"), tokens, {"expert_pruning": {"keep": 6}}, {"dynamic_skipping": {}}, evaluate=evaluate
    )
    result = compressor.compress(settings, output=tmp_path / "out")
    found = result.record["evaluation"]
    prune, skip = found["alone"]
    assert unexplained(result.record) == []
    assert (prune["method"], skip["method"]) == ("expert_pruning", "dynamic_skipping")
    alone = compressor.compress(recipe(tiny_folder("mixtral"), tokens, {"dynamic_skipping": {}}))
    assert skip["decision"] == alone.record["passes"][0]["decision"]
    assert skip["after"]["size"]["parameters"] == found["before"]["size"]["parameters"]
    assert prune["after"]["size"]["parameters"] == found["after"]["size"]["parameters"]
    assert set(prune["after"]["experts_per_token"]["tokens"].values()) == {2.0}
    table = alone_table(result.record)
    rows = {row[0]: row[1:] for row in table.rows}
    assert tuple(table.headings[1:]) == ("none", "expert_pruning", "dynamic_skipping", "all")
    assert rows["experts/token tokens"][:2] == ("2.000", "2.000")
    assert all(float(text) < 1.8 for text in rows["experts/token tokens"][2:])
    assert len({rows["perplexity tokens"][number] for number in range(4)}) == 4
    drawn = (tmp_path / "out" / "compressor" / "report.html").read_text()
    assert drawn == page(json.loads((tmp_path / "out" / "compressor" / "record.json").read_text()))
    assert "Each pass alone" in drawn
    assert drawn.count('<figure class="chart"') == 3  # losses of both, and experts per token


def test_a_pass_that_cannot_work_alone(tokens, tmp_path, monkeypatch):
    """It is said, and shown as not measured; the run goes on. Two passes of one method are told apart."""
    decide = DynamicSkipping.decide

    def only_of_pruned(method, layers, statistics):
        if layers[0].num_experts == 8:
            raise OptionError("threshold", "eight experts are too many.")
        return decide(method, layers, statistics)

    monkeypatch.setattr(DynamicSkipping, "decide", only_of_pruned)
    passes = [{"expert_pruning": {"keep": 7}}, {"dynamic_skipping": {}}, {"expert_pruning": {"keep": 6}}]
    evaluate = {"each_pass": True, "perplexity": [{"tokens": str(tokens), "samples": 4}]}
    settings = recipe(tiny_folder("mixtral"), tokens, *passes, evaluate=evaluate)
    result = compressor.compress(settings, output=tmp_path / "out")
    first, skip, last = result.record["evaluation"]["alone"]
    assert "eight experts are too many" in skip["problem"]
    assert "after" not in skip
    table = alone_table(result.record)
    rows = {row[0]: row[1:] for row in table.rows}
    assert tuple(table.headings[1:]) == ("none", "1. expert_pruning", "dynamic_skipping", "3. expert_pruning", "all")
    none, pruned, skipped, more, both = rows["perplexity tokens"]
    assert skipped == "–"
    assert table.below == [f"dynamic_skipping alone cannot be measured: {skip['problem']}"]
    assert len({none, pruned, more, both}) == 4
    sizes = [one["after"]["size"]["parameters"] for one in (first, last)]
    assert sizes[0] > sizes[1] == result.record["evaluation"]["after"]["size"]["parameters"]
    assert (tmp_path / "out" / "compressor" / "report.html").read_text().count(
        '<figure class="chart"'
    ) == 4  # two prune: two each


def test_tasks_alone_count_experts_too(tokens):
    """With no perplexity to measure, what was used is counted on the tasks."""
    evaluate = {"tasks": ["demo_arithmetic"], "limit": 4}
    settings = recipe("demo", tokens, {"dynamic_skipping": {"precision": 1.0}}, evaluate=evaluate)
    used = compressor.compress(settings).record["evaluation"]["after"]["experts_per_token"]
    assert set(used) == {"tasks"}
    assert all(1 < number < 2 for number in used["tasks"].values())


def test_text_that_is_called_as_held_out_text_is(tokens):
    settings = recipe(tiny_folder("mixtral"), tokens, {"dynamic_skipping": {}})
    settings["calibration"]["data"].append({"tokens": str(tokens), "name": "held-out tokens", "samples": 4})
    with pytest.raises(RecipeError, match="called 'held-out tokens', as the held-out text of 'tokens' is; rename it"):
        compressor.compress(settings)


def test_each_pass_of_one_has_no_effect(tokens):
    settings = recipe(tiny_folder("mixtral"), tokens, {"dynamic_skipping": {}}, evaluate={"each_pass": True})
    with pytest.raises(RecipeError, match=r"evaluate.each_pass: the recipe has one pass, so this would have no effect"):
        compressor.compress(settings)


def test_active_parameters_are_those_that_tokens_use(tokens, tmp_path):
    evaluate = {"perplexity": [{"tokens": str(tokens), "samples": 4}]}
    settings = recipe(tiny_folder("mixtral"), tokens, {"dynamic_skipping": {"threshold": 1.0}}, evaluate=evaluate)
    found = compressor.compress(settings).record["evaluation"]
    used = found["after"]["experts_per_token"]["tokens"]
    assert set(used.values()) == {1.0}
    layers = MoEModel(AutoModelForCausalLM.from_pretrained(tiny_folder("mixtral"))).layers
    saved = found["before"]["size"]["active_parameters"] - found["after"]["size"]["active_parameters"]
    assert saved == sum(layer.parameters_per_expert for layer in layers)
