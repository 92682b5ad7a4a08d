"""Our own key of a model's config: what a checkpoint is that its class cannot say.

    "compressor": {"format": 1, "num_experts": {LAYER: count}, "skipping": {"version": 1, "layers": {LAYER: {…}}}}

Either part may be missing; without both the key is not there. Transformers carries keys that it does not know from file
to file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.errors import CheckpointError

KEY = "compressor"
FORMAT = 1
_PARTS = {"num_experts": "{layer path: count}", "skipping": '{"version": 1, "layers": {layer path: rule}}'}


def read_entry(config: Any) -> dict[str, Any]:
    """What a config says under our key, by part. Raises CheckpointError where damaged or of a newer version."""
    entry = getattr(config, KEY, None)
    if entry is None:
        return {}
    is_ours = isinstance(entry, Mapping) and type(entry.get("format")) is int and entry["format"] == FORMAT
    parts = {name: part for name, part in entry.items() if name != "format"} if is_ours else {}
    for name, part in parts.items() or [("num_experts", None)]:
        if name not in _PARTS or not isinstance(part, Mapping):
            expected = f'"{name}": {_PARTS[name]}' if name in _PARTS else " and ".join(f'"{one}"' for one in _PARTS)
            raise CheckpointError(
                f'config.json: `{KEY}` should be {{"format": {FORMAT}, {expected}}}, found {entry!r}. A newer version '
                f"of moe-compressor may read it."
            )
    return parts


def write_entry(config: Any, name: str, part: Mapping[str, Any] | None) -> None:
    """Replace one part of our key, in place; None or an empty one takes it out."""
    parts = {**read_entry(config), name: part}
    parts = {key: value for key, value in parts.items() if value}
    if parts:
        setattr(config, KEY, {"format": FORMAT, **parts})
    elif hasattr(config, KEY):
        delattr(config, KEY)
