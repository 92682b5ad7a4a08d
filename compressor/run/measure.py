"""What is measured of a model, and of two side by side: quality, size and speed."""

from __future__ import annotations

import dataclasses
import gc
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compressor.data.lm_eval_tasks import LoadedTasks
from compressor.data.sequences import Sequences
from compressor.data.server import Server
from compressor.edit.backend import Measurable
from compressor.evaluation.fidelity import Answers, Fidelity, beside_original
from compressor.evaluation.generation import Generation, generation
from compressor.evaluation.lm_eval import TaskResult, positions
from compressor.evaluation.paired import paired
from compressor.evaluation.perplexity import Perplexity
from compressor.evaluation.served import run_tasks
from compressor.evaluation.serving import serving
from compressor.evaluation.size import RoutedSize, Size, bytes_on_disk
from compressor.evaluation.speed import peak_memory, speed
from compressor.machine.distributed import Processes
from compressor.machine.progress import Progress
from compressor.model.skipping.usage import Counter
from compressor.model.structure import MoELayer
from compressor.recipe.schema import Evaluation
from compressor.report.figures import cut_prompts
from compressor.run.job import Job
from compressor.wording import counted, digest

_ExpertsUsed = dict[str, dict[str, float]]
"""Text (or "tasks") → layer path → experts that a token used."""


@dataclass(frozen=True)
class Yardstick:
    """What a run measures, and on what; the same before and after."""

    evaluation: Evaluation
    texts: Sequence[Sequences]
    """For perplexity and fidelity."""
    tasks: LoadedTasks | None
    tokenizer: Any | None
    seed: int
    answers: Mapping[str, Answers] = field(default_factory=dict)
    """What the original answers to each text, by name; empty where there is no original."""

    def has_answers(self, processes: Processes) -> bool:
        """Whether all of them are there, of a run before."""
        size = self.evaluation.batch_size
        own = {text.name: processes.own(len(text.batches(size))) for text in self.texts}
        return processes.all(all(self.answers[name].has(numbers) for name, numbers in own.items()))


@dataclass(frozen=True)
class Measured:
    """A model's quality and size, as evaluate's own objects."""

    perplexity: Mapping[str, Perplexity]
    tasks: Mapping[str, TaskResult]
    size: Size
    peak_memory: Mapping[str, int | None]
    experts_per_token: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By text, then by layer; empty where no layer is known of."""
    bytes_on_disk: int | None = None
    fidelity: Mapping[str, Fidelity] = field(default_factory=dict)
    """To the original, by text."""
    generation: Generation | None = None
    server: Mapping[str, Any] | None = None
    """Which one has answered the tasks, if not the model in this process."""

    def to_json(self) -> dict[str, Any]:
        return {
            **({"experts_per_token": self.experts_per_token} if self.experts_per_token else {}),
            "perplexity": {name: value.to_json() for name, value in self.perplexity.items()},
            "tasks": {name: value.to_json() for name, value in self.tasks.items()},
            "size": self.size.to_json(),
            "peak_memory": self.peak_memory,
            **({"bytes_on_disk": self.bytes_on_disk} if self.bytes_on_disk is not None else {}),
            **({"fidelity": {name: one.to_json() for name, one in self.fidelity.items()}} if self.fidelity else {}),
            **({"generation": self.generation.to_json()} if self.generation else {}),
            **({"server": self.server} if self.server else {}),
        }

    def with_bytes_of(self, folder: Path) -> Measured:
        """The same, with what the checkpoint takes in a folder."""
        return dataclasses.replace(self, bytes_on_disk=bytes_on_disk(folder))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measured:
        objects = {
            "perplexity": {name: Perplexity(**value) for name, value in data["perplexity"].items()},
            "tasks": {name: TaskResult.from_json(value) for name, value in data["tasks"].items()},
            "size": Size(**data["size"]),
            "fidelity": {name: Fidelity(**value) for name, value in data.get("fidelity", {}).items()},
            "generation": Generation.from_json(data["generation"]) if "generation" in data else None,
        }
        return cls(**{**data, **objects})


def measure(
    job: Job,
    piece: Measurable,
    yardstick: Yardstick | None,
    when: str,
    devices: Sequence[str],
    *,
    name: str | None = None,
    is_original: bool = False,
) -> Measured | None:
    """Quality and size of a model; None without a yardstick. The journal keeps them by `name`, or else by `when`. What
    the original answers is kept, and others are compared with it.
    """
    if yardstick is None:
        return None
    progress = job.progress

    def found() -> dict[str, Any]:
        perplexity, fidelity, used = _on_texts(piece, yardstick, when, progress, is_original=is_original)
        tasks, used_by_tasks = _tasks(piece, yardstick, when, progress)
        used = used or used_by_tasks
        sizes = piece.size(_routed(piece.layers, used))
        experts_per_token = used if any(used.values()) else {}
        written, peak = _generation(piece, yardstick, when, progress), peak_memory(*devices)
        return Measured(perplexity, tasks, sizes, peak, experts_per_token, None, fidelity, written).to_json()

    anew = is_original and not yardstick.has_answers(job.processes)
    return Measured.from_json(job.noted(f"evaluation {name or when}", found, anew=anew))


def _on_texts(
    piece: Measurable, yardstick: Yardstick, when: str, progress: Progress, *, is_original: bool
) -> tuple[dict[str, Perplexity], dict[str, Fidelity], _ExpertsUsed]:
    found, fidelity, used = dict[str, Perplexity](), dict[str, Fidelity](), {}
    batch_size = yardstick.evaluation.batch_size
    for text in yardstick.texts:
        name, answers = text.name, yardstick.answers.get(text.name)
        with progress.task(f"{when}: perplexity {name}") as update, piece.counted() as counter:
            if answers is None or is_original:
                watch = answers.keep if answers is not None else None
                found[name] = piece.perplexity(text, batch_size, update, watch)
            else:
                how = (batch_size, answers, update, getattr(yardstick.tokenizer, "decode", str))
                found[name], fidelity[name] = beside_original(piece, text, *how)
        used[name] = _used(piece.layers, counter, piece.processes)
    return found, fidelity, used


def _generation(piece: Measurable, yardstick: Yardstick, when: str, progress: Progress) -> Generation | None:
    asked = yardstick.evaluation.generation
    if not asked:
        return None
    with progress.task(f"{when}: writing, batches") as update:
        return generation(
            piece.model,
            yardstick.tokenizer,
            yardstick.texts,
            asked,
            batch_size=yardstick.evaluation.batch_size,
            seed=yardstick.seed,
            progress=update,
            processes=piece.processes,
        )


def _tasks(
    piece: Measurable, yardstick: Yardstick, when: str, progress: Progress
) -> tuple[dict[str, TaskResult], _ExpertsUsed]:
    if yardstick.tasks is None or yardstick.evaluation.server:
        return {}, {}
    title = f"{when}: {counted(len(yardstick.tasks.names), 'task')}"
    with progress.task(title) as update, piece.counted() as counter:
        found = piece.ask(
            yardstick.tasks,
            yardstick.tokenizer,
            update,
            limit=yardstick.evaluation.limit,
            batch_size=yardstick.evaluation.batch_size,
            seed=yardstick.seed,
        )
    for sentence in cut_prompts({name: result.to_json() for name, result in found.items()}):
        progress.say(f"{when}: {sentence}")
    # lm-eval's padding is among the tokens: nobody tells which they are
    return found, {"tasks": _used(piece.layers, counter, piece.processes)}


def _used(layers: Sequence[MoELayer], counter: Counter, processes: Processes) -> dict[str, float]:
    """Layer path → experts that a token used: as counted where it skips some, else as many as it chooses."""
    whole = Counter()
    for sums in processes.exchange(counter.sums):
        whole.add_sums(sums)
    return {layer.path: float(layer.top_k) for layer in layers} | whole.experts_per_token


def _routed(layers: Sequence[MoELayer], used: _ExpertsUsed) -> list[RoutedSize]:
    return [
        RoutedSize(
            layer.num_with_weights,
            min(layer.num_with_weights, statistics.mean([by[layer.path] for by in used.values()] or [layer.top_k])),
            layer.parameters_per_expert,
        )
        for layer in layers
    ]


def ask_server(
    job: Job, yardstick: Yardstick | None, folder: Path | None, config: Any, when: str, *, is_original: bool = False
) -> dict[str, Any]:
    """The fields of `Measured` that a server finds of the model in a folder; none without a server. Of several
    processes the first one asks. Those of the original are kept for a run that goes on with the same server.
    """
    server = yardstick.evaluation.server if yardstick else None
    if server is None or yardstick is None or yardstick.tasks is None:
        return {}
    name, at = f"tasks {digest(server.model_dump_json())}", server
    if is_original and not server.command:
        at = server.model_copy(update={"url": server.original_url or server.url, "model": server.original_model})

    def found() -> dict[str, Any]:
        with job.timed("tasks through a server"), job.loaded.at("evaluate", "server"):
            own = _answers_of(job, yardstick, at, folder, config, when) if job.processes.is_first else None
        return dict(job.processes.exchange(own)[0])

    noted = job.noted(name, found) if is_original else found()
    return noted | {"tasks": {name: TaskResult.from_json(one) for name, one in noted["tasks"].items()}}


def _answers_of(
    job: Job, yardstick: Yardstick, server: Server, folder: Path | None, config: Any, when: str
) -> dict[str, Any]:
    assert yardstick.tasks is not None
    evaluation, tokenizer = yardstick.evaluation, yardstick.tokenizer
    how: dict[str, Any] = {"limit": evaluation.limit, "batch_size": evaluation.batch_size, "seed": yardstick.seed}
    with ExitStack() as running:
        if server.command and folder is not None:
            gc.collect()  # a server may need the room of weights that were here
            torch.cuda.empty_cache()
            server = running.enter_context(serving(server, folder, job.progress.say))
        how["progress"] = running.enter_context(job.progress.task(f"{when}: tasks through {server.url}"))
        tasks, about = run_tasks(server, tokenizer, yardstick.tasks, positions(tokenizer, config), **how)
    if server.command:  # where that was is known to nobody else
        about = {"command": list(server.command)} | {key: about[key] for key in about if key not in ("url", "model")}
    return {"tasks": {name: one.to_json() for name, one in tasks.items()}, "server": about}


def compared(before: Measured, after: Measured, texts: Sequence[Sequences]) -> dict[str, Any]:
    """The record's `evaluation`: figures before and after, how far answers are apart, and which are flipped."""
    found = after.to_json()
    fidelity = found.pop("fidelity", None)
    return {
        "text": [sequences.to_json() for sequences in texts],
        "before": before.to_json(),
        "after": found,
        **({"fidelity": fidelity} if fidelity else {}),
        "paired": {
            task: {metric: flips.to_json() for metric, flips in by_metric.items()}
            for task, by_metric in paired(before.tasks, after.tasks).items()
        },
    }


def compared_speed(original: Any, smaller: Any, texts: Sequence[Sequences], seed: int) -> dict[str, Any]:
    """The original against the smaller model, alternated, on the first of these texts."""
    vocabulary = int(smaller.get_input_embeddings().weight.shape[0])
    text = next((one.ids for one in texts if not one.images), ())
    return speed({"before": original, "after": smaller}, vocab_size=vocabulary, text=text, seed=seed).to_json()
