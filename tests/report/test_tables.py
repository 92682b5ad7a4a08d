"""Every table as people see it, at 80 and at 140 columns: nothing wider than the terminal, no word broken, no cell
lost, and none of the strings that look broken.
"""

from __future__ import annotations

import io
import random
import re
from typing import Any

import pytest
from report.test_report import with_description
from rich.cells import cell_len
from rich.console import Console

from compressor.plugins import load_plugins
from compressor.report.figures import figures, random_table
from compressor.report.html import page
from compressor.report.tables import Table, show_facts
from compressor.report.terminal import print_decisions, print_inspection, print_methods, print_plan, print_summary
from compressor.wording import counted

LONG = "a_name_of_sixty_letters_as_people_give_them_to_tasks_and_texts"[:60]
BROKEN = (
    r"Undefined|\bNone\b|\bTrue\b|\bFalse\b|\bnan\b|\binf\b|\b1 (experts|layers|tokens|tensors|tasks|times|batches)\b"
    r"|\(s\)|0/\?|0\.00 GB|<class|typing\.|\[\]|\{\}|  ;|: ;| ,"
)
DRAW = random.Random(0)


def perplexity(value: float) -> dict[str, Any]:
    return {"perplexity": value, "mean_loss": 2.5, "standard_error": 0.01, "tokens": 1000}


def side(names: list[str], tasks: list[str], factor: float) -> dict[str, Any]:
    metric = {"value": 0.5 * factor, "standard_error": 0.0123, "higher_is_better": True}
    return {
        "perplexity": {name: perplexity(10.0 ** (place % 6) * factor) for place, name in enumerate(names)},
        "tasks": {
            task: {"metrics": {"acc": metric, "acc_norm": metric, "bleu": metric}, "group": None} for task in tasks
        },
        "size": {"parameters": int(671e9 * factor), "active_parameters": int(37e9), "bytes": int(1.3e12 * factor)},
        "experts_per_token": {names[0]: {"model.layers.0.mlp": 1.0 + factor / 2}} if names else {},
        "bytes_on_disk": int(1.3e12),
        "peak_memory": {"host_bytes": 98_100_000_000, "device_bytes": None},
    }


def flips() -> dict[str, Any]:
    return {"gained": 1234, "lost": 4321, "both_right": 500, "both_wrong": 100, "p_value": 1e-9}


def record(num_layers: int, num_experts: int, names: list[str], tasks: list[str], *, skips: bool, uneven: bool) -> Any:
    """A record as a run would write it, with every kind of figure that a pass leaves."""
    layers: dict[str, Any] = {}
    for number in range(num_layers):
        num_kept = num_experts - (number % 3 if uneven else num_experts // 4)
        kept = sorted(DRAW.sample(range(num_experts), num_kept))
        dropped = [expert for expert in range(num_experts) if expert not in kept]
        layers[f"model.layers.{number}.mlp"] = {
            **{"kept": kept, "dropped": dropped, "loss": 12.3456, "relative_loss": 0.25, "search": "exact"},
            **{"domains": dict.fromkeys(names, 1e-5), "unreached": dropped[:1] if number == 0 else []},
            **{"super_experts": [0], "uncovered": 0.01, "swaps": 3},
        }
    skipping = {
        path: {
            "rule": "ratio",
            "beta": 0.4321,
            "mean_experts": 1.5,
            "relative_loss": 0.1,
            "held_out": {"mean_experts": 1.6},
        }
        for path in layers
    }
    values = {"ours": 45.05, "random": [41.2, 40.1, 123456.7]}
    pruned = {
        "method": "expert_pruning",
        "options": {"keep": 6},
        "decision": {"layers": layers},
        "random": {"relative_loss": values, "perplexity": dict.fromkeys(names, values)},
    }
    passes: list[Any] = [with_description(pruned, keep=6)]
    if skips:
        skipped = {"method": "dynamic_skipping", "decision": {"layers": skipping, "mean_experts": 1.5}}
        passes.append(with_description(skipped))
    before, after = side(names, tasks, 1.0), side(names, tasks, 0.75)
    speed = {
        "names": ["before", "after"],
        **{key: {"before": 1234.5, "after": 23.4} for key in ("prefill", "decode")},
        **{f"{key}_ratio": {"median": 1.054, "min": 1.01, "max": 1.08} for key in ("prefill", "decode")},
    }
    paired = {task: {"acc": flips(), "acc_norm": flips()} for task in tasks}
    alone = [{"pass": n, "method": one["method"], "before": before, "after": after} for n, one in enumerate(passes)]
    return {
        "model": {"reference": "mistralai/Mixtral-8x7B-v0.1", "architecture": "MixtralForCausalLM"},
        "passes": passes,
        "layers": [{"path": path, "num_experts": num_experts, "top_k": 2} for path in layers],
        "evaluation": {
            "before": before,
            "after": after,
            "paired": paired,
            "speed": speed,
            "alone": alone if skips else None,
        },
        "seconds": {f"evaluate step {n}": 10.0**n for n in range(7)},
        "output": f"runs/{LONG}",
    }


RECORDS = {
    "few": record(1, 8, ["demo:code"], ["arc_easy"], skips=False, uneven=False),
    "many": record(61, 256, ["demo:code", "demo:prose", "demo:arithmetic"], ["mmlu"], skips=True, uneven=False),
    "long": record(4, 16, [LONG, f"{LONG[:-1]}2"], [LONG, f"{LONG[:-1]}2"], skips=True, uneven=True),
    "bare": record(3, 8, [], [], skips=False, uneven=True),
}


def inspection(path: str, num_layers: int, num_experts: int) -> dict[str, Any]:
    layer = {"num_experts": num_experts, "top_k": 2, "router": f"{LONG[:40]}: top-2", "parameters_per_expert": 10**8}
    experts = num_layers * num_experts * 10**8
    return {
        **{
            "model": "m",
            "architecture": "A",
            "dtype": "bfloat16",
            "notes": [f"the expert count is `{LONG}` in config.json"],
        },
        "layers": [{"path": path.format(n), **layer} for n in range(num_layers)],
        **{
            "parameters": experts + 10**9,
            "bytes": 2 * experts,
            "expert_parameters": experts,
            "expert_bytes": 2 * experts,
        },
    }


def plan(path: str, num_layers: int) -> dict[str, Any]:
    needs = {
        **{"weights": "disk", "layers": 61, "largest_layer": 10**10, "text": 10**9, "hidden_states": "file"},
        **{"memory": 10**11, "available": 10**12, "device_memory": 10**10, "disk": 10**12, "readings": 1},
        **{"bytes_read": 10**12, "tasks_at_once": 65536},
    }
    return {
        **{"model": "m", "architecture": "A", "dtype": "float32", "needs": needs, "notes": [f"28 sets of {LONG}"]},
        "layers": [
            {"path": path.format(n), "num_experts": 256, "top_k": 8, "kept": 256 - n % 5, "dropped": n % 5}
            for n in range(num_layers)
        ],
        "parameters": {"before": 10**12, "after": 10**11},
        "bytes": {"before": 10**12, "after": 10**11},
        "expert_parameters": 10**11,
    }


PATHS = ["model.layers.{}.mlp", f"model.{LONG[:50]}.layers.{{}}.mlp"]
PRINTED: dict[str, tuple[Any, Any]] = {
    **{f"summary {name}": (print_summary, one) for name, one in RECORDS.items()},
    **{f"decisions {name}": (print_decisions, one) for name, one in RECORDS.items()},
    **{f"inspection {len(path)}": (print_inspection, inspection(path, 61, 256)) for path in PATHS},
    **{f"plan {len(path)}": (print_plan, plan(path, 7)) for path in PATHS},
    "methods": (print_methods, load_plugins().plugins),
    "no methods": (print_methods, ()),
}


def printed(name: str, width: int) -> str:
    function, data = PRINTED[name]
    text = io.StringIO()
    function(data, Console(file=text, width=width, no_color=True))
    return text.getvalue()


def words(text: str) -> set[str]:
    return set(re.sub(r"[─;,:]", " ", text).split())


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("name", PRINTED)
def test_what_people_see(name: str, width: int) -> None:
    text = printed(name, width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert not re.search(BROKEN, text), re.search(BROKEN, text)
    in_one_line = printed(name, 10_000)
    listed = re.compile(r"\d+(–\d+)?|experts?")  # lists of ids give way to their number where there is no room
    assert {word for word in words(text) ^ words(in_one_line) if not listed.fullmatch(word)} - {
        "kept",
        "dropped",
    } == set()


@pytest.mark.parametrize("name", RECORDS)
def test_the_page_has_none_of_the_strings_that_look_broken(name: str) -> None:
    text = re.sub(r"<(style|svg|script).*?</\1>|data-chart='.*?'", "", page(RECORDS[name]), flags=re.DOTALL)
    assert not re.search(BROKEN, text), re.search(BROKEN, text)


def test_the_same_perplexity_is_written_alike_in_every_table() -> None:
    text = printed("summary few", 140)
    random = {"perplexity": {"x": {"ours": 45.05, "random": [41.2, 40.1, 123456.7]}}}
    assert random_table({"method": "m", "random": random}).rows == [
        ("perplexity x", "45.05", "41.20", "40.10–123,457", "1 of 3")
    ]
    assert figures(RECORDS["few"])[0].before == "1.000 ± 0.010"
    assert "45.05" in text


def test_ids_are_listed_where_they_fit() -> None:
    kept = [*range(0, 40, 2)]
    decided = {"layers": {"model.layers.0.mlp": {"kept": kept, "dropped": [1], "loss": 1.0}}}
    done = {"passes": [{"method": "m", "decision": decided}]}
    narrow, wide = (io.StringIO(), io.StringIO())
    print_decisions(done, Console(file=narrow, width=80))
    print_decisions(done, Console(file=wide, width=200))
    assert "20 experts" in narrow.getvalue()
    assert ", ".join(map(str, kept)) in wide.getvalue()


def test_columns_give_way_to_rows_where_words_would_be_broken() -> None:
    table = Table("t", ("name", ">before", ">after"), [(LONG, "1.0 ± 0.1", "2.0\n+1 −1"), ("short", "–", "3")])
    assert table.widths(80) == [60, 9, 5]
    assert table.widths(77) is None
    text = io.StringIO()
    table.show(Console(file=text, width=70))
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    assert lines == ["", "t", "name", LONG, "    before 1.0 ± 0.1; after 2.0, +1 −1", "short", "    before –; after 3"]
    empty = io.StringIO()
    Table("t", ("a",), []).show(Console(file=empty))
    assert empty.getvalue() == ""


def test_only_as_much_is_wrapped_as_must_be_and_numbers_are_not() -> None:
    table = Table("t", ("name of it", ">each expert"), [("one two three", "1.0 ± 0.1")])
    assert table.widths(27) == [13, 11]
    assert table.widths(22) == [10, 10]
    assert table.widths(16) == [5, 9]
    assert table.widths(15) is None


def test_html_is_escaped() -> None:
    table = Table("t", ("<a>", ">b"), [("<i>", "1\n2")])
    assert table.to_html() == (
        '<div class="scroll"><table>\n<tr><th scope="col">&lt;a&gt;</th><th scope="col" class="number">b</th></tr>\n'
        '<tr><th scope="row">&lt;i&gt;</th><td class="number">1<br>2</td></tr>\n</table></div>'
    )


def test_facts_are_wrapped_between_words() -> None:
    text = io.StringIO()
    show_facts({"time": "check 20.6 s, read 1 min", "none": None}, Console(file=text, width=20))
    assert [line.rstrip() for line in text.getvalue().splitlines()] == ["time  check 20.6 s,", "      read 1 min"]


@pytest.mark.parametrize(
    ("number", "thing", "said"),
    [
        (1, "expert", "1 expert"),
        (0, "expert", "0 experts"),
        (1234, "batch", "1,234 batches"),
        (2, "process", "2 processes"),
    ],
)
def test_plurals(number: int, thing: str, said: str) -> None:
    assert counted(number, thing) == said
