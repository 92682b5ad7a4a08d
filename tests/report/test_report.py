"""Tables and model card of a record: every figure is there, rounded rightly, on one line."""

from __future__ import annotations

import copy
import io
import re
from typing import Annotated, Any, Literal

import pytest
import yaml
from rich.console import Console

from compressor.method import Decision
from compressor.plugins import load_plugins
from compressor.report import terminal
from compressor.report.card import model_card
from compressor.report.figures import collapse, fidelity_cells, sensible_counts
from compressor.report.terminal import print_inspection, print_plan, print_summary
from compressor.run.record import decided_json
from compressor.wording import human_bytes, human_count


def perplexity(value: float) -> dict[str, Any]:
    return {"perplexity": value, "mean_loss": 2.5, "standard_error": 0.01, "tokens": 1000}


def fidelity(name: str, kl: float, agreement: float, added: float, vocabulary: int | str) -> dict[str, Any]:
    errors = {"kl_error": 0.0123, "agreement_error": 0.0051, "delta_nll_error": 0.002}
    values = {"kl": kl, "agreement": agreement, "delta_nll": added}
    return {"name": name, **values, **errors, "tokens": 1000, "vocabulary": vocabulary}


def task(acc: float, acc_norm: float, group: str | None = None) -> dict[str, Any]:
    def metric(value: float) -> dict[str, Any]:
        return {"value": value, "standard_error": 0.0123, "higher_is_better": True}

    return {"metrics": {"acc_norm": metric(acc_norm), "acc": metric(acc)}, "group": group}


def flips(gained: int, lost: int, p_value: float) -> dict[str, Any]:
    return {"gained": gained, "lost": lost, "both_right": 500, "both_wrong": 100, "p_value": p_value}


def size(parameters: int, active: int) -> dict[str, Any]:
    return {"parameters": parameters, "active_parameters": active, "bytes": 2 * parameters}


def with_description(done: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A pass's entry as a run writes it: its installed method says how it is shown."""
    method = load_plugins().methods[done["method"]]
    return decided_json(method(method.options_type(**options)), Decision(done["decision"]), done)


LAYERS = [f"model.layers.{number}.mlp" for number in range(3)]
RECORD: dict[str, Any] = {
    "format": 2,
    "model": {
        "reference": "mistralai/Mixtral-8x7B-v0.1",
        "fingerprint": "f",
        "architecture": "MixtralForCausalLM",
    },
    "recipe": {"model": "mistralai/Mixtral-8x7B-v0.1", "passes": [{"expert_pruning": {"keep": 6}}]},
    "passes": [
        {
            "method": "expert_pruning",
            "decision": {"layers": {p: {"kept": [0, 1, 2, 4, 6, 7], "loss": 12.3456} for p in LAYERS}},
        },
        {
            "method": "expert_pruning",
            "original_ids": {p: [0, 1, 2, 4, 6, 7] for p in LAYERS},
            "decision": {"layers": {p: {"kept": [0, 2, 3, 5], "loss": 45.6} for p in LAYERS}},
        },
        {
            "method": "dynamic_skipping",
            "original_ids": {p: [0, 2, 4, 7] for p in LAYERS},
            "decision": {"layers": {p: {"beta": 0.4321} for p in LAYERS}},
        },
    ],
    "layers": [{"path": path, "num_experts": 8, "top_k": 2} for path in LAYERS],
    "evaluation": {
        "before": {
            "perplexity": {"demo:prose": perplexity(4.0), "news": perplexity(12.345)},
            "tasks": {
                "arc_easy": task(0.8121, 0.79),
                "mmlu": task(0.7, 0.6),
                "mmlu_x": task(0.1, 0.1, "mmlu"),
            },
            "size": size(46_702_792_704, 12_879_925_248),
            "bytes_on_disk": 93_405_650_000,
            "peak_memory": {"host_bytes": 98_100_000_000, "device_bytes": None},
        },
        "after": {
            "perplexity": {"demo:prose": perplexity(5.0), "news": perplexity(1234.5)},
            "tasks": {"arc_easy": task(0.8, 0.8), "mmlu": task(0.7, 0.6), "mmlu_x": task(0.1, 0.1, "mmlu")},
            "size": size(35_428_237_312, 12_879_663_104),
            "bytes_on_disk": 70_856_500_000,
            "peak_memory": {"host_bytes": 98_100_000_000, "device_bytes": None},
        },
        "fidelity": {
            "demo:prose": fidelity("demo:prose", 0.04567, 0.912, -0.00123, 64),
            "news": fidelity("news", 1.234, 0.5, 0.7, "top 1024 and the rest"),
        },
        "paired": {"arc_easy": {"acc": flips(23, 41, 0.0331), "acc_norm": flips(9, 99, 1e-9)}},
        "speed": {
            "names": ["before", "after"],
            "prefill": {"before": 1234.5, "after": 1301.0},
            "prefill_ratio": {"median": 1.054, "min": 1.01, "max": 1.08},
            "decode": {"before": 23.4, "after": 26.13},
            "decode_ratio": {"median": 1.111, "min": 1.09, "max": 1.14},
            "decode_reason": None,
            "peak_memory": {"before": 95_000_000_000, "after": 72_000_000_000},
        },
    },
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "seconds": {"load": 12.34, "observe": 754.0, "decide": 3700.0},
    "output": "runs/mixtral-r6",
}


def printed(function: Any, data: Any, width: int = 80) -> str:
    text = io.StringIO()
    function(data, Console(file=text, width=width, no_color=True))
    return text.getvalue()


ROWS = [
    "perplexity demo:prose 4.000 ± 0.040 5.000 ± 0.050 ×1.250",
    "perplexity news 12.35 ± 0.12 1,234 ± 12 ×100.000",
    "arc_easy acc % 81.2 ± 1.2 80.0 ± 1.2 −1.2 points",
    "+23 −41 (p=0.033)",
    "arc_easy acc_norm % 79.0 ± 1.2 80.0 ± 1.2 +1.0 points",
    "+9 −99 (p<0.001)",
    "mmlu acc % 70.0 ± 1.2 70.0 ± 1.2 0.0 points",
    "parameters 46.7B 35.4B ×0.759",
    "active parameters 12.9B 12.9B ×1.000",
    "weights in memory 93.4 GB 70.9 GB ×0.759",
    "weights on disk 93.4 GB 70.9 GB ×0.759",
    "prefill tokens/s 1,234 1,301 ×1.05 [1.01–1.08]",
    "decode tokens/s 23.4 26.1 ×1.11 [1.09–1.14]",
    "device memory, peak 95.0 GB 72.0 GB ×0.758",
    "process memory, peak so far 98.1 GB 98.1 GB",
    "model mistralai/Mixtral-8x7B-v0.1",
    "time load 12 s, observe 13 min, decide 1 h 2 min",
    "news 1.2340 ± 0.0123 50.0 ± 0.5 +0.7000 ± 0.0020",
    "demo:prose 0.0457 ± 0.0123 91.2 ± 0.5 −0.0012 ± 0.0020",
    "KL is a lower bound: it tells the top 1024 and the rest apart.",
]


def squeezed(text: str) -> list[str]:
    return [re.sub(r" +", " ", line).strip() for line in text.splitlines()]


@pytest.mark.parametrize("width", [80, 100])
def test_summary_has_every_figure_on_one_line(width: int) -> None:
    text = printed(print_summary, RECORD, width)
    lines = squeezed(text)
    assert [row for row in ROWS if row not in lines] == []
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "mmlu_x" not in text
    assert lines.index(ROWS[-3]) < lines.index(ROWS[-2]) < lines.index(ROWS[-1])  # the worst text first
    assert lines.index("arc_easy acc % 81.2 ± 1.2 80.0 ± 1.2 −1.2 points") < lines.index(ROWS[4])


def test_summary_shows_what_each_pass_kept_and_dropped() -> None:
    text = printed(print_summary, RECORD)
    first, second = text.index("expert_pruning: model.layers.N.mlp"), text.rindex("expert_pruning: model")
    assert "0 12.35 0–2, 4, 6, 7 3, 5" in squeezed(text[first:second])
    # The second pass dropped two of the six that the first one left.
    assert "2 45.6 0, 2, 4, 7 1, 6" in squeezed(text[second:])
    assert "original model's ids here" not in text[first:second]
    assert "original model's ids here" in text[second:]
    assert "1 0.4321" in squeezed(text[text.index("dynamic_skipping: model.layers.N.mlp") :])


def test_long_names_and_lists_wrap_but_numbers_do_not() -> None:
    record = copy.deepcopy(RECORD)
    kept = [*range(0, 128, 2)]
    record["layers"] = [{"path": LAYERS[0], "num_experts": 128, "top_k": 8}]
    record["passes"] = [{"method": "m", "decision": {"layers": {LAYERS[0]: {"kept": kept, "loss": 1.5}}}}]
    tasks = record["evaluation"]["before"]["tasks"], record["evaluation"]["after"]["tasks"]
    for side in tasks:
        side["a_task_whose_name_is_longer_than_any_column_could_be"] = task(0.5, 0.5)
    text = printed(print_summary, record)
    assert max(map(len, text.splitlines())) <= 80
    assert "a_task_whose_name_is_longer_than_any_column_could_be acc %" in text
    assert squeezed(text).count("before 50.0 ± 1.2; after 50.0 ± 1.2; change 0.0 points") == 2
    assert squeezed(text)[-1] == "0 1.5 64 experts 64 experts"  # which ones is in decision.json
    record["passes"][0]["decision"]["layers"][LAYERS[0]]["kept"] = [*range(113)]
    text = printed(print_summary, record)
    assert squeezed(text)[-1] == "0 1.5 0–112 113–127"


def test_what_was_not_measured_has_no_row() -> None:
    record = {"model": {"reference": "demo"}, "passes": [], "evaluation": {"after": {"size": size(10, 5)}}}
    text = printed(print_summary, record)
    assert "parameters – 10" in squeezed(text)
    assert "perplexity" not in text
    assert "Figures" not in printed(print_summary, {"model": {"reference": "demo"}})


def test_a_decode_speed_that_could_not_be_had_says_why() -> None:
    record = copy.deepcopy(RECORD)
    record["evaluation"]["speed"] |= {
        "decode": None,
        "decode_ratio": None,
        "decode_reason": "after: no cache",
    }
    text = printed(print_summary, record)
    assert "No decode speed: after: no cache" in text
    assert "decode tokens/s" not in text


def test_markup_in_names_is_text() -> None:
    record = copy.deepcopy(RECORD)
    record["output"] = "runs/[bold]x[/bold]"
    record["evaluation"]["before"]["perplexity"] = {"[red]": perplexity(3.0)}
    text = printed(print_summary, record)
    assert "runs/[bold]x[/bold]" in text
    assert "perplexity [red]" in text


PLAN = {
    "model": "demo",
    "architecture": "MixtralForCausalLM",
    "dtype": "bfloat16",
    "layers": [
        {
            "path": f"model.layers.{n}.mlp",
            "num_experts": 8,
            "top_k": 2,
            "kept": 6 if n < 3 else 4,
            "dropped": 2 if n < 3 else 4,
        }
        for n in range(5)
    ],
    "parameters": {"before": 46_702_792_704, "after": 35_428_237_312},
    "bytes": {"before": 93_405_585_408, "after": 70_856_474_624},
    "expert_parameters": 45_097_156_608,
    "notes": ["SGLang's grouped gates want powers of two"],
}


def test_plan_collapses_layers_that_are_alike() -> None:
    lines = squeezed(printed(print_plan, PLAN))
    for line in (
        "model.layers.0–2.mlp 3 8 → 6 2 2",
        "model.layers.3, 4.mlp 2 8 → 4 4 2".replace("3, 4", "{3, 4}"),
        "parameters 46.7B 35.4B ×0.759",
        "bytes 93.4 GB 70.9 GB ×0.759",
        "Experts hold 45.1B parameters, 96.6% of all.",
        "• SGLang's grouped gates want powers of two",
    ):
        assert line in lines


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["l.0.m", "l.1.m", "l.2.m"], ["l.0–2.m"]),
        (["l.1.m", "l.3.m", "l.5.m", "l.7.m"], ["l.{1, 3, …, 7}.m"]),
        (["l.1.m", "l.2.m", "l.3.n"], ["l.{1, 2}.m", "l.3.n"]),
        (["l.0.e.0", "l.1.e.0", "l.2.e.1"], ["l.{0, 1}.e.0", "l.2.e.1"]),
        (["moe"], ["moe"]),
        (["3"], ["3"]),
    ],
)
def test_labels_of_collapsed_layers(paths: list[str], labels: list[str]) -> None:
    layers = [{"path": path, "num_experts": 8} for path in paths]
    assert [label for label, _, _ in collapse(layers, ["num_experts"])] == labels


def inspection(num_experts: int, top_k: int) -> dict[str, Any]:
    layer = {
        "num_experts": num_experts,
        "top_k": top_k,
        "router": "softmax",
        "parameters_per_expert": 1_000_000,
    }
    experts = 2 * num_experts * 1_000_000
    return {
        "model": "demo",
        "architecture": "A",
        "dtype": "bfloat16",
        "layers": [{"path": f"model.layers.{n}.mlp", **layer} for n in range(2)],
        "parameters": experts + 4_000_000,
        "bytes": 2 * experts + 8_000_000,
        "expert_parameters": experts,
        "expert_bytes": 2 * experts,
        "notes": [],
    }


def test_inspection_says_what_each_count_would_save() -> None:
    lines = squeezed(printed(print_inspection, inspection(8, 2)))
    assert "model.layers.{0, 1}.mlp 2 8 2 softmax 1.00M" in lines
    assert "20.0M parameters (40.0 MB), of which experts hold 16.0M (32.0 MB, 80.0%)." in lines
    assert "6 16.0M 32.0 MB 8.00 MB 20.0%" in lines
    assert [line.split()[0] for line in lines[-6:]] == ["7", "6", "5", "4", "3", "2"]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "counts"),
    [
        (8, 2, [7, 6, 5, 4, 3, 2]),
        (16, 1, [*range(15, 1, -1)]),
        (60, 4, [*range(56, 3, -4)]),
        (128, 8, [*range(120, 7, -8)]),
        (160, 6, [*range(144, 15, -16)]),
        (2, 2, []),
    ],
)
def test_counts_worth_showing(num_experts: int, top_k: int, counts: list[int]) -> None:
    assert sensible_counts(inspection(num_experts, top_k)["layers"]) == counts
    for most in range(2, 600):
        assert len(sensible_counts([{"num_experts": most, "top_k": 1}])) <= 16


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (int | None, "int"),
        (Annotated[int, "checked"] | float | Annotated[int, "otherwise"], "int | float"),
        (dict[Annotated[str, print], int | None] | None, "{str: int}"),
        (tuple[int, ...] | dict[str, Any], "[int] | {str: Any}"),
        (Literal["mean", 1] | None, "mean | 1"),
        (bool, "bool"),
    ],
)
def test_types_of_options_as_an_author_says_them(annotation: Any, name: str) -> None:
    assert terminal._type_name(annotation) == name


def test_model_card() -> None:
    card = model_card(RECORD)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "mistralai/Mixtral-8x7B-v0.1",
        "tags": ["moe", "moe-compressor", "pruning", "expert-pruning", "dynamic-skipping"],
    }
    assert body.startswith("\n# mixtral-r6\n")
    assert "| arc_easy acc % | 81.2 ± 1.2 | 80.0 ± 1.2 | −1.2 points; +23 −41 (p=0.033) |" in body
    assert "| `model.layers.0.mlp` | 4 | 0, 2, 4, 7 | 1, 3, 5, 6 |" in body
    assert 'compressor.load("runs/mixtral-r6")' in body
    recipe = body.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe) == RECORD["recipe"]
    assert "Made with torch 2.13.0, transformers 5.23.0." in body


def test_model_card_of_another_class() -> None:
    record = RECORD | {"model": RECORD["model"] | {"auto_class": "AutoModelForImageTextToText"}}
    card = model_card(record)
    assert "so `AutoModelForImageTextToText.from_pretrained` and serving software read it too" in card
    assert yaml.safe_load(card.split("---\n")[1])["pipeline_tag"] == "image-text-to-text"
    record["model"]["auto_class"] = "AutoModelForSeq2SeqLM"
    assert "pipeline_tag" not in yaml.safe_load(model_card(record).split("---\n")[1])


@pytest.mark.parametrize(
    ("num_bytes", "config", "says"),
    [
        (11_500_000_000, {"num_nextn_predict_layers": [1, 0]},
         "with 1,551 tensors (11.5 GB), are not in this checkpoint, because transformers does not build them; in its "
         "`config.json` `num_nextn_predict_layers` is 0."),
        (2_000, {"a": [1, 0], "b.c": [2, 0]},
         "with 1,551 tensors (2.00 kB), are not in this checkpoint, because transformers does not build them; in its "
         "`config.json` `a` is 0 and `b.c` is 0."),
        (None, {}, "with 1,551 tensors, are not in this checkpoint, because transformers does not build them."),
    ],
)  # fmt: skip
def test_model_card_says_what_is_left_out(num_bytes: int | None, config: dict[str, Any], says: str) -> None:
    layers = ["model.layers.61", "model.layers.62"]
    left_out = {"tensors": 1551, "bytes": num_bytes, "layers": layers, "config": config}
    card = model_card(RECORD | {"left_out": left_out})
    both = "`model.layers.61`, `model.layers.62`"
    assert f"\n\nThe original's extra prediction layers, {both}, {says}\n\n" in card
    assert "extra prediction" not in model_card(RECORD)


@pytest.mark.parametrize("reference", ["demo", "./models/mine", "/data/mine", "a/b/c"])
def test_only_a_hub_name_is_a_base_model(reference: str) -> None:
    record = {"model": {"reference": reference}, "recipe": {}}
    card = model_card(record)
    assert "base_model" not in card
    assert f"`{reference.removeprefix('/data/')}` compressed with" in card
    assert "## Figures" not in card


@pytest.mark.parametrize(
    ("count", "number", "size"),
    [
        (0, "0", "0 B"),
        (999, "999", "999 B"),
        (1000, "1.00K", "1.00 kB"),
        (9996, "10.0K", "10.0 kB"),
        (999_600, "1.00M", "1.00 MB"),
        (46_702_792_704, "46.7B", "46.7 GB"),
        (467_000_000_000, "467B", "467 GB"),
        (2_500_000_000_000_000, "2500T", "2.50 PB"),
    ],
)
def test_human_numbers(count: int, number: str, size: str) -> None:
    assert human_count(count) == number
    assert human_bytes(count) == size


def test_what_is_nothing_has_no_sign() -> None:
    """A KL of −1e-9 is rounding."""
    nothing = {"kl": -1e-9, "kl_error": 0.0, "delta_nll": -1e-9, "delta_nll_error": 0.0}
    shown = fidelity_cells(nothing | {"agreement": 1.0, "agreement_error": 0.0})
    assert shown == ("0.0000 ± 0.0000", "100.0 ± 0.0", "0.0000 ± 0.0000")
