"""What candidates do to the answers, measured in the walk: against whole forwards under masks, from memory, from disk,
in several processes, interrupted, and where a model's layers hand on more than their outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from in_threads import together
from tiny_models import token_ids
from torch import Tensor

from compressor import MoEModel, UnsupportedModelError
from compressor.checkpoint.find import Checkpoint
from compressor.checkpoint.layerwise_weights import StreamedWeights
from compressor.checkpoint.load import load_model
from compressor.checkpoint.resume_state import Journal
from compressor.data.sequences import TokenBatch, make_batches
from compressor.machine.distributed import Processes
from compressor.machine.progress import Progress
from compressor.method import Measuring
from compressor.model.adapter import structure_of
from compressor.observe import forward, layerwise, measuring
from compressor.observe.divergence import kl_divergences
from compressor.observe.measuring import Candidate, Measured, measured_of
from compressor.plugin import RoutedTokens, Rule, Statistic
from compressor.run.texts import slice_of
from compressor.testing import tiny

TYPES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "diffusion_gemma"]


class Tokens(Statistic):
    """How many tokens came."""

    own_rules: Mapping[str, Rule] = {"tokens": "total"}

    def __init__(self) -> None:
        self.tokens = 0

    def update(self, tokens: RoutedTokens) -> None:
        self.tokens += tokens.num_tokens

    def tensors(self) -> dict[str, Tensor]:
        return {"tokens": torch.tensor(self.tokens)}


def batches() -> list[TokenBatch]:
    ids = token_ids(6, 9)
    first = make_batches([ids[0], ids[1, :5], ids[2]], 2, "one")
    return [*first, *make_batches(list(ids[3:]), 2, "two")]


def sets_of(moe: MoEModel, path: str) -> list[list[int]]:
    layer = moe.layer(path)
    size = layer.num_experts // layer.num_groups
    fewer = [expert for expert in range(layer.num_experts) if expert % size]
    return [fewer, [expert for expert in range(layer.num_experts) if expert % size != size - 1]]


def wanted(moe: MoEModel) -> Measured:
    def candidates(path: str, figures: Mapping[str, Tensor]) -> list[Candidate]:
        assert figures["tokens"] > 0
        return [Candidate({"kept": kept}, {path: partial(moe.masked, {path: kept})}) for kept in sets_of(moe, path)]

    return Measured(batches(), candidates, 2)


def measured(moe: MoEModel, **options: Any) -> dict[str, dict[str, Tensor]]:
    statistics = {layer.path: Tokens() for layer in moe.layers}
    return layerwise.observe(moe, batches(), statistics, Progress(), measured=wanted(moe), **options)


def by_whole_forwards(moe: MoEModel) -> dict[str, list[list[float]]]:
    """Layer path → candidate → KL summed over the tokens of every sequence."""
    found: dict[str, list[list[float]]] = {}
    for layer in moe.layers:
        for kept in sets_of(moe, layer.path):
            sums: list[float] = []
            for batch in batches():
                plain = forward.logits(moe.model, batch)
                with moe.masked({layer.path: kept}):
                    kl = kl_divergences(plain, forward.logits(moe.model, batch))
                sums += [float(one.sum()) for one in torch.split(kl, batch.attention_mask.sum(1).tolist())]
            found.setdefault(layer.path, []).append(sums)
    return found


@pytest.mark.parametrize("model_type", TYPES)
def test_equals_whole_forwards_under_a_mask(model_type: str) -> None:
    moe = MoEModel(tiny.tiny_model(model_type).eval())
    found, slow = measured(moe), by_whole_forwards(moe)
    assert len(slow) == len(moe.layers) > 1
    for path, sums in slow.items():
        torch.testing.assert_close(
            found[path]["measured.kl"], torch.tensor(sums, dtype=torch.float64), rtol=1e-4, atol=1e-7
        )
        assert found[path]["measured.tokens"].tolist() == [9, 5, 9, 9, 9, 9]
        assert found[path]["measured.domain"].tolist() == [0, 0, 0, 1, 1, 1]
        assert [one for one, *_ in measured_of(found[path], 2)] == [{"kept": kept} for kept in sets_of(moe, path)]
    assert max(float(one["measured.kl"].sum()) for one in found.values()) > 1e-6


def whole_decisions(moe: MoEModel) -> list[dict[str, list[int]]]:
    return [{path: sets_of(moe, path)[number] for path in (layer.path for layer in moe.layers)} for number in (0, 1)]


def compared(moe: MoEModel, **options: Any) -> list[dict[str, tuple[float, float]]]:
    contexts = [
        {path: partial(moe.masked, {path: kept}) for path, kept in decision.items()}
        for decision in whole_decisions(moe)
    ]
    return layerwise.compared(moe, batches(), contexts, Progress(), **options)


@pytest.mark.parametrize("model_type", TYPES)
def test_whole_decisions_equal_whole_forwards(model_type: str) -> None:
    moe = MoEModel(tiny.tiny_model(model_type).eval())
    found = compared(moe)
    for kept, by_domain in zip(whole_decisions(moe), found, strict=True):
        for domain in ("one", "two"):
            sums, tokens = 0.0, 0
            for batch in (one for one in batches() if one.domain == domain):
                plain = forward.logits(moe.model, batch)
                with moe.masked(kept):
                    kl = kl_divergences(plain, forward.logits(moe.model, batch))
                sums, tokens = sums + float(kl.sum()), tokens + len(kl)
            assert by_domain[domain][0] == pytest.approx(sums / tokens, rel=1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def from_disk(folder: Path) -> tuple[MoEModel, StreamedWeights]:
    found = Checkpoint(str(folder), folder, False)
    model = load_model(found, device="meta")
    return MoEModel(model, structure_of(type(model), model.config)), StreamedWeights(model, found, device="cpu")


def in_memory(folder: Path) -> MoEModel:
    return MoEModel(load_model(Checkpoint(str(folder), folder, False)).eval())


def assert_equal(found: Mapping[str, Mapping[str, Tensor]], other: Mapping[str, Mapping[str, Tensor]]) -> None:
    assert found.keys() == other.keys()
    for path, figures in found.items():
        assert figures.keys() == other[path].keys()
        assert all(torch.equal(figures[name], other[path][name]) for name in figures), path


def test_from_disk_to_the_bit(folder: Path) -> None:
    moe, weights = from_disk(folder)
    assert_equal(measured(moe, weights=weights), measured(in_memory(folder)))
    assert compared(moe, weights=weights) == compared(in_memory(folder))


def test_in_two_processes(folder: Path) -> None:
    models = [in_memory(folder) for _ in range(2)]  # not in threads: while it loads, transformers has another class

    def work(processes: Processes) -> Any:
        return measured(models[processes.rank], processes=processes)

    alone = measured(in_memory(folder))
    for found in together(2, work):
        assert_equal(found, alone)


def test_interrupted_before_every_layer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What candidates of the layers passed have come to is not run again, and the figures are the same to the bit."""
    whole = measured(in_memory(folder))
    num_layers = len(whole)
    for stop in range(1, num_layers):
        journal = Journal(tmp_path / f"journal{stop}")
        journal.begin()
        moe, weights = from_disk(folder)
        load, loaded = weights.load, list[str]()

        def breaks(unit: str, load: Callable[..., None] = load, loaded: list[str] = loaded, stop: int = stop) -> None:
            if len(loaded) == stop:
                raise KeyboardInterrupt
            loaded.append(unit)
            load(unit)

        monkeypatch.setattr(weights, "load", breaks)
        with pytest.raises(KeyboardInterrupt):
            measured(moe, weights=weights, journal=journal.observation("pass"))
        moe, weights = from_disk(folder)
        read, load = list[str](), weights.load
        monkeypatch.setattr(weights, "load", lambda unit, load=load, read=read: (read.append(unit), load(unit)))
        assert_equal(measured(moe, weights=weights, journal=journal.observation("pass")), whole)
        assert len(read) == num_layers - stop
        assert_equal(measured(moe, weights=weights, journal=journal.observation("pass")), whole)  # all is known


def test_layers_that_hand_on_more_than_their_outputs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory a candidate's text then runs from the beginning; from disk that is refused."""
    whole = measured(in_memory(folder))
    monkeypatch.setattr(measuring, "comes_to_stand", lambda *_: False)
    assert_equal(measured(in_memory(folder)), whole)
    moe, weights = from_disk(folder)
    with pytest.raises(
        UnsupportedModelError, match=r"carries more from layer to layer than their outputs.*share: even"
    ):
        measured(moe, weights=weights)


def test_by_domain_by_hand() -> None:
    figures = {
        "measured.kl": torch.tensor([[1.0, 3.0, 8.0]], dtype=torch.float64),
        "measured.tokens": torch.tensor([2, 2, 4]),
        "measured.domain": torch.tensor([0, 0, 2]),
        "measured.candidates": torch.frombuffer(bytearray(b'[{"kept": [1]}]'), dtype=torch.uint8),
    }
    [(decided, kl, error)] = measured_of(figures, 3)
    assert decided == {"kept": [1]}
    assert kl.tolist()[::2] == [1.0, 2.0]  # 4 nats on 4 tokens, 8 on 4
    assert math.isnan(kl[1])
    assert error[0] == pytest.approx(math.sqrt(2 * (1 + 1)) / 4)  # each sequence is 1 nat off its mean of 2
    assert math.isnan(error[2])  # one sequence


def test_a_slice_takes_as_much_of_every_domain() -> None:
    long, short = torch.arange(300).remainder(50), torch.arange(40)
    text = [*make_batches([long] * 5, 2, "long"), *make_batches([short] * 3, 2, "short")]
    held_out = make_batches([long], 2, "other", held_out=True)
    found = slice_of([*text, *held_out], 550)
    lengths = {(batch.domain, tuple(batch.attention_mask.sum(1).tolist())) for batch in found}
    assert lengths == {("long", (256, 256)), ("short", (40, 40))}  # 256, 40, 256, 40: then there are enough
    assert torch.equal(found[0].input_ids[0], long[:256])
    assert sum(int(one.attention_mask.sum()) for one in slice_of(text, 10**6)) == 5 * 256 + 3 * 40


def test_cost_by_hand() -> None:
    assert Measuring(tokens=4000, candidates=4).forwards(32) == 66.0


def test_one_sequence_has_no_standard_error() -> None:
    """Also where rounding leaves something of its distance from the mean."""
    figures = {
        "measured.candidates": torch.tensor(list(b"[0]"), dtype=torch.uint8),
        "measured.kl": torch.tensor([[0.1 * number for number in range(1, 30)]], dtype=torch.float64),
        "measured.tokens": torch.arange(3, 32) * 7,
        "measured.domain": torch.arange(29),
    }
    [(_, kl_D, error_D)] = measured_of(figures, 29)
    assert kl_D.isfinite().all()
    assert error_D.isnan().all()
