"""Joint training: all that came before is there again, the upper bound of what a memory can do."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from everbatch import seeds
from everbatch.data import Stream
from everbatch.errors import check_real
from everbatch.train.mixin import TrainerMixin

__all__ = ["Joint"]


class Joint(TrainerMixin):
    """Train each task on its own samples and on those of all tasks before it.

    Two methods: `joint` starts over with each task (`ShrinkPerturb(shrink=0, perturb=1)`), so that what is evaluated after task
    k is a network that was trained on tasks 0 to k at once, the upper bound there; `cumulative` goes on with the weights. No
    memory is bounded here; it is what others are compared with, as fine-tuning is from below.

    Args (Config): see the fields.

    Cost: task k of K equal ones takes k + 1 times its steps, (K + 1) / 2 times in all.
    Order: any.
    Source: the usual upper bound; "joint" and "cumulative" as in Avalanche (Lomonaco et al. 2021, arXiv 2104.00405).
    Differs: joint training there happens once, after the last task; the last row of the accuracies is that here.
    """

    makes = {"joint": {"optimizer.shrink_perturb.shrink": 0.0, "optimizer.shrink_perturb.perturb": 1.0}, "cumulative": {}}
    owns = ("samples that a task trains on",)
    example = {}
    off = {"share": 0.0}
    search = {}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        share: float = 1.0
        """Share of each earlier task's samples that comes again, the same ones each time; in [0, 1], 0 for none."""

        def __post_init__(self) -> None:
            check_real("Joint", "share", self.share, 0.0, 1.0)

    def configure_stream(self, stream: Stream) -> Stream:
        """The stream with earlier samples in later tasks."""
        stream = super().configure_stream(stream)  # type: ignore[misc]
        tasks, past = [], torch.empty(0, dtype=torch.int64)
        for task in stream.tasks:
            own = task.train_ids
            tasks.append(replace(task, train_ids=torch.cat([own, past[~torch.isin(past, own)]])))
            past = torch.unique(torch.cat([past, self.__kept(own, task.id)]))
        return replace(stream, tasks=tuple(tasks))

    def __kept(self, ids: Tensor, task: int) -> Tensor:
        count = round(self.configs[Joint].share * len(ids))
        order = torch.randperm(len(ids), generator=seeds.generator(self.seed, "joint", task))
        return ids[order[:count]]
