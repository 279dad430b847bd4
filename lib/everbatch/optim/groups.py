"""Parameter groups by the field's usual rule."""

from __future__ import annotations

from typing import Any

from torch import nn

from everbatch.errors import check_real

__all__ = ["groups"]


def groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two named groups: weights with decay, and vectors without.

    Parameters of fewer than two dimensions (biases, norm scales) get weight_decay 0, which layer-wise optimizers read as
    "no trust ratio" as well. Frozen parameters are left out; empty groups too.

    >>> from torch import nn
    >>> [(len(g["params"]), g["weight_decay"]) for g in groups(nn.Linear(3, 2), weight_decay=0.1)]
    [(1, 0.1), (1, 0.0)]
    """
    check_real("groups", "weight_decay", weight_decay, 0.0)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    pairs = (([x for x in named if x[1].ndim > 1], weight_decay), ([x for x in named if x[1].ndim <= 1], 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in pairs if params]
