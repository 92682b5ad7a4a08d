"""The file of figures: what goes in comes out, to the same bytes; files add up as one run over both would."""

from __future__ import annotations

import copy
import json
import re

import pytest
import routers
import safetensors.torch
import torch

from compressor import CheckpointError
from compressor.observe.statistic import JoinedStatistic
from compressor.observe.statistics_file import load_statistics, merge_statistics, save_statistics
from compressor.selection.activation_sums import ExpertSums
from compressor.selection.exact import SubsetErrors
from compressor.selection.pair_losses import PairLosses

PATH = "layers.0.mlp"
LAYER = {"path": PATH, "num_experts": 6, "top_k": 2}


def about(*texts):
    """What a run over these texts says: name → tokens of each."""
    return {
        "model": {"fingerprint": "sha256:model", "reference": "some/model"},
        "tokenizer": "sha256:tokenizer",
        "domains": [
            {"name": name, "fingerprint": fingerprint, "tokens": 10, "sequences": 1} for name, fingerprint in texts
        ],
        "layers": [LAYER],
        "passes": {
            "0.expert_pruning": {
                "domains": list(dict.fromkeys(name for name, _ in texts)),
                "progressive": False,
                "layers": [LAYER],
            }
        },
    }


@pytest.fixture
def run(make_tokens):
    """Figures of batches, given as (domain, seed), as a run over them leaves them."""

    def observed(*batches, counts=(4, 5), others=None):
        statistic = None
        for domain, seed in batches:
            tokens = routers.random_tokens(make_tokens, "softmax", 12, 6, 2, seed=seed)
            tokens.domain = domain
            statistic = statistic or JoinedStatistic(
                [ExpertSums(tokens.layer, outputs=True), PairLosses(tokens.layer), SubsetErrors(tokens.layer, counts)]
            )
            statistic.update(tokens)
        figures = statistic.tensors() | {"weights.l1": torch.arange(6.0)} | (others or {})
        texts = [(domain, f"sha256:{domain}{seed}") for domain, seed in batches]
        return {"0.expert_pruning": {PATH: figures}}, about(*texts)

    return observed


# The file --------------------------------------------------------------------------------------------------


def test_what_goes_in_comes_out(run, tmp_path):
    passes, said = run(("code", 1), ("prose", 2))
    save_statistics(tmp_path / "s.safetensors", passes, said)
    found, told = load_statistics(tmp_path / "s.safetensors")
    assert told == said
    assert found.keys() == passes.keys()
    assert found["0.expert_pruning"].keys() == {PATH}
    for name, tensor in passes["0.expert_pruning"][PATH].items():
        assert found["0.expert_pruning"][PATH][name].dtype == tensor.dtype
        assert torch.equal(found["0.expert_pruning"][PATH][name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_same_content_same_bytes(run, tmp_path):
    """In whatever order figures and keys are given."""
    passes, said = run(("code", 1))
    save_statistics(tmp_path / "one", passes, said)
    figures = dict(reversed(passes["0.expert_pruning"][PATH].items()))
    save_statistics(tmp_path / "other", {"0.expert_pruning": {PATH: figures}}, dict(reversed(said.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    with safetensors.safe_open(tmp_path / "one", framework="pt") as file:
        assert list(file.metadata()) == ["header"]  # several would be written in an order that changes


def test_views_are_written(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    views = {"rows": whole[:2], "columns": whole[:, 1:], "turned": whole.T, "one": whole[0]}
    save_statistics(tmp_path / "s", {"0.x": {PATH: views}}, about())
    found = load_statistics(tmp_path / "s")[0]["0.x"][PATH]
    assert all(torch.equal(found[name], view) for name, view in views.items())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "1", "about": "{}"}, "it is a statistics file of format 1; this version reads format 2. Observe "),
        ({"header": '{"format": 3, "about": {}}'}, "it is a statistics file of format 3; this version reads format 2."),
        ({}, "it is no statistics file; this version reads format 2."),
        ({"header": "{}"}, "it is no statistics file"),
        ({"header": "[1]"}, "cannot be read as a statistics file: "),
        ({"header": "{"}, "cannot be read as a statistics file: Expecting"),
    ],
)
def test_other_formats_are_refused(tmp_path, metadata, message):
    path = tmp_path / "s"
    safetensors.torch.save_file({"0.x/a/b": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{path}: {message}')}"):
        load_statistics(path)


def test_damaged_files_are_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="found a folder, expected a run's statistics"):
        load_statistics(tmp_path)
    path = tmp_path / "s"
    save_statistics(path, *run(("code", 1)))
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"", b"not at all"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: cannot be read as a statistics file: "):
            load_statistics(path)
    safetensors.torch.save_file(
        {"name": torch.zeros(1)}, path, metadata={"header": json.dumps({"format": 2, "about": about()})}
    )
    with pytest.raises(CheckpointError, match="cannot be read as a statistics file"):
        load_statistics(path)
    with pytest.raises(CheckpointError, match="cannot be read as a statistics file"):
        load_statistics(tmp_path / "nowhere")


# Files together --------------------------------------------------------------------------------------------


def assert_same_figures(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def joined(said):
    """Domains as they are told of files added up: one entry for each name."""
    found = {}
    for text in said["domains"]:
        one = found.setdefault(text["name"], {**text, "tokens": 0, "sequences": 0, "fingerprint": []})
        one["tokens"] += text["tokens"]
        one["sequences"] += text["sequences"]
        one["fingerprint"].append(text["fingerprint"])
    return said | {"domains": [{**one, "fingerprint": "+".join(one["fingerprint"])} for one in found.values()]}


def test_files_of_one_domain_are_one_run_over_all(run):
    merged, said = merge_statistics([run(("text", 1)), run(("text", 2)), run(("text", 3))])
    expected, expected_about = run(("text", 1), ("text", 2), ("text", 3))
    assert_same_figures(merged["0.expert_pruning"][PATH], expected["0.expert_pruning"][PATH])
    assert said == joined(expected_about) | {"dropped_figures": []}
    assert said["domains"] == [
        {"name": "text", "fingerprint": "sha256:text1+sha256:text2+sha256:text3", "tokens": 30, "sequences": 3}
    ]


def test_domains_stand_side_by_side_and_are_renumbered(run):
    """The second file has one domain of the first, as its second."""
    merged, said = merge_statistics([run(("code", 1), ("prose", 2)), run(("maths", 3), ("prose", 4))])
    expected, expected_about = run(("code", 1), ("prose", 2), ("maths", 3), ("prose", 4))
    assert merged["0.expert_pruning"][PATH]["batch.domain"].tolist() == [0, 1, 2, 1]
    assert_same_figures(merged["0.expert_pruning"][PATH], expected["0.expert_pruning"][PATH])
    assert said == joined(expected_about) | {"dropped_figures": []}
    assert said["passes"]["0.expert_pruning"]["domains"] == ["code", "prose", "maths"]


def test_the_largest_is_a_maximum_by_hand():
    def file(largest, domain, fingerprint):
        figures = {"sums.largest": torch.tensor([largest]), "sums.tokens": torch.tensor([largest])}
        return {"0.expert_pruning": {PATH: figures}}, about((domain, fingerprint))

    files = [file([1.0, 5.0], "a", "1"), file([2.0, 4.0], "a", "2"), file([0.0, 9.0], "b", "3")]
    found = merge_statistics(files)[0]["0.expert_pruning"][PATH]
    assert found["sums.largest"].tolist() == [[2.0, 5.0], [0.0, 9.0]]
    assert found["sums.tokens"].tolist() == [[3.0, 9.0], [0.0, 9.0]]


def test_one_file_stays_as_it_is(run):
    passes, said = run(("code", 1), others={"greedy.order": torch.arange(2)})
    merged, told = merge_statistics([(passes, said)])
    assert told == said
    assert merged == {"0.expert_pruning": {PATH: passes["0.expert_pruning"][PATH]}}


def test_files_are_not_changed(run):
    files = [run(("code", 1)), run(("prose", 2))]
    before = copy.deepcopy(files)
    merge_statistics(files)
    assert [said for _, said in files] == [said for _, said in before]
    for (passes, _), (passes_before, _) in zip(files, before, strict=True):
        assert_same_figures(passes["0.expert_pruning"][PATH], passes_before["0.expert_pruning"][PATH])


def test_what_cannot_be_added_is_left_out_and_named(run):
    searched = run(("code", 1), others={"greedy.order": torch.arange(2), "mine.own": torch.zeros(6)})
    merged, said = merge_statistics([searched, run(("code", 2))])
    assert said["dropped_figures"] == ["greedy.order", "mine.own"]
    assert "greedy.order" not in merged["0.expert_pruning"][PATH]
    again = merge_statistics([(merged, said), run(("code", 3))])[1]
    assert again["dropped_figures"] == ["greedy.order", "mine.own"]


def test_a_search_on_both_texts_is_left_out_too(run):
    files = [run(("code", seed), others={"greedy.order": torch.arange(2)}) for seed in (1, 2)]
    assert merge_statistics(files)[1]["dropped_figures"] == ["greedy.order"]


def test_losses_of_other_sets_are_left_out(run):
    merged, said = merge_statistics([run(("code", 1)), run(("code", 2), counts=(3, 5))])
    assert said["dropped_figures"] == ["subsets.counts", "subsets.squared_error", "subsets.top_k"]
    assert merged["0.expert_pruning"][PATH]["batch.num_tokens"].tolist() == [12, 12]


def test_other_weights_are_left_out(run):
    """The models are the same by their fingerprints; the figures are not."""
    said = merge_statistics([run(("a", 1)), run(("b", 2), others={"weights.l1": torch.ones(6)})])[1]
    assert said["dropped_figures"] == ["weights.l1"]


def test_figures_that_only_one_file_has_are_left_out(run):
    one = run(("code", 1))
    del one[0]["0.expert_pruning"][PATH]["pairs.loss"]
    assert merge_statistics([one, run(("code", 2))])[1]["dropped_figures"] == ["pairs.loss"]


# Files that do not belong together -------------------------------------------------------------------------

CANNOT = "the statistics cannot be added up: "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"fingerprint": "other"}}, CANNOT + "they are of different models, sha256:model and other."),
        (
            {"tokenizer": "words"},
            CANNOT + "the text was cut by different tokenizers, sha256:tokenizer and words.",
        ),
        ({"layers": [LAYER, LAYER]}, CANNOT + "the models have different MoE layers."),
    ],
)
def test_other_models(run, changes, message):
    passes, said = run(("b", 2))
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        merge_statistics([run(("a", 1)), (passes, said | changes)])


def test_progressive_figures(run):
    other = run(("code", 2))
    other[1]["passes"]["0.expert_pruning"]["progressive"] = True
    for files in ([run(("code", 1)), other], [other, run(("code", 1))]):
        with pytest.raises(CheckpointError, match=f"^{CANNOT}those of 0.expert_pruning are progressive, each layer"):
            merge_statistics(files)


@pytest.mark.parametrize("second", [(("b", 1), ("a", 1)), (("other name", "a1"),)])
def test_the_same_text_does_not_count_twice(run, second):
    """Of the same name or another."""
    first = merge_statistics([run(("a", 1)), run(("a", 2))])
    passes, said = run(*((name, 9) for name, _ in second))
    for text, (name, seed) in zip(said["domains"], second, strict=True):
        text["fingerprint"] = f"sha256:{seed}" if name == "other name" else f"sha256:{name}{seed}"
    message = f"{CANNOT}the same text would count twice (sha256:a1)."
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        merge_statistics([first, (passes, said)])


def test_passes_over_other_layers_are_not_mixed(run):
    """A later pass saw what an earlier one had left of the model."""
    passes, said = run(("b", 2))
    said["passes"]["0.expert_pruning"]["layers"] = [LAYER | {"num_experts": 4}]
    message = "the statistics have no pass over the same layers in common: 0.expert_pruning; 0.expert_pruning."
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        merge_statistics([run(("a", 1)), (passes, said)])
