"""A model's answers to tasks through a server, by lm-eval's `local-completions` and `local-chat-completions`.

Prompts are sent as token ids, so that they are those of a model that is asked here. What a server leaves out, or reads
otherwise, is an error: of that lm-eval itself would make figures.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from operator import itemgetter
from typing import Any

from compressor.data.lm_eval_tasks import LoadedTasks, quietly, seeded
from compressor.data.server import Server
from compressor.errors import EvaluationError, shortened
from compressor.evaluation.lm_eval import Counting, TaskResult, answers, refusals_of_lm_eval, with_padding
from compressor.evaluation.result import Json, Progress
from compressor.machine.distributed import Processes

_SENTENCE = "Of 1,234 naïve readers 数学 pleased 5678; why?\n\tdef f(x): return x**2  # and so on"
"""Different tokenizers make different numbers of tokens of it."""


def is_ready(url: str) -> bool:
    """Whether a server answers, and has loaded its model."""
    import requests

    try:
        status = [requests.get(one, timeout=5).status_code for one in (f"{_root(url)}/health", f"{url}/models")]
    except requests.RequestException:
        return False
    return bool(status[0] != 503 and status[1] < 500)


def look_at(server: Server, *, timeout: float = 30) -> Json:
    """What a server says of itself: url, model, and if it does engine, version and longest text. Raises EvaluationError
    where it does not answer, or has no such model.
    """
    url = str(server.url)
    listed = {str(one["id"]): one for one in _objects(_answer(url, "/models", timeout).get("data")) if "id" in one}
    model = server.model or (next(iter(listed)) if len(listed) == 1 else None)
    if model not in listed:
        raise EvaluationError(
            f"{url}: the server has {', '.join(listed) or 'no model'}; expected {model or 'one'}. Name one that it has "
            f"(`model`)."
        )
    about, longest = {"engine": listed[model].get("owned_by")}, listed[model].get("max_model_len")
    about |= {"max_model_len": longest} if isinstance(longest, int) else {}
    with suppress(EvaluationError, KeyError, TypeError):  # only some say it
        about["version"] = _answer(_root(url), "/version", timeout)["version"]
    return {"url": url, "model": model} | {key: value for key, value in about.items() if value}


def _root(url: str) -> str:
    return url.removesuffix("/v1")


def _object(found: Any) -> Json:
    """What a server has answered, where that is an object: nothing in all else."""
    return found if isinstance(found, dict) else {}


def _objects(found: Any) -> list[Json]:
    return [*map(_object, found)] if isinstance(found, list) else []


def _answer(url: str, path: str, timeout: float, **asked: Any) -> Any:
    import requests
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    key = LocalCompletionsAPI.api_key.fget(None)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = requests.request(
            "POST" if asked else "GET", url + path, json=asked or None, headers=headers, timeout=timeout
        )
        answer.raise_for_status()
        return _object(answer.json())
    except requests.RequestException as error:
        raise _refused(url, error, timeout) from error


def _refused(url: str, error: Exception, timeout: float) -> EvaluationError:
    import requests

    said, answer = shortened(str(error), 200), getattr(error, "response", None)
    problem = f"what the server answers is no JSON ({said})"
    if isinstance(error, requests.Timeout):
        problem = f"the server gave no answer within {timeout:g} seconds (`timeout`)"
    elif isinstance(error, requests.HTTPError) and answer is not None:
        key = ", which asks for another key in OPENAI_API_KEY" if answer.status_code in (401, 403) else ""
        problem = f"the server answered {answer.status_code}{key}: {shortened(' '.join(answer.text.split()), 300)}"
    elif isinstance(error, requests.ConnectionError):
        problem = f"no server answers there, or it has ended ({said})"
    return EvaluationError(f"{url}: {problem}.")


def run_tasks(
    server: Server,
    tokenizer: Any,
    tasks: LoadedTasks,
    num_positions: int,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[dict[str, TaskResult], Json]:
    """As `lm_eval.run_tasks`, of a served model with the tokenizer of its folder; and what `look_at` says. Raises
    EvaluationError where the server reads other tokens, or does not answer all.
    """
    about = look_at(server)
    num_positions = min(num_positions, about.get("max_model_len", num_positions))
    for task in tasks.tasks.values():
        task.set_fewshot_seed(seed=seed)
    with quietly(), seeded(seed), refusals_of_lm_eval(tasks):
        settings = {"model": about["model"], "max_length": num_positions, "batch_size": batch_size, "seed": seed}
        lm = _language_model(server, tokenizer, progress, settings)
        _refuse_other_tokens(server, about["model"], tokenizer)
        return answers(lm, tasks, limit, apply_chat_template=server.chat, fewshot_as_multiturn=server.chat), about


def _language_model(server: Server, tokenizer: Any, progress: Progress | None, settings: Json) -> Any:
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    base, path = (LocalChatCompletion, "chat/completions") if server.chat else (LocalCompletionsAPI, "completions")
    given, prefix = with_padding(tokenizer)
    settings |= {"batch_size": 1} if server.chat else {}
    settings |= {"num_concurrent": server.concurrent, "timeout": server.timeout, "custom_prefix_token_id": prefix}
    kind = type("Served", (Served, base), {"url": str(server.url), "threads": ThreadPoolExecutor(server.concurrent)})
    lm = kind(progress, Processes(), base_url=f"{server.url}/{path}", tokenizer_backend=None, **settings)
    if not server.chat:
        lm.tokenizer, lm.tokenizer_backend, lm.tokenized_requests, lm.add_bos_token = given, "huggingface", True, None
    return lm


def _refuse_other_tokens(server: Server, model: str, tokenizer: Any) -> None:
    """Raise EvaluationError unless a text is as many tokens to both, without or with what begins it."""
    url, path, asked, text = str(server.url), "/completions", dict[str, Any](prompt=_SENTENCE), _SENTENCE
    if server.chat:
        path, asked = "/chat/completions", {"messages": [{"role": "user", "content": _SENTENCE}]}
        text = tokenizer.apply_chat_template(asked["messages"], tokenize=False, add_generation_prompt=True)
    expected = {len(tokenizer.encode(text, add_special_tokens=special)) for special in (False, not server.chat)}
    asked |= {"model": model, "max_tokens": 1, "temperature": 0}
    _refuse_other_count(url, _answer(url, path, server.timeout, **asked), expected)


def _refuse_other_count(url: str, found: Json, expected: set[int]) -> None:
    counted = _object(found.get("usage")).get("prompt_tokens")
    if counted not in expected:
        raise EvaluationError(
            f"{url}: the server counts {counted} tokens (usage.prompt_tokens) where the folder's tokenizer has "
            f"{' or '.join(map(str, sorted(expected)))}: it has another model or template, or cuts prompts."
        )


class Served(Counting):
    """lm-eval's view of a served model, which believes no answer that is not whole."""

    beyond, max_gen_toks = 0, 256
    url: str
    threads: ThreadPoolExecutor

    def tok_encode(self, string: Any, **how: Any) -> Any:
        """As of a model that is asked here."""
        from lm_eval.models.huggingface import HFLM

        if self.tokenizer is None:
            return string
        if isinstance(string, str):
            return HFLM.tok_encode(self, string, **how)
        return [HFLM.tok_encode(self, one) for one in string]

    def model_call(self, messages: Any, **how: Any) -> Any:
        """One request, of several prompts."""
        import requests

        try:
            found = super().model_call(messages, **how)
        except requests.RequestException as error:
            raise _refused(self.url, error, self.timeout) from error
        kind = "message" if self.tokenizer is None else "text"
        given = [one.get("index") for one in _objects(_object(found).get("choices")) if kind in one]
        if sorted(map(str, given)) != sorted(map(str, range(len(messages)))):
            raise EvaluationError(f"{self.url}: the server gave {len(given)} answers to {len(messages)} prompts.")
        if self.tokenizer is not None:
            _refuse_other_count(self.url, found, {sum(map(len, messages))})
        return found

    async def amodel_call(self, *, messages: Any, sem: Any, generate: bool = True, **how: Any) -> Any:
        """The same, several at a time."""
        call = partial(self.model_call, messages, generate=generate, gen_kwargs=how.get("gen_kwargs"))
        async with sem:
            found = await asyncio.get_running_loop().run_in_executor(self.threads, call)
        return self.parse_generations(found) if generate else self.parse_logprobs(found, messages, how["ctxlens"])

    def parse_generations(self, outputs: Any, **how: Any) -> list[str]:
        """What the model wrote: nothing where a server says null, as lm-eval has it."""
        written = [one or "" for one in super().parse_generations(outputs, **how)]
        self._count(len(written))
        return written

    def parse_logprobs(self, outputs: Any, tokens: Sequence[Any] = (), ctxlens: Any = None, **how: Any) -> Any:
        """Those of answers; there must be one of every token of a prompt but the first."""
        [whole] = outputs if isinstance(outputs, list) else [outputs]
        for choice, ids in zip(sorted(whole["choices"], key=itemgetter("index")), tokens, strict=True):
            said = _object(choice.get("logprobs"))
            found, likeliest = (said.get(name) or [] for name in ("token_logprobs", "top_logprobs"))
            number = min(len(found), len(likeliest))
            if len({number, len(found), len(ids) + 1}) > 1 or None in found[1:] or not all(likeliest[1:]):
                raise EvaluationError(
                    f"{self.url}: the server gave {number} log-probabilities, expected {len(ids) + 1}: of "
                    f"all tokens of a prompt and the next (`echo`, `logprobs`). Ask it only tasks that have it write."
                )
        self._count(len(tokens))
        return super().parse_logprobs(outputs, tokens=tokens, ctxlens=ctxlens, **how)
