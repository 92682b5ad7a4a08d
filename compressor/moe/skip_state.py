"""What a layer knows while it skips experts.

Dimensions: T tokens, K experts chosen per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import UnsupportedModelError
from compressor.moe.counter import Counter
from compressor.moe.routing import RoutingRule
from compressor.moe.skip_rule import SkipRule
from compressor.moe.structure import ExpertAxis

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
        """The inverse of `pause`."""
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
        from compressor.moe.skip_layers import register

        self.__dict__.update(state)
        register()

    @property
    def is_on(self) -> bool:
        """Whether the layer skips now."""
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
