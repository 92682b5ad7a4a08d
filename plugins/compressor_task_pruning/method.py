"""The method `task_pruning`: the same objective as expert pruning, calibrated on a task's own training documents."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compressor.plugin import ExpertSelection, FileName, FilePath, Options, SelectionOptions, TaskSource


class TaskPruningOptions(SelectionOptions):
    """The task, how much of its text, and how experts are chosen (`keep` or `drop`, one of them)."""

    task: FileName = Field(
        min_length=1, description="lm-eval task or group whose training documents are the text; or a task's YAML file"
    )
    task_path: FilePath | None = Field(
        default=None, description="a folder of lm-eval task files (YAML) in which the task is looked for first"
    )
    split: Literal["train", "validation", "test"] | None = Field(
        default=None,
        description="take this split's documents; default the training split, or else a validation split that the task "
        "is not measured on",
    )
    samples: int = Field(
        default=128, ge=1, le=10_000_000, description="number of sequences of the task's text to take, at most"
    )
    length: int = Field(default=2048, ge=2, le=10_000_000, description="tokens per sequence")


class TaskPruning(ExpertSelection[TaskPruningOptions]):
    """Keep the experts that change each MoE layer's output least on a task's training text (arXiv 2402.14800)."""

    name = "task_pruning"
    version = "2"
    api = 2
    options_type: ClassVar[type[Options]] = TaskPruningOptions

    def sources(self) -> list[TaskSource]:
        """The task's training documents, prompt and answer as the task renders them."""
        options = self.options
        return [
            TaskSource(
                task=options.task,
                task_path=options.task_path,
                split=options.split,
                samples=options.samples,
                length=options.length,
            )
        ]
