"""Skip experts while a model runs: only the (token, expert) pairs that stay are evaluated.

No model code is patched. How a layer is made to skip depends on how its block hands tokens over (`probe.Call`):

choices         experts decorated by transformers: an implementation registered under IMPLEMENTATION, which gives the
                pairs that stay, as tokens with one expert each, to the implementation that was set before (eager,
                grouped_mm, batched_mm); others: a forward on the instance that does the same
list            hooks on the modules of the list: each is given the rows that stay
scaled inputs   a hook on the router sets scores to 0, and each expert runs on its own rows only
pairs           a hook on the router takes pairs out of its lists

What a layer needs while it skips is a `LayerSkip` on one of its modules. It is copied with the model, belongs to this
model alone, and is gone when skipping is switched off. If nothing is skipped in a batch, the layer runs as it would
without us, to the bit.

Not covered: expert parallelism, where one process sees only its own experts' weights; refused when it runs.

Dimensions: T tokens, K experts chosen per token, E experts, P pairs that stay, H hidden size.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CheckpointError, UnsupportedModelError
from compressor.moe.entry import KEY, read_entry
from compressor.moe.pairs import PairLists
from compressor.moe.probe import places_of_choices
from compressor.moe.routing import RoutingRule
from compressor.moe.skip_rule import VERSION, SkipRule
from compressor.moe.structure import MoELayer, Structure
from compressor.moe.tap import rule_of_block

IMPLEMENTATION = "compressor_skip"
"""Our name in transformers' registry of experts implementations."""
_STATE = "_compressor_skip"
_KEY_WIDTH = 16
_PAIRS_ON_CPU = 1024
_FEW_TOKENS = 8
"""Up to so many tokens on an accelerator, pairs are multiplied one by one, as transformers does while it decodes."""


def rules_of(config: Any) -> dict[str, SkipRule]:
    """Layer path → rule, as far as the config says. Raises CheckpointError where it is damaged or newer than we."""
    part = read_entry(config).get("skipping")
    if part is None:
        return {}
    if part.get("version") != VERSION or not isinstance(part.get("layers"), Mapping):
        raise CheckpointError(
            f'config.json: `{KEY}.skipping` should be {{"version": {VERSION}, "layers": {{layer path: rule}}}}, found '
            f"version {part.get('version')!r}. A newer version of moe-compressor may read it."
        )
    rules = {}
    for path, rule in part["layers"].items():
        try:
            rules[path] = SkipRule.from_json(rule if isinstance(rule, Mapping) else {})
        except ValueError as error:
            raise CheckpointError(f"config.json: `{KEY}.skipping`: {path}: {error}.") from error
    return rules


def rules_json(rules: Mapping[str, SkipRule]) -> dict[str, Any]:
    """The part of the config that `rules_of` reads; empty without rules."""
    return {"version": VERSION, "layers": {path: rule.to_json() for path, rule in rules.items()}} if rules else {}


class Counter:
    """How many experts the tokens of a running model used, layer by layer."""

    def __init__(self) -> None:
        self.mask_T: Tensor | None = None
        """Which tokens of the batch that is running are real; None while that is not known: then all count."""
        self._experts: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}

    def add(self, path: str, used_TK: Tensor) -> None:
        """Count one batch; `used_TK` says which of the chosen were evaluated."""
        mask_T, num_tokens = self.mask_T, torch.tensor(len(used_TK))
        if mask_T is not None and len(mask_T) == len(used_TK):
            mask_T = mask_T.to(used_TK.device)
            used_TK, num_tokens = used_TK & mask_T[:, None], mask_T.sum()
        self._experts[path] = self._experts.get(path, 0) + used_TK.sum()
        self._tokens[path] = self._tokens.get(path, 0) + num_tokens

    @property
    def experts_per_token(self) -> dict[str, float]:
        """Layer path → experts that a token used on average; only layers that skip, and that tokens came to."""
        return {path: int(total) / max(1, self.tokens[path]) for path, total in self._experts.items()}

    @property
    def tokens(self) -> dict[str, int]:
        """Layer path → tokens that were counted there."""
        return {path: int(number) for path, number in self._tokens.items()}


@dataclass
class LayerSkip:
    """What a layer's modules know while it skips. Without a `rule` its experts run as they would without us."""

    path: str
    rule: SkipRule | None
    num_experts: int
    top_k: int
    """Experts that its router gives each token: more than the model's own with a `normalise_over` beyond that."""
    zeroed: bool = False
    """Whether skipped experts are evaluated all the same, with weight 0: slow and plain, to compare with."""
    base: str | None = None
    """The experts implementation underneath."""
    original: Callable[..., Tensor] | None = None
    """The forward that stood on the instance before ours: accelerate, for one, puts one there."""
    identity: int | None = None
    """The id of something that can be chosen and computes nothing, if there is such a thing."""
    routing: RoutingRule | None = None
    """How the block chooses, where only it knows (experts in a list)."""
    counter: Counter | None = None
    removals: list[Callable[[], None]] = field(default_factory=list)
    batch: Any = None
    """What one hook leaves for the next during a forward."""
    _norms: dict[torch.device, Tensor] = field(default_factory=dict)

    def kept(self, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """[T, K] bool: which pairs stay; counted, if somebody counts."""
        assert self.rule is not None
        if index_TK.shape[-1] not in (1, self.top_k):  # 1: an expert on its own, asked by whoever watches the layer
            raise UnsupportedModelError(
                f"{self.path}: its experts are given {index_TK.shape[-1]} choices per token, and its rule for skipping "
                f"is made for {self.top_k}."
            )
        num_experts = None if self.identity is None else self.num_experts
        kept_TK = self.rule.kept(index_TK, weights_TK, num_experts, self._norms_on(index_TK.device))
        if self.counter is not None:
            self.counter.add(self.path, kept_TK & (index_TK < self.num_experts))
        return kept_TK

    def choose(self, index_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """(which pairs stay [T, K] bool, all weights [T, K], 0 for the others)."""
        assert self.rule is not None
        kept_TK = self.kept(index_TK, weights_TK)
        return kept_TK, self.rule.reweighted(weights_TK, kept_TK)

    def _norms_on(self, device: torch.device) -> Tensor | None:
        assert self.rule is not None
        if self.rule.expert_norms is None:
            return None
        if device not in self._norms:
            self._norms[device] = torch.tensor(self.rule.expert_norms, device=device)
        return self._norms[device]


# On and off ------------------------------------------------------------------------------------------------


def install(model: nn.Module, structure: Structure, rules: Mapping[str, SkipRule], *, zeroed: bool = False) -> None:
    """Let the layers named skip from now on, in place of whatever rules were installed. `rules` are checked by
    `refuse_rules` before.
    """
    remove(model)
    try:
        for layer in structure.layers:
            if layer.path in rules:
                _install_layer(model, structure, layer, rules[layer.path], zeroed)
    except BaseException:
        remove(model)
        raise


def refuse_rules(structure: Structure, rules: Mapping[str, SkipRule]) -> None:
    """Raise ValueError or UnsupportedModelError if these layers cannot skip like this."""
    layers = {layer.path: layer for layer in structure.layers}
    for path, rule in rules.items():
        if path not in layers:
            raise ValueError(f"there is no MoE layer {path!r} to skip experts in; the layers are {', '.join(layers)}")
        layer = layers[path]
        problem = rule.problem(layer.num_experts, layer.top_k)
        if problem:
            raise ValueError(f"{path}: {problem}")
        if rule.normalise_over is not None and rule.normalise_over > layer.top_k:
            size = layer.num_experts // layer.num_groups * layer.num_chosen_groups
            problem = layer.wider_problem or (
                f"its router chooses among {size} experts, so it cannot name {rule.normalise_over}"
                if rule.normalise_over > size
                else None
            )
            if problem:
                raise UnsupportedModelError(f"{path}: {problem}.")


def remove(model: nn.Module) -> None:
    """Let all layers run as they would without us."""
    for module in model.modules():
        state = module.__dict__.pop(_STATE, None)
        if isinstance(state, LayerSkip):
            for undo in state.removals:
                undo()
            state.removals.clear()


def states(model: nn.Module) -> dict[str, LayerSkip]:
    """Layer path → what it knows, of the layers that skip now."""
    found = (module.__dict__.get(_STATE) for module in model.modules())
    return {state.path: state for state in found if isinstance(state, LayerSkip) and state.rule is not None}


def base_implementation(model: nn.Module, name: str | None) -> str | None:
    """The experts implementation that a config means: what lies underneath where it names ours."""
    if name != IMPLEMENTATION:
        return name
    found = (module.__dict__.get(_STATE) for module in model.modules())
    return next((state.base for state in found if isinstance(state, LayerSkip)), None)


@contextmanager
def counting(model: nn.Module, counter: Counter) -> Iterator[None]:
    """Within the context every layer that skips adds what it does to the counter."""
    installed = list(states(model).values())
    hook = model.register_forward_pre_hook(_PaddingMask(counter), with_kwargs=True)
    try:
        for state in installed:
            state.counter = counter
        yield
    finally:
        for state in installed:
            state.counter = None
        hook.remove()


@dataclass
class _PaddingMask:
    """Tells the counter which tokens of a batch are padding, by the model's own argument."""

    counter: Counter

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        mask, tokens = kwargs.get("attention_mask"), kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        tokens = args[0] if tokens is None and args else tokens
        known = isinstance(mask, Tensor) and mask.dim() == 2 and isinstance(tokens, Tensor)
        # with a cache the mask reaches back over what was read before
        self.counter.mask_T = mask[:, -tokens.shape[1] :].bool().reshape(-1) if known else None


def _install_layer(model: nn.Module, structure: Structure, layer: MoELayer, rule: SkipRule, zeroed: bool) -> None:
    top_k = max(layer.top_k, rule.normalise_over or 0)
    state = LayerSkip(layer.path, rule, layer.num_experts, top_k, zeroed)
    state.identity = layer.num_experts if layer.num_extra_choices else None
    owner = model.get_submodule({"list": layer.path, "pairs": layer.router}.get(layer.router_probe.call, layer.experts))
    other = owner.__dict__.get(_STATE)
    if other is not None and other.rule is not None:  # a module that stands in two places of the model
        if other.rule != rule:
            raise ValueError(f"{layer.path} and {other.path} share their experts, so they must skip by the same rule")
        return
    if top_k > layer.top_k:
        _ask_for_more(model, structure, layer, state)
    installers = {
        "choices": _install_choices,
        "list": _install_list,
        "pairs": _install_pairs,
        "scaled inputs": _install_scaled,
    }
    installers[layer.router_probe.call](model, layer, state)
    owner.__dict__[_STATE] = state


def _ask_for_more(model: nn.Module, structure: Structure, layer: MoELayer, state: LayerSkip) -> None:
    """Let the layer's router name more experts than the model takes. The config stays as it is."""
    for (path, attribute), (stride, extra) in structure.top_k_integers.items():
        if path == layer.path or path.startswith(layer.path + "."):
            module = model.get_submodule(path)
            state.removals.append(_Undo.of(module, attribute))
            setattr(module, attribute, stride * state.top_k + extra)


@dataclass
class _Undo:
    """Sets an attribute back to what it is now. Not a closure, so that a copy of the model undoes its own."""

    holder: Any
    attribute: str
    value: Any
    was_there: bool

    @classmethod
    def of(cls, holder: Any, attribute: str) -> _Undo:
        return cls(holder, attribute, holder.__dict__.get(attribute), attribute in holder.__dict__)

    def __call__(self) -> None:
        if self.was_there:
            setattr(self.holder, self.attribute, self.value)
        else:
            self.holder.__dict__.pop(self.attribute, None)


# Experts that are given choices ----------------------------------------------------------------------------


def _install_choices(model: nn.Module, layer: MoELayer, state: LayerSkip) -> None:
    experts = model.get_submodule(layer.experts)
    if not is_decorated(experts):
        state.removals.append(_Undo.of(experts, "forward"))
        state.original = experts.__dict__.get("forward")
        experts.forward = types.MethodType(_skip_forward, experts)
        return
    _register()
    if _STATE not in experts.__dict__:
        config: Any = experts.config
        state.removals.append(_Undo.of(config, "_experts_implementation_internal"))
        base = config._experts_implementation_internal
        # every module that reads this config needs to know what lies underneath, whether it skips or not
        for module in model.modules():
            if is_decorated(module) and module.config is config:
                module.__dict__[_STATE] = LayerSkip(
                    layer.path, None, 0, 0, base=None if base == IMPLEMENTATION else base
                )
        config._experts_implementation_internal = IMPLEMENTATION
    state.base = experts.__dict__[_STATE].base


def is_decorated(module: nn.Module) -> bool:
    """Whether an experts module asks transformers' registry how it is to run."""
    return "_is_expert_parallel" in module.__dict__ and hasattr(type(module).forward, "__wrapped__")


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, skip_experts_forward)


def skip_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts implementation that transformers calls for a module whose config names ours."""
    state: LayerSkip | None = self.__dict__.get(_STATE)
    if state is None or state.rule is None:
        return _run_base(self, state.base if state else None, hidden_states, top_k_index, top_k_weights)
    if self._is_expert_parallel:
        raise UnsupportedModelError(
            f"{state.path}: its experts are spread over several processes, each of which sees only its own experts' "
            f"weights, so which are small cannot be told. Skipping does not work with expert parallelism."
        )

    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(
            msg="compressor: which pairs of tokens and experts stay depends on the data; compile without fullgraph=True"
        )

    def call(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return _run_base(self, state.base, hidden, index, weights)

    return _evaluate_kept(state, hidden_states, top_k_index, top_k_weights, call)


def _run_base(module: Any, name: str | None, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    name = name or "grouped_mm"
    if name == "grouped_mm" and hidden.device.type != "cpu" and len(hidden) <= _FEW_TOKENS:
        name = "batched_mm"
    eager = type(module).forward.__wrapped__
    return ALL_EXPERTS_FUNCTIONS.get_interface(name, eager)(module, hidden, index, weights)  # type: ignore[no-any-return]


def _skip_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Forward of an experts module that is not decorated."""
    state: LayerSkip = self.__dict__[_STATE]
    given = (*args, *kwargs.values())
    places = places_of_choices(given)
    if places is None:
        raise UnsupportedModelError(f"{state.path}: its experts are not given hidden states, ids and weights.")
    original = state.original or type(self).forward.__get__(self)

    def call(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if index.shape[-1] == 1 and state.identity is not None:  # some lose a dimension with one id per token
            index = torch.cat([index, torch.full_like(index, state.identity)], dim=-1)
            weights = torch.cat([weights, torch.zeros_like(weights)], dim=-1)
        values = dict(zip(places, (hidden, index, weights), strict=True))
        return original(*(values[place] for place in range(3)))

    hidden, index, weights = (given[place] for place in places)
    return _evaluate_kept(state, hidden, index, weights, call)


def _evaluate_kept(
    state: LayerSkip,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    call: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """The experts' output from the pairs that stay, each given to `call` as a token with one expert."""
    assert state.rule is not None
    hidden_TH = hidden.reshape(-1, hidden.shape[-1])
    index_TK = index.reshape(len(hidden_TH), -1)
    weights_TK = weights.reshape(index_TK.shape)
    kept_TK = state.kept(index_TK, weights_TK)
    if bool(kept_TK.all()) and state.rule.top_k is None:
        return call(hidden, index, weights)
    weights_TK = state.rule.reweighted(weights_TK, kept_TK)
    if state.zeroed:
        return call(hidden, index, weights_TK.view(weights.shape))
    if len(kept_TK) == 1 or (state.rule.top_k is not None and state.identity is None):  # as many of each token
        shape = (*index.shape[:-1], -1)
        return call(hidden, index_TK[kept_TK].view(shape), weights_TK[kept_TK].view(shape))
    token_P, rank_P = kept_TK.nonzero(as_tuple=True)
    index_P1, weights_P1 = index_TK[token_P, rank_P][:, None], weights_TK[token_P, rank_P][:, None]
    if hidden.device.type != "cpu":
        outputs_PH = call(hidden_TH[token_P], index_P1, weights_P1).reshape(len(token_P), -1)
        padded_NH = outputs_PH.new_zeros(kept_TK.numel(), outputs_PH.shape[-1])
        padded_NH[kept_TK.reshape(-1)] = outputs_PH  # index_add_ would add in no fixed order
        return padded_NH.view(*kept_TK.shape, -1).sum(1).view(*hidden.shape[:-1], -1)
    return _by_parts(hidden_TH, token_P, index_P1, weights_P1, call).view(*hidden.shape[:-1], -1)


def _by_parts(
    hidden_TH: Tensor,
    token_P: Tensor,
    index_P1: Tensor,
    weights_P1: Tensor,
    call: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """[T, H]: each token's outputs added up in float32, pairs taken in the order of their experts, some at a time, so
    that what lies between an expert's matrices stays near the processor.
    """
    order_P = index_P1[:, 0].argsort(stable=True)
    total_TH: Tensor | None = None
    for part_p in torch.split(order_P, _PAIRS_ON_CPU):
        outputs_pH = call(hidden_TH[token_P[part_p]], index_P1[part_p], weights_P1[part_p]).reshape(len(part_p), -1)
        if total_TH is None:
            total_TH = outputs_pH.new_zeros(len(hidden_TH), outputs_pH.shape[-1], dtype=torch.float32)
        total_TH.index_add_(0, token_P[part_p], outputs_pH.float())
    assert total_TH is not None
    return total_TH.to(hidden_TH.dtype)


# Experts in a list -----------------------------------------------------------------------------------------


@dataclass
class _ListBatch:
    """A forward of a block whose experts are a list, on its way: what the router chose and what of it stays."""

    hidden_TH: Tensor | None = None
    index_TK: Tensor | None = None
    kept_TK: Tensor | None = None
    factor_TK: Tensor | None = None
    """What a pair's output is multiplied with; the block itself multiplies with the router's weight."""
    rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Expert → (token, rank) of each of the rows that it was given."""


def _install_list(model: nn.Module, layer: MoELayer, state: LayerSkip) -> None:
    (container, names), *others = layer.containers.items()
    if others:
        raise UnsupportedModelError(f"{layer.path}: experts in {1 + len(others)} lists; this needs a plugin.")
    block, router = model.get_submodule(layer.path), model.get_submodule(layer.router)
    if layer.router_probe.index_position is None:
        state.routing = rule_of_block(model, layer)
    before = block.register_forward_pre_hook(_ListBlock(state), with_kwargs=True)
    after = router.register_forward_hook(_ListRouter(state, layer))
    hooks = [before, after]
    for expert, name in enumerate(names):
        module = model.get_submodule(f"{container}.{name}")
        hooks.append(module.register_forward_pre_hook(_ListExpertIn(state, expert)))
        hooks.append(module.register_forward_hook(_ListExpertOut(state, expert)))
    state.removals += [hook.remove for hook in hooks]


@dataclass
class _ListBlock:
    state: LayerSkip

    def __call__(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else next(iter(kwargs.values()))
        self.state.batch = _ListBatch(hidden.reshape(-1, hidden.shape[-1]))


@dataclass
class _ListRouter:
    state: LayerSkip
    layer: MoELayer

    def __call__(self, router: nn.Module, args: Any, output: Any) -> None:
        state, batch, probe = self.state, self.state.batch, self.layer.router_probe
        if batch is None:  # the router on its own
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
        batch.index_TK, batch.kept_TK = index_TK, kept_TK
        factor_TK = torch.where(weights_TK == 0, 1.0, new_TK.double() / weights_TK.double())
        batch.factor_TK = factor_TK.masked_fill(~kept_TK, 0.0)


@dataclass
class _ListExpertIn:
    state: LayerSkip
    expert: int

    def __call__(self, module: nn.Module, args: Any) -> Any:
        batch = self.state.batch
        if batch is None or batch.index_TK is None:  # an expert on its own
            return None
        rows_NH = args[0].reshape(-1, args[0].shape[-1])
        token_N, rank_N = self._pairs(batch, rows_NH)
        batch.rows[self.expert] = (token_N, rank_N)
        kept_N = batch.kept_TK[token_N, rank_N]
        if self.state.zeroed or bool(kept_N.all()):
            return None
        return (rows_NH[kept_N], *args[1:])

    def _pairs(self, batch: _ListBatch, rows_NH: Tensor) -> tuple[Tensor, Tensor]:
        """Token and rank of every row. Blocks sort in their own ways: rows are known by what stands in them."""
        assert batch.index_TK is not None
        assert batch.hidden_TH is not None
        token_N, rank_N = (batch.index_TK == self.expert).nonzero(as_tuple=True)
        if len(rows_NH) == len(token_N):
            place_N = torch.empty_like(token_N)
            place_N[_keys(rows_NH).argsort(stable=True)] = _keys(batch.hidden_TH[token_N]).argsort(stable=True)
            token_N, rank_N = token_N[place_N], rank_N[place_N]
            if torch.equal(rows_NH, batch.hidden_TH[token_N]):
                return token_N, rank_N
        raise UnsupportedModelError(
            f"{self.state.path}: expert {self.expert} is not given the tokens that its router sent to it, so which of "
            f"them are to be skipped cannot be told; this needs a plugin."
        )


def _keys(rows_NH: Tensor) -> Tensor:
    """[N] int64: numbers by which rows can be told apart, from the bits of their first few entries."""
    first_NX = rows_NH[:, :_KEY_WIDTH].contiguous()
    bits_NX = first_NX.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[first_NX.element_size()]).long()
    factors_X = 6364136223846793005 + 2 * torch.arange(bits_NX.shape[1], device=bits_NX.device)
    return (bits_NX * factors_X).sum(-1)


@dataclass
class _ListExpertOut:
    state: LayerSkip
    expert: int

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        batch = self.state.batch
        if batch is None or self.expert not in batch.rows:
            return None
        token_N, rank_N = batch.rows.pop(self.expert)
        factor_N = batch.factor_TK[token_N, rank_N]
        if bool((factor_N == 1).all()):
            return None
        kept_N = factor_N != 0
        if self.state.zeroed:
            output = output[kept_N]
        whole_NH = output.new_zeros(len(token_N), output.shape[-1])
        whole_NH[kept_N] = (output.double() * factor_N[kept_N, None]).to(output.dtype)
        return whole_NH


# Experts that see every token, scaled by its score ----------------------------------------------------------


def _install_scaled(model: nn.Module, layer: MoELayer, state: LayerSkip) -> None:
    router, experts = model.get_submodule(layer.router), model.get_submodule(layer.experts)
    state.removals += [
        router.register_forward_hook(_ScaledRouter(state, layer.top_k)).remove,
        _Undo.of(experts, "forward"),
    ]
    prefix = layer.experts + "."
    own = {name[len(prefix) :]: axis for name, axis in layer.tensors.items() if name.startswith(prefix)}
    integers = {
        (path[len(prefix) :], attribute): stride + extra
        for (path, attribute), (stride, extra) in layer.integers.items()
        if (path + ".").startswith(prefix)
    }
    experts.forward = types.MethodType(_scaled_forward, experts)
    state.batch = _ScaledBatch(own, integers)


@dataclass
class _ScaledBatch:
    axes: Mapping[str, Any]
    """Tensors of the experts module that are indexed by expert."""
    integers: Mapping[tuple[str, str], int]
    """Its integers that count experts → their value for one."""
    dense: bool = True
    """Whether the experts run as they would without us."""


@dataclass
class _ScaledRouter:
    state: LayerSkip
    top_k: int

    def __call__(self, router: nn.Module, args: Any, output: Any) -> Any:
        scores_TE, *others = output
        weights_TK, index_TK = scores_TE.topk(self.top_k, dim=-1)
        kept_TK, new_TK = self.state.choose(index_TK, weights_TK)
        self.state.batch.dense = self.state.zeroed or bool(kept_TK.all())
        return (torch.zeros_like(scores_TE).scatter(1, index_TK, new_TK), *others)


def _scaled_forward(self: Any, hidden: Tensor) -> Tensor:
    """Every expert on the rows that its router gave it, and no others: rows of zeros answer zeros."""
    state: LayerSkip = self.__dict__[_STATE]
    original = type(self).forward
    if state.batch.dense:
        return original(self, hidden)  # type: ignore[no-any-return]
    inputs_ETH = hidden.view(state.num_experts, -1, hidden.shape[-1])
    outputs_ETH = torch.zeros_like(inputs_ETH)
    for expert in range(state.num_experts):
        rows = inputs_ETH[expert].count_nonzero(-1).nonzero()[:, 0]
        if len(rows):
            outputs_ETH[expert, rows] = original(_only(self, expert, state.batch), inputs_ETH[expert, rows])
    return outputs_ETH.view(hidden.shape)


def _only(experts: nn.Module, expert: int, batch: _ScaledBatch) -> nn.Module:
    """A module of one of the stacked experts, sharing its weights."""
    one = copy.copy(experts)
    one._parameters = dict(experts._parameters)
    one.__dict__ = {**one.__dict__, "_parameters": one._parameters}
    for name, axis in batch.axes.items():
        stacked = one._parameters[name]
        assert stacked is not None
        one._parameters[name] = stacked.narrow(axis.dim, expert * axis.stride, axis.stride)  # type: ignore[assignment]
    for (path, attribute), value in batch.integers.items():
        if not path:
            one.__dict__[attribute] = value
    return one


# Lists of pairs --------------------------------------------------------------------------------------------


def _install_pairs(model: nn.Module, layer: MoELayer, state: LayerSkip) -> None:
    hook = model.get_submodule(layer.router).register_forward_hook(_PairsRouter(state))
    state.removals.append(hook.remove)


@dataclass
class _PairsRouter:
    state: LayerSkip

    def __call__(self, router: nn.Module, args: Any, output: Any) -> Any:
        state, pairs = self.state, PairLists.of(output, self.state.path, self.state.top_k)
        index_TK, weights_TK = pairs.choices()
        kept_TK, new_TK = state.choose(index_TK, weights_TK)
        if bool(kept_TK.all()):
            return None
        return pairs.replaced(torch.ones_like(kept_TK) if state.zeroed else kept_TK, new_TK)
