"""Where tasks are asked, if not of the model in this process: a server with OpenAI's API, as a recipe names it."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _plain(url: str) -> str:
    """Without what would stand in the record and is nobody's business there."""
    found = re.fullmatch(r"https?://(?:\[[\da-fA-F:.]+\]|[^/@?#:\s\[\]]+)(?::(\d{1,5}))?(?:/[^@?#\s]*)?", url)
    if not found or int(found[1] or 0) > 65535:
        example = "http://127.0.0.1:8000/v1; a key goes into the environment, as OPENAI_API_KEY"
        raise ValueError(f"found {url.rpartition('@')[2]!r}, expected an address such as {example}")
    return url.rstrip("/")


Url = Annotated[str, AfterValidator(_plain)]


class Server(BaseModel):
    """A server that answers tasks: one that runs, or one that is started on each model in turn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: Url | None = Field(default=None, description="where it answers, such as http://127.0.0.1:8000/v1")
    model: str | None = Field(default=None, description="what it calls the model; default the only one that it has")
    original_url: Url | None = Field(default=None, description="where the original is, for `--against`; default `url`")
    original_model: str | None = Field(default=None, description="what the original is called there")
    command: tuple[str, ...] = Field(
        default=(),
        description="a program that serves a model, with its arguments: started on the original, stopped, started on "
        "the smaller one. `{model}` becomes the folder, `{port}` the port of `url`, or else a free one",
    )
    starts_within: float = Field(default=3600, gt=0, description="seconds that it has to load a model")
    chat: bool = Field(default=False, description="ask by /chat/completions, in the model's template; tasks that write")
    concurrent: int = Field(default=1, ge=1, description="requests at a time, each of `batch_size` prompts (chats: 1)")
    timeout: int = Field(default=300, ge=1, description="seconds that it has for one request")

    @model_validator(mode="after")
    def _one_way(self) -> Server:
        wanted = ["{model}"] if self.url else ["{model}", "{port}"]
        missing = [one for one in wanted if not any(one in argument for argument in self.command[1:])]
        if not (self.url or self.command):
            raise ValueError("found neither, expected the `url` of a server that runs or the `command` that starts one")
        if self.command and missing:
            raise ValueError(f"no argument of command has {missing[0]} in it, so {self.command[0]} would not know that")
        if self.command and (self.original_url or self.original_model):
            raise ValueError("`original_…` would have no effect beside `command`, which is started on both models")
        if any(re.search(r"(?i)(api[-_]?key|hf[-_]?token)(?!-file)", argument) for argument in self.command):
            raise ValueError("a key in `command` would stand in the record; give it in the program's environment")
        return self
