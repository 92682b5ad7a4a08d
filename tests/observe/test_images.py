"""Sequences with images, as a processor makes them: what is counted, from memory, from disk, and gone on with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import vision
from torch import Tensor

from compressor import MoEModel
from compressor.checkpoint.find import Checkpoint
from compressor.checkpoint.layerwise_weights import StreamedWeights
from compressor.checkpoint.load import load_model
from compressor.checkpoint.resume_state import Journal
from compressor.data.sequences import Sequences, TokenBatch, fingerprint
from compressor.evaluation.fidelity import Answers, _by_chunk
from compressor.evaluation.perplexity import perplexity
from compressor.machine.progress import Progress
from compressor.model.adapter import structure_of
from compressor.observe import layerwise
from compressor.observe.statistic import ImageTokens, JoinedStatistic
from compressor.run.texts import probe_of, slice_of
from compressor.selection.activation_sums import ExpertSums

ROWS = vision.by_hand([(2, 2), None, (2, 3), (1, 4)], num_words=5)
TEXT = Sequences("text", vision.by_hand([None] * 3, num_words=7, seed=1).ids, "", 3)
Figures = Mapping[str, Mapping[str, Tensor]]


def batches(*texts: Sequences) -> list[TokenBatch]:
    return [batch for one in texts for batch in one.batches(2)]


def observed(moe: MoEModel, shown: list[TokenBatch], **how: Any) -> Figures:
    statistics = {one.path: JoinedStatistic([ExpertSums(one), ImageTokens(one)]) for one in moe.layers}
    return layerwise.observe(moe, shown, statistics, Progress(), **how)


@cache
def in_memory() -> Figures:
    return observed(MoEModel(vision.model()), batches(ROWS, TEXT))


def assert_equal(found: Figures, other: Figures) -> None:
    assert found.keys() == other.keys()
    for path, figures in found.items():
        assert all(torch.equal(held, other[path][name]) for name, held in figures.items()), path


def test_one_sequence_a_batch_where_rows_may_have_images() -> None:
    assert [len(batch.input_ids) for batch in batches(ROWS, TEXT)] == [1, 1, 1, 1, 2, 1]
    assert [batch.images is None for batch in batches(ROWS)] == [False, True, False, False]


def test_places_of_images_are_counted_by_hand() -> None:
    """2 × 2 + 2 × 3 + 1 × 4 of them, each of which chooses two experts in each layer."""
    assert ROWS.num_image_tokens == 14
    assert ROWS.to_json()["image_tokens"] == 14
    assert "image_tokens" not in TEXT.to_json()
    for figures in in_memory().values():
        assert figures["images.tokens"].sum() == 2 * 14
        assert figures["sums.tokens"].sum(1).tolist() == [2 * ROWS.num_tokens, 2 * TEXT.num_tokens]
        assert (figures["images.tokens"] <= figures["sums.tokens"][0]).all()


def test_experts_that_images_choose_have_figures_with_images_only() -> None:
    """The same rows without their pixels and places; text comes first, so what it chooses is the same."""
    moe, [row] = MoEModel(vision.model()), vision.by_hand([(6, 6)], num_words=1).ids
    places = (row == vision.model().config.image_token_id).nonzero()[:, 0]
    without = Sequences("text", (row[: places[0]],), "", 1)
    text = observed(moe, batches(without))
    both = observed(moe, batches(vision.by_hand([(6, 6)], num_words=1)))
    found = 0
    for path, figures in both.items():
        tokens_E, only_E = figures["sums.tokens"][0], text[path]["sums.tokens"][0] == 0
        assert (tokens_E >= text[path]["sums.tokens"][0]).all()
        new_E = only_E & (figures["images.tokens"] > 0)
        assert not text[path]["sums.norm"][0][new_E].any()
        assert (figures["sums.norm"][0][new_E] > 0).all()
        assert not text[path]["images.tokens"].any()
        found += int(new_E.sum())
    assert found > 3


def test_other_pixels_are_another_text() -> None:
    images = [dict(one) if one else None for one in ROWS.images]
    assert fingerprint(ROWS.ids, images) == ROWS.fingerprint != fingerprint(ROWS.ids)
    images[0]["pixel_values"] = images[0]["pixel_values"] + 1
    assert fingerprint(ROWS.ids, images) != ROWS.fingerprint
    halves = {"pixel_values": torch.ones(2, 2, dtype=torch.bfloat16), "num_crops": torch.tensor(1)}
    assert fingerprint([], [halves]) != fingerprint([], [halves | {"num_crops": torch.tensor(2)}])


def test_perplexity_is_that_of_text_by_hand() -> None:
    """What a model answers where the next token is an image's place counts nowhere; nor do the places of others."""
    found, losses = perplexity(vision.model(), ROWS, 3), []
    for ids, images in zip(ROWS.ids, ROWS.images, strict=True):
        with torch.no_grad():
            logits_SV = vision.model()(input_ids=ids[None], **(images or {})).logits[0]
        places = [place for place in range(1, len(ids)) if ids[place] != vision.model().config.image_token_id]
        losses += [-float(logits_SV[place - 1].log_softmax(-1)[ids[place]]) for place in places]
    assert found.tokens == len(losses) == ROWS.num_tokens - 14 - 4
    assert found.mean_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    blind = dataclasses.replace(ROWS, images=(None,) * 4)
    assert abs(perplexity(vision.model(), blind, 3).mean_loss - found.mean_loss) > 1e-3


def test_answers_are_kept_for_text_alone() -> None:
    answers, [batch, *_] = Answers(), batches(ROWS)
    logits_BSV = torch.arange(batch.input_ids.shape[1] * 3.0).view(1, -1, 3)
    losses_BS = torch.arange(batch.input_ids.shape[1] - 1.0)[None]
    [(logits_NV, losses_N)] = _by_chunk(batch, logits_BSV, losses_BS)
    assert losses_N.tolist() == [0, 5, 6, 7, 8, 9, 10]  # the start; then its end, and five words, behind four places
    assert torch.equal(logits_NV, logits_BSV[0, losses_N.long()])
    answers.keep(0, batch, logits_BSV, losses_BS)
    assert len(answers.of(0)["losses_N"]) == 7


def test_a_slice_has_whole_rows() -> None:
    found = slice_of(batches(ROWS, TEXT), 10)
    assert [batch.domain for batch in found] == ["shown", "text"]
    assert torch.equal(found[0].input_ids[0], ROWS.ids[0])
    assert found[0].images is ROWS.images[0]


def test_the_probe_is_the_shortest_row_with_an_image() -> None:
    assert probe_of(batches(TEXT, ROWS), vision.model()).images is ROWS.images[0]
    assert probe_of(batches(TEXT), vision.model()).images is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vision.model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def from_disk(folder: Path) -> tuple[MoEModel, StreamedWeights]:
    found = Checkpoint(str(folder), folder, False)
    skeleton = load_model(found, device="meta")
    return MoEModel(skeleton, structure_of(type(skeleton), skeleton.config)), StreamedWeights(skeleton, found)


def loaded_in_memory(folder: Path) -> Figures:
    return observed(MoEModel(load_model(Checkpoint(str(folder), folder, False)).eval()), batches(ROWS, TEXT))


def test_from_disk_to_the_bit(folder: Path) -> None:
    moe, weights = from_disk(folder)
    assert_equal(observed(moe, batches(ROWS, TEXT), weights=weights), loaded_in_memory(folder))
    assert all(tensor.is_meta for tensor in moe.model.parameters())


def test_goes_on_in_the_layer_that_it_was_in(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower runs again, since what it hands on is no decoder layer's output; decoder layers do not."""
    journal = Journal(tmp_path / "journal")
    journal.begin()

    def run(stop: int | None) -> tuple[Figures, list[str]]:
        moe, weights = from_disk(folder)
        load, loaded = weights.load, list[str]()

        def counts(unit: str) -> None:
            if "language_model" in unit:
                if len(loaded) == stop:
                    raise KeyboardInterrupt
                loaded.append(unit)
            load(unit)

        monkeypatch.setattr(weights, "load", counts)
        how = {"weights": weights, "journal": journal.observation("pass")}
        return observed(moe, batches(ROWS, TEXT), **how), loaded

    with pytest.raises(KeyboardInterrupt):
        run(2)
    found, loaded = run(None)
    assert loaded == ["model.language_model.layers.2"]
    assert_equal(found, loaded_in_memory(folder))
