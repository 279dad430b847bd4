"""Whether a network can still learn: units that say nothing, directions that features span."""

from __future__ import annotations

import torch
from torch import Tensor

from everbatch.errors import check, check_real

__all__ = ["dormant", "effective_rank", "threshold_rank"]


def dormant(means: Tensor, tau: float) -> Tensor:
    """Which units of a layer are dormant:  E|h_i| / (1/H sum_k E|h_k|) <= tau.

    Args:
        means: (H,) mean absolute activation of each unit over samples and places.
        tau: >= 0; 0 finds units that never speak.

    Returns:
        (H,) bool; all of a layer that is silent.

    Source: Sokar et al. 2023, arXiv 2302.12902, definition 3.1, where tau = 0.025.
    """
    check_real("dormant", "tau", tau, 0.0)
    check(means.ndim == 1 and len(means) > 0, "dormant", f"means of shape {tuple(means.shape)}", "be (units,)")
    return means <= tau * means.mean()


def _spectrum(features: Tensor) -> Tensor:
    check(features.ndim == 2 and len(features) > 0, "effective_rank", f"features of shape {tuple(features.shape)}",
          "be (samples, features)")
    values: Tensor = torch.linalg.svdvals(features.double())
    return values


def effective_rank(features: Tensor) -> float:
    """exp(entropy) of the singular values, divided by their sum: from 1 (one direction) to min(n, d); 0 of zeros.

    Args:
        features: (n, d), not centred.

    Source: Roy and Vetterli 2007, "The effective rank", definition 1.
    """
    values = _spectrum(features)
    total = values.sum()
    if not total > 0:
        return 0.0
    share = values / total
    return float(torch.special.entr(share).sum().exp())


def threshold_rank(features: Tensor, delta: float = 0.01) -> int:
    """How many of the largest singular values make up 1 - delta of their sum; 0 of zeros.

    Source: Kumar et al. 2021, arXiv 2010.14498, section 3 (srank, delta = 0.01).
    """
    check_real("threshold_rank", "delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    values = _spectrum(features)
    if not values.sum() > 0:
        return 0
    return int((values.cumsum(0) < (1.0 - delta) * values.sum()).sum()) + 1
