"""Which tensors are not finite, by name: asked when something went wrong, and before weights are saved."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from everbatch.engines.host import Host

__all__ = ["nonfinite", "nonfinite_gradients", "nonfinite_weights"]


def nonfinite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors with an element that is infinite or not a number, in their order. One host sync."""
    pairs = [(name, t) for name, t in named if t.numel() and t.is_floating_point()]
    if not pairs:
        return []
    device = pairs[0][1].device
    # Extremes are finite iff every element is.
    good = [torch.isfinite(torch.stack(torch.aminmax(t.detach()))).all().to(device) for _, t in pairs]
    bad = (~torch.stack(good)).tolist()
    return [name for (name, _), flag in zip(pairs, bad, strict=True) if flag]


def nonfinite_weights(host: Host) -> list[str]:
    """Trained weights whose masters are not finite in this rank's slices. What is frozen may hold infinities on purpose."""
    return nonfinite((s.name, s.data) for s in host.shards)


def nonfinite_gradients(host: Host) -> list[str]:
    """Weights whose reduced gradient is not finite in this rank's slices."""
    return nonfinite((s.name, g) for s in host.shards if (g := s.grad) is not None)
