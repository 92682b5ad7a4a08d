"""What a layer knows while it skips experts, and the experts implementation that asks it.

Dimensions: T tokens, K experts chosen per token, P pairs that stay, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import UnsupportedModelError
from compressor.model.expert_outputs import CONSTANTS, evaluate_pairs
from compressor.model.routing_rule import RoutingRule
from compressor.model.skipping.rule import SkipRule
from compressor.model.skipping.usage import Counter
from compressor.model.structure import ExpertAxis

IMPLEMENTATION = "compressor_skip"
"""Our name in transformers' registry of experts implementations."""
STATE = "_compressor_skip"
"""The attribute of a module that holds its layer's LayerSkip."""


@dataclass(eq=False)
class Switch:
    """What the layers of one model have in common while they skip."""

    paused: int = 0
    """How many contexts ask that nothing be skipped."""
    counters: list[Counter] = field(default_factory=list)
    """Those that count now."""
    raised: list[Raised] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model, and one that is pickled, has no part in the contexts that this one is in."""
        return {**self.__dict__, "paused": 0, "counters": []}

    def pause(self) -> None:
        """Skip nothing until `resume`; may be nested."""
        self.paused += 1
        for one in self.raised if self.paused == 1 else ():
            one.lower()

    def resume(self) -> None:
        self.paused -= 1
        for one in self.raised if not self.paused else ():
            one.lift()


@dataclass
class LayerSkip:
    """What a layer's modules know while it skips."""

    path: str
    rule: SkipRule
    num_experts: int
    top_k: int
    """Experts that its router gives each token: more than the model's own with a `normalise_over` beyond that."""
    zeroed: bool
    """Whether skipped experts are evaluated all the same, with weight 0: slow and plain, to compare with."""
    has_identity: bool
    """Whether ids from `num_experts` up can be chosen, and are no experts."""
    switch: Switch
    config: Any = None
    """The config that the experts had, which names the implementation underneath."""
    routing: RoutingRule | None = None
    """How the block chooses, where only it knows (experts in a list)."""
    stack: Stack | None = None
    """How one expert is cut out of the stack (experts whose inputs are scaled)."""
    batch: Any = None
    """What one hook leaves for the next, within a forward."""
    removals: list[Callable[[], None]] = field(default_factory=list)
    _norms: dict[torch.device, Tensor] = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was pickled: in a fresh process the implementation is not registered yet."""
        self.__dict__.update(state)
        register()

    @property
    def is_on(self) -> bool:
        return not self.switch.paused

    def kept(self, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """[T, K] bool: which pairs stay; counted, if somebody counts."""
        if index_TK.shape[-1] > self.top_k:
            raise UnsupportedModelError(
                f"{self.path}: its experts are given {index_TK.shape[-1]} choices per token, and its rule for skipping "
                f"is made for {self.top_k}."
            )
        num_experts = self.num_experts if self.has_identity else None
        kept_TK = self.rule.kept(index_TK, weights_TK, num_experts, self._norms_on(index_TK.device))
        for counter in self.switch.counters:
            counter.add(self.path, kept_TK & (index_TK < self.num_experts))
        return kept_TK

    def choose(self, index_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """(which pairs stay [T, K] bool, all weights [T, K], 0 for the others)."""
        kept_TK = self.kept(index_TK, weights_TK)
        return kept_TK, self.rule.reweighted(weights_TK, kept_TK)

    def _norms_on(self, device: torch.device) -> Tensor | None:
        if self.rule.expert_norms is None:
            return None
        if device not in self._norms:
            self._norms[device] = torch.tensor(self.rule.expert_norms, dtype=torch.float32, device=device)
        return self._norms[device]


@dataclass(eq=False)
class Raised:
    """An attribute that says how many experts a router names. Called before its block's forward: a copy that was made
    while its model was paused has found the model's own number.
    """

    switch: Switch
    module: nn.Module
    attribute: str
    own: int
    wider: int

    def __call__(self, block: nn.Module, args: Any) -> None:
        if not self.switch.paused:
            self.lift()

    def lift(self) -> None:
        setattr(self.module, self.attribute, self.wider)

    def lower(self) -> None:
        if getattr(self.module, self.attribute) == self.wider:
            setattr(self.module, self.attribute, self.own)


@dataclass
class Replaced:
    """An attribute of a module that is ours for the time being. Objects, not closures: copies put their own back."""

    module: nn.Module
    attribute: str
    before: Any
    was_there: bool
    ours: Any

    @classmethod
    def put(cls, module: nn.Module, attribute: str, ours: Any) -> Replaced:
        found = cls(module, attribute, module.__dict__.get(attribute), attribute in module.__dict__, ours)
        module.__dict__[attribute] = ours
        return found

    def __call__(self) -> None:
        if self.module.__dict__.get(self.attribute) is not self.ours:
            return  # somebody has put another one over ours
        if self.was_there:
            self.module.__dict__[self.attribute] = self.before
        else:
            del self.module.__dict__[self.attribute]


@dataclass
class Stack:
    """How one expert is cut out of a module of stacked ones."""

    axes: Mapping[str, ExpertAxis]
    """Tensors of the module that are indexed by expert."""
    integers: Mapping[str, int]
    """Its integers that count experts → their value for one."""

    def only(self, experts: nn.Module, expert: int) -> nn.Module:
        """A module of this one expert, sharing its weights."""
        one = copy.copy(experts)
        one._parameters = dict(experts._parameters)
        for name, axis in self.axes.items():
            stacked = one._parameters[name]
            assert stacked is not None
            own = stacked.narrow(axis.dim, expert * axis.stride, axis.stride)
            one._parameters[name] = own  # type: ignore[assignment]  # a view will do: nobody registers it
        one.__dict__.update(self.integers)
        return one


def is_decorated(module: nn.Module) -> bool:
    """Whether an experts module asks transformers' registry how it is to run, and nothing of ours stands before."""
    if CONSTANTS in module.__dict__:
        return False
    return "_is_expert_parallel" in module.__dict__ and hasattr(type(module).forward, "__wrapped__")


def register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, skip_experts_forward)


def skip_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts implementation that transformers calls for a module whose config names ours."""
    state: LayerSkip | None = self.__dict__.get(STATE)
    if state is None or not state.is_on:
        return _run_base(self, state, hidden_states, top_k_index, top_k_weights)
    if self._is_expert_parallel:
        raise UnsupportedModelError(
            f"{state.path}: skipping does not work with expert parallelism: a process sees only its own experts."
        )
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(
            msg="compressor: which pairs of tokens and experts stay depends on the data; compile without fullgraph=True"
        )

    def call(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return _run_base(self, state, hidden, index, weights)

    return evaluate_kept(state, hidden_states, top_k_index, top_k_weights, call)


def _run_base(module: Any, state: LayerSkip | None, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Run by what the model's config names now: transformers itself changes it while it decodes on an accelerator."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    name = state.config._experts_implementation if state else IMPLEMENTATION
    if name == IMPLEMENTATION:  # asked for at load by somebody who has no rules: transformers' own default
        name = "grouped_mm"
    eager = type(module).forward.__wrapped__
    return ALL_EXPERTS_FUNCTIONS.get_interface(name, eager)(module, hidden, index, weights)  # type: ignore[no-any-return]


def evaluate_kept(
    state: LayerSkip, hidden: Tensor, index: Tensor, weights: Tensor, call: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """The experts' output from the pairs that stay by the layer's rule."""
    index_TK, weights_TK = (value.reshape(-1, index.shape[-1]) for value in (index, weights))
    if not len(index_TK):
        return call(hidden, index, weights)
    kept_TK = state.kept(index_TK, weights_TK)
    if bool(kept_TK.all()) and state.rule.top_k is None:
        return call(hidden, index, weights)
    weights_TK = state.rule.reweighted(weights_TK, kept_TK)
    if state.zeroed:
        return call(hidden, index, weights_TK.view(weights.shape))
    is_even = state.rule.top_k is not None and not state.has_identity
    return evaluate_pairs(hidden, index, weights_TK, kept_TK, call, is_even=is_even)
