"""The HTML report: every figure is there, everything is escaped, and what its script draws is right."""

from __future__ import annotations

import copy
import html
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report.test_report import RECORD, with_description

from compressor.report import charts
from compressor.report.html import page

SKIPPING: dict[str, Any] = with_description(
    {
        "method": "dynamic_skipping",
        "options": {"mean_experts": 1.5, "rule": None},
        "decision": {
            "layers": {
                f"model.layers.{number}.mlp": {
                    "rule": "contribution",
                    "beta": 0.25,
                    "renormalise": True,
                    "expert_norms": [1.0] * 8,
                    "mean_experts": 1.5,
                    "relative_loss": 0.1,
                    "held_out": {"mean_experts": 1.6},
                }
                for number in range(3)
            }
        },
    }
)


class _Text(HTMLParser):
    """The text of a page, and whether its tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def text_of(drawn: str) -> str:
    parser = _Text()
    parser.feed(drawn)
    assert parser.open == []
    return parser.text


def record(**changes: Any) -> dict[str, Any]:
    layers = [{"path": f"model.layers.{number}.mlp", "num_experts": 8, "top_k": 2} for number in range(3)]
    found = {
        **copy.deepcopy(RECORD),
        "layers": layers,
        "passes": copy.deepcopy([*RECORD["passes"], SKIPPING]),
        "seed": 7,
    }
    example = {"text": "def add(a, b):\n    return a", "next": " +", "before": " +", "now": " *"}
    news = found["evaluation"]["fidelity"]["news"]
    news |= {"tokens": 98765, "flips": {"lost": {"tokens": 12345, "examples": [example]}}}
    return {**found, **changes}


def test_what_a_reader_finds() -> None:
    text = text_of(page(record()))
    for wanted in (
        "mistralai/Mixtral-8x7B-v0.1",
        "expert_pruning, dynamic_skipping",
        "Figures",
        "± one standard error.",
        "12,345 of 98,765 tokens only the original foresees",
        "seed",
        "compressor run compressor/recipe.yaml --output FOLDER",
        "layer by layer",
        "on held-out text",
        "model.layers.1.mlp",
        "contribution",
    ):
        assert wanted in text, wanted
    assert "expert_norms" not in text  # eight numbers for each layer are for the record
    assert "rule: None" not in text
    assert "mean_experts: 1.5" not in text  # as the recipe says, which a decision without one has not
    assert "mean_experts: 1.5" in text_of(page({key: value for key, value in record().items() if key != "recipe"}))


def drawn_in(drawn: str) -> dict[str, dict[str, Any]]:
    """A page's charts, by title."""
    found = [json.loads(html.unescape(one)) for one in re.findall(r"data-chart='(.*?)'", drawn)]
    return {one["title"]: one for one in found}


def map_in(drawn: str) -> dict[str, Any]:
    """What the map of a page's experts is drawn from."""
    [found] = re.findall(r'<script type="application/json">(.*?)</script>', drawn, flags=re.DOTALL)
    return dict(json.loads(found))


def headings_of(drawn: str) -> list[int]:
    return [int(level) for level in re.findall(r"<h(\d)", drawn)]


EVIL = "</script><script>alert('1')</script><i>\"&"


def test_everything_is_escaped() -> None:
    """Also what stands in JSON, in attributes and in scripts."""
    spoilt = record(output=EVIL, date=EVIL, versions={EVIL: EVIL})
    spoilt["passes"][1] = copy.deepcopy(SKIPPING)
    spoilt["passes"][1]["method"] = EVIL
    for one in (*spoilt["passes"], spoilt["passes"][1]["description"]):
        layers = one.get("decision", {}).get("layers", {})
        for path in [*layers][2:]:
            layers[EVIL] = layers[path]
    spoilt["layers"].append({"path": EVIL, "num_experts": 8, "top_k": 2})
    spoilt["passes"][0]["experts"] = {EVIL: {EVIL: [1.0] * 8}}
    spoilt["evaluation"]["fidelity"]["news"]["flips"]["lost"]["examples"][0]["text"] = EVIL
    drawn = page(spoilt)
    assert not re.search(r"alert\('|<i>", drawn)
    assert drawn.count("<script") == drawn.count("</script>") == 2
    text_of(drawn)
    assert map_in(drawn)["measures"][0]["name"] == EVIL
    assert EVIL in drawn_in(drawn)["relative loss, by layer"]["names"]


def test_needs_nothing_from_elsewhere() -> None:
    drawn = page(record()).replace("http://www.w3.org/2000/svg", "")  # a name, which nobody fetches
    assert not re.search(r"https?:|//\w+\.|\bsrc=|<link|@import|url\(|fetch\(|XMLHttp|import\(", drawn)


def test_a_record_without_evaluation() -> None:
    bare = record()
    bare.pop("evaluation", None)
    assert "Figures" not in text_of(page(bare))


def test_whoever_hears_the_page_finds_the_way() -> None:
    drawn = page(record())
    levels = headings_of(drawn)
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(next_one - one <= 1 for one, next_one in itertools.pairwise(levels))
    for landmark in (
        "<header>",
        "<main>",
        "<footer>",
        'lang="en"',
        "<noscript>",
        'aria-live="polite"',
        "<canvas tabindex",
    ):
        assert drawn.count(landmark) == 1, landmark
    assert drawn.count('scope="col"') > 10
    assert drawn.count('scope="row"') > 10


# the map of the experts


def test_every_expert_by_hand() -> None:
    """Two passes drop by their own ids, a third skips in one layer; figures stand at the original's ids."""
    paths = ["model.layers.0.mlp", "model.layers.1.mlp"]
    ids = {path: [0, 2, 3, 4] for path in paths}
    first = {"layers": {path: {"kept": ids[path]} for path in paths}}
    second = {"replace": "constants", "layers": {paths[0]: {"kept": [0, 2, 3]}, paths[1]: {"kept": [0, 1, 2, 3]}}}
    score = {path: {"score": [9.0] * 4} for path in paths}
    passes = [
        {"method": "a", "decision": first, "experts": {paths[0]: {"use %": [5.0, 4.0, 3.0, None, 1.0]}}},
        {"method": "b", "decision": second, "original_ids": ids, "experts": score},
    ]
    layers = [{"path": path, "num_experts": 5, "top_k": 2} for path in paths]
    found = charts.experts({"layers": layers, "passes": passes, "skipping": {paths[1]: {}}})
    assert found is not None
    assert found["states"] == ["kdckk", "sdsss"]
    assert found["said"] == "7 of 10 experts stay, 3, 4 in a layer."
    assert (found["pattern"], found["layers"]) == ("model.layers.N.mlp", ["0", "1"])
    assert {one["name"]: one["values"] for one in found["measures"]} == {
        "use %": [[5.0, 4.0, 3.0, None, 1.0], []],
        "score": [[], [9.0, None, 9.0, 9.0, 9.0]],
    }
    never = {"replace": "never_chosen", "layers": {"x": {"kept": [0], "dropped": [1]}}}
    assert charts.experts({"passes": [{"decision": never}]})["states"] == ["kn"]  # type: ignore[index]
    assert charts.experts({"layers": layers, "passes": [{"method": "m", "decision": {}}]}) is None
    merged = {"layers": {"a": {"kept": [0, 2], "dropped": [1], "clusters": [[0, 1], [2]]}}}
    assert charts.experts({"passes": [{"decision": merged}]})["states"] == ["kmk"]  # type: ignore[index]


def test_a_state_is_told_by_more_than_colour() -> None:
    """Each has a mark of its own in the legend, and the script draws one; `kept` is the plain square."""
    script = Path(charts.__file__).with_name("page.js").read_text(encoding="utf-8")
    pictures = {}
    for letter in charts._STATES:
        decision = {
            "layers": {"x": {"kept": [0], "dropped": [1], **({"clusters": [[0, 1]]} if letter == "m" else {})}},
            "replace": {"c": "constants", "n": "never_chosen"}.get(letter),
        }
        skipping = {"x": {}} if letter == "s" else {}
        layers = [{"path": "x", "num_experts": 2, "top_k": 1}]
        drawn = page(record(layers=layers, passes=[{"method": "m", "decision": decision}], skipping=skipping))
        words = dict(re.findall(r"<li>(<svg.*?</svg>)\s*(.*?)</li>", drawn, flags=re.DOTALL))
        [picture] = [one for one, word in words.items() if word == charts._STATES[letter]]
        pictures[letter] = re.sub(r'class="\w+"|\s', "", picture)
        assert letter == "k" or f'state === "{letter}"' in script
    assert len({*pictures.values()}) == len(charts._STATES)


def large() -> dict[str, Any]:
    """61 layers of 256 experts, every second one dropped, with four figures of each."""
    layers = [{"path": f"model.layers.{number}.mlp", "num_experts": 256, "top_k": 8} for number in range(3, 64)]
    decided = {"kept": [*range(128, 256)], "dropped": [*range(128)], "relative_loss": 0.1234, "kl": 0.001234}
    figures = {f"use on text {number} %": [0.1234 + expert / 1000 for expert in range(256)] for number in range(4)}
    done = with_description(
        {"method": "expert_pruning", "decision": {"layers": {one["path"]: decided for one in layers}}}, keep=128
    )
    done["experts"] = {one["path"]: figures for one in layers}
    return record(layers=layers, passes=[done])


def test_a_large_model_is_no_large_page() -> None:
    drawn = page(large())
    assert len(drawn) < 3_000_000
    assert sum(map(len, map_in(drawn)["states"])) == 61 * 256
    assert drawn.count("<td>128–255</td><td>0–127</td>") == 61  # ids as ranges


# charts


def test_plots_by_layer() -> None:
    """Of two columns both are bars; layers are numbers of one pattern; what is not there is left out."""
    drawn = drawn_in(page(record()))
    used = drawn["experts per token, by layer"]
    assert (used["x"], used["names"]) == ("model.layers.N.mlp", ["0", "1", "2"])
    assert [(one["name"], one["kind"], one["points"]) for one in used["series"]] == [
        ("experts a token", "bars", [[0, 1.5], [1, 1.5], [2, 1.5]]),
        ("on held-out text", "bars", [[0, 1.6], [1, 1.6], [2, 1.6]]),
    ]
    assert charts.series("one", enumerate([0.1, None, 0.3]))["points"] == [[0, 0.1], [2, 0.3]]
    assert charts.chart("x", [charts.series("nothing", [])])["series"] == []


MEASURED = {
    str(count): {"kl": {"a": kl, "b": 3 * kl}, "standard_error": {"a": 0.1, "b": None}}
    for count, kl in ((2, 0.2), (3, 0.1))
}


def test_quality_against_size_by_hand() -> None:
    """Means over texts, added up over layers at shares that all have; what was chosen; what chance has lost."""
    layers = {"x": {"kept": [0, 1], "dropped": [2, 3]}, "y": {"kept": [0, 1, 2], "dropped": [3]}}
    alternatives = {"reap": {"cost": 0.9}, "search": {"cost": 0.8}}
    budget = {"measured": {"x": MEASURED, "y": MEASURED | {"1": MEASURED["2"]}}, "summed_kl": 0.6}
    decision = {"layers": layers, "budget": budget, "chosen": {"alternatives": alternatives}}
    random = {"kl": {"a": {"ours": 0.5, "random": [1.0, 2.0]}, "b": {"ours": 0.7, "random": [3.0, 1.0]}}}
    [found] = charts.quality({"decision": decision, "random": random})
    series = {one["name"]: one["points"] for one in found["series"]}
    assert series.pop("same share of every layer: layers alone, added up") == [[50, 0.8], [75, pytest.approx(0.4)]]
    assert series.pop("chosen: layers alone, added up") == [[62.5, 0.6, "chosen"]]
    assert series.pop("choices compared: all layers together") == [[62.5, 0.9, "reap"], [62.5, 0.8, "search"]]
    assert series.pop("random choices, measured text") == [[62.5, 1.5, 2.0]]
    assert series.pop("chosen, measured text") == [[62.5, pytest.approx(0.6), "chosen"]]
    assert not series


def test_the_path_of_a_search_by_hand() -> None:
    layers = {
        name: {"kept": [0, 1], "dropped": [2, 3], "relative_loss": loss} for name, loss in (("x", 0.3), ("y", 0.5))
    }
    experts = {"x": {"loss when it goes": [None, 0.4, 0.1, 0.2]}, "y": {"loss when it goes": [0.9, None, 0.3, 0.4]}}
    [found] = charts.quality({"decision": {"layers": layers}, "experts": experts})
    path, chosen = found["series"]
    assert path["points"] == [[100, 0.0], [75, 0.2], [50, pytest.approx(0.3)], [25, pytest.approx(0.65)]]
    assert chosen["points"] == [[50, 0.4, "chosen"]]


# runs that are not whole


def test_a_run_that_was_cut_off_says_so() -> None:
    text = text_of(page(record(unfinished="runs/half")))
    assert "This run was not finished" in text
    assert "runs/half was not written" in text
    assert "not finished" not in text_of(page(record()))
