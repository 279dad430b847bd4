"""Which experts rest during a task: those that matter to earlier tasks more than to this one."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["between", "resting"]


def between(values: Tensor, eps: float = 0.0) -> Tensor:
    """Scaled to reach from 0 to 1 along the last dimension; all 0 where they are equal. `eps`, of the released code, is added to
    what is divided by."""
    low = values.amin(-1, keepdim=True)
    span = values.amax(-1, keepdim=True) - low
    if eps:
        return (values - low) / (span + eps)
    return torch.where(span > 0, (values - low) / torch.where(span > 0, span, 1.0), 0.0)


def resting(utilisation: Tensor, importance: Tensor, tau: float, min_active: int) -> Tensor:
    """Whether each expert rests: its score is below tau, and `min_active` others score higher.

        score = between(utilisation) - between(importance)

    Args:
        utilisation: (..., E) mean weight over the present task's tokens.
        importance: (..., E) mean of weight * ||x||^2 over earlier tasks' tokens.
        tau: in [-1, 1].
        min_active: >= 1 experts of each layer stay active.
    """
    scores = between(utilisation) - between(importance)
    rest = scores < tau
    best = scores.topk(min_active, dim=-1).indices
    return rest.scatter(-1, best, torch.zeros_like(best, dtype=torch.bool))
