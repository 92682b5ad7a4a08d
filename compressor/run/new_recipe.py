"""A commented recipe for a model, from its config: one that `check` accepts on this machine."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from compressor.checkpoint.classes import max_positions, model_class, next_token_problem
from compressor.checkpoint.find import find_checkpoint, load_config
from compressor.checkpoint.quantization import without_quantisation
from compressor.errors import CompressorError, UnsupportedModelError
from compressor.model.adapter import structure_of
from compressor.model.moe_model import possible_counts
from compressor.plugins import Plugins
from compressor.recipe.schema import load_recipe
from compressor.run.check import check
from compressor.wording import ids_said

_TEMPLATE = Path(__file__).with_name("new_recipe.yaml.jinja")
_WAYS: Sequence[dict[str, Any]] = ({"choose": "measured"}, {}, {"criterion": "reap"}, {"criterion": "aimer"})
"""How experts are chosen: the first that the model allows, of which the last needs no text."""


def new_recipe(reference: str, plugins: Plugins, *, file: Path, trust_remote_code: bool = False) -> str:
    """The text of a recipe that goes into `file`. Raises UnsupportedModelError for a dense model, and one that can
    spare no expert; what `check` refuses in any case, as it does.
    """
    found = find_checkpoint(reference, trust_remote_code=trust_remote_code, weights=False)
    config = without_quantisation(load_config(found))
    cls = model_class(found, config)
    layers = structure_of(cls, config, plugins.adapters).layers
    most = min(layer.num_experts for layer in layers)
    fewer = sorted(set.intersection(*({*possible_counts(layer)} for layer in layers)) & {*range(most)})
    top_k = max(layer.top_k for layer in layers)
    if not fewer:
        raise UnsupportedModelError(f"{reference}: none of its {most} experts can go: each token chooses {top_k}.")
    keep = max((count for count in fewer if count <= 0.75 * most), default=fewer[0])
    facts: dict[str, Any] = {
        "model": reference,
        "trust_remote_code": trust_remote_code,
        "file": file,
        "num_layers": len(layers),
        "most": most,
        "top_k": top_k,
        "keep": keep,
        "possible": ids_said(fewer),
        "length": min(512, max_positions(config) or 512),
        "has_tokenizer": found.has_tokenizer,
        "measures": found.has_tokenizer and next_token_problem(cls, config) is None,
        "output": f"{Path(reference).resolve().name.lower()}-r{keep}",
    }
    problems: list[CompressorError] = []
    for way in _WAYS if found.has_tokenizer else _WAYS[-1:]:
        try:
            return _written(facts | way, plugins)
        except CompressorError as error:
            problems.append(error)
    raise problems[0]


def _written(facts: dict[str, Any], plugins: Plugins) -> str:
    """The recipe, with what `check` says of it."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["quoted"] = lambda text: text if yaml.safe_load(text) == text else json.dumps(text)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    recipe = load_recipe(yaml.safe_load(template.render(facts)), methods=plugins.methods, criteria=plugins.criteria)
    said = [line for one in check(recipe, plugins.adapters).said for line in textwrap.wrap(one, 118)]
    return template.render({**facts, "said": said})
