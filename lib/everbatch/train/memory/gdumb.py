"""GDumb: a greedily balanced memory is all that is ever trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from everbatch import seeds
from everbatch.data import Stream
from everbatch.data.slots import Ints
from everbatch.errors import check, check_whole
from everbatch.train.mixin import TrainerMixin

__all__ = ["GDumb", "greedily_balanced"]


def greedily_balanced(
    tasks: Iterable[tuple[Ints, Ints]], capacity: int, source: np.random.Generator,
) -> Iterator[Ints]:
    """What the greedy sampler holds after each task, ascending ids.

    A sample enters where its class is new, or has fewer than capacity / classes seen; where the memory is full, a random sample
    of the largest class (the one seen first, of equally large ones) goes.

    Args:
        tasks: ids and labels of each task's samples, (n,) each, in the order in which they come.
        capacity: samples, >= 1.
        source: draws which sample goes.

    Source: Prabhu et al. 2020, Algorithm 1.
    """
    held: dict[int, list[int]] = {}
    total = 0
    for ids, labels in tasks:
        for sample, label in zip(ids.tolist(), labels.tolist(), strict=True):
            mine = held.setdefault(label, [])
            if mine and len(mine) >= capacity / len(held):
                continue
            if total >= capacity:
                largest = max(held.values(), key=len)
                gone = int(source.integers(len(largest)))
                largest[gone] = largest[-1]
                largest.pop()
                total -= 1
            mine.append(sample)
            total += 1
        yield np.sort(np.fromiter((sample for mine in held.values() for sample in mine), dtype=np.int64, count=total))


class GDumb(TrainerMixin):
    """Greedy sampler and dumb learner: each task trains on the content of a class-balanced memory, and on nothing else.

    The memory sees every sample of the stream once, in a seeded order, and is a function of the stream alone: no network is
    asked. So the stream itself is what changes: the training samples of task k become those that the memory holds after it. The
    dumb learner starts over with each of them: compose `ShrinkPerturb(shrink=0, perturb=1)`, as `method=gdumb` does. Epochs,
    schedule and augmentation are the trainer's.

    Args (Config): see the fields.

    Raises:
        ValueError: in `fit`: fewer slots than classes; a batch larger than the memory.

    Cost: nothing per step; training is of `capacity` samples, whatever the tasks hold. Each task's samples are counted once.
    Order: any. Limits: a problem of labels.
    Source: Prabhu et al. 2020, GDumb, ECCV (no arXiv number), Algorithm 1 and section 4.
    Differs: no CutMix, and a trainer's own schedule in place of SGDR; samples that come again (a growing stream's) are seen once.
    """

    makes = {"gdumb": {"optimizer.shrink_perturb.shrink": 0.0, "optimizer.shrink_perturb.perturb": 1.0}}
    owns = ("samples that a task trains on",)
    example = {"capacity": 32}
    off = {"capacity": 0}
    search = {}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        capacity: int = 500
        """Samples in the memory; >= 0, 0 trains on the stream."""

        def __post_init__(self) -> None:
            check_whole("GDumb", "capacity", self.capacity)

    def configure_stream(self, stream: Stream) -> Stream:
        """The stream of what the memory holds."""
        stream = super().configure_stream(stream)  # type: ignore[misc]
        capacity = self.configs[GDumb].capacity
        if not capacity:
            return stream
        check(capacity >= stream.num_classes, "GDumb", f"capacity={capacity} for {stream.num_classes} classes",
              "hold one sample of each")
        held = greedily_balanced(_arriving(stream, self.seed), capacity, seeds.numpy_generator(self.seed, "gdumb"))
        tasks = [replace(task, train_ids=torch.from_numpy(ids)) for task, ids in zip(stream.tasks, held, strict=True)]
        return replace(stream, tasks=tuple(tasks))


def _arriving(stream: Stream, seed: int) -> Iterator[tuple[Ints, Ints]]:
    """Ids and labels of each task's samples that no earlier task had, in a seeded order."""
    seen = torch.empty(0, dtype=torch.int64)
    for task in stream.tasks:
        order = torch.randperm(len(task.train_ids), generator=seeds.generator(seed, "gdumb", task.id))
        ids = task.train_ids[order]
        new = ids[~torch.isin(ids, seen)]
        seen = torch.cat([seen, new])
        yield new.numpy(), stream.targets(new).numpy()
