"""How far a run has come: the stream, the tasks that are done, and the batches that come next."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from everbatch.data import Batch, Loader, Stream
from everbatch.train.signals import StopFlag

__all__ = ["Run"]


@dataclass
class Run:
    """One `Trainer.fit`. A checkpoint holds it, beside weights, optimizer and what mixins keep."""

    stream: Stream | None = None
    loader: Loader | None = None
    """Of the present task."""
    task_index: int = 0
    """Tasks that are done."""
    task_step: int = 0
    """Steps of the present task that are done."""
    in_task: bool = False
    """Between the first step of a task and the last one that is taken of it."""
    bad_steps: int = 0
    """Steps in a row, up to the last one, whose gradient was not finite."""
    matrix: list[list[float]] = field(default_factory=list)
    """Accuracies, or the problem's first score: row k, after task k, column j, on task j."""
    scores: list[list[dict[str, float]]] = field(default_factory=list)
    """All scores by name: row k, after task k, one entry for each task that was evaluated."""
    changes: list[str] = field(default_factory=list)
    """What resumed runs had otherwise than the run before, in words."""
    had_ended: bool = False
    """There was nothing left to do."""
    stop: StopFlag = field(default_factory=StopFlag)
    earlier_seconds: float = 0.0
    """Of the runs that this one went on from."""
    since: float | None = None
    """When it began to work; None where it does not."""
    source: Iterator[Batch] = iter(())
    """The rest of the task's batches, as the loader gives them."""
    ahead: deque[Batch] = field(default_factory=deque)
    """Those that were fetched already."""
    hashed: tuple[str, dict[str, Any]] | None = None
    """Fingerprint and description of the stream, once they were asked for."""
    schedule: LRScheduler | None = None
    """Of the present task, or of all where none is to be seen."""
    peeked: dict[int, Batch] = field(default_factory=dict)
    """Stream parts that were made ready before their step, by step."""
    fitting: set[tuple[Any, ...]] = field(default_factory=set)
    """Shapes of outputs and targets, and classes of the stream, that the problem has found to fit."""

    @property
    def seconds(self) -> float:
        """Spent so far, over resumes too, up to the checkpoint that each went on from."""
        return self.earlier_seconds + (0.0 if self.since is None else time.monotonic() - self.since)

    def rest(self) -> None:
        """Stop the clock."""
        self.earlier_seconds, self.since = self.seconds, None

    def begin_task(self, loader: Loader) -> None:
        """Take batches from this loader."""
        self.loader, self.source = loader, iter(loader)
        self.ahead, self.peeked = deque(), {}

    def end_task(self) -> None:
        """The task is done."""
        self.task_index, self.task_step = self.task_index + 1, 0

    def fetched(self, count: int) -> bool:
        """Whether so many batches of the task are left; they are fetched then."""
        while len(self.ahead) < count and (batch := next(self.source, None)) is not None:
            self.ahead.append(batch)
        return len(self.ahead) >= count

    @property
    def seen_classes(self) -> int:
        """How many logits the classes of the present task and those before it take."""
        return 0 if self.stream is None else max(self.stream.seen_classes(self.task_index)) + 1

    @property
    def steps_left(self) -> int:
        """Steps of the present task that are not begun."""
        assert self.loader is not None
        return len(self.loader) - self.task_step
