"""The one sentence: every figure from a record's, by hand."""

from __future__ import annotations

import html
from typing import Any

import pytest

from compressor.report.card import model_card
from compressor.report.html import page
from compressor.report.verdict import verdict


def text(name: str, kl: float, agreement: float, delta_nll: float) -> dict[str, Any]:
    errors = {"kl_error": None, "agreement_error": None, "delta_nll_error": None}
    return {"name": name, "kl": kl, "agreement": agreement, "delta_nll": delta_nll, "vocabulary": 64, **errors}


def flips(gained: int, lost: int, p_value: float) -> dict[str, Any]:
    return {"acc": {"gained": gained, "lost": lost, "p_value": p_value}}


def record(evaluation: dict[str, Any], *random: dict[str, Any]) -> dict[str, Any]:
    sizes = {"before": {"bytes_on_disk": 1000}, "after": {"bytes_on_disk": 560}}
    passes = [{"method": "expert_pruning", "decision": {}, "random": one} for one in random]
    return {"model": {"reference": "demo"}, "evaluation": sizes | evaluation, "passes": passes}


TWO = {"fidelity": {"a": text("code", 0.2, 0.9, 0.0862), "b": text("prose", 0.1, 0.8, 0.01)}}
KL = {"kl": {"code": {"ours": 0.2, "random": [0.3, 0.1, 0.6]}, "prose": {"ours": 0.1, "random": [0.3, 0.05, 0.05]}}}


@pytest.mark.parametrize(
    ("evaluation", "random", "said"),
    [
        ({}, [], "44 % smaller."),
        ({"after": {"bytes_on_disk": 1000}}, [], "as large as before."),
        ({"after": {"bytes_on_disk": 1100}}, [], "10 % larger."),
        ({"before": {"size": {"bytes": 8}}, "after": {"size": {"bytes": 6}, "bytes_on_disk": 9}}, [], "25 % smaller."),
        (
            TWO,
            [KL],  # ours .15 in the mean, the others .3, .075 and .325
            "44 % smaller; KL 0.15 nats, 85 % same likeliest token, means of 2 texts; worst text code (+9 % "
            "perplexity); better than 2 of 3 random choices (1 on prose).",
        ),
        (
            {"fidelity": {"a": text("code", 0.2, 0.9, -0.0513)}},
            [{"perplexity": {"a": {"ours": 10.0, "random": [11.0]}}}],
            "44 % smaller; KL 0.2 nats, 90 % same likeliest token; code (−5 % perplexity); better than 1 of 1 random "
            "choice.",
        ),
        ({"paired": {"arc": flips(1, 2, 1.0)}}, [], "44 % smaller; arc has not changed significantly."),
        (
            {"paired": {"arc": flips(1, 2, 1.0), "boolq": flips(9, 3, 0.05)}},
            [],
            "44 % smaller; no task of 2 has changed significantly.",
        ),
        (
            {"paired": {"arc": flips(1, 20, 0.001), "boolq": flips(9, 3, 0.2), "piqa": flips(20, 1, 0.001)}},
            [],
            "44 % smaller; arc is worse, piqa is better (of 3 tasks, p < 0.05).",
        ),
    ],
)
def test_every_part(evaluation: dict[str, Any], random: list[dict[str, Any]], said: str) -> None:
    whole = record(evaluation, *random)
    assert verdict(whole) == said
    assert f"**{said}**" in model_card(whole)
    assert f"<strong>{html.escape(said)}</strong>" in page(whole)


@pytest.mark.parametrize("evaluation", [{}, {"after": {"bytes_on_disk": 5}}])
def test_nothing_was_compared(evaluation: dict[str, Any]) -> None:
    alone = {"model": {"reference": "demo"}, "evaluation": evaluation}
    assert verdict(alone) == ""
    assert "<strong>" not in page(alone)
