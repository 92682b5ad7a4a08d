"""A server with OpenAI's API over a transformers model, as small as lm-eval and the tests need it.

    python openai_stand_in.py FOLDER PORT

`faults` has it answer wrongly, as real ones do.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

NAME = "served"


def log_probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    """[S, V]: what the model expects behind every token."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)


def continued(model: Any, tokenizer: Any, ids: list[int], most: int, stop: list[str]) -> str:
    """Greedily, up to the end of text or what is to stop it."""
    written: list[int] = []
    while len(written) < most:
        token = int(log_probabilities(model, ids + written)[-1].argmax())
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
        text = str(tokenizer.decode(written, skip_special_tokens=True))
        if any(one in text for one in stop):
            return min((text.partition(one)[0] for one in stop), key=len)
    return str(tokenizer.decode(written, skip_special_tokens=True))


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, found: Any, status: int = 200) -> None:
        found = self.server.faults.get("whole", found)
        content = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        faults = self.server.faults
        self.server.keys.append(self.headers.get("Authorization"))
        if faults.get("key") and self.headers.get("Authorization") != f"Bearer {faults['key']}":
            return self.answer({"error": "no such key"}, 401)
        if self.path == "/health":
            return self.answer({}, faults.get("health", 200))
        if faults.get("no_json"):
            return self.answer(b"<html>")
        named = [{"id": one, "owned_by": "stand-in"} | faults.get("about", {}) for one in self.server.models]
        found = {"/v1/models": {"data": named}, "/version": {"version": "7.1"}}
        return self.answer(found.get(self.path, {}), 200 if self.path in found else 404)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        faults, self.server.asked = self.server.faults, self.server.asked + 1
        if self.server.asked > faults.get("dies_after", 10**9):
            self.server.dead = True
        if self.server.dead:
            self.connection.close()
            return None
        if self.server.asked > faults.get("slow_after", 10**9):
            threading.Event().wait(faults["seconds"])  # tests make sleep short
        model, tokenizer = self.server.models[asked["model"]]
        if self.path.endswith("/chat/completions"):
            text = tokenizer.apply_chat_template(asked["messages"], tokenize=False, add_generation_prompt=True)
            prompts = [tokenizer.encode(text, add_special_tokens=False)]
        else:
            given = asked["prompt"]
            prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
            prompts = [tokenizer.encode(one) if isinstance(one, str) else one for one in prompts]
        choices = [self.choice(number, model, tokenizer, ids, asked) for number, ids in enumerate(prompts)]
        counted = sum(map(len, prompts)) + faults.get("counts_more", 0)
        choices = choices[: faults.get("choices", len(choices))]
        usage = {} if faults.get("no_usage") else {"usage": {"prompt_tokens": counted}}
        if self.server.asked > faults.get("whole_after", 10**9):
            return self.answer([choices])
        return self.answer({"choices": choices[::-1], **usage})

    def choice(self, number: int, model: Any, tokenizer: Any, ids: list[int], asked: dict[str, Any]) -> dict[str, Any]:
        if not asked.get("echo"):
            text = continued(
                model, tokenizer, ids, asked["max_tokens"], [one for one in asked.get("stop") or () if one]
            )
            return {"index": number, "text": text, "message": {"role": "assistant", "content": text}}
        expected = log_probabilities(model, ids)
        given = [None, *(float(expected[place, token]) for place, token in enumerate(ids[1:]))]
        best = expected.max(-1).values.tolist()
        values, tops = [*given, best[-1]], [None, *({"best": one} for one in best)]
        if self.server.faults.get("no_echo"):
            values, tops = values[-1:], tops[-1:]
        logprobs = {"token_logprobs": values, "top_logprobs": self.server.faults.get("tops", tops)}
        return {"index": number, "text": "", "logprobs": None if self.server.faults.get("no_logprobs") else logprobs}


class StandIn(ThreadingHTTPServer):
    """Serves models by name, each with its tokenizer."""

    daemon_threads = True

    def __init__(self, models: dict[str, tuple[Any, Any]], port: int = 0, **faults: Any) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.models, self.faults = models, faults
        self.asked, self.dead = 0, False
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @contextmanager
    def running(self) -> Iterator[StandIn]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


def main(folder: str, port: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    print("serving", folder, flush=True)
    StandIn({folder: (model, AutoTokenizer.from_pretrained(folder))}, int(port)).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
