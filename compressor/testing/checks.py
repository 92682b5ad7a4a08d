"""What every model, adapter and method must pass, as functions for anybody's tests.

    from compressor.testing import check_model
    report = check_model(model, inputs)      # a tiny random model of your architecture, and what its forward takes
    report.raise_for_failures()

Every check compares the model with itself: experts removed against the same experts masked, a checkpoint read back
against the live model, figures against the blocks' own outputs. Nothing is known of any architecture.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compressor.checkpoint.find import Checkpoint, read_config
from compressor.checkpoint.headers import verify_files
from compressor.checkpoint.layerwise_weights import StreamedWeights
from compressor.checkpoint.load import align, load_model
from compressor.checkpoint.save import save_checkpoint
from compressor.data.sequences import TokenBatch
from compressor.edit.checkpoint_edit import meta_model, plan_edit
from compressor.errors import CompressorError, UnsupportedModelError, VerificationError
from compressor.model.adapter import Adapter, structure_of
from compressor.model.expert_products import own_tensors
from compressor.model.masking import dropped_experts
from compressor.model.modules import is_inside, named_tensors
from compressor.model.moe_model import Kept, MoEModel, count_problem
from compressor.model.routed_tokens import RealTokens, RoutedTokens
from compressor.model.rule_fitting import weights_by_id
from compressor.model.skipping.rule import SkipRule
from compressor.model.skipping.state import is_decorated
from compressor.model.skipping.usage import Counter
from compressor.model.structure import MoELayer
from compressor.observe import forward, layerwise
from compressor.testing.tiny import answers

_EXACT = {torch.float32: 5e-6, torch.float64: 1e-12, torch.bfloat16: 5e-2, torch.float16: 5e-3}
"""Largest relative difference of a token's answer that rounding explains."""
_TIES = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 0.5, torch.float16: 0.25}
"""Share of tokens that may differ by more. Experts tie often in half precision, where a tie may fall anew; of a few
dozen tokens one that does so changes all that follow it in its sequence.
"""


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it passed (None: does not apply), and what was measured or why it does not apply."""

    name: str
    passed: bool | None
    detail: str = ""

    def __str__(self) -> str:
        mark = {True: "passed", False: "FAILED", None: "does not apply"}[self.passed]
        return f"{self.name}: {mark}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Report:
    """All checks of one model."""

    model: str
    checks: list[Check] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.passed is False]

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def __str__(self) -> str:
        return "\n".join([self.model, *(f"  {check}" for check in self.checks)])

    def raise_for_failures(self) -> None:
        """Raise VerificationError, naming every check that failed."""
        if self.failed:
            raise VerificationError(f"{self.model}: " + "; ".join(str(check) for check in self.failed))


def check_model(
    model: Any,
    inputs: Mapping[str, Tensor],
    *,
    load: Callable[[Path], Any] | None = None,
    statistics: bool = True,
    trust_remote_code: bool = False,
    adapters: Sequence[Adapter] = (),
) -> Report:
    """Run all checks on a copy of a live model. `inputs` are arguments of its forward, at least two sequences; `load`
    reads a folder as a user without this library would (`from_pretrained`). `trust_remote_code` lets its code run
    again; `adapters` may explain it. Raises UnsupportedModelError without a structure; all else ends up in the report.
    """
    load = load or partial(type(model).from_pretrained, dtype=model.dtype)
    subject = _Subject(model, inputs, load, trust_remote_code, adapters)
    report = Report(type(model).__name__)
    for name, run in _CHECKS.items():
        if name == "statistics" and not statistics:
            continue
        try:
            report.checks += run(subject)
        except CompressorError as error:
            report.checks.append(Check(name, False, str(error)))
        except Exception as error:  # whatever the model's own code raises is a failure with a name
            report.checks.append(Check(name, False, f"{type(error).__name__}: {error}"))
    return report


@dataclass
class _Subject:
    model: Any
    inputs: Mapping[str, Tensor]
    load: Callable[[Path], Any]
    trust_remote_code: bool
    adapters: Sequence[Adapter]

    def __post_init__(self) -> None:
        self.moe = self.copy()
        self.untouched = answers(self.moe.model, self.inputs)

    def module(self, path: str) -> nn.Module:
        return self.moe.model.get_submodule(path)

    @property
    def dtype(self) -> torch.dtype:
        """The experts' dtype: parts of a model may have others, and its answers too."""
        return next(self.module(self.moe.layers[0].experts).parameters()).dtype

    @property
    def real(self) -> RealTokens:
        """No token is padding."""
        ids = self.inputs["input_ids"]
        return RealTokens(torch.ones(ids.numel(), dtype=torch.bool, device=ids.device))

    def explained(self, model: Any) -> MoEModel:
        return MoEModel(model, structure_of(type(model), model.config, self.adapters))

    def copy(self) -> MoEModel:
        return self.explained(copy.deepcopy(self.model).eval())

    def masked(self, kept: Kept, *, top_k: int | None = None) -> Tensor:
        """What the model answers where only these experts can be chosen."""
        with self.moe.masked(kept, top_k=top_k):
            return answers(self.moe.model, self.inputs)

    def edited(self, kept: Kept, **how: Any) -> tuple[MoEModel, Tensor]:
        """A copy that keeps these experts, and what it answers."""
        moe = self.copy()
        moe.keep(kept, **how)
        return moe, answers(moe.model, self.inputs)

    def load_with_compressor(self, folder: Path) -> Any:
        dtype, found = str(self.dtype).removeprefix("torch."), Checkpoint(str(folder), folder, self.trust_remote_code)
        return load_model(found, dtype=dtype, adapters=self.adapters)

    def saved(self, name: str, moe: MoEModel, folder: Path, load: Callable[[Path], Any]) -> Iterator[Check]:
        save(moe, folder)
        again = load(folder).eval()
        align(again)
        _same_implementations(moe.model, again)
        live, loaded = moe.model.state_dict(), again.state_dict()
        different = [key for key in live if key not in loaded or not torch.equal(live[key], loaded[key])]
        if different or len(live) != len(loaded):
            yield Check(name, False, f"{len(different)} tensors differ: {', '.join(different[:3])}")
            return
        yield _equal(name, answers(again, self.inputs), answers(moe.model, self.inputs))
        text = _generated(moe.model, self.inputs)
        if text is None:
            yield Check(f"{name}: generate", None, "this class does not generate from text alone")
        else:
            found = _generated(again, self.inputs)
            yield Check(f"{name}: generate", found is not None and torch.equal(text, found))


def _keep_all(subject: _Subject) -> Iterator[Check]:
    """Removing nothing changes no bit."""
    moe = subject.copy()
    moe.keep({layer.path: range(layer.num_experts) for layer in moe.layers})
    yield _equal("keep all", answers(moe.model, subject.inputs), subject.untouched)


def _removed(subject: _Subject) -> Iterator[Check]:
    """The same number everywhere: removed = masked, saved = live, with the model's own classes, and generate()."""
    kept = kept_evenly(subject.moe)
    if kept is None:
        yield Check("removed = masked", None, "no smaller number of experts is possible in all layers")
        return
    unchanged = "masking experts changes nothing, so nothing can be compared"
    yield from _edited(subject, kept, "removed = masked", "saved", unchanged)


def _edited(
    subject: _Subject, kept: Kept, name: str, saved: str, unchanged: str | None = None, **how: Any
) -> Iterator[Check]:
    """Removed as masked, saved as live; a fault if masking changes nothing, where that is said by `unchanged`."""
    masked = subject.masked(kept, top_k=how.get("top_k"))
    if unchanged and torch.equal(masked, subject.untouched):
        yield Check(name, False, unchanged)
        return
    moe, found = subject.edited(kept, **how)
    yield _close(name, found, masked)
    with tempfile.TemporaryDirectory() as folder:
        yield from subject.saved(saved, moe, Path(folder), subject.load)


def _top_k_lowered(subject: _Subject) -> Iterator[Check]:
    """Fewer experts per token, in the config too."""
    layer = subject.moe.layers[0]
    if layer.top_k_fixed or min(each.top_k for each in subject.moe.layers) < 2:
        yield Check("top-k lowered", None, f"every token chooses {layer.top_k}, whatever the config says")
        return
    kept = {each.path: range(each.num_experts) for each in subject.moe.layers}
    unchanged = "a lower top-k changes nothing"
    yield from _edited(subject, kept, "top-k lowered", "top-k saved", unchanged, top_k=layer.top_k - 1)


def _uneven(subject: _Subject) -> Iterator[Check]:
    """Other numbers in other layers: live, saved, read back twice by `compressor`, and by nobody else."""
    kept = kept_unevenly(subject.moe)
    if kept is None:
        yield Check("uneven", None, "needs two MoE layers, and two numbers that are possible in them")
        return
    masked = subject.masked(kept)
    moe, found = subject.edited(kept)
    yield _close("uneven", found, masked)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        yield from subject.saved("uneven saved", moe, Path(first), subject.load_with_compressor)
        again = subject.explained(subject.load_with_compressor(Path(first)))
        yield from subject.saved("uneven saved twice", again, Path(second), subject.load_with_compressor)
        try:
            subject.load(Path(first))
            yield Check("uneven refused elsewhere", False, "it loads without this library, as another model")
        except Exception as error:  # transformers' own, of several kinds
            yield Check("uneven refused elsewhere", True, type(error).__name__)


def _padded(subject: _Subject) -> Iterator[Check]:
    """Other numbers in other layers, as a checkpoint that loads anywhere."""
    kept = kept_unevenly(subject.moe)
    problem = next((layer.padding_problem for layer in subject.moe.layers if layer.padding_problem), None)
    if kept is None or problem:
        yield Check("padded", None, problem or "needs two MoE layers")
        return
    yield from _edited(subject, kept, "padded", "padded saved", padded=True)


def _on_disk(subject: _Subject) -> Iterator[Check]:
    """Read layer by layer it answers as in memory; edited on disk it holds what the live edit saves, by the byte."""
    wanted = {"": kept_evenly(subject.moe), " (uneven)": kept_unevenly(subject.moe)}
    with tempfile.TemporaryDirectory() as name:
        source = Checkpoint(subject.model.config.model_type, Path(name) / "source", subject.trust_remote_code)
        subject.model.save_pretrained(source.folder)
        loaded = load_model(source, adapters=subject.adapters)
        yield _layer_by_layer(subject, source, loaded)
        before = meta_model(source, subject.adapters)
        for suffix, kept in wanted.items():
            if kept is None:
                yield Check(f"edited on disk{suffix}", None, "no such numbers of experts are possible")
                continue
            live, edited = Path(name) / f"live{suffix}", Path(name) / f"edited{suffix}"
            moe, after = subject.explained(copy.deepcopy(loaded)), copy.deepcopy(before)
            moe.keep(kept)
            after.keep(kept)
            try:
                edit = plan_edit(source, before, after)
            except UnsupportedModelError as error:
                yield Check(f"edited on disk{suffix}", None, str(error))
                continue
            moe.config._name_or_path = str(source.folder)
            save(moe, live)
            edited.mkdir()
            edit.write(edited)
            different = _differing_tensors(edited, live, source.folder)
            if read_config(live) != read_config(edited):
                different.append("config.json")
            yield Check(f"edited on disk{suffix}", not different, ", ".join(different[:3]))


def _layer_by_layer(subject: _Subject, source: Checkpoint, loaded: Any) -> Check:
    weights = StreamedWeights(load_model(source, device="meta", adapters=subject.adapters), source)
    outside = [layer.path for layer in subject.moe.layers if not is_inside(layer.path, *weights.units)]
    if outside:
        return Check("read layer by layer", None, f"{outside[0]} is in no list of layers")
    ids, found = subject.inputs["input_ids"], []
    batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))
    take, no_progress = (lambda _, output: found.append(forward.answers_at(batch, output))), (lambda done, total: None)
    layerwise.forward(weights.model, [batch], take, no_progress, weights=weights)
    return _equal("read layer by layer", found[0], forward.logits(loaded, batch))


def _skipping(subject: _Subject) -> Iterator[Check]:
    """Skipped experts as with a weight of 0, over every experts implementation; FLOPs saved; saved and loaded."""
    choices = _choices(subject)
    if not choices:
        yield Check("skipping", None, "no token chooses two experts or more, so there is nothing to skip")
        return
    rules = {path: _middling_rule(*found) for path, found in choices.items()}
    nothing = {path: rule.at(1e-30) for path, rule in rules.items()}
    with subject.moe.zeroed(rules):
        expected = answers(subject.moe.model, subject.inputs)
    if torch.equal(expected, subject.untouched):
        yield Check("skipping", False, "skipping experts changes nothing, so nothing can be compared")
        return
    moe = subject.copy()
    moe.skip(nothing)
    yield _equal("skip nothing", answers(moe.model, subject.inputs), subject.untouched)
    moe.skip(rules)
    yield _close("skipping", answers(moe.model, subject.inputs), expected, subject.dtype)
    with moe.unskipped():
        yield _equal("skipping off", answers(moe.model, subject.inputs), subject.untouched)
    yield from _over_kernels(subject, rules, nothing)
    with tempfile.TemporaryDirectory() as folder:
        yield from subject.saved("skipping saved", moe, Path(folder), subject.load_with_compressor)
        plain = subject.load(Path(folder)).eval()
        align(plain)
        _same_implementations(subject.moe.model, plain)
        yield _equal("unskipped elsewhere", answers(plain, subject.inputs), subject.untouched)


def _choices(subject: _Subject) -> dict[str, tuple[RoutedTokens, bool]]:
    """Layer path → (choices, whether weights are renormalised), of layers with text that choose two or more."""
    seen: dict[str, tuple[RoutedTokens, bool]] = {}

    def visit(tokens: RoutedTokens) -> None:
        seen.setdefault(tokens.layer.path, (tokens, tokens.renormalises()))

    with subject.moe.watched({layer.path: visit for layer in subject.moe.layers if layer.top_k > 1}, subject.real):
        answers(subject.moe.model, subject.inputs)
    return seen


def _over_kernels(subject: _Subject, rules: Mapping[str, SkipRule], nothing: Mapping[str, SkipRule]) -> Iterator[Check]:
    """The same answers over all experts implementations; FLOPs saved over what the skipped experts cost."""
    moe = subject.copy()
    moe.model.requires_grad_(False)  # the FLOP counter stumbles over some modules with gradients
    experts: list[Any] = [module for module in moe.model.modules() if is_decorated(module)]
    for name in ("eager", "grouped_mm", "batched_mm") if experts else ("own code",):
        for module in experts:
            module.config._experts_implementation_internal = name
        with moe.zeroed(rules):
            expected = answers(moe.model, subject.inputs)
        moe.skip(nothing)
        with moe.counted() as chosen, FlopCounterMode(display=False) as before:
            answers(moe.model, subject.inputs)
        moe.skip(rules)
        with moe.counted() as used, FlopCounterMode(display=False) as after:
            found = answers(moe.model, subject.inputs)
        moe.skip({})
        yield _close(f"skipping over {name}", found, expected, subject.dtype)
        if name == "grouped_mm":  # whose work the FLOP counter does not see
            continue
        saved = before.get_total_flops() - after.get_total_flops()
        wanted = sum(
            2 * expert_matrix_size(moe.model, layer) * chosen.tokens[layer.path]
            * (_evaluated(layer, chosen) - used.experts_per_token[layer.path])
            for layer in moe.layers if layer.path in rules
        )  # fmt: skip
        yield Check(f"FLOPs saved over {name}", abs(saved - wanted) < 0.5, f"{saved / wanted:.2f}")


def _statistics(subject: _Subject) -> Iterator[Check]:
    """What a layer's tokens say of a smaller set is what the block computes under masks."""
    for layer in subject.moe.layers:
        if layer.watch_problem:
            yield Check(f"statistics of {layer.path}", None, layer.watch_problem)
            continue
        yield _layer_statistics(subject, layer)


def _layer_statistics(subject: _Subject, layer: MoELayer) -> Check:
    name = f"statistics of {layer.path}"
    kept = _choose(layer, _counts(layer)[:1] or [layer.num_experts], seed=1)
    seen: list[tuple[Tensor, RoutedTokens]] = []

    def visit(tokens: RoutedTokens) -> None:
        seen.append((_predicted_change(tokens, kept), tokens))

    places = (layer.path, layer.experts if not isinstance(subject.module(layer.experts), nn.ModuleList) else layer.path)
    with _outputs_of(subject.moe.model, places) as full, subject.moe.watched({layer.path: visit}, subject.real):
        answers(subject.moe.model, subject.inputs)
    if not seen:
        return Check(name, None, "no text token comes here")
    predicted, tokens = seen[0]
    with _outputs_of(subject.moe.model, places) as masked, subject.moe.masked({layer.path: kept}):
        answers(subject.moe.model, subject.inputs)
    # shared experts may take part in the renormalisation: then the block's output changes with them too
    rows = max(len(subject.moe.model.get_parameter(weight)) for weight in layer.router_weights)
    at = 0 if tokens.at_block and rows == layer.num_choices else 1
    # layers before this one are not masked, so it is given the same tokens in both runs
    change = (masked[at][-1].double() - full[at][-1].double()).reshape(len(predicted), -1)
    if not change.norm():
        return Check(name, None, "masking changes nothing here")
    error = float((predicted - change).norm() / change.norm())
    limit = {torch.float32: 1e-4, torch.float64: 1e-9}.get(tokens.hidden_TH.dtype, 0.1)
    rule = "closed rule" if tokens.rule is not None else "replay"
    return Check(name, error <= limit, f"{rule}, relative error {error:.1e}")


def _predicted_change(tokens: RoutedTokens, kept: Sequence[int]) -> Tensor:
    """[T, H] float64: how the output changes with only `kept`, by the closed rule or replay, expert by expert."""
    layer, size = tokens.layer, tokens.layer.num_choices
    if tokens.rule is not None:
        dropped = dropped_experts(layer, kept, tokens.logits_TE.device)
        chosen = tokens.rule.choose(tokens.logits_TE.index_fill(-1, dropped, float("-inf")), layer.top_k)
    else:
        chosen = tokens.replay(kept)
    change_TN = weights_by_id(*chosen, size) - weights_by_id(tokens.index_TK, tokens.weights_TK, size)
    parts = []
    for chunk in tokens.ranked_outputs(size):
        change_cM = change_TN[chunk.start : chunk.stop].gather(1, chunk.order_cM)
        parts.append(torch.einsum("cm,cmh->ch", change_cM, chunk.outputs_cMH.double()))
    return torch.cat(parts)


def _middling_rule(tokens: RoutedTokens, renormalises: bool) -> SkipRule:
    """A rule that skips about half, by ratio or else a made-up contribution; no score is near its threshold."""
    norms = tuple(1.0 + expert for expert in range(tokens.layer.num_experts))
    for rule in (
        SkipRule("ratio", renormalises, beta=1.0),
        SkipRule("contribution", renormalises, beta=1.0, expert_norms=norms),
    ):
        scores_TK = rule.scores(tokens.index_TK, tokens.weights_TK, torch.tensor(norms))
        scores = scores_TK[~rule.never_skipped(tokens.weights_TK, scores_TK)].sort().values
        scores = scores[scores < 1]
        if len(scores) > 1:
            middle = slice(len(scores) // 4, max(len(scores) // 4 + 2, 3 * len(scores) // 4))
            gap = int(scores[middle].diff().argmax()) + middle.start
            return rule.at(float(scores[gap : gap + 2].mean()))
    return rule


def _evaluated(layer: MoELayer, chosen: Counter) -> float:
    """Experts that evaluate a token if none is skipped: those it chose, or all where the block knows no better."""
    return layer.num_experts if layer.router_probe.call == "scaled inputs" else chosen.experts_per_token[layer.path]


def expert_matrix_size(model: nn.Module, layer: MoELayer) -> int:
    """Numbers in one expert's matrices: a token costs two FLOPs for each."""
    owned = [own for own in own_tensors(model, layer) if own.expert in (None, 0)]
    return sum(own.single.numel() for own in owned if own.single.ndim >= 2)


_CHECKS: Mapping[str, Callable[[_Subject], Iterator[Check]]] = {
    "keep all": _keep_all,
    "removed = masked": _removed,
    "top-k lowered": _top_k_lowered,
    "uneven": _uneven,
    "padded": _padded,
    "edited on disk": _on_disk,
    "skipping": _skipping,
    "statistics": _statistics,
}


# Which experts, and comparing -------------------------------------------------------------------------------


def _counts(layer: MoELayer) -> list[int]:
    """Numbers of experts that the layer can keep, fewer than it has, ascending."""
    return [count for count in range(2, layer.num_experts) if count_problem(layer, count) is None]


def _choose(layer: MoELayer, counts: Sequence[int], *, seed: int) -> list[int]:
    """Some `counts[0]` experts, equally many of each group."""
    size = layer.num_experts // layer.num_groups
    generator = torch.Generator().manual_seed(seed)
    return sorted(
        group * size + int(member)
        for group in range(layer.num_groups)
        for member in torch.randperm(size, generator=generator)[: counts[0] // layer.num_groups]
    )


def kept_evenly(moe: MoEModel) -> dict[str, list[int]] | None:
    """About three quarters of the experts, the same number in every layer, other ones in each; None if impossible."""
    possible = sorted(set.intersection(*(set(_counts(layer)) for layer in moe.layers)))
    wanted = [count for count in possible if 4 * count <= 3 * moe.layers[0].num_experts] or possible[:1]
    if not wanted:
        return None
    return {layer.path: _choose(layer, wanted[-1:], seed=_seed(moe, layer)) for layer in moe.layers}


def kept_unevenly(moe: MoEModel) -> dict[str, list[int]] | None:
    """Two numbers of experts in turn; the same in blocks of one decoder layer, and in blocks that share weights."""
    parents = list(dict.fromkeys(_decoder_layer(moe.layers[_seed(moe, layer)].path) for layer in moe.layers))
    if len(parents) < 2:
        return None
    kept: dict[str, list[int]] = {}
    for layer in moe.layers:
        possible = _counts(layer)
        if not possible:
            return None
        counts = [*possible, layer.num_experts]
        first = moe.layers[_seed(moe, layer)]
        is_even = parents.index(_decoder_layer(first.path)) % 2 == 0
        wanted = counts[-2] if is_even else counts[max(0, len(counts) - 4)]
        if wanted == counts[-2] and not is_even:
            wanted = counts[-1]
        kept[layer.path] = _choose(layer, [wanted], seed=_seed(moe, layer))
    return kept if len({len(ids) for ids in kept.values()}) > 1 else None


def _decoder_layer(path: str) -> str:
    """The part of a path up to its first number: `model.layers.3.mlp` → `model.layers.3`."""
    found = re.match(r".*?\.\d+", path)
    return found[0] if found else path


def _seed(moe: MoEModel, layer: MoELayer) -> int:
    """The number of the first layer that holds this layer's weights."""
    first = next(iter(layer.tensors), None)
    tensors = named_tensors(moe.model)
    for number, other in enumerate(moe.layers):
        if other is layer or (first and any(tensors[name] is tensors[first] for name in other.tensors)):
            return number
    raise AssertionError(layer.path)


def save(moe: MoEModel, folder: Path) -> None:
    """Write a live model as a run would, with the files of the folder that it came from."""
    name = moe.config._name_or_path
    source = Path(name) if name and (Path(name) / "config.json").exists() else None
    save_checkpoint(moe.model, source, folder, moe.structure.counts_in(moe.config))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def _differing_tensors(edited: Path, live: Path, source: Path) -> list[str]:
    """Names of tensors that are not in both folders with the same bytes, in the source's dtype."""
    first, second, stored = (
        {name: tensor for shard in verify_files(folder) for name, tensor in load_file(shard.path).items()}
        for folder in (edited, live, source)
    )

    def same(name: str) -> bool:
        one, other = first[name], second[name]
        is_same = one.shape == other.shape and one.dtype == stored[name].dtype
        return is_same and torch.equal(_bytes(one), _bytes(other.to(one.dtype)))

    return sorted(name for name in first.keys() | second if name not in first or name not in second or not same(name))


def _same_implementations(model: nn.Module, again: nn.Module) -> None:
    """Let the model read back compute attention and experts by the same kernels: others round otherwise."""
    modules = dict(model.named_modules())
    for name, module in again.named_modules():
        own, other = module.__dict__.get("config"), getattr(modules.get(name), "config", None)
        for key in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if own is not None and key in getattr(other, "__dict__", {}):
                own.__dict__[key] = other.__dict__[key]


def _equal(name: str, found: Tensor, expected: Tensor) -> Check:
    if torch.equal(found, expected):
        return Check(name, True)
    return Check(name, False, f"largest difference {float((found.double() - expected.double()).abs().max()):.2g}")


def _close(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> Check:
    """Equal but for rounding in `dtype`: that of the answers, if none is given."""
    dtype = dtype or expected.dtype
    found, expected_double = found.double(), expected.double()
    error = (found - expected_double).norm(dim=-1) / expected_double.norm(dim=-1).clamp_min(1e-30)
    beyond = float((~(error <= _EXACT[dtype])).double().mean())
    detail = f"largest relative difference {float(error.max()):.1e}" + (f", {beyond:.0%} of tokens" if beyond else "")
    return Check(name, beyond <= _TIES[dtype], detail)


def _generated(model: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
    if not getattr(model, "can_generate", lambda: False)():
        return None
    wanted = {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
    try:
        torch.manual_seed(0)
        out = model.generate(**wanted, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    except Exception:  # some need more than text
        return None
    out = getattr(out, "sequences", out)
    return out if isinstance(out, Tensor) else None


@contextmanager
def _outputs_of(model: nn.Module, paths: Sequence[str]) -> Iterator[list[list[Tensor]]]:
    found: list[list[Tensor]] = [[] for _ in paths]

    def take(place: list[Tensor]) -> Callable[..., None]:
        return lambda module, args, output: place.append(
            (output[0] if isinstance(output, tuple) else output).detach().clone()
        )

    with ExitStack() as hooks:
        for path, place in zip(paths, found, strict=True):
            hooks.enter_context(model.get_submodule(path).register_forward_hook(take(place)))
        yield found
