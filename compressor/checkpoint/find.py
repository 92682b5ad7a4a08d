"""Find a checkpoint, a folder of safetensors files with a config.json as transformers writes it, and read its config.

Pickled weights are never read.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compressor.checkpoint.files import SINGLE, is_weights, read_index, refuse_adapter
from compressor.checkpoint.headers import Shard, verify_files
from compressor.checkpoint.hub import download_side_files, download_weights, missing_weights
from compressor.checkpoint.quantization import MODELOPT, quantisation_of, quantiser
from compressor.errors import CheckpointError
from compressor.wording import is_hub_id

DEMO = "demo"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint found: how the user called it, the local folder, whether its Python code may run, and whether the
    folder is the hub's cache of it. A folder that is written anew is another checkpoint: its headers are read once.
    """

    reference: str
    folder: Path
    trust_remote_code: bool = False
    is_of_hub: bool = False

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder holds a tokenizer's files."""
        return any((self.folder / name).exists() for name in _TOKENIZER_FILES)

    @cached_property
    def shards(self) -> list[Shard]:
        """The headers of its files, verified; see `headers.verify_files`."""
        return verify_files(self.folder)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in its files."""
        return sum(sum(shard.sizes.values()) for shard in self.shards)

    @property
    def has_weights(self) -> bool:
        """Whether all weights are here: of a hub model all else is downloaded first, to look at it."""
        names = {*(read_index(self.folder) or {"": SINGLE}).values()}
        return all((self.folder / name).exists() for name in names)

    @property
    def awaits_weights(self) -> bool:
        """Whether no weights are here yet, in any format; of a hub model, not all of them."""
        if self.is_of_hub:
            return not self.has_weights
        return not any(is_weights(path.name) for path in self.folder.iterdir())

    @property
    def quantisation(self) -> dict[str, Any] | None:
        """What config.json says of quantisation, or else modelopt's file beside it; None where it is not quantised."""
        found = quantisation_of(read_config(self.folder))
        if found is None and (self.folder / MODELOPT).exists():
            about = read_config(self.folder, MODELOPT).get("quantization", {})
            if not isinstance(about, dict):
                where = f"{self.folder / MODELOPT}: `quantization`"
                raise CheckpointError(f"{where}: expected a JSON object, found {type(about).__name__}.")
            if about.get("quant_algo", MODELOPT) is not None:  # None where only the cache is quantised
                found = {"quant_method": "modelopt", **about}
        return found


def find_checkpoint(reference: str, *, trust_remote_code: bool = False, weights: bool = True) -> Checkpoint:
    """Find a model: `demo`, a local folder, or a hub id, which is downloaded into the hub's cache; all but weights with
    `weights` False. Raises CheckpointError where there is none, it cannot be downloaded or read, or an adapter lies in
    it.
    """
    if reference == DEMO:
        from compressor.data.demo import model_folder

        return Checkpoint(reference, model_folder())
    path = Path(os.path.expanduser(reference))
    if os.path.isdir(path):
        refuse_adapter(path, reference)
        return Checkpoint(reference, path, trust_remote_code)
    if os.path.exists(path):
        raise CheckpointError(
            f"{reference} is a file; expected the folder of a checkpoint (config.json and *.safetensors)."
        )
    if not is_hub_id(reference):
        raise CheckpointError(
            f"{reference}: there is no such folder, nor is it a hub id (`owner/name`); the built-in model is `{DEMO}`."
        )
    found = Checkpoint(reference, download_side_files(reference), trust_remote_code, is_of_hub=True)
    refuse_adapter(found.folder, reference)
    if weights:
        return with_weights(found)
    missing_weights(reference, found.folder)
    return found


def with_weights(found: Checkpoint) -> Checkpoint:
    """The checkpoint, its weights downloaded where they are on the hub. Raises CheckpointError as above."""
    if found.is_of_hub:
        download_weights(found.reference, found.folder)
    return found


def load_config(checkpoint: Checkpoint) -> Any:
    """The model's config as transformers reads it. Raises CheckpointError where there is none or it is damaged."""
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = read_config(checkpoint.folder)
    code = raw.get("auto_map")
    if code and not checkpoint.trust_remote_code and raw.get("model_type") not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{checkpoint.reference}: the model's code comes with its checkpoint "
            f"({code.get('AutoConfig') if isinstance(code, dict) else code}). It "
            f"runs only with `trust_remote_code: true` in the recipe, or --trust-remote-code; read it first."
        )
    if raw.get("transformers_weights"):
        raise CheckpointError(
            f"{checkpoint.reference}: its config.json names a file of weights itself (`transformers_weights`), which "
            f"other readers do not know of. Save it once with transformers' `save_pretrained`."
        )
    try:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
    except Exception as error:  # transformers raises many kinds for a config it does not know
        raise CheckpointError(
            f"{checkpoint.reference}: transformers cannot read config.json (model_type {raw.get('model_type')!r}): "
            f"{error}"
        ) from error


def quantiser_of(checkpoint: Checkpoint) -> Any:
    """What dequantises weights while they are read, None if unquantised. UnsupportedModelError: cannot be read so."""
    quantisation = checkpoint.quantisation
    return None if quantisation is None else quantiser(quantisation, checkpoint.reference)


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """config.json, or another, as it stands. Raises CheckpointError if it is not there or no JSON object."""
    path = folder / name
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no {name}, so this is no checkpoint.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(raw).__name__}.")
    return raw
