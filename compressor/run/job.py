"""One run of a recipe: what it is told, how long its steps take, and what is kept of them for a run that resumes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor.checkpoint.output import OutputFolder, kept_for
from compressor.checkpoint.resume_state import Journal, ObservationJournal
from compressor.machine.distributed import Processes
from compressor.machine.progress import Progress
from compressor.plugins import Plugins
from compressor.recipe.schema import LoadedRecipe, Recipe


@dataclass(frozen=True)
class Job:
    """A recipe that is run, by which plugins, and what the run's steps share."""

    loaded: LoadedRecipe
    plugins: Plugins
    progress: Progress
    processes: Processes
    journal: Journal | None = None
    """Where another run could go on with this one."""
    fingerprint: str | None = None
    """Of what the run is about, where it has a journal."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Step → how long it has taken so far."""

    @classmethod
    def of(cls, loaded: LoadedRecipe, plugins: Plugins, progress: Progress | None, processes: Processes | None) -> Job:
        """A job of this process; only the first one speaks."""
        processes = processes or Processes()
        if progress is None or not processes.is_first:
            progress = Progress()
        return cls(loaded, plugins, progress, processes)

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """The time within the context is that step's."""
        started = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started

    def noted(self, name: str, make: Callable[[], dict[str, Any]], *, anew: bool = False) -> dict[str, Any]:
        """What the journal has under a name, else (or `anew`) what is made now, which it then has."""
        found = self.processes.exchange(self.journal.noted(name) if self.journal is not None else None)[0]
        if found is not None and anew:
            self.progress.say(f"{name}: what belongs to it is damaged or gone, and it is done again")
        if found is None or anew:
            found = make()
            if self.journal is not None and self.processes.is_first:
                self.journal.note(name, found)
        return dict(found)

    def observation(self, name: str | None) -> ObservationJournal | None:
        """The journal's part for what is observed under a name, if it is to be kept."""
        return self.journal.observation(name, self.processes.rank) if self.journal and name else None


def open_journal(job: Job, output: Path, identity: Mapping[str, Any], folder: OutputFolder | None) -> Journal:
    """Begin or resume the journal beside an output of a run that is `about` this; the writing process has `folder`."""
    journal = Journal(kept_for(output, "journal"), identity, job.progress.say)
    if folder and folder.resume:
        journal.go_on()
        job.progress.say(f"going on with what was done in {folder.hidden}")
    elif folder:
        journal.begin()
    job.processes.wait()
    return journal
