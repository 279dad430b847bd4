"""A network's features in float32, whatever type it computes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everbatch.nn.retrieval import Trunk

__all__ = ["Typed"]


class Typed:
    """A trunk for inputs and features in float32.

    Args:
        trunk: of a network with weights of type `weights`.
        half: whether it computes under autocast to bf16.
    """

    def __init__(self, trunk: Trunk, weights: torch.dtype, half: bool) -> None:
        self.trunk, self.weights, self.half = trunk, weights, half

    def first(self, inputs: Tensor) -> tuple[Tensor, Any]:
        """See `Trunk`."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.half):
            features, start = self.trunk.first(inputs.to(self.weights))
        return features.float(), start

    def again(self, start: Any, tasks: Tensor) -> Tensor:
        """See `Trunk`."""
        with torch.autocast(tasks.device.type, torch.bfloat16, enabled=self.half):
            return self.trunk.again(start, tasks).float()
