"""Watch one MoE layer of a live model while the model runs, without touching its code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CheckpointError, UnsupportedModelError
from compressor.moe.routing import (
    RouterLogits,
    RoutingRule,
    biases_masked,
    dropped_experts,
    explains,
    fit_rule,
    masked_router,
    router_width,
    selection_biases,
)
from compressor.moe.structure import MoELayer
from compressor.moe.tokens import RoutedTokens, evaluate_list, evaluate_stacked

Visitor = Callable[[RoutedTokens], None]

_NUM_FITTING_TOKENS = 256
_NUM_TOKENS_THROUGH_BLOCK = 64


@dataclass
class RealTokens:
    """Which tokens of the batch that is running are no padding: `mask_T` [B·S] bool. The walk sets it before each
    batch.
    """

    mask_T: Tensor | None = None


@contextmanager
def tapped(
    model: nn.Module, layers: Mapping[str, MoELayer], visitors: Mapping[str, Visitor], real: RealTokens
) -> Iterator[None]:
    """Within the context, each visitor is called with the RoutedTokens of its layer whenever the layer runs."""
    with ExitStack() as stack:
        for path, visitor in visitors.items():
            tap = (_ListTap if layers[path].is_list else _StackedTap)(model, layers[path], visitor, real)
            stack.enter_context(tap.installed())
        yield


@dataclass
class _Tap:
    """What both kinds of layer share: the router is listened to, and can be run again on the same tokens."""

    model: nn.Module
    layer: MoELayer
    visitor: Visitor
    real: RealTokens
    rule: RoutingRule | None = None
    fitted: bool = False
    _paused: bool = False
    _modes: list[RouterLogits] = field(default_factory=list)
    _router_call: tuple[Any, Any] = ((), {})
    _router_output: Any = None
    _logits: Tensor | None = None

    @property
    def router(self) -> nn.Module:
        return self.model.get_submodule(self.layer.router)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Listen to the router and the experts within the context; the model is left as it was."""
        hooks = [
            self.router.register_forward_pre_hook(self._before_router, with_kwargs=True),
            self.router.register_forward_hook(self._after_router, always_call=True),
        ]
        try:
            with self._experts_installed():
                yield
        finally:
            for hook in hooks:
                hook.remove()
            while self._modes:
                self._modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _experts_installed(self) -> Any:
        raise NotImplementedError

    def _before_router(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._paused:
            return
        self._router_call = (args, kwargs)
        mode = RouterLogits(router_width(self.layer))
        mode.__enter__()  # type: ignore[no-untyped-call]
        self._modes.append(mode)

    def _after_router(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._paused or not self._modes:
            return
        mode = self._modes.pop()
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if output is None:  # the forward has failed, and says why itself
            return
        if mode.seen is None:
            raise UnsupportedModelError(
                f"{self.layer.router}: saw no linear map with {router_width(self.layer)} outputs inside its forward."
            )
        self._logits, self._router_output = mode.seen, output

    def _mask(self, num_rows: int) -> Tensor:
        mask_T = self.real.mask_T
        if mask_T is None or len(mask_T) != num_rows:
            raise UnsupportedModelError(
                f"{self.layer.path}: its experts are given {num_rows} tokens where the batch has "
                f"{None if mask_T is None else len(mask_T)}, so padding cannot be told from text."
            )
        return mask_T

    def _logits_TE(self, mask_T: Tensor, dtype: torch.dtype) -> Tensor:
        assert self._logits is not None
        if router_width(self.layer) != self.layer.num_experts:
            raise UnsupportedModelError(
                f"{self.layer.router}: it chooses among {router_width(self.layer)} things, only "
                f"{self.layer.num_experts} "
                f"of which are experts with weights; watching such a router needs a plugin."
            )
        logits_TE = self._logits.reshape(len(mask_T), -1)[mask_T][:, : self.layer.num_experts].float()
        if not torch.isfinite(logits_TE).all():
            raise CheckpointError(
                f"{self.layer.path}: the router's logits are not finite on calibration text (NaN or infinity); the "
                f"weights before this layer are damaged, or too large for {dtype}."
            )
        return logits_TE

    def _chosen(self, output: Any, mask_T: Tensor) -> tuple[Tensor, Tensor]:
        """The ids and weights in a router's output, of real tokens only."""
        probe = self.layer.router_probe
        assert probe.index_position is not None
        assert probe.weights_position is not None
        index = output[probe.index_position].reshape(len(mask_T), -1)[mask_T]
        return index, output[probe.weights_position].reshape(len(mask_T), -1)[mask_T]

    def _replay(self, mask_T: Tensor) -> Callable[[Any], tuple[Tensor, Tensor]]:
        args, kwargs = self._router_call
        logits = self._logits

        def replay(kept: Any) -> tuple[Tensor, Tensor]:
            dropped = dropped_experts(self.layer, kept, mask_T.device)
            mode = RouterLogits(router_width(self.layer), dropped=dropped, recorded=logits)
            with torch.no_grad(), biases_masked(self.model, self.layer, dropped), mode:
                return self._chosen(self.router.forward(*args, **kwargs), mask_T)

        return replay

    @torch.no_grad()
    def _fit(self, logits_TE: Tensor, index_TK: Tensor, weights_TK: Tensor, replay: Any) -> None:
        """Find the router's closed rule on the first tokens seen."""
        few = slice(0, _NUM_FITTING_TOKENS)

        def replay_few(kept: Any) -> tuple[Tensor, Tensor]:
            index, weights = replay(kept)
            return index[few], weights[few]

        biases = [tensor for _, tensor in selection_biases(self.model, self.layer)]
        self.rule = fit_rule(self.layer, logits_TE[few], index_TK[few], weights_TK[few], biases, replay_few)
        self.fitted = True

    @torch.no_grad()
    def _rule_for(self, logits_TE: Tensor, index_TK: Tensor, weights_TK: Tensor, replay: Any) -> RoutingRule | None:
        """The closed rule if it explains this batch too; None, so that the router itself is asked, if it does not."""
        if not self.fitted:
            self._fit(logits_TE, index_TK, weights_TK, replay)
        if self.rule is None or not explains(self.rule, self.layer, logits_TE, index_TK, weights_TK):
            return None
        return self.rule

    def _visit(self, tokens: RoutedTokens) -> None:
        self.visitor(tokens)
        if tokens.output_TH is not None:
            self._refuse_not_finite(tokens.output_TH)

    def _refuse_not_finite(self, output: Tensor) -> None:
        # smallest and largest carry NaN and infinity too, and cost a tenth of testing every number
        if output.numel() and not torch.isfinite(torch.stack(output.aminmax())).all():
            raise CheckpointError(
                f"{self.layer.path}: the experts' output is not finite on calibration text (NaN or infinity); their "
                f"weights are damaged, or too large for {output.dtype}."
            )


class _StackedTap(_Tap):
    """Experts in stacked tensors, called as (hidden, ids, weights): their forward is ours for the time being.

    The layer's output is put together from the outputs that the visitor asked for, so watching costs no second forward.
    """

    @contextmanager
    def _experts_installed(self) -> Iterator[None]:
        experts = self.model.get_submodule(self.layer.experts)
        original = experts.forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if self._paused:
                return original(*args, **kwargs)  # type: ignore[no-any-return]
            hidden, index, weights = self._call(args, kwargs)
            mask_T = self._mask(len(hidden))
            tokens = self._tokens(hidden, index, weights, mask_T, original)
            self._visit(tokens)
            if tokens.output_TH is None:
                return original(hidden, index, weights)  # type: ignore[no-any-return]
            if mask_T.all():
                return tokens.output_TH
            output = hidden.new_empty(hidden.shape)
            output[mask_T] = tokens.output_TH
            output[~mask_T] = original(hidden[~mask_T], index[~mask_T], weights[~mask_T])
            return output

        had_its_own = experts.__dict__.get("forward")  # accelerate, for one, wraps forward on the instance
        experts.forward = forward
        try:
            yield
        finally:
            del experts.forward
            if had_its_own is not None:
                experts.forward = had_its_own

    def _call(self, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        values = [*args, *kwargs.values()]
        if (
            len(values) != 3
            or not all(isinstance(value, Tensor) and value.dim() == 2 for value in values)
            or values[1].is_floating_point()
            or values[1].shape != values[2].shape
        ):
            shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in values]
            raise UnsupportedModelError(
                f"{self.layer.experts}: expected to be called with (hidden [T, H], ids [T, K], weights [T, K]), "
                f"found {shapes}."
            )
        return values[0], values[1], values[2]

    def _tokens(
        self, hidden: Tensor, index: Tensor, weights: Tensor, mask_T: Tensor, original: Callable[..., Tensor]
    ) -> RoutedTokens:
        if self.layer.router_probe.index_position is None:
            raise UnsupportedModelError(
                f"{self.layer.path}: the block chooses the experts, not its router; this needs a plugin."
            )
        logits_TE = self._logits_TE(mask_T, hidden.dtype)
        replay = self._replay(mask_T)
        index_TK, weights_TK = index[mask_T], weights[mask_T]
        return RoutedTokens(
            layer=self.layer,
            hidden_TH=hidden[mask_T],
            logits_TE=logits_TE,
            index_TK=index_TK,
            weights_TK=weights_TK,
            rule=self._rule_for(logits_TE, index_TK, weights_TK, replay),
            replay=replay,
            evaluate_experts=lambda x, e: evaluate_stacked(original, x, e, weights.dtype),
        )


class _ListTap(_Tap):
    """Experts as modules in a list, called by their block's own loop: listened to after the block has run."""

    @contextmanager
    def _experts_installed(self) -> Iterator[None]:
        hook = self.model.get_submodule(self.layer.path).register_forward_hook(self._after_block, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _after_block(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._paused:
            return
        hidden = args[0] if args else next(iter(kwargs.values()))
        flat = hidden.reshape(-1, hidden.shape[-1])
        mask_T = self._mask(len(flat))
        logits_TE = self._logits_TE(mask_T, hidden.dtype)
        (container, names), *others = self.layer.containers.items()
        if others:
            raise UnsupportedModelError(f"{self.layer.path}: experts in {1 + len(others)} lists; this needs a plugin.")
        modules = [self.model.get_submodule(f"{container}.{name}") for name in names]
        if self.layer.router_probe.index_position is not None:
            index, weights = self._chosen(self._router_output, mask_T)
            replay = self._replay(mask_T)
            rule = self._rule_for(logits_TE, index, weights, replay)
        else:
            if not self.fitted:
                self._fit_by_block(block, flat[mask_T], logits_TE, modules)
            rule = known = self.rule
            assert known is not None
            index, weights = known.choose(logits_TE, self.layer.top_k)

            def replay(kept: Any) -> tuple[Tensor, Tensor]:
                dropped = dropped_experts(self.layer, kept, logits_TE.device)
                return known.choose(logits_TE.index_fill(-1, dropped, float("-inf")), self.layer.top_k)

        self._visit(
            RoutedTokens(
                layer=self.layer,
                hidden_TH=flat[mask_T],
                logits_TE=logits_TE,
                index_TK=index,
                weights_TK=weights,
                rule=rule,
                replay=replay,
                evaluate_experts=lambda x, e: evaluate_list(modules, x, e),
            )
        )

    @torch.no_grad()
    def _fit_by_block(self, block: nn.Module, hidden_TH: Tensor, logits_TE: Tensor, modules: list[nn.Module]) -> None:
        """Find the rule of a block that chooses by itself: the one that explains how its output changes under a mask.

        Differences of outputs are compared, so whatever the block adds (shared experts) does not matter. The experts
        masked are those that these tokens choose most, so that there is a difference to explain.
        """
        layer = self.layer
        few, logits_TE = hidden_TH[:_NUM_TOKENS_THROUGH_BLOCK], logits_TE[:_NUM_TOKENS_THROUGH_BLOCK]
        all_TM = torch.arange(layer.num_experts, device=few.device).expand(len(few), -1)
        outputs_TEH = evaluate_list(modules, few, all_TM).double()
        times_chosen_E = logits_TE.topk(layer.top_k, dim=-1).indices.flatten().bincount(minlength=layer.num_experts)
        num_kept = max(layer.top_k, -(-layer.num_experts // 2))
        kept = sorted(times_chosen_E.argsort(stable=True)[:num_kept].tolist())
        self._paused = True
        try:
            full = _first(block.forward(few[None]))
            with masked_router(self.model, layer, kept):
                masked = _first(block.forward(few[None]))
        finally:
            self._paused = False
        wanted_TH = (masked - full).double().reshape(len(few), -1)
        self._refuse_not_finite(full)
        dropped = dropped_experts(layer, kept, few.device)
        for score in ("softmax", "sigmoid"):
            for renormalise in (True, False):
                rule = RoutingRule(score, renormalise, 1.0)
                found_TH = torch.zeros_like(wanted_TH)
                for sign, logits in ((1, logits_TE.index_fill(-1, dropped, float("-inf"))), (-1, logits_TE)):
                    index, weights = rule.choose(logits, layer.top_k)
                    chosen = outputs_TEH.gather(1, index[..., None].expand(-1, -1, outputs_TEH.shape[-1]))
                    found_TH += sign * (weights[..., None] * chosen).sum(1)
                error = (found_TH - wanted_TH).norm() / wanted_TH.norm().clamp_min(1e-30)
                if error < (1e-4 if few.dtype == torch.float32 else 3e-2):
                    self.rule, self.fitted = rule, True
                    return
        raise UnsupportedModelError(
            f"{layer.path} ({type(block).__name__}): it chooses its experts by a rule that is neither softmax nor "
            f"sigmoid with top-{layer.top_k}, so its smaller versions cannot be computed; this needs a plugin."
        )


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]
