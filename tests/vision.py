"""Tiny Qwen3-VL-MoE models, with a processor made by hand: a word is a token, 32 × 32 pixels of an image are one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from compressor.data.sequences import Sequences, fingerprint
from compressor.testing import tiny

WORDS = [f"w{number}" for number in range(90)]
_FIRST, _USER, _ASSISTANT = 5, 2, 3
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|> <|image_pad|> <|vision_end|> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
)


@cache
def model() -> Any:
    """With random weights, large as all tiny ones' are; what its tower's blocks answer is added behind two layers."""
    config = tiny.tiny_config("qwen3_vl_moe")
    config.vision_config.deepstack_visual_indexes = [0, 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = tiny.model_class("qwen3_vl_moe")._from_config(config)
    tiny.randomise(found)
    return found.eval()


@cache
def tokenizer() -> Any:
    """Words, roles, and placeholders at the ids that the model's config has."""
    config = model().config
    special = {
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
        "<user>": _USER,
        "<assistant>": _ASSISTANT,
    }
    words = {word: number for number, word in enumerate(WORDS, start=_FIRST)}
    inner = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1, **words, **special}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, extra_special_tokens=[*special], chat_template=TEMPLATE, **names
    )


def processor(*, videos: bool = False) -> Any:
    """Without `videos` it needs pillow alone, and torchvision too if it is to be saved and loaded."""
    from transformers import Qwen2VLImageProcessorPil, Qwen3VLProcessor, Qwen3VLVideoProcessor
    from transformers.processing_utils import ProcessorMixin

    vision = model().config.vision_config
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    sizes |= {"temporal_patch_size": vision.temporal_patch_size}
    how = {"size": {"shortest_edge": 32**2, "longest_edge": 256**2}, **sizes}
    images = Qwen2VLImageProcessorPil(**how)
    if videos:
        return Qwen3VLProcessor(images, tokenizer(), Qwen3VLVideoProcessor(**how), chat_template=TEMPLATE)

    class Still(Qwen3VLProcessor):
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            self.image_token, self.image_token_id = "<|image_pad|>", model().config.image_token_id
            self.video_token, self.video_token_id = "<|video_pad|>", model().config.video_token_id
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return Still(images, tokenizer(), chat_template=TEMPLATE)


def by_hand(sizes: Sequence[tuple[int, int] | None], *, num_words: int = 6, seed: int = 0) -> Sequences:
    """What a processor makes of rows with an image of so many tokens in height and width, or none, and some words."""
    generator, config = torch.Generator().manual_seed(seed), model().config
    vision = config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    ids, images = [], []
    for size in sizes:
        words = torch.randint(_FIRST, _FIRST + 90, (num_words,), generator=generator).tolist()
        height, across = size or (0, 0)
        places = [config.image_token_id] * (height * across)
        shown = [config.vision_start_token_id, *places, config.vision_end_token_id] if size else []
        ids.append(torch.tensor([_USER, *shown, *words]))
        pixels = torch.randn(4 * height * across, width, generator=generator)
        beside = {
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 2 * height, 2 * across]]),
            "mm_token_type_ids": (ids[-1] == config.image_token_id).long()[None],
        }
        images.append(beside if size else None)
    return Sequences(
        "shown", tuple(ids), fingerprint(ids, images), len(ids), None, (), tuple(images), config.image_token_id
    )


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
