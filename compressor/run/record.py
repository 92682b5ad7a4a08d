"""What a run, or a decision that is applied, leaves behind: names of files, and pieces of the record as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoint import classes
from compressor.checkpoint.atomic_files import write_json
from compressor.checkpoint.extra_layers import LeftOut
from compressor.errors import shortened
from compressor.model.moe_model import Kept, MoEModel
from compressor.model.structure import MoELayer
from compressor.model.uneven import uneven_counts
from compressor.report.card import model_card
from compressor.report.html import page, summary

FORMAT = 2
"""Of record.json and decision.json. In format 1 `kept` and `dropped` of every pass were in the original's ids, now they
are in those that the pass saw, like all other ids; for one pass that is the same.
"""
RECORD = "record.json"
DECISION = "decision.json"
STATISTICS = "statistics.safetensors"


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` returns: the record (as in record.json), the folder written, and the smaller model, which is None
    where its weights are on disk only, as is the tokenizer where a run before had written all of it already.
    """

    record: dict[str, Any]
    folder: Path | None
    model: Any
    tokenizer: Any | None

    def __repr__(self) -> str:
        passes = ", ".join(done["method"] for done in self.record.get("passes", []))
        reference = shortened(self.record["model"]["reference"], 60)
        return f"CompressionResult({reference} → {self.folder or 'in memory'}: {passes or 'no pass'})"

    def _repr_html_(self) -> str:
        return summary(self.record)


def original_ids_json(ids: Kept, all_ids: Kept) -> dict[str, Any]:
    """What an entry says of the ids in its decision: what the original model calls these experts, of the layers from
    which the passes before have taken some.
    """
    fewer = {path: list(of_layer) for path, of_layer in ids.items() if of_layer != all_ids[path]}
    return {"original_ids": fewer} if fewer else {}


def left_out_json(left_out: LeftOut | None) -> dict[str, Any]:
    return {"left_out": left_out.to_json()} if left_out else {}


def model_json(config: Any, auto_class: str, layers: Sequence[MoELayer]) -> dict[str, Any]:
    """What a record says of a model, beside its name and fingerprint."""
    return {
        "architecture": classes.architecture(config),
        "model_type": config.model_type,
        "auto_class": auto_class,
        "routers": sorted({layer.router_kind for layer in layers}),
    }


def layers_json(layers: Sequence[MoELayer]) -> list[dict[str, Any]]:
    return [{"path": layer.path, "num_experts": layer.num_experts, "top_k": layer.top_k} for layer in layers]


def counts_and_rules_json(moe: MoEModel) -> dict[str, Any]:
    """What a reader of the checkpoint has to know: layers of different counts, and experts that are skipped."""
    counts, rules = uneven_counts(moe.config), moe.skip_rules
    skipping = {path: rule.to_json() for path, rule in rules.items()}
    return ({"uneven": counts} if counts else {}) | ({"skipping": skipping} if rules else {})


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """The record, its page and the model card, in an output's folder."""
    write_json(folder / "compressor" / RECORD, record)
    (folder / "compressor" / "report.html").write_text(page(record), encoding="utf-8")
    (folder / "README.md").write_text(model_card(record), encoding="utf-8")
