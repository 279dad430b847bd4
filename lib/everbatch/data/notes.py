"""What is said of data beside errors: one line each, once per process, by rank 0."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from everbatch.distributed import World

__all__ = ["notes_of", "speaks", "tell"]

SHOWN = 5
"""Class names in a note."""


def speaks() -> bool:
    """Whether this process is rank 0, or will be."""
    world = World.current()
    return (world.rank if world.size > 1 else int(os.environ.get("RANK") or 0)) == 0


@functools.lru_cache(maxsize=1024)
def tell(text: str) -> None:
    """Print one line to stderr, unless this process has said it already or is not rank 0."""
    if speaks():
        print(text, file=sys.stderr, flush=True)


class Labelled(Protocol):
    """What notes are made of: a `Stream`, which itself offers them."""

    @property
    def tasks(self) -> Sequence[Any]: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def num_classes(self) -> int: ...

    def targets(self, ids: Tensor) -> Tensor: ...


def notes_of(stream: Labelled) -> tuple[str, ...]:
    """See `everbatch.data.Stream.notes`. Cost: one look at all labels."""
    trained, tested = (_counts(stream, [getattr(task, part) for task in stream.tasks]) for part in ("train_ids", "test_ids"))
    found = (
        (trained == 1, "a single training sample", "what they are cannot be learned from it"),
        ((trained == 0) & (tested > 0), "test samples and no training sample", "they cannot be learned, and count as errors"),
        ((trained > 0) & (tested == 0), "training samples and no test sample", "their accuracy is not measured"),
        ((trained == 0) & (tested == 0), "no samples at all", "the head is wider than need be"),
    )
    names = stream.classes
    lines = [_line(names, where, what, so) for where, what, so in found if bool(where.any())]
    if stream.num_classes == 1:
        lines.append(f"one class only, {names[0]!r}: every prediction is right, and nothing is learned")
    return tuple(lines)


def _counts(stream: Labelled, ids: list[Tensor]) -> Tensor:
    """Samples of each label among all tasks, each counted once."""
    return torch.bincount(stream.targets(torch.unique(torch.cat(ids))), minlength=stream.num_classes)


def _line(names: tuple[str, ...], where: Tensor, what: str, so: str) -> str:
    labels = torch.nonzero(where).flatten().tolist()
    shown = ", ".join(repr(names[label]) for label in labels[:SHOWN]) + ", ..." * (len(labels) > SHOWN)
    return f"{len(labels)} class{'es' * (len(labels) > 1)} with {what} ({shown}): {so}"
