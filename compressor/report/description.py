"""How a decision is shown to people: which of the things that it says of each layer, and what else is to be said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Json = Mapping[str, Any]
EXPERT_IDS = ("kept", "dropped")
"""What of a layer's decision are ids of experts, where its method names no others."""

SEARCH_LOSS = "loss when it goes"
"""What a search says of an expert (`Method.by_expert`): the layer's relative loss when it has let go of it."""


@dataclass(frozen=True)
class Column:
    """One thing that a decision says of a layer: a number, a word, or a list, such as of ids. Where no layer has it,
    there is no such column.

    `key` is its key, of what stands in a mapping both, such as `held_out loss`; by default the title says the same.
    `detail`: not in the terminal. `plot` names a picture on the page, by layer, which columns of one name share.
    """

    key: str
    title: str = ""
    detail: bool = False
    plot: str = ""

    @property
    def heading(self) -> str:
        return self.title or self.key.replace("_", " ")


@dataclass(frozen=True)
class Description:
    """A decision as tables, model card and page show it: by layer, and in sentences."""

    columns: Sequence[Column]
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, decision: Json) -> Description:
        """All that a decision says of its layers, numbers and words before lists; with `kept` goes `dropped`."""
        layers = [flat(layer) for layer in decision.get("layers", {}).values()]
        keys = dict.fromkeys(key for one in layers for key in (*one, *(["dropped"] if "kept" in one else ())))
        lists = [key for key in keys if all(isinstance(one.get(key), list | None) for one in layers)]
        return cls([Column(key) for key in (*(key for key in keys if key not in lists), *lists)])

    def to_json(self) -> dict[str, Any]:
        columns = [{name: value for name, value in asdict(one).items() if value} for one in self.columns]
        return {"columns": columns, "notes": list(self.notes)}


def flat(layer: Json, before: str = "") -> dict[str, Any]:
    """What a decision says of a layer, by the keys of columns."""
    found: dict[str, Any] = {}
    for key, value in layer.items():
        found |= flat(value, f"{before}{key} ") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found
