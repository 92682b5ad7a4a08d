"""REAP as it is published: the gates that the router gives, renormalised only where the router does so."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model, token_ids

from compressor import MoEModel
from compressor.data.sequences import make_batches
from compressor.machine.progress import Progress
from compressor.observe.layerwise import observe
from compressor.selection.activation_sums import ExpertSums
from compressor.selection.scores import blended_scores, kept_by_score
from compressor_expert_pruning import CRITERIA

BY_NAME = {criterion.name: criterion for criterion in CRITERIA}


class Published(ExpertSums):
    """Beside the sums, what the published code computes of the same tokens, from the logits."""

    def __init__(self, layer, norm_topk_prob):
        super().__init__(layer)
        self.norm_topk_prob = norm_topk_prob
        self.of_expert = {expert: [] for expert in range(layer.num_experts)}

    def end_batch(self, tokens):
        super().end_batch(tokens)
        gates_TE = torch.softmax(tokens.logits_TE.float(), dim=1)
        outputs_TKH = tokens.evaluate_experts(tokens.hidden_TH, tokens.index_TK).float()
        for gates_E, index_K, outputs_KH in zip(gates_TE, tokens.index_TK, outputs_TKH, strict=True):
            gates_K = gates_E[index_K]
            if self.norm_topk_prob:
                gates_K = gates_K / gates_K.sum()
            for expert, gate, output_H in zip(index_K.tolist(), gates_K.tolist(), outputs_KH, strict=True):
                self.of_expert[expert].append(gate * float(output_H.norm()))


def scores_of(model, norm_topk_prob):
    """The last layer's (published, `reap`, `reap_renormalised`), float64 [E]."""
    moe = MoEModel(model)
    layer = moe.layers[-1]
    statistic = Published(layer, norm_topk_prob)
    batches = make_batches([token_ids(length, seed=length) for length in (60, 41)], batch_size=2)
    figures = observe(moe, batches, {layer.path: statistic}, Progress())[layer.path]
    means = [sum(values) / len(values) if values else torch.nan for values in statistic.of_expert.values()]
    ours = [blended_scores(BY_NAME[name], figures, [""], "mean", num_kept=4) for name in ("reap", "reap_renormalised")]
    return torch.tensor(means, dtype=torch.float64), *ours


@pytest.mark.parametrize(
    ("name", "norm_topk_prob"),
    [("olmoe", False), ("qwen2_moe", False), ("qwen3_moe", True), ("mixtral", True)],
)
def test_the_published_formula(name, norm_topk_prob):
    """Mixtral's config has no such key, though its router renormalises: we follow the router."""
    model = tiny_model(name)
    if hasattr(model.config, "norm_topk_prob"):
        assert model.config.norm_topk_prob == norm_topk_prob
    published, reap, renormalised = scores_of(model, norm_topk_prob)
    torch.testing.assert_close(reap, published, rtol=1e-5, atol=0.0, equal_nan=True)
    assert torch.allclose(reap, renormalised, rtol=1e-5, atol=0.0, equal_nan=True) == norm_topk_prob


def test_they_choose_other_experts_where_the_router_does_not_renormalise():
    """Expert 6 is chosen where much of the weight goes to others, expert 4 where the token is surer of its choice."""
    _, reap, renormalised = scores_of(tiny_model("olmoe"), norm_topk_prob=False)
    assert kept_by_score(reap, 7)[1] == [6]
    assert kept_by_score(renormalised, 7)[1] == [4]
