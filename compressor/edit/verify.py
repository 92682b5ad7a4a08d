"""Edit a model, and check that it then computes what was decided; save it, and check that it is the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.extra_layers import LeftOut
from compressor.checkpoint.find import Checkpoint
from compressor.checkpoint.headers import verify_files
from compressor.checkpoint.load import load_model
from compressor.checkpoint.output import OutputFolder
from compressor.checkpoint.save import save_checkpoint
from compressor.data.sequences import TokenBatch
from compressor.errors import VerificationError
from compressor.evaluation.size import size
from compressor.model.adapter import Adapter
from compressor.model.moe_model import Kept, MoEModel, Removal
from compressor.observe import forward

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_TIES_ALLOWED = 0.25


def ids_left(ids: Kept, removals: Sequence[Removal]) -> Kept:
    """Layer path → those of the ids, given in the experts' order, that are left after these removals."""
    for removal in removals:
        ids = {path: [of_layer[expert] for expert in removal.kept[path]] for path, of_layer in ids.items()}
    return ids


def refuse_not_finite_answers(answers_NV: Tensor, name: str) -> None:
    """Raise VerificationError where an edited model answers NaN or infinity, though the untouched one did not."""
    if not torch.isfinite(answers_NV).all():
        raise VerificationError(f"{name}: the edited model answers NaN or infinity to calibration text.")


def compare_answers(expected_NV: Tensor, found_NV: Tensor) -> dict[str, float]:
    """Relative error of each token's logits. Experts that tie within rounding, common in half precision, may be chosen
    anew, which spreads by attention: a quarter of the tokens may differ, wrong slices change nearly all.
    """
    expected, found = expected_NV.double(), found_NV.double()
    error_N = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    tolerance = _TOLERANCE[expected_NV.dtype]
    share = float((~(error_N <= tolerance)).double().mean())
    if share > _TIES_ALLOWED:
        raise VerificationError(
            f"the edited model does not answer as decided (as if masked, or skipped with weight 0): {share:.1%} of "
            f"tokens differ by more than {tolerance:g} (largest relative difference {float(error_N.max()):.3g})."
        )
    return {"edited_against_preview": float(error_N.max()), "tolerance": tolerance, "share_beyond": share}


def save_verified(
    moe: MoEModel,
    found: Checkpoint | None,
    folder: OutputFolder,
    probe: TokenBatch,
    left_out: LeftOut | None = None,
    adapters: Sequence[Adapter] = (),
    answers: Tensor | None = None,
    *,
    into: Path | None = None,
) -> Checkpoint:
    """Write the checkpoint (`into` another folder than the output's path) and load it again: every tensor and logit
    must be the live model's (`answers` [N, V], if known), by the bit. Raises VerificationError where not,
    CheckpointError if a tensor is missing or unexpected.
    """
    into = into or folder.path
    folder.require_space(size(moe.model).bytes)
    counts = moe.structure.counts_in(moe.config)
    save_checkpoint(moe.model, found.folder if found else None, into, counts, left_out, moe.config_changes)
    verify_files(into)
    written = Checkpoint(str(folder.target), into, found.trust_remote_code if found else False)
    where = getattr(moe.model, "hf_device_map", None) or str(next(moe.model.parameters()).device)
    again = load_model(written, device=where, like=moe.model, adapters=adapters)
    live, loaded = moe.model.state_dict(), again.state_dict()
    different = [name for name in live if name not in loaded or not torch.equal(live[name], loaded[name])]
    if different or len(live) != len(loaded):
        raise VerificationError(
            f"{folder.target}: {len(different)} tensor(s) differ from what was saved: {', '.join(different[:3])}."
        )
    expected = forward.logits(moe.model, probe) if answers is None else answers
    answered = forward.logits(again, probe)
    if not torch.equal(expected, answered):
        difference = float((expected.float() - answered.float()).abs().max())
        raise VerificationError(
            f"{folder.target}: loaded again, it does not answer as the live model (a logit by {difference:.3g})."
        )
    return written


def random_batch(model: Any) -> TokenBatch:
    """Random ids, where no text is at hand: enough to compare two models bit by bit."""
    ids = torch.randint(
        model.get_input_embeddings().weight.shape[0], (2, 64), generator=torch.Generator().manual_seed(0)
    )
    return TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))
