"""Figures of live models: against hand-worked numbers, slow obvious versions, and lm-eval itself."""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import small_mixtral, word_tokenizer
from transformers import PreTrainedTokenizerFast

from compressor.checkpoint.find import Checkpoint
from compressor.data import lm_eval_tasks
from compressor.data.sequences import Sequences, fingerprint
from compressor.edit.on_disk import OnDisk
from compressor.errors import CalibrationError, CheckpointError, EvaluationError
from compressor.evaluation import perplexity as perplexities
from compressor.evaluation import size as sizes
from compressor.evaluation import speed as speeds
from compressor.evaluation.lm_eval import Metric, TaskResult, run_tasks
from compressor.evaluation.paired import Flips, mcnemar, paired
from compressor.evaluation.perplexity import next_token_losses, perplexity
from compressor.evaluation.size import RoutedSize, bytes_on_disk
from compressor.evaluation.speed import peak_memory
from compressor.machine.distributed import Processes
from compressor.machine.progress import Progress
from compressor.testing import tiny

WORDS = ["</s>", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "is", "not", "after", "before"]
VOCAB_SIZE = 32


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    settings = {"vocab_size": VOCAB_SIZE, "intermediate_size": 24, "num_local_experts": 4}
    return small_mixtral(seed=seed, **{**settings, "max_position_embeddings": 64, "initializer_range": 0.5, **changes})


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer(WORDS, unknown="</s>")


def as_sequences(*ids: list[int], name: str = "text") -> Sequences:
    tensors = tuple(torch.tensor(row, dtype=torch.int64) for row in ids)
    return Sequences(name, tensors, fingerprint(tensors))


def random_sequences(*lengths: int) -> Sequences:
    generator = torch.Generator().manual_seed(7)
    return as_sequences(*[torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths])


class FixedLogits(torch.nn.Module):
    """Predicts from a table: the row of the current token."""

    def __init__(self, table_VV: list[list[float]]) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(len(table_VV), len(table_VV))
        self.embedding.weight.data = torch.tensor(table_VV)
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.embedding(input_ids))


# --- perplexity


def test_perplexity_worked_by_hand() -> None:
    # After token 0 the odds of tokens 0 and 1 are 1 : 3, after token 1 they are 1 : 1.
    model = FixedLogits([[0.0, math.log(3)], [0.0, 0.0]])
    result = perplexity(model, as_sequences([0, 1], [0, 0, 1, 1]), batch_size=2)
    # p(1|0) = 3/4; then p(0|0) = 1/4, p(1|0) = 3/4, p(1|1) = 1/2.
    losses = [math.log(4 / 3), math.log(4) + math.log(4 / 3) + math.log(2)]
    mean = sum(losses) / 4
    assert result.tokens == 4
    assert result.mean_loss == pytest.approx(mean, rel=1e-6)
    assert result.perplexity == pytest.approx((4 / 3 * 4 * 4 / 3 * 2) ** 0.25, rel=1e-6)
    residual = (losses[0] - mean) ** 2 + (losses[1] - 3 * mean) ** 2
    assert result.standard_error == pytest.approx(math.sqrt(2 / 1 * residual) / 4, rel=1e-6)


def test_standard_error_of_equal_lengths_is_that_of_the_means(model: Any) -> None:
    sequences = random_sequences(9, 9, 9, 9, 9)
    means = [perplexity(model, as_sequences(ids.tolist())).mean_loss for ids in sequences.ids]
    expected = np.std(means, ddof=1) / math.sqrt(5)
    assert perplexity(model, sequences).standard_error == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, as_sequences([1, 2, 3])).standard_error is None


@torch.no_grad()
def slow_mean_loss(model: Any, sequences: Sequences) -> float:
    total, count = 0.0, 0
    for ids in sequences.ids:
        for position in range(1, len(ids)):
            logits = model(input_ids=ids[None, :position]).logits[0, -1]
            total -= torch.log_softmax(logits.double(), -1)[ids[position]].item()
            count += 1
    return total / count


def test_perplexity_equals_the_slow_obvious_version(model: Any) -> None:
    sequences = random_sequences(7, 12, 2, 9)
    result = perplexity(model.eval(), sequences, batch_size=3)
    assert result.mean_loss == pytest.approx(slow_mean_loss(model, sequences), rel=1e-5)
    assert result.perplexity == math.exp(result.mean_loss)
    assert result.tokens == 7 + 12 + 2 + 9 - 4
    assert (result.name, result.fingerprint) == ("text", sequences.fingerprint)


def test_padding_changes_no_figure(model: Any) -> None:
    sequences = random_sequences(5, 31, 2, 17)
    alone = perplexity(model, sequences, batch_size=1)
    together = perplexity(model, sequences, batch_size=4)
    assert together.mean_loss == pytest.approx(alone.mean_loss, rel=1e-6)
    assert together.standard_error == pytest.approx(alone.standard_error, rel=1e-5)


def test_chunks_change_no_figure(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = random_sequences(5, 31, 2, 17)
    whole = perplexity(model, sequences, batch_size=4)
    monkeypatch.setattr(perplexities, "CHUNK_ELEMENTS", 4 * VOCAB_SIZE * 7)
    assert perplexity(model, sequences, batch_size=4).mean_loss == pytest.approx(whole.mean_loss, rel=1e-9)


def test_log_softmax_is_in_float32() -> None:
    logits_BSV = torch.randn(1, 4, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids_BS = torch.tensor([[1, 2, 3, 4]])
    losses_BS = next_token_losses(logits_BSV, ids_BS, torch.ones(1, 4, dtype=torch.bool))
    exact = -torch.log_softmax(logits_BSV.double(), -1)[0, [0, 1, 2], [2, 3, 4]].sum()
    assert losses_BS.dtype == torch.float64
    assert losses_BS.sum() == pytest.approx(exact.item(), rel=1e-6)


def test_progress_counts_sequences(model: Any) -> None:
    seen: list[tuple[int, int]] = []
    perplexity(
        model,
        random_sequences(4, 4, 4),
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 3), (3, 3)]


def test_perplexity_refuses_what_it_cannot_measure(model: Any) -> None:
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3, 0] = float("nan")
    with pytest.raises(EvaluationError, match=r"source 'text': the loss on sequence 0 is nan"):
        perplexity(broken, random_sequences(5))
    with pytest.raises(EvaluationError, match=r"'text' has no sequence of 2 tokens or more"):
        perplexity(model, as_sequences([3]))
    with pytest.raises(EvaluationError, match=r"sequences of 65 tokens, the limit is 64: lower"):
        perplexity(model, random_sequences(65))
    with pytest.raises(CalibrationError, match=r"holds token id 32, but the model has only 32 embeddings"):
        perplexity(model, as_sequences([1, 32]))
    certain = FixedLogits([[0.0, 800.0], [0.0, 800.0]])
    with pytest.raises(EvaluationError, match=r"a mean loss of 800 nats per token has no finite perplexity"):
        perplexity(certain, as_sequences([0, 0, 0]))


# --- tasks


def documents(**_: Any) -> dict[str, Any]:
    from datasets import Dataset

    rng = random.Random(1)
    rows = []
    for _number in range(12):
        question = " ".join(rng.choice([*"abcdefgh"]) for _ in range(rng.randint(1, 6)))
        choices = ["not a", "is b after c before d", "g"]
        rows.append({"question": question, "choices": choices, "answer": rng.randrange(3)})
    return {"test": Dataset.from_list(rows), "train": Dataset.from_list(rows[:4])}


def multiple_choice(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "task": name,
        "custom_dataset": documents,
        "test_split": "test",
        "training_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
        **changes,
    }


def local_tasks() -> dict[str, dict[str, Any]]:
    rolling = multiple_choice("demo_rolling", output_type="loglikelihood_rolling", doc_to_target="{{question}}")
    rolling["metric_list"] = [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    ]
    del rolling["doc_to_choice"]
    return {"demo_choice": multiple_choice("demo_choice"), "demo_rolling": rolling}


@pytest.fixture
def yaml_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the tasks my_choice and my_other over local files, and the group my_group of both."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [json.dumps(row) for row in documents()["test"]]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "some.jsonl").write_text("\n".join(rows[:5]))
    for name, file in (("my_choice", "rows"), ("my_other", "some")):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {tmp_path}/{file}.jsonl}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
            "doc_to_target: answer\ndoc_to_choice: choices\n"
        )
    (tmp_path / "my_group.yaml").write_text(
        "group: my_group\ntask: [my_choice, my_other]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return tmp_path


def load(*names: str, **options: Any) -> lm_eval_tasks.LoadedTasks:
    return lm_eval_tasks.load_tasks(names, local_tasks=local_tasks, **options)


@pytest.fixture(scope="module")
def choice() -> lm_eval_tasks.LoadedTasks:
    return load("demo_choice")


def test_tasks_equal_lm_eval(model: Any, tokenizer: Any, choice: lm_eval_tasks.LoadedTasks) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    ours = run_tasks(model, tokenizer, choice, batch_size=4)["demo_choice"]
    theirs = simple_evaluate(
        HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4),
        tasks=[multiple_choice("demo_choice")],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=100,
    )["results"]["demo_choice"]
    for metric in ("acc", "acc_norm"):
        assert ours.metrics[metric].value == theirs[f"{metric},none"]
        assert ours.metrics[metric].standard_error == pytest.approx(theirs[f"{metric}_stderr,none"], rel=1e-12)
        assert ours.metrics[metric].higher_is_better is True
    assert ours.documents == 12
    assert ours.num_fewshot == 0


def test_rights_and_wrongs_and_their_standard_error(model: Any, tokenizer: Any, choice: Any) -> None:
    result = run_tasks(model, tokenizer, choice, batch_size=8)["demo_choice"]
    assert result.doc_ids == tuple(range(12))
    assert set(result.correct) == {"acc", "acc_norm"}
    assert result.correct["acc"] != result.correct["acc_norm"]
    p = sum(result.correct["acc"]) / 12
    assert 0 < p < 1
    assert result.metrics["acc"].value == pytest.approx(p)
    assert result.metrics["acc"].standard_error == pytest.approx(math.sqrt(p * (1 - p) / 11))


def right_answers(model: Any, tokenizer: Any) -> tuple[bool, ...]:
    """Document by document: is the choice of the highest likelihood the right one?"""
    right = []
    for row in documents()["test"]:
        totals = []
        for answer in row["choices"]:
            texts = (row["question"], f"{row['question']} {answer}")
            context, whole = (tokenizer(text)["input_ids"] for text in texts)
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            totals.append(sum(logits[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
        right.append(totals.index(max(totals)) == row["answer"])
    return tuple(right)


def test_right_answers_are_those_of_the_highest_likelihood(model: Any, tokenizer: Any, choice: Any) -> None:
    result = run_tasks(model, tokenizer, choice, batch_size=5)["demo_choice"]
    assert result.correct["acc"] == right_answers(model, tokenizer)


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "gemma4", "nemo_speechlm"])
def test_composites_are_asked_as_causal_models(model_type: str, tokenizer: Any, choice: Any) -> None:
    """lm-eval by itself takes nemo_speechlm for an encoder-decoder: transformers lists it with these too."""
    composite = tiny.tiny_model(model_type).eval()
    result = run_tasks(composite, tokenizer, choice, batch_size=4)["demo_choice"]
    assert result.correct["acc"] == right_answers(composite, tokenizer)


def test_documents_of_the_hub_are_called_by_their_name_there(model: Any, tokenizer: Any) -> None:
    [(name, task)] = (found := load("demo_choice")).tasks.items()
    assert run_tasks(model, tokenizer, found, limit=1)[name].dataset == ""
    task.set_config("dataset_path", "owner/exam")
    task.set_config("dataset_name", "hard")
    result = run_tasks(model, tokenizer, found, limit=1)[name]
    assert (result.dataset, result.dataset_config) == ("owner/exam", "hard")
    assert TaskResult.from_json(result.to_json()) == result


def test_limit_fewshot_and_seed(model: Any, tokenizer: Any) -> None:
    shots = load("demo_choice", num_fewshot=2)
    first = run_tasks(model, tokenizer, shots, limit=5, seed=1)["demo_choice"]
    again = run_tasks(model, tokenizer, shots, limit=5, seed=1)["demo_choice"]
    other = run_tasks(model, tokenizer, shots, limit=5, seed=2)["demo_choice"]
    assert (first.documents, first.num_fewshot, first.doc_ids) == (5, 2, (0, 1, 2, 3, 4))
    assert first == again
    assert first.fingerprint != other.fingerprint


def test_nothing_is_kept_from_one_model_for_the_next(model: Any, tokenizer: Any, choice: Any) -> None:
    changed = copy.deepcopy(model)
    before = run_tasks(changed, tokenizer, choice)["demo_choice"]
    changed.lm_head.weight.data.neg_()
    after = run_tasks(changed, tokenizer, choice)["demo_choice"]
    assert before.correct != after.correct
    assert after == run_tasks(changed, tokenizer, load("demo_choice"))["demo_choice"]
    assert before.fingerprint == after.fingerprint


def test_other_metrics_are_lm_evals(model: Any, tokenizer: Any) -> None:
    result = run_tasks(model, tokenizer, load("demo_rolling"), batch_size=2)["demo_rolling"]
    metric = result.metrics["word_perplexity"]
    assert metric.value > 1
    assert metric.standard_error is None
    assert metric.higher_is_better is False
    assert result.correct == {}


# --- tasks of a model on disk


class Loads:
    """How often each decoder layer was read."""

    def __init__(self, piece: OnDisk) -> None:
        assert piece.weights is not None
        self.by_layer: Counter[str] = Counter()
        load = piece.weights.load
        piece.weights.load = lambda unit: (self.by_layer.update([unit]), load(unit))  # type: ignore[method-assign]


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def on_disk(folder: Path, tokens_at_once: int = 10_000) -> OnDisk:
    return OnDisk(
        Checkpoint("model", folder),
        None,
        device="cpu",
        journal=None,
        tokens_at_once=tokens_at_once,
        progress=Progress(),
        processes=Processes(),
    )


@pytest.mark.parametrize("name", ["demo_choice", "demo_rolling", "my_group"])
def test_tasks_of_a_model_on_disk(name: str, model: Any, tokenizer: Any, folder: Path, yaml_tasks: Path) -> None:
    asked = load(name, task_path=yaml_tasks)
    expected = run_tasks(model, tokenizer, asked, batch_size=4)
    piece, told = on_disk(folder), []
    loads = Loads(piece)
    assert piece.ask(asked, tokenizer, lambda *of: told.append(of), batch_size=4) == expected
    assert set(loads.by_layer.values()) == {1}  # all requests pass a layer before the next one is read
    assert told[-1] == (2, 2)
    assert all(tensor.is_meta for tensor in piece.moe.model.parameters())


def test_more_requests_than_may_wait_take_turns(model: Any, tokenizer: Any, folder: Path, choice: Any) -> None:
    expected = run_tasks(model, tokenizer, choice, batch_size=4)
    piece, told = on_disk(folder, tokens_at_once=60), []
    loads = Loads(piece)
    assert piece.ask(choice, tokenizer, lambda *of: told.append(of), batch_size=4) == expected
    [turns] = set(loads.by_layer.values())
    assert turns > 1
    assert told == [(done, 2 * turns) for done in range(1, 2 * turns + 1)]


def test_perplexity_takes_turns_too(model: Any, folder: Path) -> None:
    text = random_sequences(9, 12, 7, 20, 3, 11)
    expected = perplexity(model, text, batch_size=2)
    piece = on_disk(folder, tokens_at_once=30)
    loads = Loads(piece)
    assert piece.perplexity(text, batch_size=2) == expected
    assert set(loads.by_layer.values()) == {3}  # 2 × 12, 2 × 20 and 2 × 11 tokens with their padding


def test_damage_ends_a_task(model: Any, tokenizer: Any, folder: Path, choice: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    next(tensor for name, tensor in tensors.items() if "layers.1" in name)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\..* NaN"):
        on_disk(folder).ask(choice, tokenizer, batch_size=4)


def test_groups_are_their_subtasks_and_their_mean(model: Any, tokenizer: Any, yaml_tasks: Path) -> None:
    results = run_tasks(model, tokenizer, load("my_group", task_path=yaml_tasks), batch_size=4)
    group = results["my_group"]
    assert list(results) == ["my_choice", "my_other", "my_group"]
    assert group.subtasks == ("my_choice", "my_other")
    parts = [results[name] for name in group.subtasks]
    assert [part.group for part in parts] == ["my_group"] * 2
    assert (group.group, group.documents) == (None, 17)
    rights = sum(sum(part.correct["acc"]) for part in parts)
    assert group.metrics["acc"].value == pytest.approx(rights / 17)
    errors = [part.metrics["acc"].standard_error for part in parts]
    pooled = math.sqrt((12 * 11 * errors[0] ** 2 + 5 * 4 * errors[1] ** 2) / (17 - 2) / 17)
    assert group.metrics["acc"].standard_error == pytest.approx(pooled)
    assert group.metrics["acc"].higher_is_better is True
    flips = paired(results, results)
    assert flips["my_group"]["acc"] == Flips(0, 0, rights, 17 - rights, 1.0)


def test_a_task_named_beside_its_group_stands_for_itself(yaml_tasks: Path) -> None:
    tasks = load("my_choice", "my_group", task_path=yaml_tasks)
    assert (tasks.group_of("my_choice"), tasks.group_of("my_other")) == (None, "my_group")


def test_tasks_from_yaml_files(model: Any, tokenizer: Any, yaml_tasks: Path) -> None:
    tasks = load("my_other", task_path=yaml_tasks)
    assert run_tasks(model, tokenizer, tasks)["my_other"].documents == 5
    (yaml_tasks / "some.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"task 'my_other': its documents cannot be read: FileNotFound"):
        load("my_other", task_path=yaml_tasks)


def test_the_demos_tasks_are_known_without_being_given() -> None:
    loaded = lm_eval_tasks.load_tasks(["demo_arithmetic"])
    assert len(loaded.tasks["demo_arithmetic"].eval_docs) == 400
    with pytest.raises(EvaluationError, match=r"num_fewshot: 2 would have no effect: demo_arithmetic"):
        lm_eval_tasks.load_tasks(["demo_arithmetic"], num_fewshot=2)


def test_tasks_that_cannot_be_used(tmp_path: Path, model: Any, choice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationError, match=r"unknown task 'demo_choise'\. Did you mean demo_choice, "):
        load("demo_choise")
    with pytest.raises(EvaluationError, match=r"task_path .*nowhere: there is no such folder"):
        load("my_choice", task_path=tmp_path / "nowhere")
    with pytest.raises(EvaluationError, match=r"tasks demo_choice: the model has no tokenizer"):
        run_tasks(model, None, choice)
    unsafe = {"demo_code": multiple_choice("demo_code", unsafe_code=True)}
    with pytest.raises(EvaluationError, match=r"task 'demo_code' runs code that the model writes"):
        lm_eval_tasks.load_tasks(["demo_code"], local_tasks=lambda: unsafe)


@pytest.mark.nightly
def test_lm_evals_own_index(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sources = lm_eval_tasks.TaskSources(None, local_tasks)
    with pytest.raises(EvaluationError, match=r"unknown task 'arc_eazy'\. Did you mean arc_easy"):
        sources.load("arc_eazy")
    with pytest.raises(EvaluationError, match=r"task 'arc_easy': its documents cannot be read: .*download them"):
        sources.load("arc_easy")


def state_of(model: Any, tokenizer: Any) -> Any:
    return (
        {name: (id(p), p.data_ptr(), p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        model.config.to_dict(),
        model.generation_config.to_dict(),
        sorted(vars(model)),
        tokenizer.to_str() if hasattr(tokenizer, "to_str") else tokenizer.special_tokens_map,
        len(tokenizer),
    )


@pytest.mark.parametrize("training", [True, False])
def test_measuring_changes_nothing(tokenizer: Any, choice: Any, training: bool) -> None:
    # The configuration ties the embeddings, but this checkpoint's differ: lm-eval would tie them.
    model = tiny_model(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB_SIZE, 16))
    model.train(training)
    model.model.layers[0].eval()
    model.model.layers[1].requires_grad_(False)
    before, weights = state_of(model, tokenizer), copy.deepcopy(model.state_dict())
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    run_tasks(model, tokenizer, choice, batch_size=4, seed=3)
    perplexity(model, random_sequences(4, 6))
    speeds.speed({"before": model, "after": model}, vocab_size=VOCAB_SIZE, new_tokens=1, repeats=1)
    sizes.size(model)
    assert state_of(model, tokenizer) == before
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    ) == generators


def test_state_is_put_back_after_an_error(tokenizer: Any, choice: Any) -> None:
    model = tiny_model(seed=1).train()
    before = state_of(model, tokenizer)
    model.lm_head.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run_tasks(model, tokenizer, choice)
    with pytest.raises(ZeroDivisionError):
        perplexity(model, random_sequences(4))
    del model.lm_head.forward
    assert state_of(model, tokenizer) == before


def test_a_tokenizer_without_special_tokens(model: Any, choice: Any, tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    plain = run_tasks(model, tokenizer, choice)["demo_choice"]
    assert run_tasks(model, bare, choice)["demo_choice"].correct == plain.correct
    assert bare.pad_token is None


def test_quiet_says_nothing_and_puts_logging_back(
    model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str], choice: Any
) -> None:
    logger, stderr = logging.getLogger("lm_eval"), sys.stderr
    level = logger.level
    run_tasks(model, tokenizer, choice)
    assert capfd.readouterr() == ("", "")
    assert (logger.level, sys.stderr) == (level, stderr)


def test_task_results_survive_json(model: Any, tokenizer: Any, yaml_tasks: Path) -> None:
    results = run_tasks(model, tokenizer, load("my_group", task_path=yaml_tasks))
    for result in results.values():
        assert TaskResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert results["my_other"].to_json()["doc_ids"] == "0-4"
    gaps = answered("10110", doc_ids=(0, 1, 2, 7, 9))
    assert gaps.to_json()["doc_ids"] == "0-2,7,9"
    assert gaps.to_json()["correct"] == {"acc": "10110"}
    assert TaskResult.from_json(gaps.to_json()) == gaps


# --- paired


def answered(flags: str, **changes: Any) -> TaskResult:
    settings: dict[str, Any] = {
        "name": "quiz",
        "metrics": {"acc": Metric(flags.count("1") / len(flags), None, True)},
        "documents": len(flags),
        "num_fewshot": 0,
        "version": "1",
        "fingerprint": "sha256:0",
        "doc_ids": tuple(range(len(flags))),
        "correct": {"acc": tuple(flag == "1" for flag in flags)},
        **changes,
    }
    return TaskResult(**settings)


def test_flips_worked_by_hand() -> None:
    flips = paired({"quiz": answered("11110000")}, {"quiz": answered("10000010")})["quiz"]["acc"]
    # 4 of 8 changed, 1 for the better: P(at most 1 of 4 heads) = (1 + 4)/16, twice that.
    assert flips == Flips(gained=1, lost=3, both_right=1, both_wrong=3, p_value=10 / 16)


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [(0, 0, 1.0), (0, 1, 1.0), (3, 3, 1.0), (0, 5, 2 / 32), (5, 0, 2 / 32), (1, 5, 2 * 7 / 64), (2, 3, 1.0)],
)
def test_mcnemar(gained: int, lost: int, p_value: float) -> None:
    assert mcnemar(gained, lost) == p_value


def test_mcnemar_of_thousands() -> None:
    # Normal approximation with continuity correction: z = (|b − c| − 1)/√(b + c).
    approximate = math.erfc((100 - 1) / math.sqrt(5000) / math.sqrt(2))
    assert mcnemar(2450, 2550) == pytest.approx(approximate, rel=1e-3)
    assert mcnemar(0, 5000) == 0.0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (answered("110"), r"task 'quiz' had 2 documents before and 3 after"),
        (answered("11", doc_ids=(0, 2)), r"had other documents before than after"),
        (answered("11", fingerprint="sha256:1"), r"the same documents' ids, but other texts or few-shot"),
    ],
)
def test_other_documents_are_not_compared(other: TaskResult, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        paired({"quiz": answered("11")}, {"quiz": other})


# --- size


def test_size_counts_tied_parameters_once() -> None:
    tied, untied = tiny_model(tie_word_embeddings=True), tiny_model(tie_word_embeddings=False)
    assert sizes.size(untied).parameters - sizes.size(tied).parameters == VOCAB_SIZE * 16
    assert sizes.size(tied.bfloat16()).bytes == 2 * sizes.size(tied).parameters


def test_active_parameters_worked_by_hand(model: Any) -> None:
    per_expert = 3 * 16 * 24
    # Two layers, each with 2 of its 4 experts idle.
    size = sizes.size(model, [RoutedSize(4, 2, per_expert)] * 2)
    assert size.active_parameters == size.parameters - 2 * 2 * per_expert
    with torch.device("meta"):
        assert sizes.size(tiny_model(), [RoutedSize(4, 2, per_expert)] * 2) == size


def test_bytes_on_disk(model: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or .*, found no weights at all"):
        bytes_on_disk(tmp_path)
    model.save_pretrained(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"another reader's copy")
    on_disk = bytes_on_disk(tmp_path)
    assert on_disk == (tmp_path / "model.safetensors").stat().st_size
    assert 0 < on_disk - sizes.size(model).bytes < 20_000


# --- speed and memory


def test_speed_of_two_models(model: Any) -> None:
    result = speeds.speed(
        {"large": tiny_model(num_hidden_layers=12), "small": tiny_model(num_hidden_layers=1)},
        vocab_size=VOCAB_SIZE,
        prompt_tokens=500,
        new_tokens=8,
        repeats=3,
    )
    assert result.names == ("large", "small")
    assert (result.rounds, result.prompt_tokens, result.new_tokens) == (3, 64 - 8, 8)
    assert result.decode is not None
    assert result.decode_ratio is not None
    assert result.decode_ratio.min <= result.decode_ratio.median <= result.decode_ratio.max
    assert result.decode_ratio.median > 1.5
    assert result.prefill["small"] > 0
    assert (result.device, result.peak_memory, result.decode_reason) == ("cpu", None, None)
    json.dumps(result.to_json())


def test_speed_stops_in_time_but_not_before_three_rounds(model: Any) -> None:
    pair = {"before": model, "after": model}
    options = {"vocab_size": VOCAB_SIZE, "prompt_tokens": 4, "new_tokens": 1, "repeats": 50}
    assert speeds.speed(pair, seconds=0, **options).rounds == 3
    assert speeds.speed(pair, seconds=60, **options).rounds == 50


def test_speed_alternates(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    order: list[Any] = []
    time = speeds._time
    one, other = model, copy.deepcopy(model)
    names = {id(one): "A", id(other): "B"}
    monkeypatch.setattr(speeds, "_time", lambda m, *rest: (order.append(names[id(m)]), time(m, *rest))[1])
    speeds.speed({"A": one, "B": other}, vocab_size=VOCAB_SIZE, prompt_tokens=4, new_tokens=1, repeats=4)
    assert "".join(order[4:]) == "ABBAABBA"
    with pytest.raises(ValueError, match=r"exactly two models, got \['A'\]"):
        speeds.speed({"A": one}, vocab_size=VOCAB_SIZE)


def test_decoding_is_what_generate_writes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, __, inputs: fed.append(inputs["input_ids"]), with_kwargs=True)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    speeds._time(model, prompt, 6)
    hook.remove()
    with torch.no_grad():
        expected = prompt
        for _ in range(6):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.cat(fed, 1).tolist() == expected.tolist()


def test_a_model_without_cache_has_no_decoding_speed(model: Any) -> None:
    without = copy.deepcopy(model)
    forward = without.forward
    without.forward = lambda input_ids, use_cache: forward(input_ids=input_ids, use_cache=False)
    result = speeds.speed({"before": model, "after": without}, vocab_size=VOCAB_SIZE, prompt_tokens=4, repeats=1)
    assert result.decode is None
    assert result.decode_ratio is None
    assert result.decode_reason == "after: CannotDecodeError: the model returns no key-value cache"
    assert result.prefill["after"] > 0


@pytest.mark.parametrize("model_type", ["switch_transformers", "muse_spark_text", "diffusion_gemma"])
def test_a_model_that_does_not_predict_the_next_token_only_reads(model_type: str) -> None:
    other = tiny.tiny_model(model_type)
    result = speeds.speed({"before": other, "after": other}, vocab_size=99, prompt_tokens=7, repeats=3)
    assert result.prefill["before"] > 0
    assert result.decode is None
    reason = "before: CannotDecodeError: the model does not predict the next token of a text"
    assert result.decode_reason == reason
    assert sizes.size(other).parameters == sum(parameter.numel() for parameter in other.parameters())


def test_peak_memory_counts_bytes() -> None:
    peak = peak_memory("cpu")
    assert peak["device_bytes"] is None
    assert peak["host_bytes"] is None or 10**8 < peak["host_bytes"] < 10**12


# --- into the record


def test_real_figures_print(model: Any, tokenizer: Any, choice: lm_eval_tasks.LoadedTasks) -> None:
    from rich.console import Console

    from compressor.report.terminal import print_summary

    changed = copy.deepcopy(model)
    changed.lm_head.weight.data.neg_()
    sequences = random_sequences(8, 8)
    sides, tasks = {}, {}
    for side, one in (("before", model), ("after", changed)):
        tasks[side] = run_tasks(one, tokenizer, choice, batch_size=4)
        sides[side] = {
            "perplexity": {"text": perplexity(one, sequences).to_json()},
            "tasks": {name: result.to_json() for name, result in tasks[side].items()},
            "size": sizes.size(one).to_json(),
            "peak_memory": peak_memory("cpu"),
        }
    flips = paired(tasks["before"], tasks["after"])
    speed = speeds.speed({"before": model, "after": changed}, vocab_size=VOCAB_SIZE, new_tokens=2, repeats=1)
    evaluation = {
        **sides,
        "paired": {name: {m: f.to_json() for m, f in metrics.items()} for name, metrics in flips.items()},
        "speed": speed.to_json(),
    }
    record = json.loads(json.dumps({"model": {"reference": "tiny"}, "passes": [], "evaluation": evaluation}))
    console = Console(record=True, width=80, file=io.StringIO())
    print_summary(record, console)
    text = console.export_text()
    for row in (
        "perplexity text",
        "demo_choice acc %",
        "demo_choice acc_norm %",
        "parameters",
        "decode tokens/s",
    ):
        assert row in text
    gained, lost = (getattr(flips["demo_choice"]["acc"], name) for name in ("gained", "lost"))
    assert f"+{gained} −{lost} (p=" in text
