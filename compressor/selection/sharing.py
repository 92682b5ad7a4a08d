"""How many experts stay in which layer, where a mean is asked for.

measured    c_l(r): what the answers of the model lose, in nats a token, when layer l alone keeps r experts. Measured at
            some counts on a small text; between them linear, and 0 where all stay
loss        the layer's squared loss of its best set of r experts
even        (r − mean)²

Shared out by `allocation`, so that Σ c_l(r_l) is least. Losses of different layers are not the same money; nats are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.observe.measuring import KL, measured_of
from compressor.observe.statistic import Gathered
from compressor.selection.choose import AGAIN
from compressor.selection.objective import Blend, blend_weights
from compressor.selection.scores import ChoiceError

Costs = dict[int, float]
"""Count → cost, of one layer."""


def blended(kl: Sequence[float], domains: Sequence[str], blend: Blend) -> float:
    """One number of what is lost in each domain: its mean, by weights, or the worst; `pooled` counts as `mean`."""
    if blend == "worst":
        return max(kl)
    weights = blend_weights("mean" if blend == "pooled" else blend, domains).tolist()
    return math.fsum(weight * one for weight, one in zip(weights, kl, strict=True))


def measured_table(statistics: Gathered, path: str) -> dict[int, dict[str, Any]]:
    """Count → nats by domain, of which some text was measured, and standard errors (None for one sequence). Raises
    ChoiceError where no count of the layer was measured.
    """
    if KL not in statistics.get(path, {}):
        raise ChoiceError(f"what its counts cost was not measured; share the mean out by `loss` or `even`, or {AGAIN}")
    names = statistics.domains
    return {
        len(decided["kept"]): {
            "kl": {name: kl for name, kl in zip(names, kl_D.tolist(), strict=True) if not math.isnan(kl)},
            "standard_error": {
                name: None if math.isnan(error) else error
                for name, kl, error in zip(names, kl_D.tolist(), error_D.tolist(), strict=True)
                if not math.isnan(kl)
            },
        }
        for decided, kl_D, error_D in measured_of(statistics[path], len(names))
    }


def costs_between(measured: Mapping[int, float], counts: Sequence[int]) -> Costs:
    """Costs of all counts from the least that was measured up, on straight lines between those that were."""
    known = sorted(measured)
    found: Costs = {}
    for count in (one for one in counts if known[0] <= one <= known[-1]):
        below, above = max(one for one in known if one <= count), min(one for one in known if one >= count)
        share = (count - below) / (above - below) if above > below else 0.0
        found[count] = (1 - share) * measured[below] + share * measured[above]
    return found
