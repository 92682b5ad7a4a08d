"""See an expert's tensors at work: what each matrix is multiplied with, along which dimension, and in which order.

Told by behaviour, whatever the layout and the code: while experts run, each matrix product with one of their tensors is
looked at below autograd, and the tensor is known by where its memory is.

Not covered: code that copies its matrices before it multiplies (a cast to another dtype, weights gathered by token).
transformers' own `batched_mm` does; its experts run as `grouped_mm` meanwhile.

Dimensions: E experts, P (token, expert) pairs, I inputs of a matrix, O outputs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.errors import UnsupportedModelError
from compressor.model.expert_outputs import evaluate_stacked
from compressor.model.modules import named_tensors
from compressor.model.routed_tokens import RoutedTokens
from compressor.model.structure import ExpertAxis, MoELayer

Take = Callable[[str, int, Tensor], None]
"""(a matrix's name, the expert, what it is multiplied with [P, I])."""
_PRODUCTS = {
    "aten::mm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::bmm": (0, 1),
    "aten::baddbmm": (1, 2),
    "aten::_grouped_mm": (0, 1),
    "transformers::grouped_mm_fallback": (0, 1),
}
"""Operation → where its two factors are."""
_TOKENS_AT_ONCE = 1024
_DIRECT = ("eager", "grouped_mm")
"""transformers' ways to run experts that multiply with the experts' own memory."""


@dataclass(frozen=True)
class OwnTensor:
    """A tensor of the experts: of one, or of all stacked along an axis. `name` is as `LayerWeights` has it."""

    name: str
    tensor: Tensor
    axis: ExpertAxis | None
    expert: int | None

    def of(self, expert: int) -> Tensor:
        """The part that is an expert's, a view."""
        return self.tensor if self.axis is None else self.axis.of_expert(self.tensor, expert)

    @property
    def single(self) -> Tensor:
        return self.of(0)

    def expert_at(self, view: Tensor) -> int:
        """The expert, or the first one, that a view is of."""
        if self.axis is None or self.expert is not None:
            return self.expert or 0
        start = (view.data_ptr() - self.tensor.data_ptr()) // self.tensor.element_size()
        return start // self.tensor.stride(self.axis.dim) // self.axis.stride

    def input_dim(self, factor: Tensor) -> int | None:
        """Which dimension of `single` a right factor […, I, O] is summed over; None where that cannot be told."""
        single = self.single
        if single.ndim != 2:
            return None
        along = [dim for dim in (0, 1) if single.stride(dim) == factor.stride(-2) and single.shape[dim] > 1]
        return along[0] if len(along) == 1 else None


@dataclass(frozen=True)
class Product:
    """One matrix product: `parts` are the experts and what each is multiplied with [P, I]."""

    own: OwnTensor
    input_dim: int | None
    parts: Sequence[tuple[int, Tensor]]


class ExpertProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, `seen` is told of every product with one of the experts' tensors, and `used` of every other
    operation on one. The first so many outputs (None: all) of tensors in `doubled` are as if these were twice as large.
    """

    def __init__(
        self,
        owned: Sequence[OwnTensor],
        seen: Callable[[Product], None],
        used: Callable[[str], None] | None = None,
        doubled: Mapping[str, int | None] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owned = sorted(owned, key=lambda own: own.tensor.data_ptr())
        self._starts = [own.tensor.data_ptr() for own in self._owned]
        self._seen, self._used, self._doubled = seen, used or (lambda name: None), doubled or {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass every operation through."""
        kwargs, places, given = kwargs or {}, _PRODUCTS.get(func._schema.name), list(args)
        product: tuple[OwnTensor, int] | None = None
        for place, value in enumerate(args):
            own = self._owner(value)
            if own is None or func._schema.name in _VIEWS:
                continue
            if places is not None and place in places and product is None:
                product = own, place
            else:
                self._used(own.name)
                if own.name in self._doubled:
                    first = self._doubled[own.name]
                    given[place] = value.clone()
                    given[place][..., :first] *= 2
        if product is None or places is None:
            return func(*given, **kwargs)
        own, place = product
        other, more = given[sum(places) - place], [*given[2:], *kwargs.values()]
        self._seen(_product(own, given[place], other, more, is_left=place == places[0]))
        out = func(*given, **kwargs)
        if own.name not in self._doubled:
            return out
        twice = 2 * out - given[0] if places[0] else 2 * out  # what a product is added to is doubled in its own right
        part = (..., slice(self._doubled[own.name]), *([slice(None)] if place == places[0] else []))
        out[part] = twice[part]
        return out

    def _owner(self, value: Any) -> OwnTensor | None:
        if not isinstance(value, Tensor) or value.is_meta or not value.numel():
            return None
        number = bisect_right(self._starts, start := value.data_ptr()) - 1
        if number < 0:
            return None
        own = self._owned[number]
        return own if start < self._starts[number] + own.tensor.numel() * own.tensor.element_size() else None


def _product(own: OwnTensor, factor: Tensor, other: Tensor, more: Sequence[Any], *, is_left: bool) -> Product:
    """What a factor, a view of `own`, and the other one make. Of grouped products `more` says where groups end."""
    if is_left:
        factor, other = factor.mT, other.mT
    first = own.expert_at(factor)
    if factor.ndim == 2:
        parts = [(first, other)]
    elif other.ndim == 3:
        parts = [(first + number, one) for number, one in enumerate(other)]
    else:
        ends = next(one for one in more if isinstance(one, Tensor)).tolist()
        parts = [(first + number, other[a:b]) for number, (a, b) in enumerate(pairwise([0, *ends]))]
    is_more = factor.numel() > own.single.numel() * (factor.shape[0] if factor.ndim == 3 else 1)
    return Product(own, None if is_more else own.input_dim(factor), parts)


_VIEWS = {"aten::t", "aten::transpose", "aten::select", "aten::slice", "aten::view", "aten::detach", "aten::alias"} | {
    f"aten::{name}" for name in ("unsqueeze", "squeeze", "expand", "permute", "as_strided", "split", "unbind", "chunk")
}


def own_tensors(model: nn.Module, layer: MoELayer) -> list[OwnTensor]:
    """The tensors of a layer's experts in a model, without the router's."""
    start = f"{layer.path}." if layer.path else ""
    block = named_tensors(model.get_submodule(layer.path))
    return tensors_of_experts({f"{start}{name}": tensor for name, tensor in block.items()}, layer)


def tensors_of_experts(tensors: Mapping[str, Tensor], layer: MoELayer) -> list[OwnTensor]:
    """Those of a layer's experts among tensors by their names in the model."""
    start = len(layer.path) + 1 if layer.path else 0
    others = {*layer.router_weights, *layer.selection_biases, *layer.id_tensors}
    lists = tuple(f"{path}." for path in layer.containers)
    found = [
        OwnTensor(name[start:], tensors[name].detach(), axis, None)
        for name, axis in layer.tensors.items()
        if name not in others and not (lists and name.startswith(lists))
    ]
    for path, children in layer.containers.items():
        for expert, child in enumerate(children):
            module = f"{path}.{child}."
            found += [
                OwnTensor(f"{path[start:]}.*.{name.removeprefix(module)}", tensor.detach(), None, expert)
                for name, tensor in tensors.items()
                if name.startswith(module)
            ]
    return found


def matrix_names(model: nn.Module, layer: MoELayer) -> list[str]:
    """The tensors of which one expert has a matrix; also of a model without weights."""
    return list(dict.fromkeys(own.name for own in own_tensors(model, layer) if own.single.ndim == 2))


@contextmanager
def _directly(experts: nn.Module) -> Iterator[None]:
    """Within the context transformers runs experts on their own memory."""
    config = getattr(experts, "config", None)
    name = getattr(config, "_experts_implementation", None)
    if config is None or name is None or name in _DIRECT:
        yield
        return
    config._experts_implementation_internal = "grouped_mm"
    try:
        yield
    finally:
        config._experts_implementation_internal = name


# What experts are given -----------------------------------------------------------------------------------


def show_inputs(model: nn.Module, tokens: RoutedTokens, names: Sequence[str], take: Take) -> None:
    """Run the chosen experts on their tokens, and hand over what their matrices are multiplied with, in the model's
    dtype: each expert's own tokens, in any order. Their outputs are the layer's, if nobody has asked for these before.

    Raises UnsupportedModelError, naming the matrix, where that cannot be seen.
    """
    layer, owned = tokens.layer, own_tensors(model, tokens.layer)
    output_TH = torch.empty_like(tokens.hidden_TH)
    for start in range(0, tokens.num_tokens, _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        counts: dict[tuple[str, int], int] = {}
        index_cK = tokens.index_TK[part]

        def seen(product: Product) -> None:
            name = product.own.name
            if name not in names or product.input_dim is None:
                return
            for expert, rows_PI in product.parts:
                own_c = (index_cK == expert).any(-1)  # noqa: B023 - called within the loop
                if len(rows_PI) == len(own_c):  # some give every token to every expert
                    rows_PI = rows_PI[own_c]  # noqa: PLW2901
                counts[name, expert] = counts.get((name, expert), 0) + len(rows_PI)  # noqa: B023
                if len(rows_PI):
                    take(name, expert, rows_PI)

        with torch.no_grad(), _directly(model.get_submodule(layer.experts)), ExpertProducts(owned, seen):
            outputs_cKH = tokens.evaluate_experts(tokens.hidden_TH[part], index_cK).float()
        output_TH[part] = torch.bmm(tokens.weights_TK[part, None].float(), outputs_cKH)[:, 0].to(output_TH.dtype)
        chosen = torch.bincount(index_cK.flatten(), minlength=layer.num_experts)[: layer.num_experts].tolist()
        for name in names:
            found = [counts.get((name, expert), 0) for expert in range(layer.num_experts)]
            if found != chosen:
                raise UnsupportedModelError(
                    f"{layer.path}: what {name} is multiplied with cannot be seen: of {sum(chosen)} inputs of its "
                    f"experts {sum(found)} were."
                )
    if tokens.experts_output_TH is None:  # the block need not run its experts again
        tokens.experts_output_TH = output_TH
        tokens.output_TH = output_TH if tokens.lift is None else None


# Which dimension is which ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertMatrices:
    """How an expert uses its tensors. `input_dims`: matrix → the dimension that its inputs are summed over, in the
    order of their use. `output`: the tensors in which the expert's output is linear, the last matrix and what is added
    to it; empty where there is no such thing (a norm stands behind them). `last`: the matrix used last, whose inputs
    are the expert's neurons. `neurons`: the other tensors in which each neuron has rows of its own, and whether these
    stand side by side, or one in each part of as many rows as there are neurons.
    """

    input_dims: Mapping[str, int]
    output: tuple[str, ...]
    last: str
    neurons: Mapping[str, bool]


def expert_matrices(model: nn.Module, layer: MoELayer, expert: int = 0) -> ExpertMatrices:
    """How a layer's experts use their tensors, by running one. Raises UnsupportedModelError, naming the tensor."""
    owned = own_tensors(model, layer)
    run = _runner(model, layer, expert, next(own.tensor for own in owned if own.tensor.is_floating_point()))
    order: list[tuple[str, bool]] = []
    dims: dict[str, int | None] = {}

    def seen(product: Product) -> None:
        if not any(number == expert and len(rows) for number, rows in product.parts):
            return
        name = product.own.name
        dims[name] = product.input_dim if dims.get(name, product.input_dim) == product.input_dim else None
        order.append((name, True))

    with ExpertProducts(owned, seen, lambda name: order.append((name, False))):
        answer = run()
    for name in dict.fromkeys(own.name for own in owned if own.single.ndim == 2):
        if dims.get(name) is None:
            raise UnsupportedModelError(f"{layer.path}: how its experts use {name} cannot be seen.")
    last = [name for name, is_matrix in order if is_matrix][-1]
    known = {name: dim for name, dim in dims.items() if dim is not None}
    return ExpertMatrices(
        known, _output(run, owned, order, last, answer), last, _neurons(run, owned, expert, last, known)
    )


def _output(
    run: Callable[[], Tensor], owned: Sequence[OwnTensor], order: Sequence[tuple[str, bool]], last: str, answer: Tensor
) -> tuple[str, ...]:
    """The tensors which the output doubles with; tried, the likeliest first."""
    others = list(dict.fromkeys(name for name, is_matrix in order if not is_matrix))
    for number in range(len(others) + 1):
        for added in combinations(others, number):
            with ExpertProducts(owned, lambda product: None, doubled=dict.fromkeys((last, *added))):
                doubled = run()
            if torch.allclose(doubled, 2 * answer, rtol=1e-2, atol=1e-3 * float(answer.abs().max())):
                return (last, *added)
    return ()


def _neurons(
    run: Callable[[], Tensor], owned: Sequence[OwnTensor], expert: int, last: str, input_dims: Mapping[str, int]
) -> dict[str, bool]:
    """Which rows are a neuron's, told by which inputs of the last matrix change when the first rows are doubled: as
    many as half of the neurons. Tensors of which that cannot be told are not there.
    """

    def inner(doubled: Mapping[str, int | None]) -> Tensor:
        rows: list[Tensor] = []

        def seen(product: Product) -> None:
            if product.own.name == last:
                rows.extend(one[0] for number, one in product.parts if number == expert and len(one))

        with ExpertProducts(owned, seen, doubled=doubled):
            run()
        return rows[0]

    before_I, found = inner({}), dict[str, bool]()
    half = -(-len(before_I) // 2)
    for name, single in {own.name: own.single for own in owned if own.name != last and own.single.ndim}.items():
        parts, rest = divmod(single.shape[1 - input_dims[name] if name in input_dims else -1], len(before_I))
        end = max((inner({name: half}) != before_I).nonzero().flatten().tolist(), default=-1) + 1
        if parts and not rest and 0 < end <= half:
            found[name] = end <= -(-half // parts) and parts > 1
    return found


def _unwatched(module: nn.Module) -> Callable[..., Any]:
    """The module's own code, although it may be watched meanwhile."""
    return partial(type(module).forward, module)


def _runner(model: nn.Module, layer: MoELayer, expert: int, like: Tensor) -> Callable[[], Tensor]:
    """What runs one expert on one token, in the dtype and on the device of `like`: its output, as float32."""
    experts, probe = model.get_submodule(layer.experts), layer.router_probe
    width = probe.experts_width or model.get_parameter(layer.router_weights[0]).shape[-1]
    hidden = torch.randn(1, width, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)

    def forward(hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        values = dict(zip(probe.experts_order or (0, 1, 2), (hidden_TH, index_TK, weights_TK), strict=True))
        return _unwatched(experts)(*(values[place] for place in range(3)))  # type: ignore[no-any-return]

    def run() -> Tensor:
        with torch.no_grad(), _directly(experts):
            if probe.call == "scaled inputs":
                answers = _unwatched(experts)(hidden.expand(layer.num_experts, -1))
                return answers.view(layer.num_experts, -1)[expert].float()  # type: ignore[no-any-return]
            if layer.containers:
                (path, children), *_ = layer.containers.items()
                return _unwatched(model.get_submodule(f"{path}.{children[expert]}"))(hidden).float()  # type: ignore[no-any-return]
            index = torch.tensor([[expert]], device=hidden.device)
            return evaluate_stacked(forward, hidden, index, like.dtype).float()

    if probe.call == "pairs":
        raise UnsupportedModelError(f"{layer.path}: its experts cannot be run one by one: {layer.watch_problem}.")
    return run
