"""Learn how a MoE block routes by running a part of it, without any weight of the real model.

First the block's forward is traced on the meta device up to its experts, to see what the router and the experts are
given. Then the router alone runs on random weights and random tokens (small, on the CPU) and is asked questions: how
many experts does it choose, does it limit them by groups, can it choose things that are no experts, does it read the
config while it runs, does its bias switch an expert off. So it works for `check` and `inspect`, which read the config
only; and no answer depends on a name.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor.errors import UnsupportedModelError
from compressor.model.expert_outputs import places_of_choices
from compressor.model.modules import forward_replaced, named_tensors, tensor_at
from compressor.model.router_logits import RouterLogits
from compressor.model.structure import Call, RouterProbe

if TYPE_CHECKING:
    from compressor.model.structure import ConfigLeaf, MoELayer

_NUM_TOKENS = 48
SWITCHED_OFF = -1e9
"""A bias with which no expert is chosen; finite, so that it can be written into a checkpoint."""


@torch.no_grad()
def probe_router(
    model: nn.Module,
    layer: MoELayer,
    count_leaf: ConfigLeaf,
    config: Any,
    top_k: int | None,
    num_groups: int,
    name: str,
) -> RouterProbe:
    """Probe one block of a meta model, where its parts are as `layer` says; `top_k` is the config's. Raises
    UnsupportedModelError where the router has no logits, its choices cannot be counted, or its experts do not run them.
    """
    router_class = type(model.get_submodule(layer.router)).__name__
    trace = _trace(model, layer, count_leaf, config)
    num_experts = layer.num_experts
    router = _LoneRouter.of(model, layer, trace)
    try:
        outputs = router.run()
    except Exception as error:  # whatever it needs, we do not have it
        outputs = None
        failure = f"{type(error).__name__}: {error}"
    call = _call(layer, trace)
    if call == "masks":
        _refuse_other_experts(model, layer, trace, name)
    if outputs is not None and not router.saw_logits:
        raise UnsupportedModelError(
            f"{name}: {layer.router} ({router_class}) computes no logit per expert; this needs an adapter."
        )
    found = _Found.of(call, trace, outputs, top_k, num_experts)
    if found.top_k is None:
        returned = "nothing, it failed: " + failure if outputs is None else _describe(outputs)
        raise UnsupportedModelError(
            f"{name}: cannot tell how many experts {layer.router} ({router_class}) chooses; it returned {returned}."
        )
    ask = _Questions(router, found, num_experts) if outputs is not None and found.weights_position is not None else None
    given = [value for value in trace.experts_args or () if isinstance(value, Tensor)]
    return RouterProbe(
        class_name=router_class,
        top_k=found.top_k,
        call=call,
        index_position=found.index_position,
        weights_position=found.weights_position,
        uses_groups=ask is not None and num_groups > 1 and ask.uses_groups(),
        num_extra_choices=ask.num_extra_choices() if ask else 0,
        reads_config=ask is not None and ask.reads(count_leaf),
        block_runs=trace.experts_args is not None,
        watch_problem=_UNWATCHED.format(layer.path) if call == "pairs" else None,
        padding_problem=_padding_problem(router, ask, found.top_k),
        experts_order=places_of_choices(trace.experts_args or ()) if call == "choices" else None,
        experts_width=next((value.shape[-1] for value in given if value.is_floating_point()), None),
    )


# Tracing ---------------------------------------------------------------------------------------------------


class _Reached(Exception):  # noqa: N818 - no error: it ends a forward
    """The traced forward has come to the experts; nothing behind them matters."""


@dataclass
class _Trace:
    """What the router and the experts were given, on the meta device; None where the trace did not come so far."""

    router_args: tuple[Any, ...] | None = None
    router_kwargs: dict[str, Any] = field(default_factory=dict)
    router_output: tuple[Any, ...] | None = None
    experts_args: tuple[Any, ...] | None = None


def _trace(model: nn.Module, layer: MoELayer, count_leaf: ConfigLeaf, config: Any) -> _Trace:
    """Run the block on meta tokens, with the hidden sizes that the config and the router's weight speak of."""
    holder = count_leaf.holder(config)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = max((model.get_parameter(weight).shape[-1] for weight in layer.router_weights), default=0)
    sizes = [getattr(holder, "hidden_size", None), getattr(text, "hidden_size", None), width]
    best = _Trace()
    for size in dict.fromkeys(size for size in sizes if isinstance(size, int) and size > 0):
        for shape in ((1, _NUM_TOKENS, size), (_NUM_TOKENS, size)):
            trace = _trace_block(model, layer, torch.empty(shape, device="meta"))
            if trace.experts_args is not None:
                return trace
            if best.router_output is None and trace.router_args is not None:
                best = trace
    if best.router_args is None:  # no block of its own (the decoder layer is it): the router is asked directly
        best.router_args = (torch.empty(_NUM_TOKENS, width, device="meta"),)
        with torch.device("meta"):
            try:
                best.router_output = _tuple(model.get_submodule(layer.router)(*best.router_args))
            except Exception:  # the lone router on the CPU will say why
                best.router_output = None
    return best


def _trace_block(model: nn.Module, layer: MoELayer, hidden: Tensor) -> _Trace:
    block, router = model.get_submodule(layer.path), model.get_submodule(layer.router)
    experts = model.get_submodule(layer.experts)
    trace = _Trace()

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        trace.router_args, trace.router_kwargs = args, kwargs

    def after(module: nn.Module, args: Any, output: Any) -> None:
        trace.router_output = _tuple(output)

    def reached(*args: Any, **kwargs: Any) -> None:
        trace.experts_args = (*args, *kwargs.values())
        raise _Reached

    is_called = experts is not block and not isinstance(experts, nn.ModuleList)
    takes_ids = "input_ids" in inspect.signature(block.forward).parameters
    others = {"input_ids": torch.empty(hidden.shape[:-1], dtype=torch.int64, device="meta")} if takes_ids else {}
    first, second = router.register_forward_pre_hook(before, with_kwargs=True), router.register_forward_hook(after)
    try:
        with first, second, torch.device("meta"), forward_replaced(experts, reached) if is_called else nullcontext():
            block.forward(hidden, **others)
    except Exception:  # _Reached, or anything that cannot run on the meta device
        pass
    return trace


def _tuple(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def _call(layer: MoELayer, trace: _Trace) -> Call:
    if layer.experts == layer.path:
        return "pairs"
    given = [value for value in trace.experts_args or () if isinstance(value, Tensor)]
    integers = [value for value in given if not value.is_floating_point()]
    if len(given) == 1 and given[0].numel() == layer.num_experts * _NUM_TOKENS * given[0].shape[-1]:
        return "scaled inputs"
    if layer.containers:
        return "masks" if integers and integers[0].shape[-1] == layer.num_experts else "list"
    return "choices"


def _refuse_other_experts(model: nn.Module, layer: MoELayer, trace: _Trace, name: str) -> None:
    """Let a block's experts run for one token each and see which of them are called."""
    experts, num_experts = model.get_submodule(layer.experts), layer.num_experts
    stand_in = copy.copy(experts)
    called: list[tuple[str, int]] = []

    def recorder(child: str) -> nn.Module:
        module = nn.Identity()
        module.register_forward_pre_hook(lambda _, args: called.append((child, len(args[0]))))
        return module

    stand_in._modules = {
        child: recorder(child) if child in expert_children(experts) else module
        for child, module in experts._modules.items()
    }
    hidden, mask, weights = trace.experts_args or ()
    own = torch.eye(num_experts, dtype=mask.dtype).reshape(num_experts, *mask.shape[1:-1], num_experts)
    try:
        stand_in(torch.zeros(num_experts, hidden.shape[-1]), own, torch.ones(num_experts, *weights.shape[1:]))
        wanted = {(child, 1) for child in expert_children(experts)}
        wrong = sorted(set(called) ^ wanted)
    except Exception as error:
        wrong = [(f"{type(error).__name__}: {error}", 0)]
    if wrong:
        raise UnsupportedModelError(
            f"{name}: {layer.experts} ({type(experts).__name__}) does not run the experts that its router chose: given "
            f"one token for each of {num_experts} experts, it called {sorted({child for child, _ in called})}; no "
            "choice can be judged."
        )


def expert_children(experts: nn.Module) -> tuple[str, ...]:
    """The names of the children that have weights: the experts in a container."""
    return tuple(name for name, child in experts._modules.items() if child and any(True for _ in child.parameters()))


# The router alone ------------------------------------------------------------------------------------------


@dataclass
class _LoneRouter:
    """A copy of the router on the CPU with random weights, and random arguments of the traced shapes."""

    module: nn.Module
    args: list[Any]
    kwargs: dict[str, Any]
    weights: list[Tensor]
    biases: list[tuple[Tensor, int]]
    """(tensor, its expert dimension): in the router, or handed to it by its block."""
    width: int
    saw_logits: bool = False

    @classmethod
    def of(cls, model: nn.Module, layer: MoELayer, trace: _Trace) -> _LoneRouter:
        original, num_experts = model.get_submodule(layer.router), layer.num_experts
        with torch.device("cpu"):
            module = copy.deepcopy(original).to_empty(device="cpu").float().eval()
        generator = torch.Generator().manual_seed(0)
        for tensor in [*module.parameters(), *module.buffers()]:
            _fill(tensor, generator, num_experts)
        named = named_tensors(model).items()
        handed = {id(tensor): layer.tensors[name].dim for name, tensor in named if name in layer.selection_biases}
        prefix = layer.router + "."
        biases = [
            (tensor_at(module, name[len(prefix) :]), layer.tensors[name].dim)
            for name in layer.selection_biases
            if name.startswith(prefix)
        ]

        def real(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            made = torch.empty(value.shape, dtype=torch.float32 if value.is_floating_point() else value.dtype)
            if value.is_floating_point():
                made.normal_(generator=generator)
            else:
                made.copy_(torch.arange(made.numel()).view(made.shape) % max(2, num_experts))
            if id(value) in handed:
                biases.append((made.mul_(0.1), handed[id(value)]))
            return made

        args = [real(value) for value in trace.router_args or ()]
        kwargs = {key: real(value) for key, value in trace.router_kwargs.items()}
        weights = [tensor_at(module, name[len(prefix) :]) for name in layer.router_weights]
        return cls(module, args, kwargs, weights, biases, max((len(weight) for weight in weights), default=0))

    def run(self, dropped: Sequence[int] = (), off: float | None = None) -> tuple[Any, ...]:
        """The router's output with `dropped` experts' logits and biases at −inf, or only biases at `off`."""
        ids = torch.tensor(list(dropped), dtype=torch.int64)
        mode = RouterLogits(self.weights, dropped=ids if off is None else None)
        with self._biased(ids, float("-inf") if off is None else off), mode:
            outputs = self.module(*self.args, **self.kwargs)
        self.saw_logits = mode.seen is not None
        return _tuple(outputs)

    @contextmanager
    def _biased(self, ids: Tensor, value: float) -> Iterator[None]:
        saved = [(tensor, tensor.clone()) for tensor, _ in self.biases]
        for tensor, dim in self.biases if len(ids) else ():
            tensor.index_fill_(dim, ids, value)
        try:
            yield
        finally:
            for tensor, old in saved:
                tensor.copy_(old)


def _fill(tensor: Tensor, generator: torch.Generator, num_experts: int) -> None:
    """Random numbers of about unit gain; integers become distinct expert ids along the last dimension."""
    if tensor.is_floating_point():
        tensor.copy_(
            torch.randn(tensor.shape, generator=generator) / max(1, tensor.shape[-1] if tensor.dim() else 1) ** 0.5
        )
    else:
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % max(1, num_experts))


# What was found --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """The number of experts chosen, and where the router's output has ids and weights."""

    top_k: int | None
    index_position: int | None
    weights_position: int | None

    @classmethod
    def of(
        cls, call: Call, trace: _Trace, outputs: tuple[Any, ...] | None, top_k: int | None, num_experts: int
    ) -> _Found:
        if call == "masks" and outputs is not None:
            mask = next(value for value in outputs if isinstance(value, Tensor) and not value.is_floating_point())
            return cls(int(mask.reshape(-1, num_experts).sum(-1).max()), None, None)
        if call == "scaled inputs" and outputs is not None:
            scores = next(value for value in outputs if isinstance(value, Tensor) and value.shape[-1] == num_experts)
            return cls(int((scores != 0).sum(-1).max()), None, None)
        if call == "pairs":
            return cls(top_k, None, None)
        given = [value for value in trace.experts_args or () if isinstance(value, Tensor)]
        chosen = [value.shape[-1] for value in given if not value.is_floating_point()]
        if chosen:
            top_k = chosen[0]
        index = [i for i, value in enumerate(outputs or ()) if _is_choice(value, num_experts, chosen)]
        if not index or outputs is None:
            return cls(top_k, None, None)
        shape = outputs[index[0]].shape
        weights = [
            i
            for i, value in enumerate(outputs)
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape
        ]
        same = [i for i in weights if trace.router_output and any(trace.router_output[i] is value for value in given)]
        position = (same or weights)[-1] if weights else None
        return cls(shape[-1], index[0] if weights else None, position)


def _is_choice(value: object, num_experts: int, chosen: Sequence[int]) -> bool:
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dim() < 2:
        return False
    return value.shape[-1] == chosen[0] if chosen else 1 <= value.shape[-1] <= num_experts


def _describe(outputs: Sequence[Any]) -> str:
    return ", ".join(
        f"{value.dtype}{list(value.shape)}".removeprefix("torch.")
        if isinstance(value, Tensor)
        else type(value).__name__
        for value in outputs
    )


@dataclass(frozen=True)
class _Questions:
    """Questions to a router that returns ids and weights."""

    router: _LoneRouter
    found: _Found
    num_experts: int

    def _weights(self, outputs: tuple[Any, ...]) -> Tensor:
        """[T, choices] weight of everything chosen."""
        assert self.found.index_position is not None
        assert self.found.weights_position is not None
        index = outputs[self.found.index_position].flatten(0, -2)
        weights = outputs[self.found.weights_position].flatten(0, -2).float()
        width = max(self.router.width, self.num_experts)
        return torch.zeros(len(index), width).scatter_add_(1, index, weights)

    def num_extra_choices(self) -> int:
        """How many rows behind the experts the router chooses from: it is left fewer experts than it must choose."""
        extra = self.router.width - self.num_experts
        if extra <= 0:
            return 0
        assert self.found.top_k is not None
        left = range(self.num_experts - self.found.top_k + 1)
        chosen = self.router.run(dropped=left)[self.found.index_position or 0]
        return extra if bool((chosen >= self.num_experts).any()) else 0

    def uses_groups(self) -> bool:
        """Whether the router reads its group counts, asked with counts that divide nothing: with all groups chosen they
        limit nothing, and it still cuts its experts into equal ones.
        """
        modules = self.router.module.modules()
        places = [(one, k) for one in modules for k, v in one.__dict__.items() if type(v) is int and "group" in k]
        return self._changes(places, 10**6)

    def reads(self, leaf: ConfigLeaf) -> bool:
        """Whether the router looks at the config's expert count, asked by making it equal to an id that is chosen."""
        held = [value for module in self.router.module.modules() for value in module.__dict__.values()]
        configs = [one for one in held if leaf.key in getattr(one, "__dict__", {}) and not isinstance(one, nn.Module)]
        chosen = int(self.router.run()[self.found.index_position or 0].flatten()[0])
        return self._changes([(config, leaf.key) for config in configs], chosen)

    def bias_switches_off(self) -> bool:
        """Whether a very low bias leaves a router that behaves as if the experts were not there."""
        dropped = range(0, self.num_experts, 2)
        if self.num_experts - len(dropped) < (self.found.top_k or 1):
            dropped = range(self.num_experts - (self.found.top_k or 1))
        masked, off = self._weights(self.router.run(dropped)), self._weights(self.router.run(dropped, off=SWITCHED_OFF))
        return torch.allclose(masked, off, rtol=1e-5, atol=1e-6)

    def _changes(self, places: Sequence[tuple[Any, str]], value: int) -> bool:
        """Whether the router answers otherwise, or no longer, with another number in these attributes."""
        outputs = self.router.run()
        saved = [(holder, key, holder.__dict__[key]) for holder, key in places]
        for holder, key in places:
            setattr(holder, key, value)
        try:
            again = self.router.run()
        except Exception:  # it reads what was changed, and cannot work with it
            return True
        finally:
            for holder, key, old in saved:
                setattr(holder, key, old)
        pairs = zip(outputs, again, strict=False)
        return any(not torch.equal(old, new) for old, new in pairs if isinstance(old, Tensor))


_UNWATCHED = (
    "{}: its block sorts (token, expert) pairs through several modules, so what one expert answers to a token cannot "
    "be asked; its experts can be masked, removed and skipped, but not judged without a plugin's adapter"
)


def _padding_problem(router: _LoneRouter, ask: _Questions | None, top_k: int) -> str | None:
    if not router.biases:
        return "its router has no bias that could switch surplus experts off"
    if ask is None:
        return "its router cannot be asked whether its bias switches an expert off"
    if not ask.bias_switches_off():
        return (
            "its router's bias decides who is chosen, but surplus experts would still take their share of the weights"
        )
    return None
