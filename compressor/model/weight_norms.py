"""Norms of the experts' weights.

Dimensions: E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressor.model.structure import MoELayer

_AT_ONCE = 1024
"""So many numbers are summed in float32, and these sums in float64: 16 million at once lost 1.6 % of the sum."""


@torch.no_grad()
def expert_weight_norms(model: nn.Module, layer: MoELayer) -> dict[str, Tensor]:
    """weights.l1 (Σ|w|), weights.squared (Σw²), weights.count: [E] float64, over each expert's weights and biases."""
    l1_E, squared_E, count_E = (torch.zeros(layer.num_experts, dtype=torch.float64) for _ in range(3))

    def add(expert: int, weights: Tensor) -> None:
        flat = weights.reshape(-1)
        whole = flat.numel() - flat.numel() % _AT_ONCE
        for rows in (flat[:whole].view(-1, _AT_ONCE), flat[None, whole:]):
            norms = [torch.linalg.vector_norm(rows, order, dim=1, dtype=torch.float32).double() for order in (1, 2)]
            l1_E[expert] += norms[0].sum().cpu()
            squared_E[expert] += norms[1].square().sum().cpu()
        count_E[expert] += flat.numel()

    inside, in_lists = layer.experts + ".", tuple(path + "." for path in layer.containers)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, axis in layer.tensors.items():
        if name.startswith(inside) and name in parameters and not (in_lists and name.startswith(in_lists)):
            parts = torch.split(parameters[name], axis.stride, dim=axis.dim)
            for expert, rows in enumerate(parts[: layer.num_experts]):
                add(expert, rows)
    for container, names in layer.containers.items():
        for expert, child in enumerate(names[: layer.num_experts]):
            for parameter in model.get_submodule(f"{container}.{child}").parameters():
                add(expert, parameter)
    return {"weights.l1": l1_E, "weights.squared": squared_E, "weights.count": count_E}
