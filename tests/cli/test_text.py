"""What a run says on the screen, and in its record, about the text that it read and the prompts that it cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

Cli = Callable[..., Any]
WriteRecipe = Callable[..., Path]
CopyOf = Callable[[Path], Path]


@pytest.fixture
def model(mixtral: Path, copy_of: CopyOf) -> Path:
    """A model whose tokenizer begins every text with a token, as Gemma's does."""
    folder = copy_of(mixtral)
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.post_processor = TemplateProcessing("w7 $A", None, [("w7", inner.token_to_id("w7"))])
    inner.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three questions, two of them longer than the model."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"q": "w1 " * length, "choices": ["w2", "w3"], "answer": 1} for length in (40, 8, 50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "long.yaml").write_text(
        f"task: long\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\n"
    )
    return tmp_path


def test_what_was_read_and_cut_is_said(cli: Cli, recipe: WriteRecipe, model: Path, task: Path, tmp_path: Path) -> None:
    """Each of three rows is `w7`, 15 words and the end (17 tokens, or 16 without the first)."""
    path = tmp_path / "text.jsonl"
    path.write_text((json.dumps({"text": "w2 w3 w4 " * 5}) + "\n") * 3)
    file = recipe(
        model=model,
        data=[{"jsonl": str(path), "samples": 12, "length": 8}],
        evaluate={
            "tasks": ["long"],
            "task_path": str(task),
            "perplexity": [{"jsonl": str(path), "length": 8, "samples": 8, "special_tokens": False, "name": "plain"}],
        },
    )
    answer = cli("run", file)
    assert answer.status == 0, answer
    lines = answer.err.splitlines()
    assert "source 'text' has text for 6 of the 12 sequences asked for" in lines
    assert "source 'plain' has text for 6 of the 8 sequences asked for" in lines
    cut = "long: 2 of 3 prompts are longer than the model takes, and were asked without their beginnings."
    assert {f"before: {cut}", f"after: {cut}"} <= {*lines}
    assert cut in " ".join(answer.out.split())
    record = json.loads((tmp_path / "out" / "compressor" / "record.json").read_text())
    [read], [measured] = record["calibration"], record["evaluation"]["text"]
    assert (read["sequences"], read["asked"], read["special_tokens"]) == (6, 12, {"begin": ["w7"], "end": []})
    assert (measured["sequences"], measured["asked"]) == (6, 8)
    assert measured["special_tokens"] == {"begin": [], "end": []}
    assert record["evaluation"]["before"]["tasks"]["long"]["cut"] == 2
