"""The batch that travels through a trainer's verbs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from everbatch.rows import Rows, each

__all__ = ["Batch", "split_parts"]


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one part of one global batch. n = rows on this rank.

    Every row carries where it came from, so buffers and queues are functions of the stream alone, at any world size.
    """

    inputs: Rows
    """(n, ...) model inputs, or several by name; as the source gave them until the trainer augments and normalises them."""
    targets: Tensor
    """(n,) int64 class indices, in order of appearance in the stream; or (n, ...) what the source gives as targets."""
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
    extras: dict[str, Any] = field(default_factory=dict)
    """Further rows a mixin carries, tensors or several by name: "raw" inputs before augmentation, stored "logits", ..."""

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on `device`."""

        ahead = torch.device(device).type != "cpu"  # what comes back from a GPU must be there before it is read

        def move(rows: Any) -> Any:
            return rows.to(device, non_blocking=ahead) if isinstance(rows, Tensor) else each(move, rows)

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
        weight = self.weight
        if weight is None:
            weight = torch.full((len(self),), 1.0 / len(self), device=self.targets.device)
        missing = max(0, pieces - len(self))
        if pieces == 1 and not missing:
            # Nothing is copied but what a model may write into and a memory may keep.
            kept = _memory(self.inputs) & _memory(self.extras.get("raw", {}))
            inputs = each(Tensor.clone, self.inputs) if kept else self.inputs
            return [replace(self, inputs=inputs, weight=weight)]
        weight = torch.cat([weight, weight.new_zeros(missing)]) if missing else weight
        places: dict[torch.device, Sequence[Tensor]] = {}

        def places_on(device: torch.device) -> Sequence[Tensor]:
            """Made where they are used: a batch on a GPU may keep raw rows on the host, and neither waits for the other."""
            if device not in places:
                index = torch.arange(len(self), device=device)
                places[device] = torch.cat([index, index.new_zeros(missing)]).tensor_split(pieces)
            return places[device]

        return [replace(self._taken(lambda device, piece=piece: places_on(device)[piece]), weight=w)  # type: ignore[misc]
                for piece, w in enumerate(weight.tensor_split(pieces))]

    def rows(self, index: Tensor) -> Batch:
        """The rows at `index`, with their weights."""
        return self._taken(index.to)

    def _taken(self, index_on: Callable[[torch.device], Tensor]) -> Batch:
        def take(rows: Any) -> Any:
            return rows[index_on(rows.device)] if isinstance(rows, Tensor) else each(take, rows)

        return replace(
            self, inputs=take(self.inputs), targets=take(self.targets), ids=take(self.ids), position=take(self.position),
            weight=None if self.weight is None else take(self.weight),
            extras={name: take(rows) for name, rows in self.extras.items()})


def _memory(rows: Rows) -> set[int]:
    """Where these tensors lie."""
    values = rows.values() if isinstance(rows, dict) else (rows,)
    return {value.untyped_storage().data_ptr() for value in values}


def split_parts(parts: list[Batch], pieces: int) -> list[tuple[Batch, ...]]:
    """Micro-batches of all parts of a batch: `pieces` tuples of one piece of each."""
    cut = [part.split(pieces) for part in parts]
    return list(zip(*cut, strict=True))
