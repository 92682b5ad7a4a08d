"""Watch one MoE layer of a live model while the model runs, without touching its code.

Blocks differ in how they hand tokens to their experts (`structure.Call`); there is one tap for each way, and all of
them give the visitor the same RoutedTokens. While the model runs, the router and the block are listened to by
hooks; the experts' forward is ours where they are a module that is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CheckpointError, UnsupportedModelError
from compressor.model.block_rule import NUM_TOKENS_THROUGH_BLOCK, first_output, refuse_not_finite, rule_of_block
from compressor.model.expert_outputs import evaluate_list, evaluate_stacked, places_of_choices
from compressor.model.masking import (
    dropped_experts,
    experts_hidden,
    logits_watched,
    router_weights,
    selection_biases,
    top_k_set,
)
from compressor.model.modules import forward_replaced
from compressor.model.routed_tokens import Lift, RealTokens, RoutedTokens
from compressor.model.router_logits import RouterLogits
from compressor.model.routing_rule import Replay, RoutingRule
from compressor.model.rule_fitting import explains, fit_rule
from compressor.model.structure import MoELayer, Structure
from compressor.model.token_pairs import PairLists

Visitor = Callable[[RoutedTokens], None]
_NUM_FITTING_TOKENS = 256


@contextmanager
def tapped(model: nn.Module, structure: Structure, visitors: Mapping[str, Visitor], real: RealTokens) -> Iterator[None]:
    """Within the context each visitor gets its layer's RoutedTokens. Raises UnsupportedModelError, naming the layer."""
    layers = {layer.path: layer for layer in structure.layers}
    with ExitStack() as stack:
        for path, visitor in visitors.items():
            layer = layers[path]
            kind = {
                "choices": _ChoicesTap,
                "list": _ListTap,
                "masks": _MasksTap,
                "scaled inputs": _ScaledInputsTap,
                "pairs": _PairsTap,
            }[layer.router_probe.call]
            stack.enter_context(kind(model, structure, layer, visitor, real).installed())
        yield


class _Reached(Exception):  # noqa: N818 - no error: it ends a forward
    """A block that is run again has come to its experts; nothing behind them matters."""


@dataclass
class _Tap:
    """What all kinds of layer share: the router is listened to, and can be run again on the same tokens."""

    model: nn.Module
    structure: Structure
    layer: MoELayer
    visitor: Visitor
    real: RealTokens
    rule: RoutingRule | None = None
    fitted: bool = False
    _router_call: tuple[Any, Any] = ((), {})
    _router_output: Any = None
    _block_call: tuple[Any, Any] = ((), {})
    _logits: Tensor | None = None

    @property
    def router(self) -> nn.Module:
        return self.model.get_submodule(self.layer.router)

    @property
    def block(self) -> nn.Module:
        return self.model.get_submodule(self.layer.path)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Listen to the block, the router and the experts within the context; the model is left as it was."""
        before_block = self.block.register_forward_pre_hook(self._before_block, with_kwargs=True)
        watched = logits_watched(self.router, self.layer.router, self._before_router, self._after_router)
        with before_block, watched, self._experts_installed():
            yield

    def _experts_installed(self) -> Any:
        raise NotImplementedError

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Within the context the layer may be run again, and nobody listens."""
        self.real.paused = True
        try:
            yield
        finally:
            self.real.paused = False

    def _before_block(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.real.deaf:
            self._block_call = (args, kwargs)

    def _before_router(self, args: Any, kwargs: Any) -> RouterLogits | None:
        if self.real.deaf:
            return None
        self._router_call = (args, kwargs)
        return RouterLogits(router_weights(self.model, self.layer))

    def _after_router(self, logits: Tensor, output: Any) -> None:
        if not self.real.deaf:
            self._logits, self._router_output = logits, output

    def _mask(self, rows: Tensor) -> Tensor:
        """Which of these rows are real tokens; where the layer is, wherever the batch came in."""
        mask_T = self.real.mask_T
        if self.real.splits and mask_T is not None and len(rows) < len(mask_T):
            mask_T = mask_T[: len(rows)]  # all are real
        if mask_T is None or len(mask_T) != len(rows):
            raise UnsupportedModelError(
                f"{self.layer.path}: its experts are given {len(rows)} tokens where the batch has "
                f"{None if mask_T is None else len(mask_T)}, so padding cannot be told from text."
            )
        return mask_T.to(rows.device)

    def _logits_TE(self, mask_T: Tensor, dtype: torch.dtype) -> Tensor:
        assert self._logits is not None
        logits_TE = self._logits.reshape(len(mask_T), -1)[mask_T][:, : self.layer.num_choices].float()
        if not torch.isfinite(logits_TE).all():
            raise CheckpointError(
                f"{self.layer.path}: the router's logits are not finite: damaged weights, or too large for {dtype}."
            )
        return logits_TE

    def _chosen(self, output: Any, mask_T: Tensor) -> tuple[Tensor, Tensor]:
        """The ids and weights in a router's output, of real tokens only."""
        probe = self.layer.router_probe
        assert probe.index_position is not None
        assert probe.weights_position is not None
        index = output[probe.index_position].reshape(len(mask_T), -1)[mask_T]
        return index, output[probe.weights_position].reshape(len(mask_T), -1)[mask_T]

    @contextmanager
    def _as_if_kept(self, kept: Any, top_k: int | None, device: torch.device) -> Iterator[None]:
        """Within the context the router, given the same tokens, answers as if only `kept` experts were there."""
        dropped = dropped_experts(self.layer, kept, device)
        weights = router_weights(self.model, self.layer)
        mode = RouterLogits(weights, dropped=dropped, recorded=self._logits)
        with (
            torch.no_grad(),
            self._pause(),
            experts_hidden(self.model, self.layer, dropped),
            top_k_set(self.model, self.structure, top_k),
            mode,
        ):
            yield

    def _router_replay(self, mask_T: Tensor) -> Replay:
        args, kwargs = self._router_call

        def replay(kept: Any, top_k: int | None = None) -> tuple[Tensor, Tensor]:
            with self._as_if_kept(kept, top_k, mask_T.device):
                return self._chosen(self.router.forward(*args, **kwargs), mask_T)

        return replay

    @torch.no_grad()
    def _rule_for(self, logits_TE: Tensor, index_TK: Tensor, weights_TK: Tensor, replay: Replay) -> RoutingRule | None:
        """The closed rule, looked for on the first tokens seen, if it explains this batch too; None, so that the router
        itself is asked, if it does not, or has rows behind its experts that it does not choose from, but that may shift
        weights.
        """
        few = slice(0, _NUM_FITTING_TOKENS)

        def replay_few(kept: Any, top_k: int | None = None) -> tuple[Tensor, Tensor]:
            index, weights = replay(kept, top_k)
            return index[few], weights[few]

        assert self._logits is not None
        if not self.fitted and self._logits.shape[-1] == self.layer.num_choices:
            biases = [tensor for _, tensor in selection_biases(self.model, self.layer)]
            self.rule = fit_rule(self.layer, logits_TE[few], index_TK[few], weights_TK[few], biases, replay_few)
        self.fitted = True
        if self.rule is None or not explains(self.rule, self.layer, logits_TE, index_TK, weights_TK):
            return None
        return self.rule

    def _visit(
        self, hidden_TH: Tensor, logits_TE: Tensor, index_TK: Tensor, weights_TK: Tensor, replay: Replay, **others: Any
    ) -> RoutedTokens:
        """Show one batch's real tokens, with the closed rule, if it explains them and no `rule` is given."""
        if "rule" not in others:
            others["rule"] = self._rule_for(logits_TE, index_TK, weights_TK, replay)
        tokens = RoutedTokens(self.layer, hidden_TH, logits_TE, index_TK, weights_TK, replay=replay, **others)
        self.visitor(tokens)
        if tokens.output_TH is not None:
            refuse_not_finite(self.layer, tokens.output_TH)
        return tokens


class _CalledTap(_Tap):
    """Experts that are a module which its block calls: their forward is ours for the time being."""

    _original: Callable[..., Tensor]
    _stand_in: Callable[..., Tensor] | None = None
    """Runs instead of the experts while the block is run again by ourselves."""
    _lift: Lift | None = None
    _lift_known: bool = False
    _at_block: bool = False

    @contextmanager
    def _experts_installed(self) -> Iterator[None]:
        experts = self.model.get_submodule(self.layer.experts)
        self._original = experts.forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if self._stand_in is not None:
                return self._stand_in(*args, **kwargs)
            if self.real.deaf:
                return self._original(*args, **kwargs)
            return self._watch(*args, **kwargs)

        with forward_replaced(experts, forward):
            yield

    def _watch(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the experts answer while they are watched."""
        raise NotImplementedError

    def _experts_call(self, kept: Any, top_k: int | None, device: torch.device) -> tuple[Any, ...]:
        """What the block would give its experts if only `kept` were there."""
        given: list[tuple[Any, ...]] = []

        def reached(*args: Any, **kwargs: Any) -> Tensor:
            given.append((*args, *kwargs.values()))
            raise _Reached

        args, kwargs = self._block_call
        self._stand_in = reached
        try:
            with self._as_if_kept(kept, top_k, device):
                self.block.forward(*args, **kwargs)
        except _Reached:
            return given[0]
        finally:
            self._stand_in = None
        raise UnsupportedModelError(f"{self.layer.path}: run again, its block did not come to its experts.")

    @torch.no_grad()
    def _find_lift(self, experts_output: Tensor) -> tuple[Lift | None, bool]:
        """How the block carries its experts' output to its own (as it is, times a factor, by a linear map), asked on
        zeros with answers of ours for the experts'. The second is False where there is no such map, no block or a norm
        behind the experts: then figures are of the experts' own output.
        """
        if not self.layer.router_probe.block_runs:
            return None, False
        width = self._block_call[0][0].shape[-1] if self._block_call[0] else 0
        generator = torch.Generator().manual_seed(0)
        size = (NUM_TOKENS_THROUGH_BLOCK, experts_output.shape[-1])
        first, second = (
            torch.randn(size, generator=generator).to(experts_output.device, experts_output.dtype) for _ in range(2)
        )
        carry = self._carry(width)
        try:
            lifted, other, both = carry(first), carry(second), carry(first + second)
        except (TypeError, ValueError, RuntimeError, AttributeError):  # the block needs more than hidden states
            return None, False
        tolerance = 1e-4 if first.dtype == torch.float32 else 3e-2
        if (both - lifted - other).norm() > tolerance * both.norm() or not both.norm():
            return None, False
        if lifted.shape == first.shape:
            factor = float((lifted.double() * first.double()).sum() / first.double().square().sum())
            if (lifted - factor * first).norm() <= tolerance * lifted.norm():
                factor = round(factor, 3) if abs(factor - round(factor, 3)) < tolerance else factor
                return (None if factor == 1.0 else (lambda outputs: outputs * factor)), True
        return carry, True

    def _carry(self, width: int) -> Lift:
        """Outputs [N, H'] of the experts → what they add to the block's own output [N, H]."""

        def carry(outputs: Tensor) -> Tensor:
            hidden = outputs.new_zeros(1, len(outputs), width)
            dtype = self._block_call[0][0].dtype

            def run(answer: Tensor) -> Tensor:
                self._stand_in = lambda *args, **kwargs: answer.to(dtype)
                try:
                    with torch.no_grad(), self._pause():
                        return first_output(self.block.forward(hidden.to(dtype))).reshape(len(outputs), -1).float()
                finally:
                    self._stand_in = None

            return run(outputs) - run(torch.zeros_like(outputs))

        return carry

    def _known_lift(self, experts_output: Tensor) -> Lift | None:
        if not self._lift_known:
            (self._lift, self._at_block), self._lift_known = self._find_lift(experts_output), True
        return self._lift


class _ChoicesTap(_CalledTap):
    """Experts called as (hidden, ids, weights); the layer's output is made of outputs asked for, in one forward."""

    _by_router: bool | None = None
    _order: tuple[int, int, int] = (0, 1, 2)
    """Where in their forward's arguments hidden, ids and weights are."""

    def _watch(self, *args: Any, **kwargs: Any) -> Tensor:
        given, index, weights = self._sorted_call((*args, *kwargs.values()))
        hidden = given.reshape(-1, given.shape[-1])
        index, weights = index.reshape(len(hidden), -1), weights.reshape(len(hidden), -1)
        mask_T = self._mask(hidden)
        logits_TE = self._logits_TE(mask_T, hidden.dtype)
        index_TK, weights_TK = index[mask_T], weights[mask_T]
        replay = self._replay(mask_T, index_TK, weights_TK)
        tokens = self._visit(
            hidden[mask_T], logits_TE, index_TK, weights_TK, replay,
            evaluate_experts=lambda x, e: evaluate_stacked(self._call_original, x, e, weights.dtype),
            lift=self._known_lift(hidden),
            at_block=self._at_block,
        )  # fmt: skip
        if tokens.experts_output_TH is None:
            return self._original(*args, **kwargs)
        if mask_T.all():
            return tokens.experts_output_TH.view(given.shape)
        output = hidden.new_empty(hidden.shape)
        output[mask_T] = tokens.experts_output_TH
        padding = self._call_original(hidden[~mask_T], index[~mask_T], weights[~mask_T])
        output[~mask_T] = padding.reshape(-1, hidden.shape[-1])  # some add a dimension
        return output.view(given.shape)

    def _sorted_call(self, given: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden, ids, weights), in whatever order the block gives them."""
        places = places_of_choices(given)
        if places is None:
            shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in given]
            raise UnsupportedModelError(
                f"{self.layer.experts}: expected (hidden [T, H], ids [T, K], weights [T, K]), found {shapes}."
            )
        self._order = places
        return given[places[0]], given[places[1]], given[places[2]]

    def _call_original(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The experts' own forward, its arguments in its own order."""
        places = self._order
        values = {places[0]: hidden, places[1]: index, places[2]: weights}
        return self._original(*(values[i] for i in range(3)))

    def _replay(self, mask_T: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Replay:
        """By the router alone where the experts are given what it returns, by the whole block otherwise."""
        if self._by_router is None:
            self._by_router = self.layer.router_probe.index_position is not None and all(
                torch.equal(a, b)
                for a, b in zip(self._chosen(self._router_output, mask_T), (index_TK, weights_TK), strict=True)
            )
        if self._by_router:
            return self._router_replay(mask_T)

        def replay(kept: Any, top_k: int | None = None) -> tuple[Tensor, Tensor]:
            _, index, weights = self._sorted_call(self._experts_call(kept, top_k, mask_T.device))
            rows = len(mask_T)
            return index.reshape(rows, -1)[mask_T], weights.reshape(rows, -1)[mask_T]

        return replay


class _MasksTap(_CalledTap):
    """Experts in a module of modules, called as (hidden [T, H], one-hot mask [T, 1, E], weights [T, 1])."""

    def _watch(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden, mask, weights = (*args, *kwargs.values())
        mask_T = self._mask(hidden)
        index_TK, weights_TK = self._choice(mask, weights, mask_T)
        logits_TE = self._logits_TE(mask_T, hidden.dtype)
        experts = self.model.get_submodule(self.layer.experts)
        modules = [experts._modules[name] for names in self.layer.containers.values() for name in names]

        def replay(kept: Any, top_k: int | None = None) -> tuple[Tensor, Tensor]:
            _, mask, weights = self._experts_call(kept, top_k, mask_T.device)
            return self._choice(mask, weights, mask_T)

        self._visit(
            hidden[mask_T], logits_TE, index_TK, weights_TK, replay,
            evaluate_experts=partial(evaluate_list, [module for module in modules if module]),
            lift=self._known_lift(hidden),
            at_block=self._at_block,
        )  # fmt: skip
        return self._original(*args, **kwargs)

    def _choice(self, mask: Tensor, weights: Tensor, mask_T: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and weights [T, 1]; a token that found no room at its expert has weight 0."""
        mask = mask.reshape(len(mask_T), -1)[mask_T]
        return mask.argmax(-1, keepdim=True), weights.reshape(len(mask_T), -1)[mask_T] * mask.sum(-1, keepdim=True)


class _ScaledInputsTap(_CalledTap):
    """Experts that see every token times its sigmoid score, 0 where not chosen: hidden [E·T, H]. Written as s · (f(s·x)
    / s) a contribution f(s·x) has the form of all others, with weight s.
    """

    def _watch(self, *args: Any, **kwargs: Any) -> Tensor:
        (given,) = (*args, *kwargs.values())
        hidden = self._router_call[0][0]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        mask_T = self._mask(hidden)
        logits_TE = self._logits_TE(mask_T, hidden.dtype)
        index_TK, weights_TK = self._choice(self._router_output, mask_T)
        self._refuse_other_scores(given, hidden, logits_TE, index_TK, mask_T)
        args, kwargs = self._router_call

        def replay(kept: Any, top_k: int | None = None) -> tuple[Tensor, Tensor]:
            with self._as_if_kept(kept, top_k, mask_T.device):
                return self._choice(self.router.forward(*args, **kwargs), mask_T, top_k)

        self._visit(hidden[mask_T], logits_TE, index_TK, weights_TK, replay, evaluate_experts=self._evaluate)
        return self._original(given)

    def _choice(self, output: Any, mask_T: Tensor, top_k: int | None = None) -> tuple[Tensor, Tensor]:
        scores_TE = output[0].reshape(len(mask_T), -1)[mask_T]
        weights_TK, index_TK = scores_TE.topk(top_k or self.layer.top_k, dim=-1)
        return index_TK, weights_TK

    def _refuse_other_scores(
        self, given: Tensor, hidden: Tensor, logits_TE: Tensor, index_TK: Tensor, mask_T: Tensor
    ) -> None:
        """The experts must have been given what this class of tap takes for granted."""
        scores_TE = torch.zeros_like(logits_TE).scatter(1, index_TK, logits_TE.gather(1, index_TK).sigmoid())
        expected = hidden[mask_T][None] * scores_TE.to(hidden.dtype).T[..., None]
        found = given.reshape(self.layer.num_experts, len(mask_T), -1)[:, mask_T]
        tolerance = 1e-4 if hidden.dtype == torch.float32 else 2e-2
        if found.shape != expected.shape or (found - expected).norm() > tolerance * expected.norm():
            raise UnsupportedModelError(
                f"{self.layer.experts}: not given tokens times the sigmoid of their logits; this needs an adapter."
            )

    def _evaluate(self, hidden_cH: Tensor, index_cM: Tensor) -> Tensor:
        """[c, M, H]: f(s·x) / s. All experts see all tokens, as in the model's own forward."""
        with self._pause():
            weight_EH = router_weights(self.model, self.layer)[0]
            scores_cE = (hidden_cH @ weight_EH.T).sigmoid().clamp_min(1e-20)
            inputs_EcH = hidden_cH[None] * scores_cE.T[..., None]
            outputs = self._original(inputs_EcH.reshape(-1, hidden_cH.shape[-1])).view(inputs_EcH.shape)
        outputs_cEH = outputs.float().transpose(0, 1) / scores_cE.float()[..., None]
        return outputs_cEH.gather(1, index_cM[..., None].expand(-1, -1, outputs_cEH.shape[-1]))


class _ListTap(_Tap):
    """Experts as modules in a list, called by their block's own loop: listened to after the block has run."""

    @contextmanager
    def _experts_installed(self) -> Iterator[None]:
        with self.block.register_forward_hook(self._after_block, with_kwargs=True):
            yield

    def _after_block(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.real.deaf:
            return
        hidden = args[0] if args else next(iter(kwargs.values()))
        flat = hidden.reshape(-1, hidden.shape[-1])
        mask_T = self._mask(flat)
        logits_TE = self._logits_TE(mask_T, hidden.dtype)
        (container, names), *others = self.layer.containers.items()
        if others:
            raise UnsupportedModelError(f"{self.layer.path}: experts in {1 + len(others)} lists; this needs a plugin.")
        modules = [self.model.get_submodule(f"{container}.{name}") for name in names]
        replay: Replay
        if self.layer.router_probe.index_position is not None:
            index, weights = self._chosen(self._router_output, mask_T)
            replay = self._router_replay(mask_T)
            rule = self._rule_for(logits_TE, index, weights, replay)
        else:
            if not self.fitted:
                with self._pause():
                    self.rule = rule_of_block(self.model, self.layer, flat[mask_T])
                self.fitted = True
            rule = known = self.rule
            assert known is not None
            index, weights = known.choose(logits_TE, self.layer.top_k)

            def replay(kept: Any, top_k: int | None = None) -> tuple[Tensor, Tensor]:
                dropped = dropped_experts(self.layer, kept, logits_TE.device)
                masked_TE = logits_TE.index_fill(-1, dropped, float("-inf"))
                return known.choose(masked_TE, top_k or self.layer.top_k)

        evaluate = partial(evaluate_list, modules)
        self._visit(flat[mask_T], logits_TE, index, weights, replay, rule=rule, evaluate_experts=evaluate)


class _PairsTap(_Tap):
    """Routers that return lists of pairs: what was chosen can be told, what an expert answers cannot be asked."""

    @contextmanager
    def _experts_installed(self) -> Iterator[None]:
        with self.router.register_forward_hook(self._after_lists):
            yield

    def _after_lists(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.real.deaf:
            return
        hidden = args[0].reshape(-1, args[0].shape[-1])
        index, weights = PairLists.of(output, self.layer.path, len(hidden)).choices()
        mask_T = self._mask(index)

        def refused(*_: Any, **__: Any) -> Any:
            raise UnsupportedModelError(f"{self.layer.watch_problem}.")

        logits_TE, chosen = self._logits_TE(mask_T, hidden.dtype), (index[mask_T], weights[mask_T])
        self._visit(hidden[mask_T], logits_TE, *chosen, refused, rule=None, evaluate_experts=refused)
