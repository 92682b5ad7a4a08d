"""Share a number of experts out among layers: where the last expert costs least, fewer stay.

With c_l(r) the cost of keeping r experts in layer l (∞ if r is not possible) and R the number to keep in all:

    minimise  Σ_l c_l(r_l)   subject to   Σ_l r_l = R

Solved exactly by dynamic programming over the layers: the best cost of layers l, l+1, … with t experts to share is

    f_l(t) = min_r c_l(r) + f_{l+1}(t − r)        f_L(0) = 0,   f_L(t) = ∞ otherwise

A greedy choice, dropping what costs least one expert after another, is not exact: c_l need not be convex, since the
best sets of r and of r − 1 experts may have little in common.

Dimensions: L layers, C counts from 0 to the largest number of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor

_IMPOSSIBLE = float("inf")


def allocate(costs_LC: Tensor, total: int) -> list[int]:
    """The counts, one a layer, of least summed cost that make up `total`. `costs_LC` float64: each count's cost, ∞
    where not possible; ties: the first layers keep fewest. Raises ValueError if none add up.
    """
    best_from = [torch.full((total + 1,), _IMPOSSIBLE, dtype=torch.float64)]
    best_from[0][0] = 0.0
    for costs_C in reversed(costs_LC.double().cpu()):
        best_from.insert(0, _with_one_layer_more(costs_C, best_from[0]))
    if best_from[0][total] == _IMPOSSIBLE:
        raise ValueError(f"no possible counts of {len(costs_LC)} layers add up to {total}")
    counts, left = list[int](), total
    for costs_C, here, after in zip(costs_LC.double().cpu(), best_from, best_from[1:], strict=False):
        most = min(left, len(costs_C) - 1)
        sums_C = costs_C[: most + 1] + after[left - most : left + 1].flip(0)
        count = int((sums_C == here[left]).nonzero()[0])
        counts.append(count)
        left -= count
    return counts


def _with_one_layer_more(costs_C: Tensor, after_T: Tensor) -> Tensor:
    """[total + 1]: f_l from f_{l+1}."""
    best_T = torch.full_like(after_T, _IMPOSSIBLE)
    for count in costs_C[: len(after_T)].isfinite().nonzero().flatten().tolist():
        best_T[count:] = torch.minimum(best_T[count:], costs_C[count] + after_T[: len(after_T) - count])
    return best_T


def possible_totals(counts: Sequence[Sequence[int]]) -> list[int]:
    """All sums of one count a layer, ascending."""
    reached = 1  # bit n: whether n can be reached
    for possible in counts:
        reached = reduce(or_, (reached << count for count in possible), 0)
    return [total for total, bit in enumerate(reversed(f"{reached:b}")) if bit == "1"]
