"""Whether a context has left anything behind in a model."""

from __future__ import annotations

import torch
from torch.overrides import _get_current_function_mode_stack


def traces(model):
    """Everything that a context could leave behind in a model."""
    hooks = [
        (path, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in module.__dict__)
        for path, module in model.named_modules()
    ]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return hooks, [(name, id(tensor), tensor.detach().clone()) for name, tensor in tensors]


def assert_untouched(model, before):
    hooks, tensors = traces(model)
    assert hooks == before[0]
    for (name, identity, tensor), (old_name, old_identity, old) in zip(tensors, before[1], strict=True):
        assert (name, identity) == (old_name, old_identity)
        assert torch.equal(tensor.view(torch.uint8), old.view(torch.uint8)) if tensor.dim() else tensor == old, name
    assert _get_current_function_mode_stack() == []
