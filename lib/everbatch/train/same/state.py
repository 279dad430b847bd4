"""What SAME keeps over steps and tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from everbatch.distributed import World
from everbatch.train.same.moments import TaskSums

__all__ = ["SAMEState", "nobody"]


def nobody() -> Tensor:
    """No expert rests, and it is not decided yet."""
    return torch.zeros(0, 0, dtype=torch.bool)


@dataclass
class SAMEState:
    """All of it is in a checkpoint; tensors are the same on every rank, but for `open`."""

    open: TaskSums = field(default_factory=lambda: TaskSums(World()))
    """This rank's sums of the present task."""
    history: dict[str, Tensor] = field(default_factory=dict)
    """Sums over all ranks and ended tasks, by "LAYER/FIELD"."""
    probes: dict[str, Tensor] = field(default_factory=dict)
    """Tokens of ended tasks, and how they were routed then."""
    resting: Tensor = field(default_factory=nobody)
    """(layers, experts): who rests in the present task; empty before it is decided."""
    begun: int = 0
    """Step at which the present task began."""
    ended: int = 0
    """Tasks."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """Load, drift and who rested, of each ended task."""
    released: dict[str, Tensor] = field(default_factory=dict)
    """Of released=True: factors and moving averages."""
