"""Counting, while a model runs, how many experts its tokens use; and which of them are padding.

Dimensions: B sequences, S tokens of each, N tokens that can be seen, T = B × S tokens, K experts chosen per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_HIDDEN = -1000.0
"""What is added to the scores of tokens that are not seen is below this: −inf, the dtype's least, or some −10,000."""


class _Forward(NamedTuple):
    """A forward that a counter counts."""

    counter: Counter
    real_T: Tensor | None
    """Which of its tokens are real; None: all, or that cannot be told."""


_RUNNING: ContextVar[tuple[_Forward, ...]] = ContextVar("compressor_running_forwards", default=())
"""The forwards that are running, the innermost last; of each greenlet its own, since batches take turns in them."""


class Counter:
    """Experts that a model's tokens used, by layer, in its own forward: nothing recomputed, no layer called alone."""

    def __init__(self) -> None:
        self.may_count_padding = False
        """Whether a mask was given that did not tell which tokens are real, so all counted."""
        self._experts: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        used = self.experts_per_token.values()
        mean = f", {sum(used) / len(used):.3g} experts a token" if used else ""
        return f"Counter({len(used)} layer{'s' * (len(used) != 1)}{mean})"

    def add(self, path: str, used_TK: Tensor) -> None:
        """Count one batch; `used_TK` says which of the chosen were evaluated."""
        forward = next((one for one in reversed(_RUNNING.get()) if one.counter is self), None)
        if forward is None:
            return
        real_T, num_tokens = forward.real_T, torch.tensor(len(used_TK))
        if real_T is not None and len(real_T) == len(used_TK):
            real_T = real_T.to(used_TK.device)
            used_TK, num_tokens = used_TK & real_T[:, None], real_T.sum()
        elif real_T is not None:
            self.may_count_padding = True
        self._experts[path] = self._experts.get(path, 0) + used_TK.sum()
        self._tokens[path] = self._tokens.get(path, 0) + num_tokens

    @property
    def sums(self) -> dict[str, list[int]]:
        """Layer path → experts used and tokens, in all, for `add_sums` of another counter."""
        return {path: [int(total), int(self._tokens[path])] for path, total in self._experts.items()}

    def add_sums(self, sums: Mapping[str, Sequence[int]]) -> None:
        """Count what another counter has counted."""
        for path, (experts, tokens) in sums.items():
            self._experts[path] = self._experts.get(path, 0) + torch.tensor(experts)
            self._tokens[path] = self._tokens.get(path, 0) + torch.tensor(tokens)

    @property
    def experts_per_token(self) -> dict[str, float]:
        """Layer path → experts that a token used on average; only layers that skip, and that tokens came to."""
        return {path: int(total) / max(1, self.tokens[path]) for path, total in self._experts.items()}

    @property
    def tokens(self) -> dict[str, int]:
        """Layer path → tokens that were counted there."""
        return {path: int(number) for path, number in self._tokens.items()}

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Within the context the model's forwards are counted, and those of the body behind its head."""
        bodies = {id(module): module for module in (model, getattr(model, "base_model", model))}
        with ExitStack() as hooks:
            for body in bodies.values():
                hooks.enter_context(body.register_forward_pre_hook(self._before, with_kwargs=True))
                hooks.enter_context(body.register_forward_hook(self._after, always_call=True))
            yield

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        _RUNNING.set((*_RUNNING.get(), _Forward(self, self._real_tokens(model, args, kwargs))))

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        running = _RUNNING.get()
        last = max((number for number, one in enumerate(running) if one.counter is self), default=len(running))
        _RUNNING.set((*running[:last], *running[last + 1 :]))

    def _real_tokens(self, model: nn.Module, args: Any, kwargs: Any) -> Tensor | None:
        """[T] bool, from the forward's own arguments; None where they name no mask, or one that cannot be read."""
        try:
            given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        except TypeError:  # the forward will say so itself
            return None
        given = {**given, **given.get("kwargs", {})}
        mask, tokens = given.get("attention_mask"), given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if isinstance(mask, Mapping) and mask:  # by kind of attention
            mask = mask.get("full_attention", next(iter(mask.values())))
        if mask is None:
            return None
        cache = given.get("cache", given.get("past_key_values"))  # the latter before transformers 5.24
        real_BS = None
        if isinstance(mask, Tensor) and isinstance(tokens, Tensor):
            real_BS = _unpadded(mask, tokens, cache)
        if real_BS is None:
            self.may_count_padding = True
            return None
        return real_BS.reshape(-1)


def _unpadded(mask: Tensor, tokens_BS: Tensor, cache: Any) -> Tensor | None:
    """[B, S] bool: the real tokens, by a mask [B, N] or of attention [B, 1, S, N]; None where it does not tell."""
    num_sequences, num_tokens = tokens_BS.shape[:2]
    surplus = mask.shape[-1] - num_tokens
    if surplus < 0:
        return None
    if mask.dim() == 2:  # with a cache the mask reaches back over what was read before
        return mask[:, surplus:].bool()
    if mask.dim() != 4 or mask.shape[-2] != num_tokens or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return None
    # A real token sees itself, whoever else it sees. A cache of fixed size has room behind the tokens, one for a window
    # has let go of the first.
    first = surplus if cache is None else min(int(cache.get_seq_length()), surplus)
    own_BS = mask[:, 0].diagonal(offset=first, dim1=-2, dim2=-1)
    real_BS = own_BS if mask.dtype == torch.bool else own_BS > _HIDDEN
    return real_BS.expand(num_sequences, -1)
