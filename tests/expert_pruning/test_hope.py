"""HOPE: sums and sets by hand and against plain loops, with groups and lists of experts; domains; a run."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from tiny_models import tiny_folder, tiny_model, token_ids, write_token_file

import compressor
from compressor import MoEModel
from compressor.data.sequences import make_batches
from compressor.machine.progress import Progress
from compressor.observe.layerwise import observe
from compressor.observe.statistic import JoinedStatistic
from compressor.plugin import RoutingRule
from compressor.selection.activation_sums import ExpertSums
from compressor.selection.choose import Fixed, by_criterion
from compressor_expert_pruning import CRITERIA
from compressor_expert_pruning.pair_sizes import PairSizes

BY_NAME = {criterion.name: criterion for criterion in CRITERIA}


def kept_of(moe_layer, figures, name, num_kept, **others):
    options = {"domains": [""], "blend": "mean", "fixed": Fixed()} | others
    return by_criterion(moe_layer, figures, num_kept, criterion=BY_NAME[name], seed=0, **options)[0]["kept"]


def gathered(*batches):
    """What `hope` and `hope_sums` decide by."""
    layer = batches[0].layer
    statistic = JoinedStatistic(
        [ExpertSums(layer), *(BY_NAME[name].statistic(layer) for name in ("hope", "hope_sums"))]
    )
    for tokens in batches:
        statistic.update(tokens)
    return statistic.tensors()


def plain(logits, top_k):
    weights, index = logits.double().softmax(-1).topk(top_k, dim=-1)
    return index, weights


SCALES = torch.tensor([1.0, 2.0, 4.0])
PROBABILITIES = [[0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]


@pytest.fixture
def three_tokens(make_tokens):
    """Experts answer x, 2x and 4x to x = 1, 2, 2: tokens 1 and 2 choose 0 and 1, token 3 chooses 1 and 2.

    a: token 1 (0.6, 0.6, –), token 2 (1, 1.2, –), token 3 (–, 1.2, 4).
    """
    hidden_TH = torch.tensor([[1.0], [2.0], [2.0]])
    logits = torch.tensor(PROBABILITIES).log()
    return make_tokens(hidden_TH, SCALES[:, None, None], logits, 2, plain, RoutingRule("softmax", False, 1.0))


def test_by_hand(three_tokens):
    """Sums: 0 has 0.36 + 1, 1 has 0.36 + 1.44 + 1.44, 2 has 16; 0 with 1 0.36 + 1.2, 1 with 2 4.8.

    Means: 0.68, 1.08, 16; 0.78, 4.8. Of one that goes it is 0 both times. Of two, by sums 0 and 1: 1.36 + 3.24 + 2·1.56
    against 17.36 and 28.84.
    """
    figures = gathered(three_tokens)
    products = torch.tensor([[[1.36, 1.56, 0.0], [1.56, 3.24, 4.8], [0.0, 4.8, 16.0]]], dtype=torch.float64)
    together = torch.tensor([[[2, 2, 0], [2, 3, 1], [0, 1, 1]]], dtype=torch.float64)
    for name in ("hope", "hope_sums"):
        torch.testing.assert_close(figures[f"sums.{name}.products"], products, rtol=1e-6, atol=1e-7)
        assert torch.equal(figures[f"sums.{name}.together"], together)
        assert kept_of(three_tokens.layer, figures, name, 2) == [1, 2]


def test_seldom_and_large_counts_in_means_and_not_in_sums(three_tokens):
    """Expert 0 is chosen by nine tokens with a = 1, expert 1 by one with a = 2, expert 2 by four with a = 3, no two
    together. By means 0 is the least (1, 4, 9), by sums 1 is (9, 4, 36).
    """
    sums = {
        "products": torch.diag(torch.tensor([9.0, 4, 36]).double()),
        "together": torch.diag(torch.tensor([9.0, 1, 4])),
    }
    figures = gathered(three_tokens)
    for name in ("hope", "hope_sums"):
        figures |= {f"sums.{name}.{key}": figure[None].double() for key, figure in sums.items()}
    assert kept_of(three_tokens.layer, figures, "hope", 2) == [1, 2]
    assert kept_of(three_tokens.layer, figures, "hope_sums", 2) == [0, 2]


def test_domains_weigh_by_the_size_of_their_output(three_tokens):
    """The second text has a hundredfold of the first one's products and output: as fractions of it both count the same,
    and experts 0 and 1 lose (9 + 1) / 2 and (3 + 4) / 2; pooled, what the second one says decides: 109 and 403.
    """
    figures = gathered(three_tokens)
    for key in figures:
        if key.startswith(("sums.", "batch.")):
            figures[key] = torch.cat([figures[key], figures[key]])
    figures["batch.domain"] = torch.tensor([0, 1])
    figures["batch.squared_output"] = torch.tensor([1.0, 100.0]).double()
    own = torch.tensor([[9.0, 3, 99], [100.0, 400, 9900]])
    figures["sums.hope_sums.products"] = torch.diag_embed(own).double()
    names = ["one", "two"]
    assert kept_of(three_tokens.layer, figures, "hope_sums", 2, domains=names) == [0, 2]
    assert kept_of(three_tokens.layer, figures, "hope_sums", 2, domains=names, blend="pooled") == [1, 2]
    assert kept_of(three_tokens.layer, figures, "hope_sums", 2, domains=names, blend={"two": 1}) == [1, 2]


def test_a_domain_without_a_token_has_a_row(three_tokens, make_tokens):
    none = make_tokens(torch.zeros(0, 1), SCALES[:, None, None], torch.zeros(0, 3), 2, plain, three_tokens.rule)
    none.domain = "none"
    figures = gathered(none, three_tokens)
    assert figures["sums.hope.products"].shape == (2, 3, 3)
    assert not figures["sums.hope.products"][0].any()


# Real models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss"])
def test_against_plain_loops(name):
    """Sums pair by pair; then no set of as many experts of every group is better than what is found by more than swaps
    can tell, and what is protected stays, what is forbidden goes.
    """
    moe = MoEModel(tiny_model(name))
    batches = make_batches([token_ids(length, seed=length) for length in (13, 5, 9)], batch_size=2)
    layer = moe.layers[-1]
    products, together = torch.zeros(2, layer.num_experts, layer.num_experts, dtype=torch.float64)

    class Slow(PairSizes):
        def end_batch(self, tokens):
            super().end_batch(tokens)
            outputs_TKH = tokens.evaluate_experts(tokens.hidden_TH, tokens.index_TK).double()
            for index_K, weights_K, outputs_KH in zip(tokens.index_TK, tokens.weights_TK, outputs_TKH, strict=True):
                for i, j in itertools.product(range(layer.top_k), repeat=2):
                    size = [float(weights_K[k]) * float(outputs_KH[k].norm()) for k in (i, j)]
                    products[index_K[i], index_K[j]] += size[0] * size[1]
                    together[index_K[i], index_K[j]] += 1

    statistic = JoinedStatistic([ExpertSums(layer), Slow(layer, "hope"), PairSizes(layer, "hope_sums")])
    figures = observe(moe, batches, {layer.path: statistic}, Progress())[layer.path]
    torch.testing.assert_close(figures["sums.hope.products"][0], products, rtol=1e-5, atol=0)
    assert torch.equal(figures["sums.hope.together"][0], together)
    means = torch.where(together > 0, products / together.clamp_min(1), 0.0)
    size = layer.num_experts // layer.num_groups
    protected, forbidden = (0,), (layer.num_experts - 1,)
    for criterion, matrix in (("hope", means), ("hope_sums", products)):
        kept = kept_of(layer, figures, criterion, layer.num_experts // 2)
        assert [sum(e // size == group for e in kept) for group in range(layer.num_groups)] == [
            size // 2
        ] * layer.num_groups
        dropped = [e for e in range(layer.num_experts) if e not in kept]
        for back, gone in itertools.product(dropped, kept):
            if back // size == gone // size:
                other = [gone if e == back else e for e in dropped]
                assert matrix[dropped][:, dropped].sum() <= matrix[other][:, other].sum() * (1 + 1e-9)
        kept = kept_of(layer, figures, criterion, layer.num_experts // 2, fixed=Fixed(protected, forbidden))
        assert 0 in kept
        assert layer.num_experts - 1 not in kept


def test_a_run_and_another_count_decided_later(tmp_path):
    """What the run gathered answers again, and another count; for the other criterion it names what is missing."""
    data = []
    for name in ("one", "two"):
        tokens = write_token_file(tmp_path / f"{name}.jsonl", token_ids(3, 24, seed=len(data)).tolist())
        data.append({"tokens": str(tokens), "name": name})
    expert_pruning = {"keep": 6, "criterion": "hope"}
    recipe = {
        "model": str(tiny_folder("mixtral")),
        "calibration": {"data": data},
        "passes": [{"expert_pruning": expert_pruning}],
    }
    compressor.compress(recipe | {"output": str(tmp_path / "smaller")})
    folder = tmp_path / "smaller" / "compressor"
    decided = json.loads((folder / "decision.json").read_text())["passes"][0]["decision"]["layers"]
    assert [(layer["search"], len(layer["kept"])) for layer in decided.values()] == [("hope", 6)] * len(decided)
    statistics = folder / "statistics.safetensors"
    again = compressor.decide(statistics, keep=6, criterion="hope")
    assert again["passes"][0]["decision"]["layers"] == decided
    fewer = compressor.decide(statistics, keep=4, criterion="hope")["passes"][0]["decision"]["layers"]
    assert [len(layer["kept"]) for layer in fewer.values()] == [4] * len(decided)
    with pytest.raises(compressor.RecipeError, match=r"hope_sums needs its own figures, `sums\.hope_sums\.…`"):
        compressor.decide(statistics, keep=6, criterion="hope_sums")
