"""The options of `kept_experts`."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, StrictInt, model_validator

from compressor.plugin import FilePath, Options


class KeptExpertsOptions(Options):
    """Where it stands which experts stay: `file`, or `counts` with `keep`."""

    file: FilePath | None = Field(
        default=None, description="a JSON file of expert ids by layer: kept ones, unless it or `ids` says otherwise"
    )
    ids: Literal["kept", "dropped"] | None = Field(
        default=None, description="with `file`: what its ids are; default kept, which a file's own words may overrule"
    )
    counts: FilePath | None = Field(
        default=None,
        description="a figure for every expert, of which the largest stay (of equal ones the lower id): SGLang's "
        "`logical_count`, vLLM's `routed_experts`, HOPE's observations.h5, or JSON of figures by layer",
    )
    keep: StrictInt | None = Field(default=None, ge=1, description="with `counts`: experts that every layer keeps")

    sha256: str | None = Field(
        default=None,
        description="the file's digest, by which another one is refused; filled in, so that a record has it",
    )

    @model_validator(mode="before")
    @classmethod
    def _with_digest(cls, given: Any) -> Any:
        """A run with another file is another run; one that cannot be read is refused when it is to be."""
        file = isinstance(given, dict) and (given.get("file") or given.get("counts"))
        if file and given.get("sha256") is None:
            with suppress(OSError, ValueError, TypeError):
                return {**given, "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()}
        return given

    @model_validator(mode="after")
    def _one_source(self) -> KeptExpertsOptions:
        if (self.file is None) == (self.counts is None):
            raise ValueError("give one of `file` (ids) and `counts` (a figure for every expert, with `keep`)")
        if (self.counts is None) != (self.keep is None):
            raise ValueError("`counts` and `keep` go together: figures, and how many experts stay")
        if self.ids is not None and self.file is None:
            raise ValueError("`ids` says what a `file` of ids holds, and has no effect beside `counts`; leave it out")
        return self
