"""Quality, size and speed of a live model, as plain numbers.

* ``perplexity`` on token sequences, ``load_tasks`` and ``run_tasks`` through lm-evaluation-harness, and
  ``paired`` for what changed document by document between two models;
* ``size`` and ``bytes_on_disk``; ``speed`` of two models measured in alternation; ``peak_memory``.

Every result is a frozen dataclass; ``to_json()`` gives what the record holds. Nothing here changes the model:
its parameters, configuration, device and training mode are as before, also after an error. No answer is kept
from one model for the next.

Several processes with the same model share the batches of a text and the requests of tasks, and all get the results.

Not covered here: chat templates, tasks that run code which the model wrote, tasks with images or sound.

Dimensions: B sequences of a batch, S positions, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import inspect
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from compressor import walk
from compressor.calibration import Sequences, TokenBatch, check_vocabulary, make_batches
from compressor.checkpoint import max_positions
from compressor.errors import CompressorError, EvaluationError
from compressor.files import names_of_weights, read_index
from compressor.moe import evaluating
from compressor.processes import Processes
from compressor.tasks import LoadedTasks, members, quietly, refuse_long_answers, seeded
from compressor.wording import digest, runs

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM as _HFLM
else:  # imported when a model is asked, and put beside the classes that need it then
    _HFLM = object

Json = dict[str, Any]
Progress = Callable[[int, int], None]
Run = Callable[[Sequence[TokenBatch], Callable[[TokenBatch, Any], None]], None]
"""(batches, what to do with each batch and the model's output for it)"""

CHUNK_ELEMENTS = 2**24  # float32 log-probabilities held at one time: 64 MiB
MIN_ROUNDS = 3


@dataclass(frozen=True)
class _Result:
    def to_json(self) -> Json:
        """The figures as JSON types: what the record holds."""
        return dataclasses.asdict(self)


# --- perplexity ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Perplexity(_Result):
    """How well a model predicts a text: lower is better.

    ``mean_loss`` is in nats per predicted token, over ``tokens`` predicted tokens; ``perplexity`` its
    exponential. ``standard_error`` is that of ``mean_loss`` (nats), None for a single sequence; that of the
    perplexity is ``perplexity × standard_error``. ``fingerprint`` names the token ids.
    """

    name: str
    perplexity: float
    mean_loss: float
    standard_error: float | None
    tokens: int
    fingerprint: str


def perplexity(
    model: Any,
    sequences: Sequences,
    batch_size: int = 8,
    progress: Progress | None = None,
    processes: Processes | None = None,
    *,
    run: Run | None = None,
) -> Perplexity:
    """Next-token perplexity of ``model`` on one source.

    In a sequence of n tokens the last n − 1 are predicted, each from those before it in the same sequence.
    Padding counts nowhere. The mean is over all predicted tokens of all sequences, whatever the batches;
    logits are in the model's dtype, log-softmax in float32 and sums in float64.

    The standard error takes the sequences, not the tokens, as independent draws. With the loss l_s and
    predicted tokens n_s of each of R sequences, mean L = Σl_s / Σn_s, it is √( R/(R−1) · Σ(l_s − L·n_s)² ) /
    Σn_s; for sequences of one length that is the standard deviation of the sequences' means over √R.

    ``progress(done, total)`` is called with numbers of sequences. ``run`` feeds the batches to a model that cannot
    simply be called, in order; the figures are the same to the bit. Raises EvaluationError when a loss is not
    finite, a sequence is longer than the model's positions or nothing is to be predicted, CalibrationError
    when an id has no embedding.
    """
    _check_sequences(model, sequences)
    processes = processes or Processes()
    batches = make_batches(sequences.ids, batch_size)
    own = processes.own(len(batches))
    found: list[list[tuple[float, int]]] = []  # batch by batch

    def take(batch: TokenBatch, output: Any) -> None:
        number = own[len(found)]
        losses_B = next_token_losses(output.logits, batch.input_ids, batch.attention_mask).tolist()
        _refuse_not_finite(losses_B, sequences.name, first=number * batch_size)
        found.append(list(zip(losses_B, batch.attention_mask[:, 1:].sum(1).tolist(), strict=True)))
        if progress is not None:
            progress(min((number + 1) * batch_size, len(sequences.ids)), len(sequences.ids))

    with torch.no_grad(), evaluating(model):
        if run is not None:
            run([batches[number] for number in own], take)
        else:
            for number in own:
                take(batches[number], model(**walk.model_inputs(model, batches[number])))
    losses, counts = zip(*(pair for of_batch in processes.in_order(found) for pair in of_batch), strict=True)
    tokens = sum(counts)
    mean_loss = math.fsum(losses) / tokens
    return Perplexity(
        name=sequences.name,
        perplexity=_exponential(mean_loss, sequences.name),
        mean_loss=mean_loss,
        standard_error=_ratio_standard_error(losses, counts),
        tokens=tokens,
        fingerprint=sequences.fingerprint,
    )


def next_token_losses(logits_BSV: Tensor, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Each sequence's summed negative log likelihood in nats: [B] float64 on the CPU.

    ``mask_BS`` is True where a token is real; padding is on the right and adds 0. Positions are taken in
    chunks, so that the float32 copy of the logits stays at about 64 MiB whatever the vocabulary.
    """
    ids_BS, mask_BS = ids_BS.to(logits_BSV.device), mask_BS.to(logits_BSV.device)
    num_sequences, num_positions, vocab_size = logits_BSV.shape
    chunk = max(1, CHUNK_ELEMENTS // (num_sequences * vocab_size))
    loss_B = torch.zeros(num_sequences, dtype=torch.float64)
    for start in range(0, num_positions - 1, chunk):
        stop = min(start + chunk, num_positions - 1)
        targets_BC = ids_BS[:, start + 1 : stop + 1]
        log_probabilities_BCV = torch.log_softmax(logits_BSV[:, start:stop].float(), dim=-1)
        loss_BC = -log_probabilities_BCV.gather(-1, targets_BC[..., None])[..., 0]
        loss_BC = loss_BC.masked_fill(~mask_BS[:, start + 1 : stop + 1], 0.0)
        loss_B += loss_BC.cpu().double().sum(1)
    return loss_B


def _check_sequences(model: Any, sequences: Sequences) -> None:
    if not any(len(ids) > 1 for ids in sequences.ids):
        raise EvaluationError(f"source {sequences.name!r} has no sequence of 2 tokens or more: nothing to predict.")
    check_vocabulary(sequences, model.get_input_embeddings().weight.shape[0])
    longest, positions = max(map(len, sequences.ids)), max_positions(model.config)
    if positions is not None and longest > positions:
        raise EvaluationError(
            f"source {sequences.name!r} has a sequence of {longest} tokens, but the model takes at most "
            f"{positions}. Say `length: {positions}` or less."
        )


def _refuse_not_finite(losses: Sequence[float], name: str, first: int) -> None:
    bad = next((number for number, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None:
        raise EvaluationError(
            f"source {name!r}: the model's loss on sequence {first + bad} is {losses[bad]}, not a finite number: its "
            f"weights or activations overflow in this dtype, or are damaged."
        )


def _exponential(mean_loss: float, name: str) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:
        raise EvaluationError(
            f"source {name!r}: a mean loss of {mean_loss:.0f} nats per token has no finite perplexity."
        ) from None


def _ratio_standard_error(totals: Sequence[float], counts: Sequence[int]) -> float | None:
    """Standard error of Σtotals / Σcounts over independent (total, count) pairs; see ``perplexity``."""
    num_pairs = len(totals)
    if num_pairs < 2:
        return None
    mean = math.fsum(totals) / sum(counts)
    squares = math.fsum((total - mean * count) ** 2 for total, count in zip(totals, counts, strict=True))
    return math.sqrt(num_pairs / (num_pairs - 1) * squares) / sum(counts)


# --- tasks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric(_Result):
    """One figure of a task. ``standard_error`` is None where it is not a mean over documents."""

    value: float
    standard_error: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskResult:
    """What lm-evaluation-harness measured on one task or group of tasks.

    ``metrics`` have lm-eval's names without its ``,none``: ``acc``, ``acc_norm``,
    ``exact_match,strict-match``. ``correct[metric][i]`` says whether document ``doc_ids[i]`` was answered
    rightly, for each metric that is the mean of rights and wrongs. ``fingerprint`` is a digest of documents,
    prompts and answers asked for. ``cut`` is how many of the documents were asked without the beginning of their
    prompts, for which the model has too few positions. A group has ``subtasks``, and its metrics are lm-eval's means
    over them; ``group`` names the group through which a task came.
    """

    name: str
    metrics: dict[str, Metric]
    documents: int
    num_fewshot: int | None
    version: str
    fingerprint: str
    doc_ids: tuple[int, ...] = ()
    correct: dict[str, tuple[bool, ...]] = dataclasses.field(default_factory=dict)
    subtasks: tuple[str, ...] = ()
    group: str | None = None
    cut: int = 0

    def to_json(self) -> Json:
        """The figures as JSON types; the answers as one string of ``1`` (right) and ``0`` for each metric."""
        return {
            "name": self.name,
            "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
            "documents": self.documents,
            "num_fewshot": self.num_fewshot,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "doc_ids": _to_ranges(self.doc_ids),
            "correct": {name: "".join(str(int(right)) for right in flags) for name, flags in self.correct.items()},
            "subtasks": list(self.subtasks),
            "group": self.group,
            "cut": self.cut,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskResult:
        """The inverse of ``to_json``, for a run that goes on from its record."""
        return cls(
            **{
                **data,
                "metrics": {name: Metric(**metric) for name, metric in data["metrics"].items()},
                "doc_ids": tuple(_from_ranges(data["doc_ids"])),
                "correct": {name: tuple(flag == "1" for flag in flags) for name, flags in data["correct"].items()},
                "subtasks": tuple(data["subtasks"]),
            }
        )


def run_tasks(
    model: Any,
    tokenizer: Any | None,
    tasks: LoadedTasks,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    quiet: bool = True,
    progress: Progress | None = None,
    processes: Processes | None = None,
    run: Run | None = None,
    device: str = "cpu",
) -> dict[str, TaskResult]:
    """Ask the tasks of a live model through lm-evaluation-harness: results by name, groups last.

    ``limit`` takes the first so many documents of each task. ``seed`` draws all that is random, so that the next model
    gets the same prompts. Settings not named here are lm-eval's own, and so are the figures. Standard errors of means
    over documents are sample standard deviation / √n, a group's is combined by lm-eval's rule; other metrics have none.

    ``progress(done, total)`` is called with numbers of requests, of a multiple-choice question one for each choice;
    equal ones are asked once, so it may end early.

    Each of several `processes` prepares all requests, and asks its share of them. Other requests share a batch than in
    one process, so answers agree up to rounding.

    `run` feeds batches to a model that cannot simply be called, in order, on `device`: then all requests of a kind go
    together, progress is told by `run`, and a task that has the model write raises EvaluationError. The figures are
    the same to the bit.

    The tokenizer is copied, the model's training mode put back. Raises EvaluationError without a tokenizer, for answers
    longer than the model, and for whatever lm-eval itself refuses.
    """
    from lm_eval.evaluator import evaluate

    refuse_without_tokenizer(tasks.names, tokenizer)
    for task in tasks.tasks.values():
        task.set_fewshot_seed(seed=seed)
    with (
        quietly(quiet),
        seeded(seed),
        torch.no_grad(),
        evaluating(model),
        _tying_as_it_is(model),
        _refusals_of_lm_eval(tasks),
    ):
        lm = _language_model(model, tokenizer, batch_size, progress, processes or Processes(), run, device)
        refuse_long_answers(tasks.tasks, lm.max_length)
        try:
            raw = evaluate(
                lm=lm,
                task_dict={"tasks": dict(tasks.tasks), "groups": dict(tasks.groups)},
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        finally:
            for task in tasks.tasks.values():
                task._instances = None  # the prompts with this model's answers
    results = {name: _task_result(name, task, raw, tasks, len(lm.cut[name])) for name, task in tasks.tasks.items()}
    figures = {name: _with_standard_errors(raw["results"][name], results[name]) for name in results}
    return results | {name: _group_result(group, figures, results, tasks) for name, group in tasks.groups.items()}


def refuse_without_tokenizer(names: Sequence[str], tokenizer: Any | None) -> None:
    """Raise EvaluationError where a model is to be asked tasks, and has no tokenizer."""
    if tokenizer is None:
        raise EvaluationError(
            f"tasks {', '.join(names)}: the model has no tokenizer, and tasks are text. Add the "
            f"tokenizer's files to the model's folder, or evaluate `perplexity` on a `tokens:` source."
        )


def check_requests(tasks: LoadedTasks, tokenizer: Any, config: Any, *, seed: int = 0) -> None:
    """Raise EvaluationError for what a model of this config, whose weights are not needed, could not be asked, as far
    as the first document of each task tells.
    """
    from lm_eval.models.huggingface import HFLM

    known = {"_max_length": None, "_DEFAULT_MAX_LENGTH": HFLM._DEFAULT_MAX_LENGTH, "tokenizer": tokenizer}
    num_positions = HFLM.max_length.fget(SimpleNamespace(model=SimpleNamespace(config=config), **known))
    refuse_long_answers(tasks.tasks, num_positions)
    with quietly(True), seeded(seed), _refusals_of_lm_eval(tasks):
        for task in tasks.tasks.values():
            task.set_fewshot_seed(seed=seed)
            task.build_all_requests(limit=1, rank=0, world_size=1)
            requests, task._instances = task.instances, None
            for one in requests:
                if one.request_type == "loglikelihood":
                    answer = tokenizer.encode(one.args[1], add_special_tokens=False)
                    _refuse_long_answer(one, len(answer), num_positions)


def _refuse_long_answer(request: Any, num_tokens: int, num_positions: int) -> None:
    if num_tokens > num_positions:
        raise EvaluationError(
            f"task {request.task_name!r}: an answer to document {request.doc_id} has {num_tokens} tokens, but the "
            f"model takes {num_positions} positions. Leave the task out."
        )


class _Counting(_HFLM):  # type: ignore[misc]
    """lm-eval's view of a live model, which tells how many of the requests have been through it, and whose prompts it
    cut: task → documents.

    lm-eval's own way to use several processes shares out the documents and draws few-shot examples for the share only:
    other prompts than in one process. So to lm-eval each process is alone, and the requests are shared out here.
    """

    def __init__(self, progress: Progress | None, processes: Processes, **settings: Any) -> None:
        super().__init__(**settings)
        self._progress, self._processes = progress, processes
        self._done = self._total = 0
        self.cut: dict[str, set[int]] = collections.defaultdict(set)
        self._asked: Sequence[Any] = ()

    def _count(self, number: int) -> None:
        self._done = min(self._done + number, self._total)
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _note_cut(self, request: Any, num_tokens: int, limit: int) -> None:
        if num_tokens > limit:
            self.cut[request.task_name].add(request.doc_id)

    def _shared_out(self, ask: Callable[[list[Any]], list[Any]], requests: Sequence[Any]) -> list[Any]:
        """The answers to all requests, of which this process asks its own."""
        own = [requests[number] for number in self._processes.own(len(requests))]
        self._total += len(own)
        return self._processes.in_order(ask(own) if own else [])

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._asked = requests
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._asked = ()

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        for asked, (_, context, answer) in zip(self._asked, requests, strict=False):  # windows were asked by nobody
            _refuse_long_answer(asked, len(answer), self.max_length)
            if not answer:
                raise EvaluationError(
                    f"task {asked.task_name!r}: an answer to document {asked.doc_id} has no token of its own. Let it "
                    f"begin with a blank, which `target_delimiter` puts before choices, or leave the task out."
                )
            self._note_cut(asked, len(context) + len(answer), self.max_length + 1)
        ask = super()._loglikelihood_tokens
        return [tuple(answer) for answer in self._shared_out(lambda own: ask(own, *args, **kwargs), requests)]

    def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        from lm_eval.models.utils import normalize_gen_kwargs

        for asked in requests:
            prompt, settings = asked.args
            room = self.max_length - normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            self._note_cut(asked, len(self.tok_encode(prompt)), room)
        ask = super().generate_until
        return self._shared_out(lambda own: ask(own, *args, **kwargs), requests)

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, *args, **kwargs)
        self._count(len(inps))
        return logits

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        written = super()._model_generate(context, *args, **kwargs)
        self._count(len(context))
        return written


class _Walking(_Counting):
    """Asks all requests of a kind together. lm-eval's own code runs twice for that: once to tell which batches will
    come, with answers that nobody reads; then, beside the run of these batches, with their logits.
    """

    def __init__(self, run: Run, device: str, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._run, self._device = run, torch.device(device)  # the skeleton's weights are nowhere

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return self._asked_together(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return self._asked_together(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        raise EvaluationError(writes_problem({requests[0].task_name}))

    def _asked_together(self, ask: Callable[..., Any], requests: Any) -> Any:
        batches = self._batches_to_come(ask, requests)
        asking = greenlet(lambda: ask(requests, disable_tqdm=True))

        def wait_for_logits(ids_BS: Tensor) -> Tensor:
            assert asking.parent is not None
            logits_BSV: Tensor = asking.parent.switch(ids_BS)
            return logits_BSV

        self._answer = wait_for_logits
        said = asking.switch()

        def give(batch: TokenBatch, output: Any) -> None:
            nonlocal said
            assert torch.equal(said.cpu(), batch.input_ids), "lm-eval asks the same again"
            asking.parent = getcurrent()
            said = asking.switch(output.logits)

        self._run(batches, give)
        assert asking.dead
        return said

    def _batches_to_come(self, ask: Callable[..., Any], requests: Any) -> list[TokenBatch]:
        batches: list[TokenBatch] = []
        num_logits = self.model.get_input_embeddings().weight.shape[0]

        def note(ids_BS: Tensor) -> Tensor:
            batches.append(TokenBatch(ids_BS.cpu(), torch.ones(ids_BS.shape, dtype=torch.bool)))
            return torch.zeros((), dtype=self.model.dtype, device=self._device).expand(*ids_BS.shape, num_logits)

        self._answer = note
        ask(requests, disable_tqdm=True)
        return batches

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        return self._answer(inps)


def _language_model(
    model: Any,
    tokenizer: Any,
    batch_size: int,
    progress: Progress | None,
    processes: Processes,
    run: Run | None,
    device: str,
) -> Any:
    """lm-eval's view of a live model. It sets a padding token on the tokenizer, so it gets a copy."""
    from lm_eval.models.huggingface import HFLM

    kind, given = (_Counting, ()) if run is None else (_Walking, (run, device))
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id is None and tokenizer.unk_token_id is None and tokenizer.eos_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # lm-eval would add one that has no embedding
    starts = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return type(kind.__name__, (kind, HFLM), {})(
        *given,
        progress,
        processes,
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        prefix_token_id=tokenizer.pad_token_id if starts == (None, None) else None,
    )


@contextlib.contextmanager
def _refusals_of_lm_eval(tasks: LoadedTasks) -> Iterator[None]:
    """What lm-eval, or a task's own templates and functions, refuse is an EvaluationError; what goes wrong in a model
    or in this library stays as it is.
    """
    try:
        yield
    except CompressorError:
        raise
    except Exception as error:
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        within = [name.startswith("lm_eval.") for name in modules]
        innermost = len(within) - within[::-1].index(True) if True in within else len(within)
        in_model = any(name.startswith(("compressor.", "torch.nn.")) for name in modules[innermost:])
        if True not in within or in_model:
            raise
        raise EvaluationError(
            f"lm-eval cannot ask the model {', '.join(tasks.names)}: {type(error).__name__}: {error}"
        ) from error


def writes_problem(names: Iterable[str]) -> str:
    """What to say of tasks that have the model write, where its weights are on disk."""
    return (
        f"task {', '.join(sorted(names))}: the model is to write, token after token, and would be read from disk for "
        f"every one. Measure tasks that choose among answers, or this one with `compressor evaluate` where the model "
        f"fits in memory."
    )


def _task_result(name: str, task: Any, raw: Mapping[str, Any], tasks: LoadedTasks, cut: int) -> TaskResult:
    from lm_eval.api.metrics import mean

    samples = raw["samples"][name]
    aggregation, higher_is_better = task.aggregation(), task.higher_is_better()
    metrics: dict[str, Metric] = {}
    correct: dict[str, tuple[bool, ...]] = {}
    for key, value in _figures(raw["results"][name]):
        metric, _, filter_name = key.partition(",")
        short = key.removesuffix(",none")
        values = [sample[metric] for sample in samples if sample["filter"] == filter_name and metric in sample]
        is_mean = aggregation.get(metric) is mean
        error = _standard_error_of_mean(values) if is_mean else None
        metrics[short] = Metric(value, error, higher_is_better.get(metric))
        if is_mean and all(v in (0, 1) for v in values):
            correct[short] = tuple(bool(v) for v in values)
    first_filter = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    return TaskResult(
        name=name,
        metrics=metrics,
        documents=len(first_filter),
        num_fewshot=task.get_config("num_fewshot"),
        version=str(task.VERSION),
        fingerprint=digest(
            "|".join(part for s in first_filter for part in (s["doc_hash"], s["prompt_hash"], s["target_hash"]))
        ),
        doc_ids=tuple(sample["doc_id"] for sample in first_filter),
        correct=correct,
        group=tasks.group_of(name),
        cut=cut,
    )


def _group_result(
    group: Any, figures: Mapping[str, Json], results: Mapping[str, TaskResult], tasks: LoadedTasks
) -> TaskResult:
    """A group's means as lm-eval forms them, over its subtasks' figures with our standard errors put in."""
    parts = [results[name] for name in members(group)]
    means = group.aggregate(figures)
    metrics = {}
    for key, value in _figures(means):
        metric, _, filter_name = key.partition(",")
        error = means.get(f"{metric}_stderr,{filter_name}")
        better = {
            member.metrics[key.removesuffix(",none")].higher_is_better
            for member in parts
            if key.removesuffix(",none") in member.metrics
        }
        metrics[key.removesuffix(",none")] = Metric(
            value, error if isinstance(error, float) else None, better.pop() if len(better) == 1 else None
        )
    fewshots = {member.num_fewshot for member in parts}
    return TaskResult(
        name=group.name,
        metrics=metrics,
        documents=sum(member.documents for member in parts),
        num_fewshot=fewshots.pop() if len(fewshots) == 1 else None,
        version=str(group.version),
        fingerprint=digest("|".join(member.fingerprint for member in parts)),
        subtasks=tuple(member.name for member in parts),
        group=tasks.group_of(group.name),
        cut=sum(member.cut for member in parts),
    )


def _figures(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers among lm-eval's ``metric,filter`` keys."""
    for key, value in result.items():
        if "," in key and "_stderr," not in key and isinstance(value, int | float | np.number):
            yield key, float(value)


def _with_standard_errors(raw: Mapping[str, Any], result: TaskResult) -> Json:
    figures = dict(raw)
    for name, metric in result.metrics.items():
        base, _, filter_name = name.partition(",")
        if metric.standard_error is not None:
            figures[f"{base}_stderr,{filter_name or 'none'}"] = metric.standard_error
    return figures


def _standard_error_of_mean(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return float(statistics.stdev(map(float, values))) / math.sqrt(len(values))


def _to_ranges(ids: Sequence[int]) -> str:
    """``(0, 1, 2, 5)`` → ``"0-2,5"``."""
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs(ids))


def _from_ranges(text: str) -> Iterator[int]:
    for run in filter(None, text.split(",")):
        first, _, last = run.partition("-")
        yield from range(int(first), int(last or first) + 1)


# --- what changed, document by document ---------------------------------------------------------------------


@dataclass(frozen=True)
class Flips(_Result):
    """Documents by their answers before and after, and how surprising the change is.

    ``gained`` were wrong and became right, ``lost`` the reverse. ``p_value`` is McNemar's exact two-sided
    test: how often a fair coin thrown gained + lost times is as uneven as this or more.
    """

    gained: int
    lost: int
    both_right: int
    both_wrong: int
    p_value: float


def paired(before: Mapping[str, TaskResult], after: Mapping[str, TaskResult]) -> dict[str, dict[str, Flips]]:
    """Flips by task and metric, for each metric of rights and wrongs; a group's are its subtasks' sum.

    Raises EvaluationError when a task of both was not asked the same documents with the same prompts.
    """
    flips: dict[str, dict[str, Flips]] = {}
    shared = [name for name in before if name in after]
    for name in shared:
        _check_same_documents(before[name], after[name])
        pairs = [(before[sub], after[sub]) for sub in before[name].subtasks or (name,)]
        counted = {metric for one, other in pairs for metric in {*one.correct} & {*other.correct}}
        metrics = [metric for metric in before[name].metrics if metric in counted]
        flips[name] = {metric: _flips(pairs, metric) for metric in metrics}
    return {name: by_metric for name, by_metric in flips.items() if by_metric}


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value: min(1, 2 · Σ_{i ≤ min(gained, lost)} C(n, i) / 2ⁿ), n = gained + lost.

    In whole numbers up to the last division, so thousands of flips neither overflow nor round.
    """
    total = gained + lost
    tail = term = 1  # C(n, 0)
    for i in range(min(gained, lost)):
        term = term * (total - i) // (i + 1)  # C(n, i + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**total))


def _flips(pairs: Sequence[tuple[TaskResult, TaskResult]], metric: str) -> Flips:
    answers = [
        answer
        for one, other in pairs
        if metric in one.correct and metric in other.correct
        for answer in zip(one.correct[metric], other.correct[metric], strict=True)
    ]
    gained, lost = answers.count((False, True)), answers.count((True, False))
    return Flips(
        gained=gained,
        lost=lost,
        both_right=answers.count((True, True)),
        both_wrong=answers.count((False, False)),
        p_value=mcnemar(gained, lost),
    )


def _check_same_documents(before: TaskResult, after: TaskResult) -> None:
    if before.documents != after.documents:
        difference = f"{before.documents} documents before and {after.documents} after"
    elif before.doc_ids != after.doc_ids or before.subtasks != after.subtasks:
        difference = "other documents before than after"
    elif before.fingerprint != after.fingerprint:
        difference = "the same documents' ids, but other texts or few-shot examples, before and after"
    else:
        return
    raise EvaluationError(
        f"task {before.name!r} had {difference}: answers cannot be compared one by one. Evaluate both models "
        f"with the same limit, num_fewshot and seed."
    )


# --- size ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoutedSize:
    """One layer's routed experts: how many, how many a token uses (on average), and the parameters of each."""

    num_experts: int
    used: float
    parameters_per_expert: int


@dataclass(frozen=True)
class Size(_Result):
    """``parameters`` of the model, those that one token uses (None where that is not known), and what they take in
    memory, in ``bytes``.
    """

    parameters: int
    active_parameters: int | None
    bytes: int


def size(model: Any, routed: Sequence[RoutedSize] = ()) -> Size:
    """Count a model's parameters; tied ones count once.

    Active parameters are all but the routed experts that a token does not use: total − Σ_layers
    (num_experts − used) · parameters_per_expert. Bytes are those of parameters and of the buffers that a
    checkpoint holds, each in its own dtype. A model on the meta device will do. Packed quantised weights
    count as the numbers they are stored in.
    """
    saved = set(model.state_dict())
    parameters = list(model.parameters())
    buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
    total = sum(parameter.numel() for parameter in parameters)
    idle = sum((layer.num_experts - layer.used) * layer.parameters_per_expert for layer in routed)
    return Size(
        parameters=total,
        active_parameters=round(total - idle),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in [*parameters, *buffers]),
    )


def bytes_on_disk(folder: Path) -> int:
    """The files of weights that are read of a folder, together. Raises CheckpointError if there is none."""
    names = names_of_weights([path.name for path in folder.iterdir()], read_index(folder), str(folder))
    return sum((folder / name).stat().st_size for name in names)


# --- speed and memory ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio(_Result):
    """The second model's speed over the first's: median, smallest and largest of the rounds' ratios."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Speed(_Result):
    """Two models' speed in tokens per second (of all sequences of the batch), medians of ``rounds`` rounds.

    ``prefill`` reads the prompt, ``decode`` writes one token after another. Ratios above 1 mean that the
    second of ``names`` is faster. ``decode`` is None when one of the models cannot, for ``decode_reason``.
    ``peak_memory`` is the most device memory, in bytes, that each model's weights and work took together;
    None on the CPU, where allocations are not counted.
    """

    names: tuple[str, str]
    prefill: dict[str, float]
    prefill_ratio: Ratio
    decode: dict[str, float] | None
    decode_ratio: Ratio | None
    decode_reason: str | None
    peak_memory: dict[str, int] | None
    rounds: int
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    device: str


def speed(
    models: Mapping[str, Any],
    *,
    vocab_size: int,
    text: Sequence[Tensor] = (),
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 5,
    seconds: float = 20.0,
    seed: int = 0,
) -> Speed:
    """Time two models against each other in one process: A B, B A, A B, … after a warm-up of both.

    Machines drift, so each round forms its own ratio and the median is taken of these. ``prefill`` is one
    forward over ``prompt_tokens`` ids of ``text``, or random ones, with the logits of the last position only where the
    model can (a model that skips experts skips others on random ids);
    ``decode`` is ``new_tokens`` greedy forwards of one token each with the model's own cache. The prompt is
    shortened so that both fit in the models' positions. It stops after ``repeats`` rounds, or after
    ``seconds`` once there were three. Wall clock, with the device synchronised. Both models are in memory;
    each is timed on its own device.
    """
    if len(models) != 2:
        raise ValueError(f"speed compares exactly two models, got {list(models)}")
    first, second = models
    prompt_tokens, new_tokens = _fit_positions(list(models.values()), prompt_tokens, new_tokens)
    generator = torch.Generator().manual_seed(seed)
    prompt_BS = torch.randint(vocab_size, (batch_size, prompt_tokens), generator=generator)
    if text:
        ids = torch.cat(list(text))
        prompt_BS = ids[torch.arange(prompt_BS.numel()) % len(ids)].view_as(prompt_BS)
    started = time.perf_counter()
    decode_reason = _warm_up(models, prompt_BS, new_tokens)
    steps = 0 if decode_reason else new_tokens
    rounds: list[dict[str, _Timing]] = []
    while len(rounds) < repeats and (len(rounds) < MIN_ROUNDS or time.perf_counter() - started < seconds):
        order = (first, second) if len(rounds) % 2 == 0 else (second, first)
        rounds.append({name: _time(models[name], prompt_BS, steps) for name in order})

    prefill = {name: [prompt_BS.numel() / timings[name].prefill for timings in rounds] for name in models}
    decode = (
        {name: [batch_size * steps / timings[name].decode for timings in rounds] for name in models} if steps else None
    )
    peaks = {name: max(timings[name].peak_memory or 0 for timings in rounds) for name in models}
    return Speed(
        names=(first, second),
        prefill={name: statistics.median(values) for name, values in prefill.items()},
        prefill_ratio=_ratio(prefill[first], prefill[second]),
        decode={name: statistics.median(values) for name, values in decode.items()} if decode else None,
        decode_ratio=_ratio(decode[first], decode[second]) if decode else None,
        decode_reason=decode_reason,
        peak_memory=peaks if all(peaks.values()) else None,
        rounds=len(rounds),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        device=", ".join(walk.devices_of(models[second])),
    )


def peak_memory(*devices: str) -> dict[str, int | None]:
    """The most memory so far, in bytes: of this process on the host, and allocated by torch on CUDA devices, the sum of
    what was the most on each.

    ``host_bytes`` cannot be reset, so of two models measured one after the other it is the larger one's; None
    where the system does not tell. ``device_bytes`` is None where no device is CUDA.
    """
    peaks = [torch.cuda.max_memory_allocated(device) for device in devices if device.startswith("cuda")]
    return {"host_bytes": _host_bytes(), "device_bytes": sum(peaks) if peaks else None}


@dataclass(frozen=True)
class _Timing:
    """Seconds of one prefill and of all decoding steps; peak device memory in bytes."""

    prefill: float
    decode: float
    peak_memory: int | None


class _CannotDecodeError(Exception):
    """The model gives no cache to decode with."""


def _warm_up(models: Mapping[str, Any], prompt_BS: Tensor, new_tokens: int) -> str | None:
    """Run each model once; the reason why one of them cannot decode, or None."""
    reason = None
    for name, model in models.items():
        _time(model, prompt_BS, 0)
        try:
            _time(model, prompt_BS, new_tokens)
        except Exception as error:  # whatever third-party model code does not support shows here, and is reported
            reason = reason or f"{name}: {type(error).__name__.removeprefix('_')}: {error}"
    return reason


def _time(model: Any, prompt_BS: Tensor, new_tokens: int) -> _Timing:
    gpus = _gpus_of(model)
    prompt_BS = prompt_BS.to(walk.device_of(model))
    takes = inspect.signature(model.forward).parameters
    extra: Json = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    two_parts = "decoder_input_ids" in takes
    extra |= {"decoder_input_ids": prompt_BS} if two_parts else {"use_cache": True}
    cache_name = "cache" if "cache" in takes else "past_key_values"  # as it was called before transformers 5.24
    with torch.no_grad(), evaluating(model), _counted_memory(model, gpus) as peak:
        start = _now(gpus)
        output = model(input_ids=prompt_BS, **extra)
        middle = _now(gpus)
        for _ in range(new_tokens):
            cache = getattr(output, cache_name, None)
            if two_parts or not hasattr(output, "logits"):
                raise _CannotDecodeError("the model does not predict the next token of a text")
            if cache is None:
                raise _CannotDecodeError("the model returns no key-value cache")
            token_B1 = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token_B1, use_cache=True, **{cache_name: cache})
        end = _now(gpus)
    return _Timing(middle - start, end - middle, peak())


def _gpus_of(model: Any) -> list[str]:
    return [device for device in walk.devices_of(model) if device.startswith("cuda")]


def _now(gpus: Sequence[str]) -> float:
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
    return time.perf_counter()


@contextlib.contextmanager
def _counted_memory(model: Any, gpus: Sequence[str]) -> Iterator[Callable[[], int | None]]:
    """Yields a function: bytes of the model's weights and of what its CUDA devices allocated meanwhile."""
    if not gpus:
        yield lambda: None
        return
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    resting = sum(map(torch.cuda.memory_allocated, gpus))
    weights = size(model).bytes
    yield lambda: weights + sum(map(torch.cuda.max_memory_allocated, gpus)) - resting


def _ratio(first: Sequence[float], second: Sequence[float]) -> Ratio:
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def _fit_positions(models: Sequence[Any], prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
    positions = min(
        (p for p in (max_positions(one.config) for one in models) if p is not None), default=prompt_tokens + new_tokens
    )
    new_tokens = max(1, min(new_tokens, positions // 2))
    return max(1, min(prompt_tokens, positions - new_tokens)), new_tokens


def _host_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


# --- leaving everything as it was ---------------------------------------------------------------------------


@contextlib.contextmanager
def _tying_as_it_is(model: Any) -> Iterator[None]:
    """``model.tie_weights()`` does nothing inside.

    lm-eval calls it on the model it is given. Where a checkpoint holds different input and output embeddings
    although its configuration ties them, transformers rightly keeps both when loading, and that call would
    overwrite one.
    """
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights
