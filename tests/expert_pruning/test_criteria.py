"""The published criteria: worked out by hand for three tokens, and against their definitions on real models."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from tiny_models import tiny_model, token_ids

from compressor import MoEModel
from compressor.data.sequences import make_batches
from compressor.machine.progress import Progress
from compressor.observe.layerwise import observe
from compressor.observe.statistic import JoinedStatistic
from compressor.selection.activation_sums import ExpertSums
from compressor.selection.criteria import ExpertFigures
from compressor.selection.pair_losses import PairLosses
from compressor.selection.scores import blended_scores, kept_by_score
from compressor_expert_pruning import CRITERIA
from compressor_expert_pruning.criteria import aimer

NAN = math.nan
BY_NAME = {criterion.name: criterion for criterion in CRITERIA}


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


# Three tokens choose two of four experts each; shares s are g over the token's own sum.
#
#   token (3, 4):  expert 0, f = ( 3,  4), g = 0.6, s = 3/4      expert 1, f = ( 6, 8), g = 0.2, s = 1/4
#   token (0, 2):  expert 0, f = ( 0,  2), g = 0.3, s = 3/4      expert 1, f = ( 0, 4), g = 0.1, s = 1/4
#   token (6, 8):  expert 0, f = ( 6,  8), g = 0.5, s = 1/2      expert 2, f = (−6, −8), g = 0.5, s = 1/2
THREE_TOKENS = ExpertFigures(
    num_kept=2,
    num_groups=1,
    seed=0,
    protected=(),
    forbidden=(),
    tokens=column(3, 2, 1, 0),
    weight=column(1.4, 0.3, 0.5, 0),
    share=column(2, 0.5, 0.5, 0),
    norm=column(17, 14, 10, 0),
    squared_norm=column(129, 116, 100, 0),
    weighted_norm=column(8.6, 2.4, 5, 0),
    squared_weighted_norm=column(34.36, 4.16, 25, 0),
    share_norm=column(10.25, 3.5, 5, 0),
    largest=column(8, 8, 8, 0),
    output=torch.stack([column(9, 14), column(6, 12), column(-6, -8), column(0, 0)]),
    # expert 0: means 3 and 14/3; squares about them 9 + 9 + 0 and 4/9 + 64/9 + 100/9
    # expert 1: means 3 and 6; 9 + 9 and 4 + 4
    spread=column(18 + 168 / 9, 18 + 8, 0, 0),
    pairs=torch.diag(column(4, 1, 3, 0)),
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("frequency", [3, 2, 1, 0]),
        ("seer", [1.4, 0.3, 0.5, 0]),
        ("ean", [5 + 2 + 10, 10 + 4, 10, 0]),
        ("weighted_ean", [3 + 0.6 + 5, 2 + 0.4, 5, 0]),
        ("reap", [(3 + 0.6 + 5) / 3, (2 + 0.4) / 2, 5, NAN]),
        ("reap_renormalised", [(3.75 + 1.5 + 5) / 3, (2.5 + 1) / 2, 5, NAN]),
        ("man", [17 / 3, 7, 10, NAN]),
        ("msan", [129 / 3, 116 / 2, 100, NAN]),
        ("mone", [math.sqrt((18 + 168 / 9) / 2) * 1.4, math.sqrt(18 + 8) * 0.3, 0, NAN]),
        ("single_removal", [4, 1, 3, 0]),
        ("quad_mix", [1, 0, 1, 0]),
    ],
)
def test_three_tokens_by_hand(name, expected):
    found = BY_NAME[name].score(THREE_TOKENS)
    assert found.tolist() == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_every_criterion_is_tested_by_hand():
    by_hand = {mark.args[1][i][0] for mark in test_three_tokens_by_hand.pytestmark for i in range(len(mark.args[1]))}
    assert BY_NAME.keys() - by_hand == {"aimer", "random", "hope", "hope_sums"}  # the latter: test_hope.py
    assert len(BY_NAME) == len(CRITERIA)
    assert all(criterion.source for criterion in CRITERIA)


def test_experts_without_tokens_go_first():
    for name in ("reap", "reap_renormalised", "man", "msan", "mone", "frequency", "ean"):
        assert kept_by_score(BY_NAME[name].score(THREE_TOKENS), 3)[1] == [3]


def test_aimer_keeps_weights_that_are_concentrated():
    """(1, 1, 1, 1), (2, 0, 2, 0), (4, 0, 0, 0): the mean magnitude is 1, its root mean square 1, √2 and 2.

    The published score is the inverse, and its largest go. Scaling an expert changes nothing.
    """
    figures = {
        "weight_l1": column(4, 4, 4, 40),
        "weight_squared": column(4, 8, 16, 1600),
        "num_weights": column(*[4] * 4),
    }
    found = aimer(ExpertFigures(**{**vars(THREE_TOKENS), **figures}))
    assert found.tolist() == pytest.approx([1, math.sqrt(2), 2, 2])
    published = figures["weight_l1"] / (figures["num_weights"] * figures["weight_squared"]).sqrt()
    assert found.tolist() == pytest.approx((1 / published).tolist())


def test_random_draws_every_expert_and_depends_on_the_seed_alone():
    def drawn(seed):
        return BY_NAME["random"].score(ExpertFigures(**{**vars(THREE_TOKENS), "seed": seed})).tolist()

    assert drawn(1) == drawn(1) != drawn(2)
    assert all(0 <= score < 1 for score in drawn(1))
    first = [kept_by_score(torch.tensor(drawn(seed)), 1)[0][0] for seed in range(400)]
    assert all(70 < first.count(expert) < 130 for expert in range(4))


def test_quad_mix_minds_what_is_fixed():
    fixed = ExpertFigures(**{**vars(THREE_TOKENS), "protected": (3,), "forbidden": (0,)})
    assert BY_NAME["quad_mix"].score(fixed).tolist() == [0, 0, 1, 1]


# Real models -----------------------------------------------------------------------------------------------


def slow_scores(chosen):
    """Definitions, expert by expert: of [(g, s, f), …] of its tokens."""
    if not chosen:
        return dict.fromkeys(("reap", "reap_renormalised", "man", "msan", "mone"), NAN) | dict.fromkeys(
            ("frequency", "seer", "ean", "weighted_ean"), 0.0
        )
    norms = [float(f.norm()) for _, _, f in chosen]
    columns = zip(*(f.tolist() for _, _, f in chosen), strict=True)
    variance = sum(statistics.variance(values) for values in columns) if len(chosen) > 1 else 0.0
    gates = sum(g for g, _, _ in chosen)
    return {
        "frequency": len(chosen),
        "seer": gates,
        "ean": sum(norms),
        "weighted_ean": sum(g * norm for (g, _, _), norm in zip(chosen, norms, strict=True)),
        "reap": statistics.fmean(g * norm for (g, _, _), norm in zip(chosen, norms, strict=True)),
        "reap_renormalised": statistics.fmean(s * norm for (_, s, _), norm in zip(chosen, norms, strict=True)),
        "man": statistics.fmean(norms),
        "msan": statistics.fmean(norm**2 for norm in norms),
        "mone": math.sqrt(variance) * gates,
    }


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss", "deepseek4"])
def test_against_their_definitions(name):
    moe = MoEModel(tiny_model(name))
    batches = make_batches([token_ids(length, seed=length) for length in (7, 3, 5)], batch_size=2)
    layer = moe.layers[-1]
    chosen = {expert: [] for expert in range(layer.num_experts)}

    def collect(tokens):
        outputs_TKH = tokens.evaluate_experts(tokens.hidden_TH, tokens.index_TK).double()
        for index_K, weights_K, outputs_KH in zip(
            tokens.index_TK, tokens.weights_TK.double(), outputs_TKH, strict=True
        ):
            for expert, g, f in zip(index_K.tolist(), weights_K.tolist(), outputs_KH, strict=True):
                chosen[expert].append((g, g / float(weights_K.sum()), f))

    class Collect(ExpertSums):
        def end_batch(self, tokens):
            collect(tokens)
            super().end_batch(tokens)

    figures = observe(moe, batches, {layer.path: Collect(layer, outputs=True)}, Progress())[layer.path]
    assert sum(map(len, chosen.values())) == 15 * layer.top_k
    expected = [slow_scores(chosen[expert]) for expert in range(layer.num_experts)]
    for criterion in expected[0]:
        found = blended_scores(BY_NAME[criterion], figures, [""], "mean", num_kept=4).tolist()
        values = [scores[criterion] for scores in expected]
        # float32 outputs, computed anew: some tens of roundings of 6e-8 each. What is 0 is exactly 0.
        assert found == pytest.approx(values, rel=1e-5, abs=0.0, nan_ok=True), criterion


def test_criteria_that_need_more_than_sums():
    """From a walk: losses of pairs, and norms of weights, which are those of the model and not of the text."""
    moe = MoEModel(tiny_model("mixtral"))
    batches = make_batches([token_ids(30)], batch_size=1)
    statistics_of = {layer.path: JoinedStatistic([ExpertSums(layer), PairLosses(layer)]) for layer in moe.layers}
    for path, figures in observe(moe, batches, statistics_of, Progress()).items():
        scores = {
            name: blended_scores(BY_NAME[name], figures, [""], "mean", num_kept=5)
            for name in ("single_removal", "quad_mix", "aimer")
        }
        assert torch.equal(scores["single_removal"], figures["pairs.loss"][0].diagonal())
        assert scores["quad_mix"].sum() == 5
        experts = moe.model.get_submodule(path).experts
        flat_EW = torch.cat([experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)], dim=1).detach().double()
        expected = flat_EW.square().mean(1).sqrt() / flat_EW.abs().mean(1)
        torch.testing.assert_close(scores["aimer"], expected, rtol=1e-5, atol=0)
        dropped = (scores["quad_mix"] == 0).nonzero()[:, 0]
        by_size = scores["single_removal"].argsort()[:3]
        matrix = figures["pairs.loss"][0]
        assert matrix[dropped][:, dropped].sum() <= matrix[by_size][:, by_size].sum() * (1 + 1e-9)
