"""Rows with images → token ids, and what else the model's forward is given, by the model's own processor: each row is a
sequence of its own. Images are files, base64, or what a dataset has decoded; nothing is fetched. Not covered: videos.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.data.chats import has_images, template_and_values
from compressor.data.sequences import Sequences, fingerprint
from compressor.data.sources import BaseSource, Chat, DatasetSource, Document, Messages, RowsSource
from compressor.errors import CalibrationError

_FILES = ("processor_config.json", "preprocessor_config.json")
UNSEEN = (
    "the model reads images, and its calibration text has none: experts that images use look unused: 0 image tokens "
    "were seen. Give rows with `images: true`"
)


def reads_images(config: Any) -> bool:
    """Whether a model of this config does."""
    return getattr(config, "vision_config", None) is not None


def images_json(config: Any, calibration: Sequence[Sequences]) -> dict[str, Any]:
    """What a record says of a model that reads images: how many tokens of its calibration text stand for one."""
    tokens, of_images = (sum(getattr(one, key) for one in calibration) for key in ("num_tokens", "num_image_tokens"))
    if not tokens or not reads_images(config):
        return {}
    said = f"{of_images:,} of {tokens:,} calibration tokens stand for images ({of_images / tokens:.1%})"
    return {"images": {"tokens": tokens, "image_tokens": of_images, "said": said if of_images else UNSEEN}}


def image_reader(given: Any, folder: Path | None, config: Any, *, trust_remote_code: bool) -> ImageReader:
    """What reads images for a model: the processor `given`, or that of its folder. Raises CalibrationError if none."""
    missing = [name for name in ("PIL", "torchvision") if importlib.util.find_spec(name) is None]
    if not reads_images(config):
        raise CalibrationError("the model reads no images (its config has no `vision_config`): leave `images` out.")
    token = getattr(config, "image_token_id", getattr(config, "media_placeholder_token_id", None))  # the latter Kimi's
    if token is None:
        raise CalibrationError("the model's config does not say which token stands for an image (`image_token_id`).")
    if "PIL" in missing:
        raise CalibrationError("images are read by pillow, which is not installed: pip install pillow.")
    if hasattr(given, "image_processor"):
        return ImageReader(given, token)
    if folder is None or not any((folder / name).exists() for name in _FILES):
        raise CalibrationError(
            f"there is no processor, which reads images: put {' or '.join(_FILES)} of the model that this one was made "
            f"from into its folder, or give a live model's processor as its tokenizer."
        )
    from transformers import AutoProcessor

    try:
        found = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # many kinds, as for configs
        said = str(error).strip().split(". ")[0].rstrip(".")
        advice = " It may need torchvision, which is not installed." if missing else ""
        raise CalibrationError(f"{folder}: its processor cannot be loaded: {said}.{advice}") from error
    return ImageReader(found, token)


@dataclass(frozen=True)
class ImageReader:
    """A model's processor, and the id that stands in its text where an image is."""

    processor: Any
    image_token: int

    @property
    def tokenizer(self) -> Any:
        """The processor's."""
        return self.processor.tokenizer

    def read(self, source: RowsSource, documents: Iterable[Document]) -> Sequences:
        """A sequence for each row, cut at `length`; rows whose images take more are left out, as the notes say. Raises
        CalibrationError for an image that cannot be read, with its row, and where no row is left.
        """
        ids: list[Tensor] = []
        images: list[Mapping[str, Tensor] | None] = []
        too_long: list[int] = []
        for ids_S, beside in (self._of_row(source, document) for document in documents):
            needed = int((ids_S == self.image_token).nonzero().max()) + 1 if beside else 0
            if needed > source.length:
                too_long.append(needed)
            elif len(ids_S) >= 2:
                cut = {name: one[:, : source.length] for name, one in beside.items() if one.shape == (1, len(ids_S))}
                ids.append(ids_S[: source.length])
                images.append({**beside, **cut} or None)
            if len(ids) == source.samples:
                break
        if not ids:
            why = f"images take {min(too_long)} tokens or more: raise `length:`" if too_long else "it is empty"
            raise CalibrationError(f"source {source.title!r} has no row of {source.length} tokens or less: {why}.")
        note = f"source {source.title!r}: rows left out, whose images take over {source.length} tokens: {len(too_long)}"
        notes = (note,) if too_long else ()
        about = (source.title, tuple(ids), fingerprint(ids, images), source.samples, None, notes)
        return Sequences(*about, tuple(images), self.image_token)

    def _of_row(self, source: RowsSource, document: Document) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The ids [S] of a row, and what the processor gives beside them: nothing where there is no image."""
        if not isinstance(document, Chat):
            held = self.tokenizer("".join(document.pieces), add_special_tokens=source.special_tokens, verbose=False)
            return torch.tensor(held["input_ids"], dtype=torch.int64), {}
        messages, where = with_images(source, document), f"source {source.title!r}: {document.where}"
        owner = self.processor if self.processor.chat_template else self.tokenizer
        template, how = template_and_values(owner, self.tokenizer, document, source.template, source.title)
        how |= {"chat_template": template, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        try:
            found = dict(self.processor.apply_chat_template(messages, **how))
        except Exception as error:  # templates and processors raise what they like
            raise CalibrationError(f"{where}: the model's processor refuses it: {error}") from error
        beside = {name: held for name, held in found.items() if name not in ("input_ids", "attention_mask")}
        if not has_images(messages):
            return found["input_ids"][0], {}
        if not (found["input_ids"] == self.image_token).any():
            raise CalibrationError(f"{where}: its images leave no token {self.image_token}, the model's for images.")
        if odd := [name for name, held in beside.items() if not isinstance(held, Tensor)]:
            raise CalibrationError(f"{where}: the processor makes no tensor of {odd[0]}, so it cannot be handed on.")
        return found["input_ids"][0], beside


def check_images(source: BaseSource, seed: int) -> None:
    """Raise CalibrationError where an image of a row that will be read is not there, or none; not of datasets."""
    if isinstance(source, RowsSource) and source.images and not isinstance(source, DatasetSource):
        for one in itertools.islice(source.documents(seed=seed, split="train"), source.samples):
            _ = with_images(source, one) if isinstance(one, Chat) else None


def with_images(source: RowsSource, chat: Chat) -> Messages:
    """The messages with their images read; parts without one take the row's `images` in order, and where no part is an
    image, these stand before what the user says first. Raises CalibrationError, with the row.
    """
    where, given = f"source {source.title!r}: {chat.where}", chat.others.get("images") or []
    given = given if isinstance(given, list) else [given]
    messages = [{**message, "content": _parts(message.get("content") or [])} for message in chat.messages]
    if not has_images(messages):
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"] = [*({"type": "image"} for _ in given), *first["content"]]
    rest = iter(given)
    for message in messages:
        message["content"] = [_read(part, rest, source.image_folder, where) for part in message["content"]]
    if left := len(list(rest)):
        raise CalibrationError(f"{where}: {left} of its {len(given)} images have no part of the chat.")
    return messages


def _parts(content: Any) -> list[dict[str, Any]]:
    parts = content if isinstance(content, list) else [content]
    return [part if isinstance(part, dict) else {"type": "text", "text": str(part)} for part in parts]


def _read(part: dict[str, Any], rest: Iterator[Any], folder: Path | None, where: str) -> dict[str, Any]:
    """A part of a message; an image in RGB, turned as its camera was."""
    from PIL import Image
    from transformers.image_utils import load_image

    if part.get("type") == "text":
        return part
    value = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
    value = next(rest, None) if value is None else value
    if part.get("type") != "image" or value is None:
        raise CalibrationError(f'{where}: expected a text or {{"type": "image", "path": "cat.png"}}, found {part}.')
    if isinstance(value, Mapping):  # as a dataset has it undecoded
        value = io.BytesIO(value["bytes"]) if value.get("bytes") else value.get("path")
    if str(value).startswith(("http://", "https://")):
        raise CalibrationError(f"{where}: the image is at {value}, and nothing is fetched: download it first.")
    if isinstance(value, str) and not value.startswith("data:"):
        if folder is None:
            raise CalibrationError(f"{where}: the image {value[:80]!r} would be beside a dataset that is not here.")
        value = folder / value
    name = f" {value}" if isinstance(value, Path) else ""
    try:
        with value.open("rb") if isinstance(value, Path) else nullcontext(value) as file:
            return {"type": "image", "image": load_image(Image.open(file) if hasattr(file, "read") else file)}
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        raise CalibrationError(f"{where}: the image{name} cannot be read: {str(error)[:200]}") from error
