"""The dense gradients that the next change of topology prunes and grows by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from everbatch.engines.named import ByName
from everbatch.engines.shards import Shard
from everbatch.optim.sparsity.options import Kept, Options

__all__ = ["Scores"]


class Scores:
    """What is noted of gradients before they are masked: those of single steps, their running mean,
    or neither."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.averages = options.averages
        self.gradients = options.gradients
        self.dense: dict[str, Tensor] = {}
        """The gradient of the step under way, where one step is enough for a change."""

    def note(self, shards: Sequence[Shard], gradients: Sequence[Tensor], kept: Kept, *, scoring: bool) -> None:
        """Note the reduced, dense gradients of masked shards.

        Args:
            scoring: whether this step's gradient counts for the next change.
        """
        options = self.options
        if self.averages:
            for shard, gradient in zip(shards, gradients, strict=True):
                average = _zeros(kept.averages, shard)
                average.lerp_(gradient.to(average.dtype), 1.0 - options.gradient_decay)
        if not scoring:
            return
        if options.score_steps == 1:
            self.dense = {s.name: g.clone() for s, g in zip(shards, gradients, strict=True)}
            return
        for shard, gradient in zip(shards, gradients, strict=True):
            _zeros(kept.scores, shard).add_(gradient, alpha=1.0 / options.score_steps)

    def growth(self, kept: Kept) -> Mapping[str, Tensor]:
        """What a change grows by, by name."""
        return kept.scores if self.options.score_steps > 1 else self.dense

    def forget(self, kept: Kept) -> None:
        """After a change: begin anew. Running means go on."""
        kept.scores = ByName()
        self.dense = {}


def _zeros(kept: ByName, shard: Shard) -> Tensor:
    """What is kept for a shard, zeros at first."""
    if shard.name not in kept:
        kept[shard.name] = torch.zeros_like(shard.data)
    return kept[shard.name]
