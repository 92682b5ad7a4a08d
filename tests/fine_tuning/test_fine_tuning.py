"""Fine-tuning: losses and steps by hand, what is merged, a run that is stopped, whole runs, what is refused."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import VOCAB_SIZE, small_mixtral, token_ids, write_checkpoint, write_token_file

import compressor
from compressor import RecipeError
from compressor.data.sequences import make_batches
from compressor.plugin import OptionError, Training
from compressor_fine_tuning import FineTuningOptions, tuning
from compressor_fine_tuning import method as of_method

Q, ROUTER = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate.weight"


class Told:
    """A run's progress, which may stop it."""

    def __init__(self, stops_after: int | None = None) -> None:
        self.stops_after = stops_after

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def task(self, title: str) -> Any:
        def update(done: int, total: int) -> None:
            if done == self.stops_after:
                raise KeyboardInterrupt

        yield update


def training(work: Path, stops_after: int | None = None, rows: int = 12) -> Training:
    batches = make_batches(list(token_ids(rows, 10, seed=1)), 4)
    progress: Any = Told(stops_after)
    return Training(batches, batches, None, work, "cpu", 3, progress, lambda folder: None, lambda *one: None)


# By hand ---------------------------------------------------------------------------------------------------


def test_kl_by_hand() -> None:
    """(½, ½) against (¼, ¾): ½ log 2 + ½ log ⅔."""
    p, q = torch.tensor([[0.5, 0.5]]).log() + 3, torch.tensor([[0.25, 0.75]]).log() - 1
    assert float(tuning.kl(p, q)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-5)
    assert float(tuning.kl(p, p)) == pytest.approx(0, abs=1e-6)


def test_losses_are_those_of_tokens_that_have_a_next_one() -> None:
    model, other = small_mixtral().eval(), small_mixtral(seed=1).eval()
    rows = [token_ids(7), token_ids(4, seed=1)]
    [batch] = make_batches(rows, 2)
    likely, lost = [], []
    with torch.no_grad():
        for ids in rows:
            ours, theirs = (one(input_ids=ids[None]).logits[0].double().log_softmax(-1) for one in (model, other))
            for place in range(len(ids) - 1):
                likely.append(-ours[place, ids[place + 1]])
                lost.append((theirs[place].exp() * (theirs[place] - ours[place])).sum())
        torch.testing.assert_close(
            tuning.token_losses(model, None, batch).double(), torch.stack(likely), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            tuning.token_losses(model, other, batch).double(), torch.stack(lost), rtol=1e-4, atol=1e-5
        )
    assert tuning.mean_loss(model, None, [batch]) == pytest.approx(float(sum(likely)) / 9, rel=1e-5)


def test_memory_by_hand() -> None:
    """100 weights of 4 bytes; a layer whose experts are twice as wide as 4 hidden numbers leaves 12 + 2 · 13 vectors
    of a token, and 6 numbers a word.
    """
    layer: Any = SimpleNamespace(
        linears={"q": "layers.0.q"}, shapes={"q": (4, 6)}, holds=lambda at: False, router_weights=("layers.0.gate",),
        num_experts=3, top_k=2, parameters_per_expert=3 * 4 * 8,
    )  # fmt: skip
    work: Any = SimpleNamespace(hidden=4, itemsize=4, bytes_total=400, batch_tokens=10, vocabulary=7)
    tokens = 10 * (4 * 4 * 38 + 6 * 4 * 7)

    def found(**options: Any) -> int:
        return of_method.FineTuning(FineTuningOptions(rank=2, **options)).bytes_of_training([layer], work)

    assert found(train="full", loss="next_token") == 16 * 100 + tokens
    assert found(train="full") == 400 + 16 * 100 + tokens
    assert found() == 400 + 400 + 4 * 24 + 16 * 2 * (4 + 6) + tokens
    assert found(parts=("router",)) == 400 + 400 + 4 * 12 + 16 * 2 * (3 + 4) + tokens


def test_learning_rates_by_hand() -> None:
    """Of 40 steps the first two rise, the others fall in a line."""
    found = [tuning.learning_rate(step, 40, 2.0) for step in range(40)]
    assert found[:3] == pytest.approx([1.0, 2.0, 2.0 * 38 / 39])
    assert found[-1] == pytest.approx(2.0 / 39)
    assert tuning.learning_rate(0, 1, 2.0) == 2.0


def test_every_batch_comes_once_before_one_comes_again() -> None:
    numbers = tuning.order(5, seed=2)
    rounds = [[next(numbers) for _ in range(5)] for _ in range(4)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in rounds)
    assert len({*map(tuple, rounds)}) > 1


@torch.no_grad()
def test_what_is_merged() -> None:
    """W + 2 B A, of a linear layer's weight and of a router's that is none; nothing else moves."""
    model = small_mixtral().eval()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    wrapped = tuning.with_lora(model, [Q, ROUTER], 3, seed=0)
    drawn: dict[str, torch.Tensor] = {}
    for name, one in wrapped.named_parameters():
        if one.requires_grad:
            one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(len(drawn))))
            drawn[name] = one.clone()
    assert len(drawn) == 4
    merged = wrapped.merge_and_unload().state_dict()
    assert merged.keys() == before.keys()
    for name, one in before.items():
        found = merged[name] - one
        if name not in (Q, ROUTER):
            assert not found.any(), name
            continue
        owner = name.removesuffix(".weight")
        a, b = (
            next(one for key, one in drawn.items() if owner in key and part in key) for part in ("lora_A", "lora_B")
        )
        torch.testing.assert_close(found, 2 * b @ a, rtol=1e-4, atol=1e-5)


def test_what_did_not_move_is_refused(tmp_path: Path) -> None:
    options = FineTuningOptions(loss="next_token", steps=1, learning_rate=1e-20)
    with pytest.raises(OptionError, match=rf"1 of 1 trained weights are what they were, such as {Q}: train for more"):
        tuning.tuned(small_mixtral().eval(), None, [Q], options, training(tmp_path))


def test_zeros_stay_where_they_are_and_all_else_moves(tmp_path: Path) -> None:
    """Also in a run that is stopped and goes on."""
    options = FineTuningOptions(train="full", loss="next_token", steps=4, save_every=2, learning_rate=0.01)

    def sparse() -> Any:
        model = small_mixtral().eval()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.experts.down_proj[..., ::2] = 0
        return model

    with pytest.raises(KeyboardInterrupt):
        tuning.tuned(sparse(), None, None, options, training(tmp_path, 3))
    model = tuning.tuned(sparse(), None, None, options, training(tmp_path))
    for layer, before in zip(model.model.layers, sparse().model.layers, strict=True):
        found, was = layer.mlp.experts.down_proj, before.mlp.experts.down_proj
        assert torch.equal(found == 0, was == 0)
        assert not torch.equal(found, was)


def test_behind_zeros_all_weights_are_trained_or_none(make_layer: Any) -> None:
    layers = [make_layer(8, 2, zeros="2:4")]
    full = of_method.FineTuning(FineTuningOptions(train="full"))
    assert full.check(layers).layers == layers
    with pytest.raises(
        OptionError, match="lora may fill the 2:4 zeros that there are by then; `full` keeps them"
    ) as error:
        of_method.FineTuning(FineTuningOptions()).check(layers)
    assert error.value.option == "train"


# Stopped ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [[Q, ROUTER], None])
def test_a_stopped_one_goes_on(names: list[str] | None, tmp_path: Path) -> None:
    """To the bit, from the last steps that were kept."""
    kind = "full" if names is None else "lora"
    options = FineTuningOptions(train=kind, loss="next_token", steps=7, save_every=3)
    (tmp_path / "whole").mkdir()
    whole = tuning.tuned(small_mixtral().eval(), None, names, options, training(tmp_path / "whole"))
    for stops_after in (5, 6):  # after three steps are kept, and six
        with pytest.raises(KeyboardInterrupt):
            tuning.tuned(small_mixtral().eval(), None, names, options, training(tmp_path, stops_after))
    with safe_open(tmp_path / "state.safetensors", "pt") as state:
        assert int(state.metadata()["done"]) == 6
    again = tuning.tuned(small_mixtral().eval(), None, names, options, training(tmp_path))
    moved = [
        name for name, one in small_mixtral().state_dict().items() if not torch.equal(one, whole.get_parameter(name))
    ]
    assert moved == ([Q, ROUTER] if names else list(whole.state_dict()))
    assert all(torch.equal(one, again.get_parameter(name)) for name, one in whole.state_dict().items())


# Whole runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each token decides the next but for one in a few: there is something to learn."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = token_ids(40, 16)
    for place in range(1, rows.shape[1]):
        follows = (rows[:, place - 1] * 5 + 3) % (VOCAB_SIZE - 2) + 2
        rows[:, place] = torch.where(rows[:, place] % 8 > 0, follows, rows[:, place])
    tokens = write_token_file(folder / "tokens.jsonl", rows.tolist())
    return {
        "model": str(write_checkpoint(small_mixtral(), folder / "model")),
        "calibration": {"batch_size": 8, "data": [{"tokens": str(tokens), "samples": 32}]},
        "output": str(folder / "out"),
    }


def tune(**options: Any) -> dict[str, Any]:
    return {"fine_tuning": {"steps": 12, "learning_rate": 0.01, **options}}


@pytest.mark.slow
def test_between_other_passes(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Towards the original, beside the experts, which stay those that the pass before has left."""
    prune = {"expert_pruning": {"keep": 2, "criterion": "frequency"}}
    passes = [
        prune,
        tune(parts=["attention", "router"], learning_rate=0.001, steps=20, rank=2),
        {"dynamic_skipping": {}},
    ]
    record = compressor.compress({**recipe, "passes": passes}, output=tmp_path / "out").record
    checks = record["passes"][1]["checks"]
    assert 0 < checks["held_out_loss_after"] < checks["held_out_loss_before"]
    [first, _] = record["passes"][1]["decision"]["layers"].values()
    assert sorted(name.rpartition("0.")[2] for name in first["trained"]) == [
        "mlp.gate.weight",
        *(f"self_attn.{name}_proj.weight" for name in "koqv"),
    ]
    model, _ = compressor.load(tmp_path / "out")
    assert compressor.MoEModel(model).skips
    kept = record["passes"][0]["decision"]["layers"]["model.layers.0.mlp"]["kept"]
    experts = small_mixtral().model.layers[0].mlp.experts.down_proj[kept]
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, experts)
    assert not torch.equal(
        model.model.layers[0].self_attn.q_proj.weight, small_mixtral().model.layers[0].self_attn.q_proj.weight
    )


@pytest.mark.nightly
def test_stored_in_eight_bits_behind_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    model = str(write_checkpoint(small_mixtral(hidden_size=32, intermediate_size=32), tmp_path / "model"))
    prune = {"expert_pruning": {"keep": 2, "criterion": "frequency"}}
    store = {"quantization": {"scheme": "W8A16", "group_size": 32}}
    passes = [prune, tune(learning_rate=0.001, steps=20, rank=2), store]
    record = compressor.compress({**recipe, "model": model, "passes": passes}, output=tmp_path / "out").record
    trained, stored = (one["checks"] for one in record["passes"][1:])
    assert trained["held_out_loss_after"] < trained["held_out_loss_before"]
    assert 0 < stored["external_difference"] < 0.1


def test_all_weights_towards_the_text(recipe: dict[str, Any], tmp_path: Path) -> None:
    model = str(write_checkpoint(small_mixtral().bfloat16(), tmp_path / "model"))
    passes = [tune(train="full", loss="next_token")]
    record = compressor.compress({**recipe, "model": model, "passes": passes}, output=tmp_path / "out").record
    checks = record["passes"][0]["checks"]
    assert checks["held_out_loss_after"] < checks["held_out_loss_before"] - 0.1
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(one.dtype == torch.bfloat16 and not torch.equal(one, before[name]) for name, one in after.items())


# What is refused -------------------------------------------------------------------------------------------


def test_what_makes_it_worse_is_refused(recipe: dict[str, Any]) -> None:
    says = r"passes\[0\].fine_tuning: on held-out text the loss does not fall: \d+\.\d+ nats a token before, \d"
    with pytest.raises(RecipeError, match=says):
        compressor.compress({**recipe, "passes": [tune(learning_rate=3.0, steps=3)]})
    assert not Path(recipe["output"]).exists()


def test_a_loss_that_is_no_number_is_refused(tmp_path: Path) -> None:
    model = small_mixtral().eval()
    model.lm_head.weight.data.fill_(torch.inf)
    with pytest.raises(OptionError, match=r"in step 0 the loss is (nan|inf): give a smaller one"):
        tuning.tuned(model, None, [Q], FineTuningOptions(loss="next_token"), training(tmp_path))


def test_a_live_model_cannot_be_distilled_from(recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"fine_tuning.loss: the original is a live model, and no folder of it"):
        compressor.compress({**recipe, "passes": [tune()]}, small_mixtral())


def test_without_held_out_text(recipe: dict[str, Any]) -> None:
    data = [{**recipe["calibration"]["data"][0], "samples": 40}]
    with pytest.raises(RecipeError, match="fine_tuning judges by held-out text, and none is left"):
        compressor.compress({**recipe, "calibration": {"data": data}, "passes": [tune()]})


def test_without_peft(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_method, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"fine_tuning.train: lora needs peft, .*: pip install 'moe-compressor\[fine"):
        compressor.compress({**recipe, "passes": [tune()]})


def test_a_part_that_is_not_there(recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"fine_tuning.parts: no layer has shared that could be trained"):
        compressor.compress({**recipe, "passes": [tune(parts=["shared"])]})
