"""Domains, criteria, deciding again, random controls, task-specific pruning: the commands, from end to end."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_plugins import write_distribution

import compressor

Cli = Callable[..., Any]
Refused = Callable[..., str]
WriteRecipe = Callable[..., Path]

MOE = "model.layers.0.mlp"


def ids_file(path: Path, seed: int, num_rows: int = 4) -> Path:
    numbers = random.Random(seed)
    rows = [[numbers.randrange(1, 64) for _ in range(16)] for _ in range(num_rows)]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("domains")
    return {name: ids_file(folder / f"{name}.jsonl", seed) for seed, name in enumerate(("code", "prose"))}


@pytest.fixture
def two_domains(domains: dict[str, Path]) -> list[dict[str, Any]]:
    return [{"tokens": str(path), "name": name} for name, path in domains.items()]


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compressor" / "record.json").read_text())


def run(cli: Cli, recipe: WriteRecipe, tmp_path: Path, output: str = "out", **changes: Any) -> Path:
    answer = cli("run", recipe(output=tmp_path / output, **changes))
    assert answer.status == 0, answer.err
    return tmp_path / output


# Domains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blend", ["mean", "worst", "pooled", {"code": 2, "prose": 1}])
@pytest.mark.parametrize("search", ["exact", "greedy"])
def test_each_domain_is_told_apart(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, two_domains: Any, blend: Any, search: str
) -> None:
    options = {"keep": 5, "blend": blend, "search": search}
    output = run(cli, recipe, tmp_path, data=two_domains, passes=[{"expert_pruning": options}])
    record = record_of(output)
    assert [source["name"] for source in record["calibration"]] == ["code", "prose"]
    (done,) = record["passes"]
    assert done["domains"] == ["code", "prose"]
    for layer in done["decision"]["layers"].values():
        losses = layer["domains"]
        assert list(losses) == ["code", "prose"]
        if blend == "worst":
            assert layer["objective"] == pytest.approx(max(losses.values()))
        if blend == "mean":
            assert layer["objective"] == pytest.approx(sum(losses.values()) / 2)
        assert min(losses.values()) <= layer["relative_loss"] <= max(losses.values())


def test_exact_and_greedy_agree_on_few_experts(cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    """With all ranks to look at the loss of the searched set is the same figure, and never better than the best."""
    found = []
    for search in ("exact", "greedy"):
        output = run(cli, recipe, tmp_path, search, passes=[{"expert_pruning": {"keep": 6, "search": search}}])
        (done,) = record_of(output)["passes"]
        found.append(done["decision"]["layers"])
    for exact, greedy in zip(found[0].values(), found[1].values(), strict=True):
        assert exact["loss"] <= greedy["loss"] * (1 + 1e-5)
        if exact["kept"] == greedy["kept"]:
            assert exact["loss"] == pytest.approx(greedy["loss"], rel=1e-5)


def test_weights_of_a_source_that_there_is_not(recipe: WriteRecipe, refused: Refused, two_domains: Any) -> None:
    passes = [{"expert_pruning": {"keep": 6, "blend": {"cod": 1}}}]
    path = recipe(data=two_domains, passes=passes)
    says = "passes[0].expert_pruning.blend: there is no calibration source called 'cod'; there are code, prose."
    refused("run", path, says=says)
    refused("check", path, says=says)


def test_sources_of_the_same_name(recipe: WriteRecipe, refused: Refused, two_domains: Any) -> None:
    two_domains[1]["name"] = "code"
    refused("run", recipe(data=two_domains), says="two sources are called 'code'; tell them apart with `name:`")


# Criteria --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "criterion",
    [
        "frequency",
        "seer",
        "ean",
        "weighted_ean",
        "reap",
        "reap_renormalised",
        "man",
        "msan",
        "mone",
        "aimer",
        "single_removal",
        "quad_mix",
    ],
)
def test_every_criterion_prunes(cli: Cli, recipe: WriteRecipe, tmp_path: Path, criterion: str) -> None:
    passes = [{"expert_pruning": {"keep": 6, "criterion": criterion}}]
    output = run(cli, recipe, tmp_path, passes=passes)
    layers = record_of(output)["passes"][0]["decision"]["layers"]
    assert {layer["search"] for layer in layers.values()} == {criterion}
    assert {len(layer["kept"]) for layer in layers.values()} == {6}


def test_random_depends_on_its_seed(cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    kept = []
    for number, seed in enumerate((1, 1, 2)):
        passes = [{"expert_pruning": {"keep": 4, "criterion": "random", "seed": seed}}]
        layers = record_of(run(cli, recipe, tmp_path, f"out{number}", passes=passes))["passes"][0]["decision"]["layers"]
        kept.append([layer["kept"] for layer in layers.values()])
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"criterion": "reep"}, ".criterion: there is no criterion 'reep'; did you mean 'reap'? Known are aimer"),
        ({"criterion": "reap", "search": "exact"}, "`search` would have no effect beside `criterion`"),
        ({"criterion": "reap", "ranks": 4}, "`ranks` would have no effect beside `criterion`"),
        ({"seed": 3}, "`seed` would have no effect: the search draws nothing at random"),
        ({"search": "exact", "starts": 2}, "`ranks` and `starts` would have no effect with `search: exact`"),
        (
            {"protect": {0: [1, 2, 3, 4, 5, 6, 7]}},
            f".protect: {MOE}: 7 experts are protected, but only 6 are to be kept.",
        ),
        ({"forbid": {0: [1, 2, 3]}}, f".forbid: {MOE}: 3 experts are forbidden, but only 2 are to be dropped."),
        ({"protect": {0: [1]}, "forbid": {0: [1]}}, f".forbid: {MOE}: expert 1 is both protected and forbidden."),
        ({"protect": {0: [8]}}, f".protect: {MOE}: it has no expert 8; its experts are 0 to 7."),
        ({"protect": {7: [1]}}, ".protect: there is no MoE layer 7; the MoE layers are 0, 1"),
        ({"forbid": {0: []}}, "layer 0: found []; give different expert ids from 0 up"),
        ({"blend": {}}, "found an empty mapping; give each domain its weight"),
        ({"blend": {"a": -1}}, "found -1 as the weight of 'a'; a weight is a number from 0 up"),
    ],
)
def test_options_that_cannot_be(recipe: WriteRecipe, refused: Refused, options: Any, says: str) -> None:
    refused("run", recipe(passes=[{"expert_pruning": {"keep": 6, **options}}]), says=says)


def test_protected_and_forbidden(cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    for number, extra in enumerate(({}, {"search": "greedy"}, {"criterion": "reap"})):
        options = {"keep": 4, "protect": {0: [0, 1], MOE.replace("0", "1"): [2]}, "forbid": {0: [7]}, **extra}
        output = run(cli, recipe, tmp_path, f"out{number}", passes=[{"expert_pruning": options}])
        first, second = record_of(output)["passes"][0]["decision"]["layers"].values()
        assert {0, 1} <= set(first["kept"])
        assert 7 in first["dropped"]
        assert 2 in second["kept"]


def test_an_expert_that_no_token_reaches_is_told(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, make_model: Any
) -> None:
    """Its figures are absent, so a criterion drops it first, and the table says so."""

    def edit(model: Any) -> None:
        gate = model.model.layers[0].mlp.gate.weight
        gate[3] = -20 * gate.abs().mean() * model.model.embed_tokens.weight.mean(0).sign()
        model.model.layers[0].post_attention_layernorm.weight.fill_(0.0)
        model.model.layers[0].post_attention_layernorm.weight[0] = 1.0
        gate[:, 0] = gate[:, 0].abs()
        gate[3] = 0.0
        gate[3, 0] = -100.0
        model.model.embed_tokens.weight[:, 0] = 5.0

    model = make_model(tmp_path / "unreached", edit=edit)
    answer = cli("run", recipe(model=model, passes=[{"expert_pruning": {"keep": 7, "criterion": "reap"}}]))
    assert answer.status == 0, answer.err
    layer = record_of(tmp_path / "out")["passes"][0]["decision"]["layers"][MOE]
    assert 3 in layer["unreached"]
    assert layer["dropped"][0] in layer["unreached"]
    assert re.search(r"no token of the calibration text reached \d expert", answer.out)


def test_a_third_party_criterion_is_one_function(
    tmp_path: Path, cli: Cli, recipe: WriteRecipe, install_from: Callable[[Path], None]
) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    write_distribution(
        plugins,
        "loudest",
        {"loudest": ""},
        "from compressor.plugin import Criterion, hookimpl\n\n\n"
        "def loudest(figures):\n    return figures.largest\n\n\n"
        "@hookimpl\ndef compressor_criteria():\n"
        "    return [Criterion('loudest', loudest, 'a test')]\n",
    )
    path = recipe(passes=[{"expert_pruning": {"keep": 6, "criterion": "loudest"}}])
    install_from(plugins)
    for command in (["methods"], ["run", path, "--quiet"]):
        answer = cli(*command)
        assert answer.status == 0, answer.err
        assert ("loudest" in answer.out) == (command == ["methods"])
    layers = record_of(tmp_path / "out")["passes"][0]["decision"]["layers"]
    assert {layer["search"] for layer in layers.values()} == {"loudest"}


# Deciding again --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory, mixtral: Path, domains: dict[str, Path]) -> Path:
    """Statistics of the two domains. Shared: never write beside them."""
    output = tmp_path_factory.mktemp("gathered") / "out"
    data = [{"tokens": str(path), "name": name} for name, path in domains.items()]
    passes = [{"expert_pruning": {"keep": 6, "gather": ["pairs", "outputs"]}}]
    recipe = {"model": str(mixtral), "calibration": {"batch_size": 2, "data": data}, "passes": passes}
    compressor.compress(recipe, output=output)
    return output / "compressor" / "statistics.safetensors"


@pytest.mark.parametrize("criterion", ["reap", "mone", "aimer", "quad_mix"])
def test_deciding_again_is_what_a_run_would_have_decided(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, two_domains: Any, gathered: Path, mixtral: Path, criterion: str
) -> None:
    answer = cli("decide", gathered, "--keep", "4", "--criterion", criterion, "--output", "d.json")
    assert answer.status == 0, answer.err
    assert "Written to d.json" in answer.out
    passes = [{"expert_pruning": {"keep": 4, "criterion": criterion}}]
    output = run(cli, recipe, tmp_path, "direct", data=two_domains, passes=passes)
    decided = json.loads(Path("d.json").read_text())["passes"][0]["decision"]["layers"]
    for path, layer in record_of(output)["passes"][0]["decision"]["layers"].items():
        assert (decided[path]["kept"], decided[path]["search"]) == (layer["kept"], criterion)
        assert decided[path]["score_kept"] == pytest.approx(layer["score_kept"], rel=1e-5)
    assert cli("apply", "d.json", mixtral, "--output", "applied", "--quiet").status == 0
    weights = [folder / "model.safetensors" for folder in (Path("applied"), output)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_deciding_again_with_other_weights_of_domains(cli: Cli, gathered: Path) -> None:
    for number, blend in enumerate(("{code: 1}", "{prose: 1}", "worst")):
        assert cli("decide", gathered, "--keep", "6", "--blend", blend, "--output", f"{number}.json").status == 0
    layers = [json.loads(Path(f"{n}.json").read_text())["passes"][0]["decision"]["layers"][MOE] for n in range(3)]
    assert layers[0]["domains"]["code"] <= layers[1]["domains"]["code"]
    assert layers[1]["domains"]["prose"] <= layers[0]["domains"]["prose"]
    worst = [max(layer["domains"].values()) for layer in layers]
    assert worst[2] == min(worst)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--keep", "4"],
            "the losses of all sets were gathered for keeping 6 experts, not 4; decide by a",
        ),
        (["--keep", "9"], "expert_pruning.keep: model.layers.0.mlp: it has 8 experts and cannot keep 9"),
        (["--keep", "6", "--criterion", "best"], "expert_pruning.criterion: there is no criterion 'best'"),
        (
            ["--keep", "6", "--blend", "{poetry: 1}"],
            "there is no calibration source called 'poetry'; there are code, prose",
        ),
        (["--keep", "six"], "expert_pruning.keep: found 'six', expected "),
        (["--keep", "{"], "error: --keep={: not valid YAML: "),
        (
            ["--set", "kept=6"],
            "error: --set kept=6 expert_pruning.kept: unknown key; did you mean 'keep'? Known",
        ),
        (
            ["--method", "dynamic_skipping", "--set", "threshold=2"],
            "error: --set threshold=2 dynamic_skipping.threshold: found 2; a threshold is a number above 0",
        ),
        (
            ["--method", "dynamic_skipping", "--set", "threshold=0.3", "--set", "keep_mass=0.9"],
            "error: dynamic_skipping: `threshold` and `keep_mass` both say how much is skipped",
        ),
        (
            ["--method", "dynamic_skipping", "--set", "keep_mass=0.9999999999999"],
            "error: --set keep_mass=0.9999999999999 dynamic_skipping.keep_mass: found 0.9999999999999, of which",
        ),
        (
            ["--keep", "6", "--method", "pruning"],
            "there is no method 'pruning'; known are ",
        ),
    ],
)
def test_deciding_what_cannot_be(gathered: Path, refused: Refused, arguments: list[str], says: str) -> None:
    refused("decide", gathered, "--output", "d.json", *arguments, says=says)


def test_decisions_are_not_overwritten(cli: Cli, gathered: Path, refused: Refused) -> None:
    arguments = ["decide", gathered, "--keep", "6", "--output", "d.json", "--quiet"]
    assert cli(*arguments).status == 0
    refused(*arguments, says="d.json exists. Choose another output, or say --overwrite.")
    assert cli(*arguments, "--overwrite").status == 0


def test_files_that_are_no_statistics(tmp_path: Path, mixtral: Path, refused: Refused) -> None:
    for path, says in (
        (mixtral / "model.safetensors", "it is no statistics file; this version reads format 2"),
        (mixtral / "config.json", "cannot be read as a statistics file"),
        (tmp_path / "nowhere", "cannot be read as a statistics file"),
    ):
        refused("decide", path, "--keep", "4", "--output", "d.json", says=says)


def test_figures_of_two_runs_add_up_to_those_of_one(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, two_domains: Any, gathered: Path
) -> None:
    parts = []
    for source in two_domains:
        output = run(cli, recipe, tmp_path, source["name"], data=[source])
        parts.append(output / "compressor" / "statistics.safetensors")
    for blend in ("mean", "pooled"):
        common = ["--keep", "5", "--criterion", "ean", "--blend", blend, "--overwrite", "--quiet"]
        assert cli("decide", *parts, *common, "--output", "two.json").status == 0
        assert cli("decide", gathered, *common, "--output", "one.json").status == 0
        two, one = (json.loads(Path(name).read_text())["passes"][0]["decision"] for name in ("two.json", "one.json"))
        for path, layer in one["layers"].items():
            assert two["layers"][path]["kept"] == layer["kept"]


def test_statistics_of_another_model(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, two_domains: Any, gathered: Path, make_model: Any, refused: Refused
) -> None:
    other = make_model(tmp_path / "other", initializer_range=0.2)
    output = run(cli, recipe, tmp_path, "elsewhere", data=two_domains[:1], model=other)
    theirs = output / "compressor" / "statistics.safetensors"
    says = "the statistics cannot be added up: they are of different models, sha256:"
    refused("decide", gathered, theirs, "--keep", "4", "--criterion", "ean", "--output", "d.json", says=says)
    assert cli("decide", gathered, "--keep", "4", "--criterion", "ean", "--output", "d.json").status == 0
    refused("apply", "d.json", other, "--output", "x", says="d.json was decided on ")
    assert cli("apply", "d.json", other, "--output", "x", "--other-model", "--quiet").status == 0


def test_progressive_figures_answer_nothing_else(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, refused: Refused
) -> None:
    output = run(cli, recipe, tmp_path, passes=[{"expert_pruning": {"keep": 6, "progressive": True}}])
    file = output / "compressor" / "statistics.safetensors"
    says = "its figures were gathered progressively, so answer nothing else; observe without `progressive`."
    refused("decide", file, "--keep", "4", "--criterion", "ean", "--output", "d.json", says=says)


@pytest.mark.parametrize("passes", [[{"expert_pruning": {"keep": {"mean": 6}, "progressive": True}}]])
def test_progressive_cannot_share_out_a_mean(recipe: WriteRecipe, refused: Refused, passes: Any) -> None:
    refused("run", recipe(passes=passes), says="`progressive` decides a layer before it sees the next")


# Against chance --------------------------------------------------------------------------------------------


def test_random_decisions_stand_beside_the_methods(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, mixtral: Path, two_domains: Any
) -> None:
    evaluate = {"random": 3, "perplexity": [{"tokens": two_domains[0]["tokens"], "name": "code"}]}
    before = {path: path.read_bytes() for path in mixtral.iterdir()}
    answer = cli("run", recipe(evaluate=evaluate, data=two_domains))
    assert answer.status == 0, answer.err
    assert {path: path.read_bytes() for path in mixtral.iterdir()} == before
    record = record_of(tmp_path / "out")
    found = record["passes"][0]["random"]
    assert found["seeds"] == [0, 1, 2]
    assert len(found["relative_loss"]["random"]) == len(found["perplexity"]["code"]["random"]) == 3
    layers = record["passes"][0]["decision"]["layers"].values()
    mean = sum(layer["relative_loss"] for layer in layers) / len(layers)
    assert found["relative_loss"]["ours"] == pytest.approx(mean, rel=1e-5)
    assert found["relative_loss"]["ours"] <= min(found["relative_loss"]["random"]) * (1 + 1e-6)
    after = record["evaluation"]["after"]["perplexity"]["code"]["perplexity"]
    assert found["perplexity"]["code"]["ours"] == pytest.approx(after, rel=1e-4)
    assert "does it beat chance?" in answer.out
    assert "does it beat chance?" in (tmp_path / "out" / "README.md").read_text()


# A task ----------------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path) -> Path:
    numbers = random.Random(3)
    for split in ("train", "test"):
        rows = [
            {"question": " ".join(f"w{numbers.randrange(2, 60)}" for _ in range(12)), "answer": numbers.randrange(2)}
            for _ in range(12)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "words.yaml"
    path.write_text(
        f"task: words\ndataset_path: json\ndataset_kwargs: {{data_files: {{train: {tmp_path}/train.jsonl, "
        f"test: {tmp_path}/test.jsonl}}}}\ntraining_split: train\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: answer\ndoc_to_choice: ['w7 w8', 'w9']\n"
    )
    return path


def test_pruned_for_a_task(cli: Cli, recipe: WriteRecipe, tmp_path: Path, task: Path) -> None:
    """Calibrated on its training documents, and measured on it though the recipe does not ask for that."""
    passes = [{"task_pruning": {"task": str(task), "keep": 6, "samples": 4, "length": 16}}]
    path = recipe(passes=passes, calibration=None)
    assert "words" in yaml.safe_load(path.read_text())["passes"][0]["task_pruning"]["task"]
    answer = cli("run", path)
    assert answer.status == 0, answer.err
    record = record_of(tmp_path / "out")
    assert [source["name"] for source in record["calibration"]] == ["words"]
    assert record["calibration"][0]["sequences"] == 4
    assert record["evaluation"]["before"]["tasks"]["words"]["documents"] == 12
    assert set(record["evaluation"]["after"]["tasks"]) == {"words"}


def test_a_task_beside_general_text(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, task: Path, two_domains: Any
) -> None:
    options = {"task": "words", "task_path": str(task.parent), "keep": 6, "samples": 4, "length": 16}
    passes = [{"task_pruning": {**options, "blend": {"words": 3, "code": 1}}}]
    output = run(cli, recipe, tmp_path, data=two_domains[:1], passes=passes)
    (done,) = record_of(output)["passes"]
    assert done["domains"] == ["words", "code"]
    assert set(done["decision"]["layers"][MOE]["domains"]) == {"words", "code"}


def test_a_task_without_training_documents(recipe: WriteRecipe, refused: Refused, task: Path) -> None:
    task.write_text(task.read_text().replace("training_split: train\n", ""))
    passes = [{"task_pruning": {"task": str(task), "keep": 6, "length": 8}}]
    refused(
        "run",
        "--quiet",
        recipe(passes=passes),
        says="task 'words' has no training documents, only test (test), which",
    )


def test_no_text_at_all(recipe: WriteRecipe, refused: Refused) -> None:
    refused("run", recipe(calibration=None), says="calibration.data: no text to observe the model on; list at least")


@pytest.mark.parametrize("search", ["exact", "greedy"])
def test_a_mean_is_shared_out_along_either_search(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, search: str, two_domains: Any
) -> None:
    """Beside protected experts, of which there are more than the smallest count that a layer could keep."""
    options = {"keep": {"mean": 5}, "search": search, "protect": {0: [0, 1, 2, 3]}, "forbid": {1: [7]}}
    output = run(cli, recipe, tmp_path, data=two_domains, passes=[{"expert_pruning": options}])
    first, second = record_of(output)["passes"][0]["decision"]["layers"].values()
    assert len(first["kept"]) + len(second["kept"]) == 10
    assert {0, 1, 2, 3} <= set(first["kept"])
    assert 7 not in second["kept"]
