"""A live model's answers to tasks, through lm-evaluation-harness.

The model is as before afterwards, also after an error, and no answer is kept from one model for the next. Several
processes with the same model share the requests of tasks, and all get the results.

Not covered here: chat templates (but by `served`), tasks with images or sound.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import math
import statistics
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

from compressor.data.lm_eval_tasks import LoadedTasks, members, quietly, refuse_long_answers, seeded
from compressor.data.sequences import TokenBatch
from compressor.errors import CompressorError, EvaluationError
from compressor.evaluation.result import Json, Progress, Result, Run
from compressor.machine.distributed import Processes
from compressor.model.modules import evaluating
from compressor.wording import digest, is_hub_id, runs

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM as _HFLM
else:  # imported when a model is asked, and put beside the classes that need it then
    _HFLM = object


@dataclass(frozen=True)
class Metric(Result):
    """One figure of a task. ``standard_error`` is None where it is not a mean over documents."""

    value: float
    standard_error: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskResult:
    """What lm-evaluation-harness measured on a task or group. ``metrics`` have lm-eval's names without ``,none``;
    ``correct[metric][i]`` says whether document ``doc_ids[i]`` was right, for means of rights and wrongs;
    ``fingerprint`` digests documents, prompts and answers; ``cut`` documents were asked without their prompts'
    beginnings, for which there are too few positions. A group has ``subtasks``; ``group`` is the one through which a
    task came; ``dataset`` is the name that its documents have on the hub, if they are there.
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
    dataset: str = ""
    dataset_config: str = ""

    def to_json(self) -> Json:
        """The figures as JSON types; the answers as one string of ``1`` (right) and ``0`` for each metric."""
        correct = {name: "".join(str(int(right)) for right in flags) for name, flags in self.correct.items()}
        others = {"doc_ids": _to_ranges(self.doc_ids), "correct": correct, "subtasks": list(self.subtasks)}
        return dataclasses.asdict(self) | others

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
    progress: Progress | None = None,
    processes: Processes | None = None,
    run: Run | None = None,
    device: str = "cpu",
) -> dict[str, TaskResult]:
    """Ask the tasks of a live model through lm-evaluation-harness: results by name, groups last. ``limit`` takes so
    many documents of each task, ``seed`` draws all that is random; other settings and figures are lm-eval's own.
    Standard errors are those of means over documents (sample deviation / √n), a group's by lm-eval's rule.
    ``progress(done, total)`` counts requests, equal ones once, so it may end early. Each of several `processes` asks
    its share, in other batches, so answers agree up to rounding. `run` feeds batches on `device` to a model that cannot
    simply be called, all requests of a kind together, to the same bits; then writing raises EvaluationError, as does no
    tokenizer, an answer longer than the model, and whatever lm-eval refuses. Tokenizer and training mode stay as they
    were.
    """
    refuse_without_tokenizer(tasks.names, tokenizer)
    for task in tasks.tasks.values():
        task.set_fewshot_seed(seed=seed)
    with (
        quietly(),
        seeded(seed),
        torch.no_grad(),
        evaluating(model),
        _tying_as_it_is(model),
        refusals_of_lm_eval(tasks),
    ):
        lm = _language_model(model, tokenizer, batch_size, progress, processes or Processes(), run, device)
        return answers(lm, tasks, limit)


def answers(lm: Any, tasks: LoadedTasks, limit: int | None, **how: Any) -> dict[str, TaskResult]:
    """The results of tasks, by what lm-eval makes of the answers; `how`: more that its `evaluate` takes."""
    refuse_long_answers(tasks.tasks, lm.max_length)
    raw = _evaluated(lm, tasks, limit, **how)
    results = {name: _task_result(name, task, raw, tasks, len(lm.cut[name])) for name, task in tasks.tasks.items()}
    figures = {name: _with_standard_errors(raw["results"][name], results[name]) for name in results}
    return results | {name: _group_result(group, figures, results, tasks) for name, group in tasks.groups.items()}


def _evaluated(lm: Any, tasks: LoadedTasks, limit: int | None, **how: Any) -> Json:
    """What lm-eval makes of the answers; the tasks forget these. Those that run code were asked for."""
    from lm_eval.evaluator import evaluate

    how |= {"task_dict": {"tasks": dict(tasks.tasks), "groups": dict(tasks.groups)}, "limit": limit}
    try:
        return evaluate(lm=lm, bootstrap_iters=0, log_samples=True, confirm_run_unsafe_code=True, **how)  # type: ignore[no-any-return]
    finally:
        for task in tasks.tasks.values():
            task._instances = None  # the prompts with this model's answers


def refuse_without_tokenizer(names: Sequence[str], tokenizer: Any | None) -> None:
    """Raise EvaluationError where a model is to be asked tasks, and has no tokenizer."""
    if tokenizer is None:
        raise EvaluationError(
            f"tasks {', '.join(names)}: the model has no tokenizer; add it, or measure `perplexity` on `tokens:`."
        )


def positions(tokenizer: Any, config: Any) -> int:
    """How many tokens lm-eval gives a model of this config."""
    from lm_eval.models.huggingface import HFLM

    known = {"_max_length": None, "_DEFAULT_MAX_LENGTH": HFLM._DEFAULT_MAX_LENGTH, "tokenizer": tokenizer}
    return int(HFLM.max_length.fget(SimpleNamespace(model=SimpleNamespace(config=config), **known)))


def check_requests(tasks: LoadedTasks, tokenizer: Any, config: Any, *, limit: int | None = None, seed: int = 0) -> int:
    """Raise EvaluationError for what a model of this config could not be asked, by each task's first document. Returns
    how many requests there will be, if the others are like it.
    """
    num_positions, num_requests = positions(tokenizer, config), 0
    refuse_long_answers(tasks.tasks, num_positions)
    with quietly(), seeded(seed), refusals_of_lm_eval(tasks):
        for task in tasks.tasks.values():
            task.set_fewshot_seed(seed=seed)
            task.build_all_requests(limit=1, rank=0, world_size=1)
            requests, task._instances = task.instances, None
            documents = len(task.eval_docs)
            num_requests += sum(one.repeats for one in requests) * min(limit or documents, documents)
            for one in requests:
                if one.request_type == "loglikelihood":
                    answer = tokenizer.encode(one.args[1], add_special_tokens=False)
                    _refuse_long_answer(one, len(answer), num_positions)
    return num_requests


def _refuse_long_answer(request: Any, num_tokens: int, num_positions: int) -> None:
    if num_tokens > num_positions:
        raise EvaluationError(
            f"task {request.task_name!r}: an answer to document {request.doc_id} has {num_tokens} tokens, but the "
            f"model takes {num_positions} positions. Leave the task out."
        )


class Counting(_HFLM):  # type: ignore[misc]
    """lm-eval's view of a live model, which counts requests done and prompts cut: task → documents. To lm-eval each
    process is alone: its own way to share out draws other few-shot examples than one process.
    """

    beyond = 1  # an answer's last token is not given to the model, and has no position

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
            self._note_cut(asked, len(context) + len(answer), self.max_length + self.beyond)
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


class _Walking(Counting):
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

    kind, given = (Counting, ()) if run is None else (_Walking, (run, device))
    tokenizer, prefix = with_padding(tokenizer)
    return type(kind.__name__, (kind, HFLM), {})(
        *given,
        progress,
        processes,
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        prefix_token_id=prefix,
    )


def with_padding(tokenizer: Any) -> tuple[Any, int | None]:
    """A copy as lm-eval needs it, and what begins a text, where the tokenizer has nothing for that."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id is None and tokenizer.unk_token_id is None and tokenizer.eos_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # lm-eval would add one that has no embedding
    starts = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return tokenizer, tokenizer.pad_token_id if starts == (None, None) else None


@contextlib.contextmanager
def refusals_of_lm_eval(tasks: LoadedTasks) -> Iterator[None]:
    """What lm-eval or a task's code refuses is an EvaluationError; errors of the model and ours stay as they are."""
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
        f"task {', '.join(sorted(names))}: the model is to write, and would be read from disk for every token. Measure "
        "tasks that choose among answers, or ask this one of a server that holds it: `evaluate: {server: ...}`."
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
        has_error = is_mean and len(values) > 1
        error = statistics.stdev(map(float, values)) / math.sqrt(len(values)) if has_error else None
        metrics[short] = Metric(value, error, higher_is_better.get(metric))
        if is_mean and all(v in (0, 1) for v in values):
            correct[short] = tuple(bool(v) for v in values)
    first_filter = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    dataset = str(task.get_config("dataset_path") or "")
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
        dataset=dataset if is_hub_id(dataset) and not Path(dataset).exists() else "",
        dataset_config=str(task.get_config("dataset_name") or ""),
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


def _to_ranges(ids: Sequence[int]) -> str:
    """``(0, 1, 2, 5)`` → ``"0-2,5"``."""
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs(ids))


def _from_ranges(text: str) -> Iterator[int]:
    for run in filter(None, text.split(",")):
        first, _, last = run.partition("-")
        yield from range(int(first), int(last or first) + 1)


@contextlib.contextmanager
def _tying_as_it_is(model: Any) -> Iterator[None]:
    """``model.tie_weights()``, which lm-eval calls, does nothing inside: it may overwrite untied embeddings."""
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights
