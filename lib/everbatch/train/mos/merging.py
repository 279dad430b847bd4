"""Progressive merging of adapters: the pull of the trained set to the mean of the stored ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from everbatch.engines.shards import Shard

__all__ = ["Places", "merge_", "merges_per_step"]


@torch.no_grad()
def merge_(own: list[Tensor], mean: list[Tensor], alpha: float, times: int = 1) -> None:
    """Pull tensors to others, in place, `times` times over:

        theta <- (1 - alpha) theta + alpha * mean

    As m merges in a row are one: theta_m = (1 - alpha)^m theta + (1 - (1 - alpha)^m) mean. Elementwise: slices do as well.
    """
    keep = (1.0 - alpha) ** times
    if keep == 1.0 or not own:
        return
    torch._foreach_mul_(own, keep)
    torch._foreach_add_(own, mean, alpha=1.0 - keep)


def merges_per_step(merging: str, depth: int) -> int:
    """Merges in a step: one as in the paper ("step"); "released": depth + 1, as the released code also makes one, over all
    blocks, in the forward of each block."""
    return depth + 1 if merging == "released" else 1


class Places:
    """Where this rank's slices of parameters lie in a flat vector of whole ones.

    Args:
        shapes: of the whole parameters by name, in the vector's order.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.start: dict[str, int] = {}
        at = 0
        for name, shape in shapes.items():
            self.start[name] = at
            at += math.prod(shape)

    def mine(self, shards: list[Shard]) -> list[Shard]:
        """Those of these shards that the vector has."""
        return [shard for shard in shards if shard.name in self.start]

    def slices(self, shards: list[Shard], vector: Tensor) -> list[Tensor]:
        """The part of the vector for each shard, of its shape, type and device."""
        found = []
        for shard in shards:
            data = shard.data
            begin = self.start[shard.name] + shard.start
            found.append(vector[begin : begin + data.numel()].to(data).view(data.shape))
        return found
