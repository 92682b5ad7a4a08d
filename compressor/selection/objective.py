"""What a search minimises: squared errors of batches → losses of domains → one number.

With e_b(S) the squared error of a layer's output on batch b when the experts S are kept, and z_b the output itself:

    loss_D(S)      =  Σ_{b ∈ D} √e_b(S)              the objective of arXiv 2402.14800, section 3.2, for each domain
    relative_D(S)  =  loss_D(S) / Σ_{b ∈ D} ‖z_b‖    a fraction, so that domains with large activations do not rule

With one domain its loss is minimised. With several, blended:

    mean      Σ_D relative_D / number of domains         each domain counts the same; the default
    worst     max_D relative_D
    weights   Σ_D w_D relative_D / Σ_D w_D
    pooled    Σ_D loss_D                                 the paper's objective over all text together

Dimensions: B batches, D domains, and any dimensions before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from compressor.machine.distributed import Processes

Blend = Literal["mean", "worst", "pooled"] | Mapping[str, float]


@dataclass(frozen=True)
class Objective:
    """The number to be minimised, for batches of these domains."""

    domains: tuple[str, ...]
    domain_B: Tensor
    """int64: each batch's domain."""
    norm_D: Tensor
    """float64: Σ over the domain's batches of the norm of the layer's output."""
    blend: Blend = "mean"
    processes: Processes = field(default_factory=Processes)
    """Where several share the batches, those of `domain_B` are this one's and everything else is of all."""

    @classmethod
    def of_batches(
        cls,
        batch_domains: Sequence[str],
        squared_output_B: Tensor,
        blend: Blend = "mean",
        processes: Processes | None = None,
    ) -> Objective:
        """From each batch's domain, and the squared norm of the output that the layer should have on it."""
        processes = processes or Processes()
        domains = tuple(dict.fromkeys(name for names in processes.exchange(list(batch_domains)) for name in names))
        domain_B = torch.tensor([domains.index(domain) for domain in batch_domains], dtype=torch.int64)
        norms_B = squared_output_B.double().sqrt()
        norm_D = torch.zeros(len(domains), dtype=torch.float64).index_add_(0, domain_B, norms_B)
        return cls(domains, domain_B, processes.sum(norm_D), blend, processes)

    @property
    def is_relative(self) -> bool:
        """Whether the number is a fraction of the output's norm, and not in the output's own units."""
        return len(self.domains) > 1 and self.blend != "pooled"

    def losses(self, squared_B: Tensor) -> Tensor:
        """[..., B] squared errors → [..., D] losses, in the output's units; of this process's batches."""
        roots_B = squared_B.double().clamp_min(0.0).sqrt()
        empty_D = roots_B.new_zeros(*roots_B.shape[:-1], len(self.domains))
        return empty_D.index_add_(-1, self.domain_B.to(roots_B.device), roots_B)

    def relative(self, losses_D: Tensor) -> Tensor:
        """[..., D] losses → [..., D] fractions of the output's norm; 0 for a domain whose output is 0."""
        norm_D = self.norm_D.to(losses_D.device)
        return torch.where(norm_D > 0, losses_D / norm_D, 0.0)

    def of_losses(self, losses_D: Tensor) -> Tensor:
        """[..., D] losses → [...]: the number that is minimised."""
        if not self.is_relative:
            return losses_D.sum(-1)
        relative_D = self.relative(losses_D)
        if self.blend == "worst":
            return relative_D.amax(-1)
        return relative_D @ blend_weights(self.blend, self.domains).to(relative_D.device)

    def __call__(self, squared_B: Tensor) -> Tensor:
        """[..., B] squared errors → [...]: the number that is minimised; over the batches of all processes."""
        return self.of_losses(self.processes.sum(self.losses(squared_B)))


def blend_weights(blend: Blend, domains: Sequence[str]) -> Tensor:
    """[D] float64, summing to 1: equal for `mean`, else those given; a domain that is not named weighs nothing."""
    if isinstance(blend, Mapping):
        weights_D = torch.tensor([float(blend.get(domain, 0.0)) for domain in domains], dtype=torch.float64)
    else:
        weights_D = torch.ones(len(domains), dtype=torch.float64)
    return weights_D / weights_D.sum()
