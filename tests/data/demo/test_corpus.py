from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from itertools import islice

import pytest

from compressor.data.demo import corpus
from compressor.data.demo.corpus import DOMAINS, documents, split_of
from compressor.errors import CalibrationError


@pytest.fixture(scope="module")
def held_out() -> dict[str, list[str]]:
    return {domain: list(documents(domain, "held-out")) for domain in DOMAINS}


def test_domains_have_enough_text(held_out):
    sizes = {domain: sum(map(len, docs)) for domain, docs in held_out.items()}
    assert sizes["code"] > 300_000
    assert sizes["prose"] > 80_000
    assert sizes["arithmetic"] > 100_000


def test_same_seed_same_documents_other_seed_other_order(held_out):
    for domain in DOMAINS:
        again = list(islice(documents(domain, "held-out", seed=0), 5))
        other = list(islice(documents(domain, "held-out", seed=1), 5))
        assert again == held_out[domain][:5]
        assert other != again


def test_splits_share_no_file():
    train, held_out = (corpus._source_files(split) for split in ("train", "held-out"))
    assert not set(train) & set(held_out)
    assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.15


def test_splits_share_hardly_a_docstring(held_out):
    """One that was copied into a second module may be on both sides."""
    assert len(set(islice(documents("prose", "train"), 600)) & set(held_out["prose"])) <= 5


def test_no_held_out_sum_in_the_training_split(held_out):
    train, other = (
        {line.split("=")[0] for doc in docs for line in doc.splitlines()}
        for docs in (documents("arithmetic", "train"), held_out["arithmetic"])
    )
    assert not train & other
    assert len(train) > 8 * len(other)


def test_arithmetic_is_right(held_out):
    lines = "".join(held_out["arithmetic"]).splitlines()
    assert {line[len(re.match(r"\d+", line)[0])] for line in lines} == set("+-*")
    for line in lines[:2000]:
        a, operator, b, value = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", line).groups()
        assert int(value) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator]


def test_code_has_lost_its_docstrings_and_nothing_else():
    source = '"""Doc."""\nimport os\n\ndef f(x):\n    """One\n    two."""\n    text = """kept"""\n    return x\n'
    stripped = corpus._without_docstrings(source, list(corpus._documented(ast.parse(source))))
    assert stripped == 'import os\n\ndef f(x):\n    text = """kept"""\n    return x\n'


def test_prose_has_lost_its_doctests():
    text = "Before.\n\n>>> f(1)\n2\n>>> for x in y:\n...     z\n3\n\nAfter.\n"
    assert corpus._without_doctests(text) == "Before.\n\nAfter.\n"


def test_docstrings_are_those_that_a_search_of_every_node_finds_in_the_same_order():
    nested = "if 1:\n    def f():\n        'f'\ntry:\n    pass\nexcept E:\n    class G:\n        'G'\n"
    nested += "match x:\n    case 1:\n        def h():\n            'h'\ndef i():\n    'i'\n"
    for source in (nested, inspect.getsource(inspect)):
        tree = ast.parse(source)
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        every = [ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, owners)]
        assert [node.value for node in corpus._documented(tree)] == [text for text in every if text is not None]


def test_skipped_files():
    found = corpus._all_source_files()
    assert "json/encoder.py" in found
    assert "encodings/cp1252.py" not in found
    assert not any("idle_test" in name or name.startswith("_sysconfigdata") for name in found)


def test_split_is_the_same_everywhere():
    """The hash does not depend on the process, the platform or PYTHONHASHSEED: these were computed once."""
    assert [split_of(name) for name in ("8*1", "37+58", "json/encoder.py")] == ["held-out", "train", "train"]


def test_unknown_names_are_refused():
    with pytest.raises(CalibrationError, match="no domain 'poetry'; known: code, prose, arithmetic"):
        documents("poetry", "train")
    with pytest.raises(CalibrationError, match="no split 'test'; known: train, held-out"):
        documents("code", "test")


def test_reading_text_needs_no_torch():
    program = (
        "import sys, compressor.data.demo.corpus as c; "
        "next(c.documents('prose', 'train')); print('torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "False"
