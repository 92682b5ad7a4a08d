"""Fidelity to the original: by hand, by brute force over the whole vocabulary, from memory and from disk, resumed."""

from __future__ import annotations

import json
import math
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from evaluation.test_evaluate import FixedLogits, Loads, as_sequences, on_disk
from machine.test_processes import together
from tiny_models import small_mixtral, tiny_folder, token_ids, word_tokenizer, write_checkpoint, write_token_file
from torch import Tensor

import compressor
from compressor import EvaluationError, RecipeError
from compressor.data.sequences import Sequences, make_batches
from compressor.evaluation import fidelity as fidelities
from compressor.evaluation.fidelity import Answers, Fidelity, beside_original
from compressor.evaluation.perplexity import Perplexity, Watch, perplexity
from compressor.machine.distributed import Processes
from compressor.observe import forward
from compressor.run import pipeline

LENGTHS = (9, 14, 1, 5, 14)


class Live:
    """A model in memory, as measurements see it."""

    def __init__(self, model: Any, processes: Processes | None = None) -> None:
        self.model, self.processes = model, processes or Processes()

    def perplexity(self, sequences: Sequences, batch_size: int, update: Any = None, watch: Watch | None = None) -> Any:
        return perplexity(self.model, sequences, batch_size, update, self.processes, watch=watch)


@pytest.fixture(scope="module")
def original() -> Any:
    return small_mixtral(seed=1).eval()


@pytest.fixture(scope="module")
def other() -> Any:
    """Not far from the original."""
    model = small_mixtral(seed=1).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(noise, alpha=0.1 * float(parameter.std()) if parameter.dim() > 1 else 0.0)
    return model


@pytest.fixture(scope="module")
def text() -> Sequences:
    return as_sequences(*[token_ids(length, seed=length).tolist() for length in LENGTHS])


def compare(original: Any, other: Any, text: Sequences, batch_size: int = 2, **kept: Any) -> Fidelity:
    answers = Answers(**kept)
    Live(original).perplexity(text, batch_size, watch=answers.keep)
    return beside_original(Live(other), text, batch_size, answers)[1]


def by_brute_force(original: Any, other: Any, text: Sequences) -> dict[str, list[Tensor]]:
    """In float64, sequence by sequence: of each predicted token the divergence, agreement and added loss."""
    found: dict[str, list[Tensor]] = {"kl": [], "agreement": [], "delta_nll": []}
    for ids in text.ids:
        [batch] = make_batches([ids], 1)
        log_p, log_q = (forward.logits(one, batch)[:-1].double().log_softmax(-1) for one in (original, other))
        found["kl"].append((log_p.exp() * (log_p - log_q)).sum(-1))
        found["agreement"].append((log_p.argmax(-1) == log_q.argmax(-1)).double())
        found["delta_nll"].append((log_p - log_q).gather(1, ids[1:, None])[:, 0])
    return found


def assert_equal(found: Fidelity, expected: dict[str, list[Tensor]]) -> None:
    for name, values in expected.items():
        mean = torch.cat(values).mean()
        assert getattr(found, name) == pytest.approx(mean.item(), rel=1e-4, abs=1e-6)
        squares = sum((one.sum() - mean * len(one)) ** 2 for one in values)
        error = (len(values) / (len(values) - 1) * squares).sqrt() / found.tokens
        assert getattr(found, f"{name}_error") == pytest.approx(error.item(), rel=1e-3, abs=1e-6)


def test_by_hand() -> None:
    """After token 0 the original answers 1/4, 3/4, the other 1/2, 1/2; after token 1 they answer alike."""
    answers = [[0.0, math.log(3)], [math.log(4), 0.0]]
    found = compare(FixedLogits(answers), FixedLogits([[0.0, 0.0], answers[1]]), as_sequences([0, 1], [0, 0, 1, 0]))
    one = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)  # three of four tokens follow a 0
    assert found.kl == pytest.approx(3 / 4 * one, rel=1e-6)
    assert found.kl_error == pytest.approx(math.sqrt(2 * ((one / 4) ** 2 + (one / 4) ** 2)) / 4, rel=1e-6)
    assert found.agreement == 1 / 4  # of two as likely ones the first is taken
    added = [math.log(3 / 2), math.log(1 / 2) + math.log(3 / 2)]  # 0 → 1; 0 → 0 and 0 → 1; 1 → 0 alike
    assert found.delta_nll == pytest.approx(sum(added) / 4, rel=1e-6)
    assert (found.tokens, found.vocabulary, found.exact) == (4, 2, True)
    # likeliest after 0 was 1 and is 0: so both 1 that follow a 0 are lost, and the 0 that does is gained
    lost = [{"next": "[1]", "before": "[1]", "now": "[0]", "text": text} for text in ("[0]", "[0, 0]")]
    gained = [{"next": "[0]", "before": "[1]", "now": "[0]", "text": "[0]"}]
    assert found.flips == {"lost": {"tokens": 2, "examples": lost}, "gained": {"tokens": 1, "examples": gained}}


def test_few_examples_of_flips_each_the_last_of_its_sequence() -> None:
    """The original always foresees a 1, the other one a 0."""
    long = [0] + [1] * 30
    found = compare(FixedLogits([[0.0, 1.0]] * 2), FixedLogits([[1.0, 0.0]] * 2), as_sequences(*[long] * 5))
    assert found.flips is not None
    assert found.flips["gained"] == {"tokens": 0, "examples": []}
    assert found.flips["lost"]["tokens"] == 5 * 30
    assert [one["text"] for one in found.flips["lost"]["examples"]] == [str([1] * 20)] * 3


def test_equals_brute_force_over_the_whole_vocabulary(original: Any, other: Any, text: Sequences) -> None:
    found = compare(original, other, text)
    assert_equal(found, by_brute_force(original, other, text))
    assert 0.3 < found.agreement < 1
    assert found.kl > 0.01
    assert found.tokens == sum(LENGTHS) - len(LENGTHS)
    assert found.vocabulary == 64
    assert compare(original, other, as_sequences([1, 2, 3])).kl_error is None


@pytest.mark.parametrize("vocabulary", [64, 2100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_models_differ_in_nothing(vocabulary: int, dtype: torch.dtype, text: Sequences) -> None:
    model = small_mixtral(vocab_size=vocabulary).to(dtype).eval()
    found = compare(model, model, text)
    assert [found.kl, found.agreement, found.delta_nll] == [0.0, 1.0, 0.0]
    assert [found.kl_error, found.agreement_error, found.delta_nll_error] == [0.0, 0.0, 0.0]


def test_of_a_large_vocabulary_a_lower_bound(text: Sequences) -> None:
    """What is merged makes the divergence smaller, by little where it is unlikely; all else is exact."""
    torch.manual_seed(0)
    tables = [4 * torch.randn(64, 2100), torch.randn(64, 2100)]
    flat, peaked = [], []
    for scale, found in ((0.1, flat), (1.0, peaked)):
        one, two = (FixedLogits((scale * table).tolist()) for table in (tables[0], tables[0] + 0.5 * tables[1]))
        bound, whole = compare(one, two, text), by_brute_force(one, two, text)
        assert (bound.vocabulary, bound.exact) == ("top 1024 and the rest", False)
        kl = torch.cat(whole.pop("kl")).mean().item()
        assert_equal(bound, whole)
        found += [bound.kl / kl]
    assert 0.4 < flat[0] < 0.95  # half of the probability is in the merged half
    assert 0.98 < peaked[0] < 1


def test_top_and_rest_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelities, "MOST_WHOLE", 3)
    monkeypatch.setattr(fidelities, "NUM_KEPT", 2)
    p, q = [0.1, 0.4, 0.3, 0.2], [0.2, 0.3, 0.1, 0.4]
    one, two = (FixedLogits([[math.log(x) for x in row]] * 4) for row in (p, q))
    found = compare(one, two, as_sequences([0, 3]))
    kept = 0.4 * math.log(4 / 3) + 0.3 * math.log(3) + 0.3 * math.log(0.3 / 0.6)
    assert found.kl == pytest.approx(kept, rel=1e-6)
    assert found.delta_nll == pytest.approx(math.log(0.2 / 0.4), rel=1e-6)  # of an id that is not among them
    assert found.vocabulary == "top 2 and the rest"


@pytest.mark.parametrize("vocabulary", [64, 2100])
def test_batches_padding_chunks_and_files_change_no_figure(
    vocabulary: int, text: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (small_mixtral(seed=seed, vocab_size=vocabulary).eval() for seed in (0, 1))
    whole = compare(one, two, text, 5)
    alone = compare(one, two, text, 1, folder=tmp_path / "answers", run="r")
    monkeypatch.setattr(fidelities, "CHUNK_ELEMENTS", 4 * vocabulary)
    for found in (alone, compare(one, two, text, 5), compare(one, two, text, 5, folder=tmp_path / "more")):
        for name in ("kl", "kl_error", "agreement", "delta_nll", "delta_nll_error"):
            assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-4)
    files = sorted(path.name for path in (tmp_path / "answers").iterdir())
    assert files == [f"{number}.safetensors" for number in range(5)]
    kept = Answers(tmp_path / "answers", "r")
    assert kept.has(range(5))
    assert not kept.has(range(6))
    assert not Answers(tmp_path / "answers", "another run").has([0])
    (tmp_path / "answers" / "3.safetensors").write_bytes(b"cut")
    assert not kept.has(range(5))
    size = sum((tmp_path / "more" / f"{number}.safetensors").stat().st_size for number in range(1))
    per_token = fidelities.bytes_per_token(vocabulary)
    assert size == pytest.approx(per_token * whole.tokens, rel=0.02, abs=1000)


def test_several_processes_find_the_same(original: Any, other: Any, text: Sequences) -> None:
    alone = compare(original, other, text)

    def work(processes: Processes) -> Fidelity:
        answers = Answers()
        Live(original, processes).perplexity(text, 2, watch=answers.keep)
        assert answers.has(processes.own(3))
        return beside_original(Live(other, processes), text, 2, answers)[1]

    assert together(2, work) == [alone] * 2
    assert together(4, work) == [alone] * 4  # one without a batch


def test_a_model_on_disk_is_read_no_more_often(original: Any, other: Any, text: Sequences, tmp_path: Path) -> None:
    pieces = []
    for name, model in (("original", original), ("other", other)):
        model.save_pretrained(tmp_path / name)
        pieces.append(on_disk(tmp_path / name, tokens_at_once=30))
    loads = [Loads(piece) for piece in pieces]
    answers = Answers(tmp_path / "answers")
    pieces[0].perplexity(text, 2, watch=answers.keep)
    found = beside_original(pieces[1], text, 2, answers)
    assert found == (perplexity(other, text, 2), compare(original, other, text))
    assert [set(one.by_layer.values()) for one in loads] == [{2}] * 2  # 2 × 14 and 2 × 5 tokens, then 14


def test_what_cannot_be_compared_is_refused(original: Any, text: Sequences) -> None:
    larger = small_mixtral(vocab_size=65).eval()
    with pytest.raises(EvaluationError, match=r"^source 'text': the model tells 65 ids apart, the original 64: only"):
        compare(original, larger, text)
    excluding = FixedLogits([[0.0, 0.0, -math.inf]] * 3)
    with pytest.raises(EvaluationError, match=r"^source 'text': the divergence from the original on sequence 1 is inf"):
        compare(
            FixedLogits([[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0], [0.0] * 3]), excluding, as_sequences([0, 1], [1, 0])
        )
    with pytest.raises(EvaluationError, match=r"the loss on sequence 0 is nan"):
        compare(original, FixedLogits([[math.nan] * 64] * 64), text)


# runs


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    tokens = write_token_file(tmp_path / "tokens.jsonl", token_ids(12, 24).tolist())
    return {
        "model": str(tiny_folder("mixtral")),
        "calibration": {"data": [{"tokens": str(tokens)}]},
        "passes": [{"expert_pruning": {"keep": 6}}, {"dynamic_skipping": {}}],
        "evaluate": {"fidelity": [{"tokens": str(tokens), "name": "one"}, {"tokens": str(tokens), "name": "two"}]},
    }


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts whose perplexity is measured from now on."""
    found: list[str] = []
    measure = perplexity

    def counted(model: Any, sequences: Sequences, *args: Any, **kwargs: Any) -> Perplexity:
        found.append(sequences.name)
        return measure(model, sequences, *args, **kwargs)

    for room in ("backend", "on_disk"):
        monkeypatch.setattr(f"compressor.edit.{room}.perplexity", counted)
    return found


def test_a_run_from_memory_and_from_disk_measures_each_text_once(
    recipe: dict[str, Any], tmp_path: Path, forwards: list[str]
) -> None:
    evaluations = []
    for where in ("memory", "disk"):
        result = compressor.compress(recipe, output=tmp_path / where, overrides=[f"weights={where}"])
        evaluations.append(result.record["evaluation"])
        assert not list(tmp_path.glob(".*"))
    assert forwards == 4 * ["one", "two"]
    fidelity = evaluations[0]["fidelity"]
    assert evaluations[1]["fidelity"] == fidelity
    assert list(fidelity) == ["one", "two"] == list(evaluations[0]["after"]["perplexity"])
    assert "fidelity" not in evaluations[0]["after"]
    for name, found in fidelity.items():
        before, after = (evaluations[0][side]["perplexity"][name]["mean_loss"] for side in ("before", "after"))
        assert found["delta_nll"] == pytest.approx(after - before, rel=1e-9)
        assert found["kl"] > 0
        assert found["vocabulary"] == 64


def test_each_pass_is_compared_with_the_original(recipe: dict[str, Any]) -> None:
    recipe["evaluate"]["each_pass"] = True
    evaluation = compressor.compress(recipe).record["evaluation"]
    alone = compressor.compress({**recipe, "passes": recipe["passes"][:1], "evaluate": evaluate_only(recipe)}).record
    assert evaluation["alone"][0]["fidelity"] == alone["evaluation"]["fidelity"]
    assert evaluation["alone"][1]["fidelity"] != evaluation["fidelity"] != evaluation["alone"][0]["fidelity"]


def evaluate_only(recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe["evaluate"].items() if key != "each_pass"}


@pytest.mark.parametrize("damage", [False, True])
def test_a_run_goes_on_with_the_answers_that_it_has(
    recipe: dict[str, Any], tmp_path: Path, forwards: list[str], damage: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["passes"] = recipe["passes"][:1]
    whole = compressor.compress(recipe).record["evaluation"]
    del forwards[:]
    with monkeypatch.context() as patch:
        patch.setattr("compressor.run.passes.edit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compressor.compress(recipe, output=tmp_path / "out")
    kept = sorted((tmp_path / ".out.partial/answers").rglob("*.safetensors"))
    assert [str(path.relative_to(kept[0].parents[1])) for path in kept] == [
        f"{text}/{batch}.safetensors" for text in (0, 1) for batch in (0, 1)
    ]
    if damage:
        kept[1].write_bytes(kept[1].read_bytes()[:100])
    found = compressor.compress(recipe, output=tmp_path / "out", resume=True).record["evaluation"]
    assert found["fidelity"] == whole["fidelity"]
    assert forwards == ["one", "two"] * (3 if damage else 2)
    assert not list(tmp_path.glob(".*"))


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_text_that_is_named_twice_is_read_once(
    recipe: dict[str, Any], forwards: list[str], cli: Callable[..., Any]
) -> None:
    text = recipe["evaluate"]["fidelity"][0]
    recipe["evaluate"] |= {"perplexity": [text]}
    compressor.compress(recipe)
    assert forwards == 2 * ["one", "two"]
    recipe["evaluate"]["perplexity"] = [{**text, "samples": 3}]
    with pytest.raises(RecipeError, match=r"evaluate: two sources are called 'one'; tell them apart with `name:`"):
        compressor.compress(recipe)


def test_what_is_kept_counts_in_the_estimate(recipe: dict[str, Any], tmp_path: Path) -> None:
    def needs(**evaluate: Any) -> list[int]:
        asked = {**recipe, "evaluate": {**recipe["evaluate"], **evaluate}}
        found = [compressor.check(asked, output=output).plan["needs"] for output in (None, tmp_path / "out")]
        return [found[0]["memory"], found[1]["memory"], found[0]["disk"], found[1]["disk"]]

    with_both, with_one = needs(), needs(fidelity=recipe["evaluate"]["fidelity"][:1])
    bytes_of_one = 12 * 24 * (4 * 64 + 8)
    assert [a - b for a, b in zip(with_both, with_one, strict=True)] == [bytes_of_one, 0, 0, bytes_of_one]


def test_the_record_is_json(recipe: dict[str, Any]) -> None:
    fidelity = compressor.compress(recipe).record["evaluation"]["fidelity"]["one"]
    assert json.loads(json.dumps(fidelity)) == fidelity
    assert Fidelity(**fidelity).to_json() == fidelity


# against another model


@pytest.fixture
def smaller(recipe: dict[str, Any], tmp_path: Path) -> Path:
    compressor.compress({**recipe, "passes": recipe["passes"][:1], "evaluate": None}, output=tmp_path / "smaller")
    return tmp_path / "smaller"


def test_a_model_against_its_original(
    recipe: dict[str, Any], smaller: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of the run that made it, from memory and from disk; of the original itself nothing is lost."""
    loaded: list[weakref.ref[Any]] = []
    load = pipeline.load_moe

    def alone(*args: Any) -> Any:
        assert all(one() is None for one in loaded), "the other model is there still"
        found = load(*args)
        loaded.append(weakref.ref(found.model))
        return found

    run = compressor.compress({**recipe, "passes": recipe["passes"][:1]}).record["evaluation"]
    monkeypatch.setattr(pipeline, "load_moe", alone)
    original = recipe["model"]
    records = [compressor.evaluate(recipe, str(smaller), against=original)]
    assert len(loaded) == 2
    records.append(compressor.evaluate(recipe, str(smaller), against=original, overrides=["weights=disk"]))
    for record in records:
        assert record["evaluation"]["fidelity"] == run["fidelity"]
        assert record["evaluation"]["before"]["perplexity"] == run["before"]["perplexity"]
        assert record["evaluation"]["after"]["perplexity"] == run["after"]["perplexity"]
        assert (record["model"]["reference"], record["against"]["reference"]) == (str(smaller), original)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    answer = cli("evaluate", original, "--recipe", tmp_path / "recipe.yaml", "--against", original, "-q")
    assert answer.status == 0, answer.err
    assert [line.split() for line in answer.out.splitlines() if line.startswith(("one  ", "two  "))] == [
        [name, "0.0000", "±", "0.0000", "100.0", "±", "0.0", "0.0000", "±", "0.0000"] for name in ("one", "two")
    ]


def test_of_one_model_alone_there_is_no_fidelity(recipe: dict[str, Any]) -> None:
    record = compressor.evaluate(recipe, recipe["model"])
    assert record["evaluation"].keys() == {"text", "after"}
    assert list(record["evaluation"]["after"]["perplexity"]) == ["one", "two"]


@pytest.mark.parametrize("change", ["tokenizer", "vocabulary"])
def test_another_tokenizer_or_vocabulary_is_refused(
    recipe: dict[str, Any], tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr(pipeline, "load_moe", interrupt)
    other = write_checkpoint(small_mixtral(vocab_size=64 + (change == "vocabulary")), tmp_path / "other")
    says = rf"its size of vocabulary is 65, that of {re.escape(recipe['model'])} is 64; only models that read the same"
    if change == "tokenizer":
        word_tokenizer([f"v{number}" for number in range(64)], unknown="v2").save_pretrained(other)
        says = rf"its tokenizer is sha256:\w+, that of {re.escape(recipe['model'])} is sha256:\w+; only models that"
    with pytest.raises(EvaluationError, match=f"^{re.escape(str(other))}: {says}"):
        compressor.evaluate(recipe, recipe["model"], against=str(other))
    with pytest.raises(RecipeError, match="the recipe has no `evaluate:`"):
        compressor.evaluate({**recipe, "evaluate": None}, recipe["model"], against=str(other))
