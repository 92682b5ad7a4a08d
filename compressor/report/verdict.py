"""What a record says of a smaller model, in one sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from compressor.report.description import Json
from compressor.wording import counted

SIGNIFICANT = 0.05
"""Tasks of which McNemar's exact test says a smaller p have changed; of 20 that have not, one will, by chance."""


def verdict(record: Json) -> str:
    """Size, answers, worst text, tasks and chance, as far as they were measured before and after; "" if nothing was."""
    evaluation = record.get("evaluation") or {}
    if not evaluation.get("before") or not evaluation.get("after"):
        return ""
    parts = [*_size(evaluation), *_answers(evaluation), *_tasks(evaluation), *_chance(record)]
    return "; ".join(parts) + "." if parts else ""


def _size(evaluation: Json) -> Iterator[str]:
    sides = [evaluation[when] for when in ("before", "after")]
    sizes = [[side.get("bytes_on_disk") for side in sides], [(side.get("size") or {}).get("bytes") for side in sides]]
    for before, after in sizes:
        if before and after:
            change = round(100 * (1 - after / before))
            yield f"{abs(change)} % {'smaller' if change > 0 else 'larger'}" if change else "as large as before"
            return


def _answers(evaluation: Json) -> Iterator[str]:
    """KL and the same likeliest token as means over texts, and the text that has lost most."""
    texts = list((evaluation.get("fidelity") or {}).values())
    if not texts:
        return
    kl, same = (statistics.fmean(one[key] for one in texts) for key in ("kl", "agreement"))
    over = f", means of {len(texts)} texts" if len(texts) > 1 else ""
    yield f"KL {kl:.3g} nats, {100 * same:.0f} % same likeliest token{over}"
    worst = max(texts, key=lambda one: one["delta_nll"])
    change = 100 * math.expm1(worst["delta_nll"])
    name = f"worst text {worst['name']}" if len(texts) > 1 else worst["name"]
    yield f"{name} ({'+' if change >= 0 else '−'}{abs(change):.0f} % perplexity)"


def _tasks(evaluation: Json) -> Iterator[str]:
    """Tasks that have changed: by their first metric, as far as answers can be paired."""
    paired = {name: next(iter(by.values())) for name, by in (evaluation.get("paired") or {}).items() if by}
    changed = [
        f"{name} is {'worse' if one['lost'] > one['gained'] else 'better'}"
        for name, one in paired.items()
        if one["p_value"] < SIGNIFICANT
    ]
    if changed:
        yield f"{', '.join(changed)} (of {counted(len(paired), 'task')}, p < {SIGNIFICANT})"
    elif len(paired) > 1:
        yield f"no task of {len(paired)} has changed significantly"
    elif paired:
        yield f"{next(iter(paired))} has not changed significantly"


def _chance(record: Json) -> Iterator[str]:
    """How many random decisions lose more in the mean over texts; and on which text the fewest do, if fewer."""
    for done in record.get("passes", []):
        random = done.get("random") or {}
        by_text = random.get("kl") or {
            name: {"ours": math.log(one["ours"]), "random": [math.log(value) for value in one["random"]]}
            for name, one in random.get("perplexity", {}).items()
        }
        if by_text:
            ours = statistics.fmean(one["ours"] for one in by_text.values())
            others = [statistics.fmean(draw) for draw in zip(*(one["random"] for one in by_text.values()), strict=True)]
            beaten = sum(other > ours for other in others)
            fewest, where = min(
                (sum(other > one["ours"] for other in one["random"]), name) for name, one in by_text.items()
            )
            but = f" ({fewest} on {where})" if fewest < beaten else ""
            yield f"better than {beaten} of {counted(len(others), 'random choice')}{but}"
