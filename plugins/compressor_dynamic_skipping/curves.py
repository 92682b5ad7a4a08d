"""What skipping would do to a layer, for every threshold at once.

A token's experts are skipped in the order of their scores (`SkipRule.scores`), smallest first, so its output as a
function of the threshold is a staircase. Each step has a score, an expert that goes, a share of the token's weight that
goes with it, and a change of the squared error of the layer's output

    ‖Σ_m w'_m f_m − Σ_m w_m f_m‖² = δᵀ G δ      with  δ = w' − w,  G_mn = ⟨f_m, f_n⟩

where w' are the weights after the step, as the rule leaves them. Sums of steps by score, over all tokens, are all that
a choice of threshold needs; sums of several texts add up. Scores are sorted into bins of equal ratio, 2⁻⁹ wide;
thresholds are then chosen among the bins' edges, where sums are exact.

Dimensions: T tokens, c of them, K experts chosen per token, E experts, H hidden size, D domains, N bins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.plugin import CheckpointError, MoELayer, Processes, RoutedTokens, Rule, SkipRule, Statistic

RULES = ("ratio", "tail_mass", "contribution")

_MANTISSA = 9
_SMALLEST = 2.0**-16
"""Scores below this are all in the first bin."""
_TOKENS_AT_ONCE = 16384
_CHUNK_BYTES = 256 * 2**20
_FIRST_BATCHES = 8


def _bits(values: Tensor) -> Tensor:
    return values.float().contiguous().view(torch.int32) >> (23 - _MANTISSA)


_FIRST = int(_bits(torch.tensor([_SMALLEST])))
NUM_BINS = int(_bits(torch.ones(1))) - _FIRST + 2


def bins_of(scores: Tensor) -> Tensor:
    """The bin of each score from 0 to 1: 0 below 2⁻¹⁶, then 512 to each factor of two; int64."""
    return (_bits(scores) - _FIRST + 1).clamp(0, NUM_BINS - 1).long()


def edges() -> Tensor:
    """[N] float32: the smallest score of each bin, 0 for the first."""
    whole = torch.arange(_FIRST, _FIRST + NUM_BINS - 1, dtype=torch.int32) << (23 - _MANTISSA)
    return torch.cat([torch.zeros(1), whole.view(torch.float32)])


@dataclass(frozen=True)
class FixedCount:
    """A number of experts for every token, and of how many the mass is that their weights are a part of."""

    top_k: int
    normalise_over: int

    @property
    def figure(self) -> str:
        """What the sums of it are called."""
        return f"sums.skip.top_k.{self.top_k}.{self.normalise_over}"


class SkipCurves(Statistic):
    """Steps by score for every rule, exact medians of the scores, and sums of the experts' output norms.

    Kept while the layer is observed: K + K² numbers a token. Layers of which no expert's answer can be asked have no
    errors and no norms. `fixed` is a number of experts to measure besides. Held-out text counts in no median and norm.
    """

    optional = True
    own_rules: Mapping[str, Rule] = {"skip.contribution": "summed", "skip.": "same"}

    def __init__(self, layer: MoELayer, fixed: FixedCount | None = None) -> None:
        self.layer = layer
        self.fixed = fixed
        self._renormalises = True
        self._domains: list[str] = []
        self._batches: list[_Batch] = []
        self._fixed_sums: dict[int, Tensor] = {}
        self._figures: dict[str, Tensor] | None = None

    def update(self, tokens: RoutedTokens) -> None:
        """Keep what a batch's tokens chose, and the inner products of what the chosen experts answered."""
        if not torch.isfinite(tokens.weights_TK).all():
            raise CheckpointError(
                f"{self.layer.path}: the router gives weights that are not finite (NaN or infinity) on calibration "
                f"text; its own weights are damaged, or too large for {tokens.weights_TK.dtype}."
            )
        if tokens.domain not in self._domains:
            self._domains.append(tokens.domain)
        domain = self._domains.index(tokens.domain)
        if len(self._batches) < _FIRST_BATCHES and self._renormalises:
            self._renormalises = tokens.renormalises()
        gram_TKK = None
        if tokens.can_evaluate:
            chunks = tokens.ranked_outputs(tokens.index_TK.shape[1])
            grams = [one.gram().cpu() for one in chunks]
            gram_TKK = torch.cat(grams) if grams else torch.zeros(0, self.layer.top_k, self.layer.top_k).double()
        index_TK, weights_TK = tokens.index_TK.cpu(), tokens.weights_TK.cpu()
        self._batches.append(_Batch(domain, index_TK, weights_TK, gram_TKK, tokens.held_out))
        if self.fixed is not None and self.layer.top_k > self.fixed.top_k:
            before = self._fixed_sums.get(domain, torch.zeros(3, dtype=torch.float64))
            self._fixed_sums[domain] = before + self._measure_fixed(tokens, self.fixed)

    def _measure_fixed(self, tokens: RoutedTokens, fixed: FixedCount) -> Tensor:
        """[3] float64: experts that go, share of the weight that goes, squared error; the literal way."""
        index_TC, weights_TC = tokens.index_TK, tokens.weights_TK
        if fixed.normalise_over > self.layer.top_k:
            index_TC, weights_TC = tokens.replay(range(self.layer.num_experts), top_k=fixed.normalise_over)
        rule = SkipRule(
            "top_k", self._renormalises, top_k=fixed.top_k,
            normalise_over=fixed.normalise_over if self._renormalises else None,
        )  # fmt: skip
        kept_TC = rule.kept(index_TC, weights_TC, self.layer.num_experts)
        new_TC = rule.reweighted(weights_TC, kept_TC)
        num_kept = (kept_TC & (index_TC < self.layer.num_experts)).sum()
        num_gone = (tokens.index_TK < self.layer.num_experts).sum() - num_kept
        share = 1 - new_TC.double().sum(1) / tokens.weights_TK.double().sum(1)
        error = torch.zeros((), dtype=torch.float64)
        if tokens.can_evaluate:
            assert tokens.output_TH is not None
            order = kept_TC.int().argsort(dim=1, descending=True, stable=True)[:, : int(kept_TC.sum(1).max())]
            index_Tc, new_Tc = index_TC.gather(1, order), new_TC.gather(1, order)
            step = max(1, _CHUNK_BYTES // (4 * tokens.hidden_TH.shape[1] * index_Tc.shape[1]))
            for start in range(0, tokens.num_tokens, step):
                part = slice(start, start + step)
                outputs_cCH = tokens.evaluate_experts(tokens.hidden_TH[part], index_Tc[part]).float()
                if tokens.lift is not None:
                    outputs_cCH = tokens.lift(outputs_cCH.flatten(0, 1)).view(*outputs_cCH.shape[:2], -1)
                found_cH = torch.bmm(new_Tc[part].float()[:, None], outputs_cCH)[:, 0]
                error += (found_cH - tokens.output_TH[part].float()).square().sum(dtype=torch.float64).cpu()
        return torch.stack([num_gone.double().cpu(), share.sum().cpu(), error])

    def again(self) -> bool:
        """Never; but norms and medians are of the tokens of all processes, and agreed on here."""
        self._figures = self._measured()
        self._batches = []  # another layer's are next
        return False

    def tensors(self) -> dict[str, Tensor]:
        """For D domains, float64:

        sums.skip.tokens, .experts (chosen in all), .squared_output [D]; sums.skip.norm, .chosen [D, E] (‖f‖ summed, and
        over how many tokens); sums.skip.ratio, sums.skip.tail_mass, skip.contribution [D, N, 3] (experts that go, share
        of their tokens' weights, change of the squared error, by bin of the score); skip.RULE.median, .mean of the
        scores of all experts that may be skipped, held-out text aside; same.renormalises and same.plain, 0 or 1;
        sums.skip.top_k.C.R [D, 3] where C experts normalised over R were measured.
        """
        if self._figures is None:
            self.again()
        assert self._figures is not None
        return self._figures

    def _measured(self) -> dict[str, Tensor]:
        num_experts = self.layer.num_experts
        sums = torch.zeros(len(self._domains), 3, dtype=torch.float64)
        norms = torch.zeros(len(self._domains), 2, num_experts, dtype=torch.float64)
        for batch in self._batches:
            is_expert_TK = batch.index_TK < num_experts
            sums[batch.domain, 0] += len(batch.index_TK)
            sums[batch.domain, 1] += is_expert_TK.sum()
            if batch.gram_TKK is not None:
                weights = batch.weights_TK.double()
                sums[batch.domain, 2] += torch.einsum("tk,tkm,tm->", weights, batch.gram_TKK, weights)
                norm_P = batch.gram_TKK.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()[is_expert_TK]
                index_P = batch.index_TK[is_expert_TK]
                norms[batch.domain, 0].index_add_(0, index_P, norm_P)
                norms[batch.domain, 1].index_add_(0, index_P, torch.ones_like(norm_P))
        self._renormalises = self.processes.all(self._renormalises)
        calibration = [d for d in range(len(self._domains)) if not any(b.held_out for b in self._of(d))]
        found = {
            "same.renormalises": torch.tensor(int(self._renormalises)),
            "same.plain": torch.tensor(int(self._is_plain)),
            "sums.skip.tokens": sums[:, 0].contiguous(),
            "sums.skip.experts": sums[:, 1].contiguous(),
        }
        norms_E = None
        if self.processes.all(all(batch.gram_TKK is not None for batch in self._batches)):
            norms_E = mean_norms(*self.processes.sum(norms[calibration].sum(0)))
            found |= {
                "sums.skip.squared_output": sums[:, 2].contiguous(),
                "sums.skip.norm": norms[:, 0].contiguous(),
                "sums.skip.chosen": norms[:, 1].contiguous(),
            }
        for name in RULES:
            if name == "contribution" and norms_E is None:
                continue
            rule = _any_rule(name, self._renormalises, norms_E)
            curve_DNX = torch.zeros(len(self._domains), NUM_BINS, 3, dtype=torch.float64)
            scores = []
            for batch in self._batches:
                for part in batch.parts():
                    steps = steps_of(rule, part, num_experts)
                    curve_DNX[batch.domain].index_add_(0, bins_of(steps.score), steps.columns())
                    scores += [] if batch.held_out else [steps.score]
            prefix = "skip" if name == "contribution" else "sums.skip"  # norms of other text are others
            found[f"{prefix}.{name}"] = curve_DNX
            all_scores = torch.cat(scores).double() if scores else torch.zeros(0, dtype=torch.float64)
            count = torch.tensor(len(all_scores), dtype=torch.float64)
            total, number = self.processes.sum(torch.stack([all_scores.sum(), count]))
            if number:
                found |= {
                    f"skip.{name}.median": median(all_scores, self.processes),
                    f"skip.{name}.mean": total / number,
                }
        for domain, row in self._fixed_sums.items():
            assert self.fixed is not None
            found.setdefault(self.fixed.figure, torch.zeros(len(self._domains), 3, dtype=torch.float64))[domain] = row
        return found

    @property
    def _is_plain(self) -> bool:
        """Whether weights are in the ratios of the scores that experts are chosen by, of all experts."""
        layer = self.layer
        probe = layer.router_probe  # of gpt-oss a softmax over what was chosen by logits
        is_of_logits = probe is not None and probe.class_name.startswith("GptOss")
        return not layer.selection_biases and layer.num_groups == 1 and not is_of_logits

    def _of(self, domain: int) -> list[_Batch]:
        return [batch for batch in self._batches if batch.domain == domain]


@dataclass(frozen=True)
class _Batch:
    domain: int
    index_TK: Tensor
    weights_TK: Tensor
    gram_TKK: Tensor | None
    held_out: bool

    def parts(self) -> list[_Batch]:
        """The batch in parts that are worked on at a time."""
        starts = range(0, len(self.index_TK), _TOKENS_AT_ONCE)
        return [
            dataclasses.replace(
                self,
                index_TK=self.index_TK[start : start + _TOKENS_AT_ONCE],
                weights_TK=self.weights_TK[start : start + _TOKENS_AT_ONCE],
                gram_TKK=None if self.gram_TKK is None else self.gram_TKK[start : start + _TOKENS_AT_ONCE],
            )
            for start in starts
        ]


@dataclass(frozen=True)
class Steps:
    """What goes, one entry for each expert that may be skipped, of all tokens of a batch."""

    score: Tensor
    share: Tensor
    error: Tensor

    def columns(self) -> Tensor:
        """[P, 3]: one, share, change of the squared error."""
        return torch.stack([torch.ones_like(self.share), self.share, self.error], dim=1)


def steps_of(rule: SkipRule, batch: _Batch, num_experts: int) -> Steps:
    """The steps of each token's staircase: its experts in the order in which a rising threshold skips them."""
    index_TK, weights_TK = batch.index_TK, batch.weights_TK
    norms_E = torch.tensor(rule.expert_norms) if rule.expert_norms is not None else None
    scores_TK = rule.scores(index_TK, weights_TK, norms_E)
    stays_TK = rule.never_skipped(weights_TK, scores_TK) | (index_TK >= num_experts)
    order_TK = scores_TK.masked_fill(stays_TK, torch.inf).argsort(dim=1, stable=True)
    goes_TK = ~stays_TK.gather(1, order_TK)
    weights_ordered_TK = weights_TK.gather(1, order_TK)
    error_TK = torch.zeros(weights_TK.shape, dtype=torch.float64)
    if batch.gram_TKK is not None:
        rows_T11 = order_TK[:, :, None].expand(-1, -1, order_TK.shape[1])
        gram_TKK = batch.gram_TKK.gather(1, rows_T11).gather(2, rows_T11.transpose(1, 2))
        for step in range(weights_TK.shape[1]):
            kept_TK = ~goes_TK
            kept_TK[:, step + 1 :] = True
            change_TK = rule.reweighted(weights_ordered_TK, kept_TK).double() - weights_ordered_TK.double()
            error_TK[:, step] = torch.einsum("tk,tkm,tm->t", change_TK, gram_TKK, change_TK)
        error_TK[:, 1:] = error_TK[:, 1:] - error_TK[:, :-1].clone()
    share_TK = weights_ordered_TK.double() / weights_TK.double().sum(1, keepdim=True)
    return Steps(scores_TK.gather(1, order_TK)[goes_TK], share_TK[goes_TK], error_TK[goes_TK])


def expert_norms(figures: Mapping[str, Tensor], domains: Sequence[int]) -> Tensor:
    """[E] float64: the mean norm of each expert's output on some of the domains."""
    return mean_norms(*(figures[f"sums.skip.{name}"][list(domains)].sum(0) for name in ("norm", "chosen")))


def mean_norms(total_E: Tensor, chosen_E: Tensor) -> Tensor:
    """[E] float64: norms summed over so many tokens → their mean; that of all experts together for one that no token
    chose.
    """
    overall = total_E.sum() / chosen_E.sum().clamp_min(1)
    return torch.where(chosen_E > 0, total_E / chosen_E.clamp_min(1), overall)


def _any_rule(name: str, renormalises: bool, norms_E: Tensor | None) -> SkipRule:
    """The rule with any threshold, to compute scores and weights by."""
    if name != "contribution":
        return SkipRule(name, renormalises, beta=1.0)  # type: ignore[arg-type]
    assert norms_E is not None
    return SkipRule("contribution", renormalises, beta=1.0, expert_norms=tuple(norms_E.tolist()))


def median(scores: Tensor, processes: Processes) -> Tensor:
    """The median of the scores of all processes: the mean of the two in the middle.

    Exact: the bins tell in which of them these two are, and only the scores in there are brought together.
    """
    bins = bins_of(scores)
    count_N = processes.sum(torch.bincount(bins, minlength=NUM_BINS))
    upto_N = count_N.cumsum(0)
    number = int(upto_N[-1])
    middle = torch.tensor([(number - 1) // 2, number // 2])
    low, high = torch.searchsorted(upto_N, middle, right=True).tolist()
    inside = processes.gather({"scores": scores[(bins >= low) & (bins <= high)]})
    ordered = torch.cat([figures["scores"] for figures in inside]).sort().values
    before = upto_N[low] - count_N[low]
    return ordered[middle - before].mean()
