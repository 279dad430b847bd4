"""How much of a displacement low-precision weights really make."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from everbatch.engines.shards import Vector, inner

__all__ = ["realised", "report"]

WARN_BELOW = 0.9


@torch.no_grad()
def realised(requested: Vector, saved: Vector, working: torch.dtype) -> tuple[Tensor, Tensor]:
    """Norm ratio and cosine of the displacement that weights in `working` precision make, against the requested one.

    A displacement below half a unit in the last place vanishes, and others are rounded: with e requested and
    r = working(w + e) - working(w), returns ||r|| / ||e|| and <r, e> / (||r|| ||e||). One collective, one temporary copy.

    Args:
        requested: e, already added to the shards' data. saved: the weights before.
    """
    got = Vector(requested.host, requested.shards,
                 [s.data.to(working).to(e.dtype) - w.to(working).to(e.dtype) for (s, e), (_, w) in
                  zip(requested, saved, strict=True)])
    rr, ee, re = inner(requested.host, (got, got), (requested, requested), (got, requested)).unbind()
    tiny = torch.finfo(torch.float64).tiny
    one = torch.ones_like(ee)  # of a displacement of zero, at a zero gradient, nothing is lost
    return (torch.where(ee > 0, (rr / ee.clamp_min(tiny)).sqrt(), one),
            torch.where(ee > 0, re / (rr * ee).sqrt().clamp_min(tiny), one))


def report(who: str, ratio: Tensor, cosine: Tensor, rank: int) -> bool:
    """Warn on rank 0 when a displacement is mostly lost; whether it did. Reads two scalars from the device."""
    lost = rank == 0 and min(ratio.item(), cosine.item()) < WARN_BELOW
    if lost:
        warnings.warn(f"{who}: the working weights' precision swallows the perturbation: realised norm {ratio.item():.2f} of the "
                      f"requested, cosine {cosine.item():.2f}; raise the radius, or keep working weights in fp32", stacklevel=2)
    return lost
