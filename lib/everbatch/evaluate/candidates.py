"""What a prediction may be: the classes among which the best is taken."""

from __future__ import annotations

import torch
from torch import Tensor

from everbatch.data import Stream, Task
from everbatch.problems.classification import best

__all__ = ["allowed_classes", "best"]


def allowed_classes(stream: Stream, seen: int, task: Task) -> Tensor:
    """Labels a prediction on `task` may take after training on tasks 0 to `seen`, ascending.

    Class-incremental: those of tasks 0 to `seen` (a task not yet seen: its own as well). Task-incremental: the task's.
    Otherwise: all.
    """
    if stream.kind == "task":
        return torch.tensor(task.classes)
    if stream.kind == "class":
        return torch.tensor(stream.seen_classes(max(seen, task.id)))
    return torch.arange(stream.num_classes)
