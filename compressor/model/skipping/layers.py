"""How each kind of block is made to skip experts (`structure.Call`). No model code is patched.

choices         experts decorated by transformers: an implementation registered under IMPLEMENTATION, which gives the
                pairs that stay, as tokens with one expert each, to the implementation that the model's config names
                (eager, grouped_mm, batched_mm); others: a forward on the instance that does the same
list            hooks on the modules of the list: each is given the rows that stay
scaled inputs   a hook on the router sets scores to 0, and each expert runs on its own rows only
pairs           a hook on the router takes pairs out of its lists

If nothing is skipped in a batch, the layer runs as it would without us, to the bit. Hooks and forwards are
copied and pickled with the model.

Not covered: expert parallelism, where one process sees only its own experts' weights; refused when it runs. Experts in
a list: one forward at a time, since hooks leave each other what they found.

Dimensions: T tokens, K experts chosen per token, E experts, P pairs that stay, N rows of one expert, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import UnsupportedModelError
from compressor.model.expert_outputs import places_of_choices
from compressor.model.skipping.state import (
    IMPLEMENTATION,
    LayerSkip,
    Replaced,
    Stack,
    evaluate_kept,
    is_decorated,
    register,
)
from compressor.model.structure import MoELayer
from compressor.model.token_pairs import PairLists

_KEY_WIDTH = 16


# Experts that are given choices ----------------------------------------------------------------------------


def install_choices(model: nn.Module, layer: MoELayer, state: LayerSkip) -> None:
    experts: Any = model.get_submodule(layer.experts)
    if not is_decorated(experts):
        state.removals += _SkipForward.put(experts, state)
        return
    register()
    # a config of its own: the model's may be another model's too, and goes on naming what lies underneath
    state.config = experts.config
    own = copy.copy(experts.config)
    own._experts_implementation_internal = IMPLEMENTATION
    state.removals.append(Replaced.put(experts, "config", own))


@dataclass(eq=False)
class _Forward:
    """A forward of ours on an experts module. It knows by itself what lies underneath: whoever wraps it while it is
    there (accelerate, for one) goes on calling it when skipping has ended, and then it only passes on.
    """

    experts: nn.Module
    inner: Callable[..., Tensor] | None
    """The forward that stood on the instance before ours."""
    state: LayerSkip | None

    @classmethod
    def put(cls, experts: nn.Module, state: LayerSkip) -> list[Callable[[], None]]:
        """What undoes it."""
        ours = cls(experts, experts.__dict__.get("forward"), state)
        return [Replaced.put(experts, "forward", ours), ours.retire]

    def retire(self) -> None:
        self.state = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.state is None or not self.state.is_on:
            return self.run_inner(*args, **kwargs)
        return self.run(self.state, *args, **kwargs)

    def run_inner(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.experts).forward(self.experts, *args, **kwargs)  # type: ignore[no-any-return]

    def run(self, state: LayerSkip, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError


class _SkipForward(_Forward):
    """Forward of an experts module that is not decorated."""

    def run(self, state: LayerSkip, *args: Any, **kwargs: Any) -> Tensor:
        given = (*args, *kwargs.values())
        places = places_of_choices(given)
        if places is None:
            raise UnsupportedModelError(f"{state.path}: its experts are not given hidden states, ids and weights.")

        def call(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            if index.shape[-1] == 1 and state.has_identity:  # some lose a dimension with one id per token
                index = torch.cat([index, torch.full_like(index, state.num_experts)], dim=-1)
                weights = torch.cat([weights, torch.zeros_like(weights)], dim=-1)
            values = dict(zip(places, (hidden, index, weights), strict=True))
            return self.run_inner(*(values[place] for place in range(3)))

        hidden, index, weights = (given[place] for place in places)
        return evaluate_kept(state, hidden, index, weights, call)


# Experts in a list -----------------------------------------------------------------------------------------


@dataclass
class _ListBatch:
    """A forward of a block whose experts are a list, on its way: what the router chose and what of it stays."""

    hidden_TH: Tensor
    index_TK: Tensor | None = None
    kept_TK: Tensor | None = None
    factor_TK: Tensor | None = None
    """What a pair's output is multiplied with; the block itself multiplies with the router's weight."""
    rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Expert → (token, rank) of each of the rows that it was given."""


def install_list(model: nn.Module, layer: MoELayer, state: LayerSkip) -> None:
    [(container, names)] = layer.containers.items()
    block, router = model.get_submodule(layer.path), model.get_submodule(layer.router)
    hooks = [
        block.register_forward_pre_hook(partial(_list_block_in, state), with_kwargs=True),
        block.register_forward_hook(partial(_list_block_out, state), always_call=True),
        router.register_forward_hook(partial(_list_router, state, layer)),
    ]
    for expert, name in enumerate(names):
        module = model.get_submodule(f"{container}.{name}")
        hooks.append(module.register_forward_pre_hook(partial(_list_expert_in, state, expert), with_kwargs=True))
        hooks.append(module.register_forward_hook(partial(_list_expert_out, state, expert)))
    state.removals += [hook.remove for hook in hooks]


def _list_block_in(state: LayerSkip, block: nn.Module, args: Any, kwargs: Any) -> None:
    if state.is_on:
        hidden = args[0] if args else next(iter(kwargs.values()))
        state.batch = _ListBatch(hidden.reshape(-1, hidden.shape[-1]))


def _list_block_out(state: LayerSkip, block: nn.Module, args: Any, output: Any) -> None:
    state.batch = None


def _list_router(state: LayerSkip, layer: MoELayer, router: nn.Module, args: Any, output: Any) -> None:
    batch, probe = state.batch, layer.router_probe
    if batch is None or not len(batch.hidden_TH):  # the router on its own, or nothing to route
        return
    if state.routing is not None:
        logits = output[0] if isinstance(output, tuple) else output
        logits_TE = logits.reshape(len(batch.hidden_TH), -1)[:, : state.num_experts].float()
        index_TK, weights_TK = state.routing.choose(logits_TE, state.top_k)
        weights_TK = weights_TK.float()
    else:
        index_TK, weights_TK = (
            output[position].reshape(len(batch.hidden_TH), -1)
            for position in (probe.index_position, probe.weights_position)
        )
    kept_TK, new_TK = state.choose(index_TK, weights_TK)
    nothing_TK = weights_TK == 0
    factor_TK = new_TK.double() / weights_TK.double().masked_fill(nothing_TK, 1.0)
    batch.index_TK, batch.kept_TK = index_TK, kept_TK
    batch.factor_TK = factor_TK.masked_fill(nothing_TK, 1.0).masked_fill(~kept_TK, 0.0)


def _list_expert_in(state: LayerSkip, expert: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
    batch = state.batch
    if batch is None or batch.index_TK is None:  # an expert on its own
        return None
    rows = args[0] if args else next(iter(kwargs.values()))
    token_N, rank_N = batch.rows[expert] = _pairs(state, expert, rows.reshape(-1, rows.shape[-1]))
    kept_N = batch.kept_TK[token_N, rank_N]
    if state.zeroed or bool(kept_N.all()):
        return None

    def of_kept(value: Any) -> Any:
        per_row = isinstance(value, Tensor) and value.shape[: rows.dim() - 1] == rows.shape[:-1]
        return value.reshape(len(kept_N), *value.shape[rows.dim() - 1 :])[kept_N] if per_row else value

    return tuple(map(of_kept, args)), {key: of_kept(value) for key, value in kwargs.items()}


def _pairs(state: LayerSkip, expert: int, rows_NH: Tensor) -> tuple[Tensor, Tensor]:
    """Token and rank of every row. Blocks sort in their own ways: rows are known by what stands in them."""
    batch = state.batch
    token_N, rank_N = (batch.index_TK == expert).nonzero(as_tuple=True)
    if len(rows_NH) == len(token_N):
        place_N = torch.empty_like(token_N)
        place_N[_keys(rows_NH).argsort(stable=True)] = _keys(batch.hidden_TH[token_N]).argsort(stable=True)
        token_N, rank_N = token_N[place_N], rank_N[place_N]
        if torch.equal(_bits(rows_NH), _bits(batch.hidden_TH[token_N])):
            return token_N, rank_N
    raise UnsupportedModelError(
        f"{state.path}: expert {expert} is not given the tokens that its router sent to it; this needs a plugin."
    )


def _bits(rows: Tensor) -> Tensor:
    """As integers: a NaN equals itself."""
    return rows.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])


def _keys(rows_NH: Tensor) -> Tensor:
    """[N] int64: numbers by which rows can be told apart, from the bits of their first few entries."""
    bits_NX = _bits(rows_NH[:, :_KEY_WIDTH]).long()
    factors_X = 6364136223846793005 + 2 * torch.arange(bits_NX.shape[1], device=bits_NX.device)
    return (bits_NX * factors_X).sum(-1)


def _list_expert_out(state: LayerSkip, expert: int, module: nn.Module, args: Any, output: Tensor) -> Any:
    batch = state.batch
    if batch is None or expert not in batch.rows:
        return None
    token_N, rank_N = batch.rows.pop(expert)
    factor_N = batch.factor_TK[token_N, rank_N]
    if bool((factor_N == 1).all()):
        return None
    kept_N = batch.kept_TK[token_N, rank_N]
    output = output.reshape(-1, output.shape[-1])
    if state.zeroed:
        output = output[kept_N]
    whole_NH = output.new_zeros(len(token_N), output.shape[-1])
    whole_NH[kept_N] = (output.double() * factor_N[kept_N, None]).to(output.dtype)
    return whole_NH


# Experts that see every token, scaled by its score ----------------------------------------------------------


def install_scaled(model: nn.Module, layer: MoELayer, state: LayerSkip) -> None:
    router, experts = model.get_submodule(layer.router), model.get_submodule(layer.experts)
    prefix = layer.experts + "."
    state.stack = Stack(
        {name[len(prefix) :]: axis for name, axis in layer.tensors.items() if name.startswith(prefix)},
        {
            attribute: stride + extra
            for (path, attribute), (stride, extra) in layer.integers.items()
            if path == layer.experts
        },
    )
    state.removals += [
        router.register_forward_hook(partial(_scaled_router, state)).remove,
        *_ScaledForward.put(experts, state),
    ]


def _scaled_router(state: LayerSkip, router: nn.Module, args: Any, output: Any) -> Any:
    state.batch = None
    scores_TE, *others = output
    if not state.is_on or not len(scores_TE):
        return None
    weights_TK, index_TK = scores_TE.topk(state.top_k, dim=-1)
    kept_TK, new_TK = state.choose(index_TK, weights_TK)
    if bool(kept_TK.all()) and state.rule.top_k is None:
        return None
    state.batch = not state.zeroed
    return (torch.zeros_like(scores_TE).scatter(1, index_TK, new_TK), *others)


class _ScaledForward(_Forward):
    """Every expert on the rows that its router gave it, and no others: rows of zeros answer zeros."""

    def run(self, state: LayerSkip, *args: Any, **kwargs: Any) -> Tensor:
        sparse, state.batch = state.batch, None
        if not sparse or self.inner is not None:  # who wraps the forward (offloading, say) expects to see it called
            return self.run_inner(*args, **kwargs)
        assert state.stack is not None
        (hidden,) = (*args, *kwargs.values())
        inputs_ETH = hidden.view(state.num_experts, -1, hidden.shape[-1])
        outputs_ETH = torch.zeros_like(inputs_ETH)
        for expert in range(state.num_experts):
            rows = inputs_ETH[expert].count_nonzero(-1).nonzero()[:, 0]
            if len(rows):
                one: Any = state.stack.only(self.experts, expert)
                outputs_ETH[expert, rows] = type(self.experts).forward(one, inputs_ETH[expert, rows])
        return outputs_ETH.view(hidden.shape)


# Lists of pairs --------------------------------------------------------------------------------------------


def install_pairs(model: nn.Module, layer: MoELayer, state: LayerSkip) -> None:
    router = model.get_submodule(layer.router)
    state.removals.append(router.register_forward_hook(partial(_pairs_router, state)).remove)


def _pairs_router(state: LayerSkip, router: nn.Module, args: Any, output: Any) -> Any:
    num_tokens = args[0].reshape(-1, args[0].shape[-1]).shape[0]
    if not state.is_on or not num_tokens:
        return None
    pairs = PairLists.of(output, state.path, num_tokens)
    kept_TK, new_TK = state.choose(*pairs.choices())
    if bool(kept_TK.all()) and state.rule.top_k is None:
        return None
    return pairs.replaced(torch.ones_like(kept_TK) if state.zeroed else kept_TK, new_TK)


INSTALLERS: dict[str, Callable[[nn.Module, MoELayer, LayerSkip], None]] = {
    "choices": install_choices,
    "list": install_list,
    "pairs": install_pairs,
    "scaled inputs": install_scaled,
}
"""By `structure.Call`; experts that are given masks choose one expert a token, and have nothing to skip."""
