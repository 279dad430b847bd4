"""The batch that travels through a trainer's verbs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["Batch", "split_parts"]


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one part of one global batch. n = rows on this rank.

    Every row carries where it came from, so buffers and queues are functions of the stream alone, at any world size.
    """

    inputs: Tensor
    """(n, ...) model inputs; as the source gave them until the trainer augments and normalises them."""
    targets: Tensor
    """(n,) int64 class indices, in order of appearance in the stream."""
    ids: Tensor
    """(n,) int64 sample ids, unique in the data set."""
    position: Tensor
    """(n,) int64 position in the global stream: step * global batch size + index inside the global batch."""
    task: int = 0
    part: str = "stream"
    """"stream", "replay", ...: parts are forwarded one after the other, unless a mixin says otherwise."""
    weight: Tensor | None = None
    """(n,) weight of each row in this rank's loss, such that the mean over ranks of the weighted sums is the loss of
    the part; None: 1/n each (every rank holds as many rows)."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Further rows a mixin carries: "raw" inputs before augmentation, stored "logits", ..."""

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on `device`."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=True)

        return replace(
            self, inputs=move(self.inputs), targets=move(self.targets), ids=move(self.ids), position=move(self.position),
            weight=None if self.weight is None else move(self.weight), extras={k: move(v) for k, v in self.extras.items()},
        )

    def mean(self, losses: Tensor) -> Tensor:
        """Reduce (n,) per-row losses to this rank's scalar share of the part's loss."""
        return losses.mean() if self.weight is None else (losses * self.weight).sum()

    def split(self, pieces: int) -> list[Batch]:
        """Cut into `pieces` micro-batches whose weighted sums add up to this batch's.

        A batch of fewer rows than pieces is filled up with its first row at weight 0, so that every rank runs as many
        forwards.
        """
        index, weight = torch.arange(len(self), device=self.targets.device), self.weight
        if weight is None:
            weight = torch.full((len(self),), 1.0 / len(self), device=self.targets.device)
        if len(self) < pieces:
            fill = index.new_zeros(pieces - len(self))
            index, weight = torch.cat([index, fill]), torch.cat([weight, weight.new_zeros(len(fill))])
        return [replace(self, inputs=self.inputs[at], targets=self.targets[at], ids=self.ids[at],
                        position=self.position[at], weight=w, extras={k: v[at] for k, v in self.extras.items()})
                for at, w in zip(index.tensor_split(pieces), weight.tensor_split(pieces), strict=True)]


def split_parts(parts: list[Batch], pieces: int) -> list[tuple[Batch, ...]]:
    """Micro-batches of all parts of a batch: `pieces` tuples of one piece of each."""
    cut = [part.split(pieces) for part in parts]
    return list(zip(*cut, strict=True))
