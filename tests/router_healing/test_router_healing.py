"""Router rows and scales: by hand, against whole outputs, what a fit finds again, whole runs, what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from in_threads import together
from safetensors.torch import load_file
from tiny_models import tiny_folder, token_ids, write_token_file
from torch import Tensor

import compressor
from compressor import RecipeError
from compressor.machine.distributed import Processes
from compressor.model.routing_rule import GroupRule, RoutingRule
from compressor.plugin import Decision, OptionError, RankedChunk, UnsupportedModelError
from compressor_router_healing import RouterHealing, RouterHealingOptions
from compressor_router_healing.fitting import RouterFit, losses, weights_of

RULES = {
    "renormalised": RoutingRule("softmax", True, 1.0),
    "not renormalised": RoutingRule("softmax", False, 1.0),
    "biased": RoutingRule("sigmoid", True, 2.5, torch.tensor([0.3, -0.2, 0.0, 0.4, -0.4, 0.1]).double()),
    "grouped": RoutingRule("softmax", False, 1.0, None, GroupRule(3, 2, "best", float("-inf"))),
}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# By hand, and slowly ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_among_all_experts_weights_are_the_routers(name: str) -> None:
    logits_TE, rule = drawn(20, 6, seed=0), RULES[name]
    order_TM = torch.rand(20, 6, generator=torch.Generator().manual_seed(1)).argsort(-1)
    index_TK, weights_TK = rule.choose(logits_TE, 2)
    expected = torch.zeros(20, 6).double().scatter(1, index_TK, weights_TK)
    torch.testing.assert_close(weights_of(rule, 2, logits_TE, order_TM), expected.gather(1, order_TM))


def test_by_hand() -> None:
    """Of three experts one may be chosen, of candidates 0 and 2. z = (0, 5, 1), x = (1, 2). Δ gives 0 three more:
    so it is that one, f = (2, 0), s = ½, y = (3, 1): ‖(1, 0) − (3, 1)‖² = 5. Without Δ it is expert 2, f = (0, 1): 9.
    """
    seen = {
        "hidden": torch.tensor([[1.0, 2.0]]),
        "logits": torch.tensor([[0.0, 5.0, 1.0]]),
        "order": torch.tensor([[0, 2]]),
        "gram": torch.tensor([[[4.0, 0.0], [0.0, 1.0]]]),
        "cross": torch.tensor([[6.0, 1.0]]),
        "energy": torch.tensor([10.0]),
    }
    change, scales = torch.tensor([[1.0, 1.0], [0, 0], [0, 0]]), torch.tensor([0.5, 9.0, 1.0])
    assert losses(seen, RULES["renormalised"], 1, change, scales).tolist() == [5.0]
    assert losses(seen, RULES["renormalised"], 1, 0 * change, scales).tolist() == [9.0]


class Layer:
    """A layer of experts that are matrices, as tokens of a text come to it; the original has other rows and scales."""

    def __init__(self, rule: RoutingRule, seed: int = 0, num_tokens: int = 400) -> None:
        self.rule, self.layer = rule, SimpleNamespace(path="layer", num_experts=6, top_k=2)
        self.rows, self.moved = drawn(6, 8, seed=1), 0.3 * drawn(6, 8, seed=2)
        self.scales = 1 + 0.2 * drawn(6, seed=3)
        self.hidden = drawn(num_tokens, 8, seed=seed)
        self.outputs = torch.einsum("th,ehi->tei", self.hidden, drawn(6, 8, 8, seed=4))
        self.target = self.out(self.moved, self.scales)

    def out(self, change: Tensor, scales: Tensor) -> Tensor:
        """What a layer with other rows and scales puts out: slowly, token by token."""
        index_TK, weights_TK = self.rule.choose(self.hidden @ (self.rows + change).T, 2)
        found = torch.zeros(len(self.hidden), 8)
        for token, (ids, weights) in enumerate(zip(index_TK.tolist(), weights_TK.tolist(), strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                found[token] += weight * scales[expert] * self.outputs[token, expert]
        return found

    def shown_to(self, fit: RouterFit, *, held_out: bool = False, part: slice = slice(None)) -> None:
        """In two chunks, with all experts as candidates."""
        logits = (self.hidden @ self.rows.T)[part]
        tokens: Any = SimpleNamespace(
            rule=self.rule,
            held_out=held_out,
            target_TH=self.target[part],
            hidden_TH=self.hidden[part],
            logits_TE=logits,
        )
        order = logits.argsort(-1, descending=True)
        outputs = self.outputs[part].gather(1, order[:, :, None].expand(-1, -1, 8))
        for start, stop in ((0, 150), (150, len(logits))):
            fit.add(tokens, RankedChunk(start, stop, order[start:stop], outputs[start:stop]))


@pytest.mark.parametrize("name", RULES)
def test_losses_are_those_of_whole_outputs(name: str) -> None:
    one = Layer(RULES[name], num_tokens=200)
    fit = RouterFit(one.layer, 1, 1)  # type: ignore[arg-type]
    one.shown_to(fit)
    change, scales = 0.5 * drawn(6, 8, seed=8), 1 + 0.3 * drawn(6, seed=9)
    found = losses(fit._seen[False].joined(), one.rule, 2, change, scales)
    expected = (one.out(change, scales) - one.target).square().sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["not renormalised", "biased"])
def test_most_of_what_was_moved_is_found_again(name: str) -> None:
    """On text that it was not fitted to."""
    one, other = Layer(RULES[name]), Layer(RULES[name], seed=7)
    fit = RouterFit(one.layer, 60, 300)  # type: ignore[arg-type]
    one.shown_to(fit)
    other.shown_to(fit, held_out=True)
    assert not fit.again()
    found = fit.tensors()
    before, after = found["fit.losses"].tolist()
    energy = other.target.square().sum()
    change, scales = found["fit.rows"], found["fit.scales"]
    lost = [
        float((other.out(*how) - other.target).square().sum() / energy)
        for how in ((0 * change, scales * 0 + 1), (change, scales))
    ]
    assert [before, after] == pytest.approx(lost, rel=1e-3)
    assert after < 0.5 * before
    assert int(found["fit.tokens"]) == 400


def test_nothing_is_fitted_to_few_tokens() -> None:
    one = Layer(RULES["renormalised"])
    fit = RouterFit(one.layer, 60, 401)  # type: ignore[arg-type]
    one.shown_to(fit)
    fit.again()
    assert {name: int(found) for name, found in fit.tensors().items()} == {"fit.tokens": 400}


def test_several_processes_fit_as_one() -> None:
    """The third has no token."""
    one, parts = Layer(RULES["renormalised"]), [slice(0, 250), slice(250, 400), None]

    def fitted(processes: Processes, part: slice | None) -> dict[str, Tensor]:
        fit = RouterFit(one.layer, 5, 1)  # type: ignore[arg-type]
        fit.share(processes)
        if part is not None:
            one.shown_to(fit, part=part)
            one.shown_to(fit, held_out=True, part=part)
        fit.again()
        return fit.tensors()

    alone = fitted(Processes(), slice(None))
    for found in together(3, lambda processes: fitted(processes, parts[processes.rank])):
        for name, tensor in alone.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3)


def test_a_router_without_a_rule_is_refused() -> None:
    fit = RouterFit(SimpleNamespace(path="layer"), 1, 1)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="layer: its router follows no rule in closed form, so its rows"):
        fit.add(SimpleNamespace(rule=None), None)  # type: ignore[arg-type]


# Whole runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tokens = write_token_file(tmp_path_factory.mktemp("text") / "tokens.jsonl", token_ids(60, 24).tolist())
    return {
        "model": str(tiny_folder("olmoe")),
        "calibration": {"batch_size": 16, "data": [{"tokens": str(tokens), "samples": 48}]},
        "passes": [{"expert_pruning": {"keep": 4}}, {"router_healing": {"min_tokens": 1000, "steps": 20}}],
    }


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["memory", pytest.param("disk", marks=pytest.mark.nightly)])
def test_a_run(weights: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Rows move by what was decided, last matrices are scaled; nothing else moves."""
    record = compressor.compress({**recipe, "weights": weights}, output=tmp_path / "out").record
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder("olmoe"), tmp_path / "out"))
    decided = load_file(tmp_path / "out" / "compressor" / "decision.safetensors")
    kept, healed = (done["decision"]["layers"] for done in record["passes"])
    assert all(one["healed"] < 0.9 * one["loss"] for one in healed.values())
    for name, one in after.items():
        path = name.partition(".mlp.")[0] + ".mlp"
        if name.endswith("mlp.gate.weight"):
            torch.testing.assert_close(one, before[name][kept[path]["kept"]] + decided[f"1/{path}/rows"])
        elif ".experts." in name:
            number, _, which = name.partition(".experts.")[2].partition(".")
            was = before[f"{path}.experts.{kept[path]['kept'][int(number)]}.{which}"]
            torch.testing.assert_close(one, was * (healed[path]["scales"][int(number)] if "down_proj" in which else 1))
        else:
            assert torch.equal(one, before[name]), name


# Decided, and refused --------------------------------------------------------------------------------------


def figures(before: float, after: float) -> dict[str, Tensor]:
    return {
        "fit.tokens": torch.tensor(60_000),
        "fit.losses": torch.tensor([before, after]).double(),
        "fit.rows": torch.ones(2, 3),
        "fit.scales": torch.tensor([1.0, 0.5]),
        "fit.hidden": torch.eye(3),
        "fit.logits": torch.tensor([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]) + 7,  # a bias makes no difference
    }


def layer(name: str) -> Any:
    return SimpleNamespace(path=name)


def test_a_layer_where_nothing_falls_stays_as_it_was() -> None:
    method = RouterHealing(RouterHealingOptions())
    decision = method.decide([layer("a"), layer("b")], {"a": figures(0.3, 0.2), "b": figures(0.2, 0.3)})  # type: ignore[arg-type]
    assert decision["layers"] == {
        "a": {"loss": pytest.approx(0.3), "healed": pytest.approx(0.2), "scales": [1.0, 0.5]},
        "b": {"loss": pytest.approx(0.2), "healed": pytest.approx(0.3), "scales": None},
    }
    assert list(decision.tensors) == ["a"]
    assert method.describe(decision).notes == ["in 1 of 2 layers the loss does not fall, and nothing changes"]
    with pytest.raises(ValueError, match="in no layer does the loss on held-out text fall: leave this pass out"):
        method.decide([layer("b")], {"b": figures(0.2, 0.2)})  # type: ignore[arg-type]


def test_few_tokens_are_refused() -> None:
    says = "the calibration text has 2,048 tokens, and 50,000 are asked for: on few tokens rows fit what other text"
    with pytest.raises(OptionError, match=says) as error:
        RouterHealing(RouterHealingOptions()).decide([layer("a")], {"a": {"fit.tokens": torch.tensor(2048)}})  # type: ignore[arg-type]
    assert error.value.option == "min_tokens"


def test_few_tokens_are_refused_before_any_weight_is_read(recipe: dict[str, Any]) -> None:
    """48 sequences of 24; no more are known of before text is read."""
    says = r"passes\[1\]\.router_healing\.min_tokens: the calibration text has 1,152 tokens, and 2,000 are asked for"
    with pytest.raises(RecipeError, match=says):
        compressor.check(recipe, overrides=["passes.1.router_healing.min_tokens=2000"])
    compressor.check(recipe, overrides=["passes.1.router_healing.min_tokens=1152"])


class Scaled:
    by = 1.0

    def scale(self, factor: float) -> None:
        self.by *= factor


def edited(rows: list[list[float]]) -> tuple[list[dict[str, Tensor]], list[float]]:
    method = RouterHealing(RouterHealingOptions())
    decision: Decision = method.decide([layer("a")], {"a": figures(0.3, 0.2)})  # type: ignore[arg-type]
    router = [{"gate.weight": torch.tensor(row), "bias": torch.tensor(0.0)} for row in rows]
    weights: Any = SimpleNamespace(path="a", router=router, experts=[Scaled(), Scaled()])
    method.edit(weights, decision)
    return router, [one.by for one in weights.experts]


def test_an_edit_by_hand() -> None:
    router, scales = edited([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert [row["gate.weight"].tolist() for row in router] == [[2, 3, 4], [5, 6, 7]]
    assert scales == [1.0, 0.5]


def test_a_router_that_sees_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="a: its router makes its logits of something else than its experts see"):
        edited([[1.0, 2.0, 5.0], [4.0, 5.0, 6.0]])
