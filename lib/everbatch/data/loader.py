"""Batches of a task as a pure function of (seed, task, epoch, step), for one rank of any number of ranks."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from everbatch.data.batch import Batch
from everbatch.data.datasets import drawing
from everbatch.data.tasks import Stream, Task, bounded, rows_of_stream
from everbatch.distributed import World
from everbatch.errors import check
from everbatch.processes import follow_trainer
from everbatch.seeds import generator

__all__ = ["Loader", "check_workers", "evaluation_batches"]


def _same(batch: Any) -> Any:
    """Collate nothing: a batch is made whole."""
    return batch


def check_workers(who: str, workers: int) -> None:
    """Raise unless `workers` is a number of processes that this machine can sensibly run beside one rank."""
    cpus = os.cpu_count() or 1
    most = max(32, 4 * cpus)
    whole = isinstance(workers, int) and not isinstance(workers, bool)
    check(whole and 0 <= workers <= most, who, f"workers={workers!r}", f"be an integer in [0, {most}]",
          f"they are processes of every rank, and this machine has {cpus} processors")


class _Steps(Dataset["Batch | ValueError"]):
    """The loader as a map-style data set of steps, for worker processes. What our own errors say comes back as it is:
    raised in a worker, torch would wrap it in the worker's traceback."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getitem__(self, step: int) -> Batch | ValueError:
        try:
            return self.loader.batch(step)
        except ValueError as error:
            return ValueError(str(error))


def _arrived(batch: Batch | ValueError) -> Batch:
    if isinstance(batch, ValueError):
        raise batch
    return batch


class Loader:
    """This rank's batches of one task.

    Each epoch is one permutation of the task's training samples, keyed by (seed, "order", task, epoch), but of an ordered
    stream, whose samples come as the task has them. Global batch b
    of an epoch is rows b*G to (b+1)*G of it, and rank r of W takes the r-th of W equal contiguous parts, so the union
    over ranks does not depend on W. The incomplete last batch of an epoch is left out; its samples are shuffled into
    the next.

    Args:
        stream: where the samples come from.
        task: the task to train on.
        global_batch: G, samples per step over all ranks.
        epochs: passes over the task.
        seed: of the order.
        world: this rank's place.
        start: the step from which iteration begins (resuming); `len` and `batch` do not change.
        workers: processes that fetch ahead; 0 fetches in this one. Results are the same. At most 32, or 4 for each
            processor.
        position0: position of the task's first sample in the global stream.

    Raises:
        ValueError: G below 1, not divisible by the number of ranks or above the task's samples; epochs, start, workers
            or position0 out of range.

    Cost: one permutation per epoch, O(n); a step fetches G/W samples.
    """

    def __init__(
        self, stream: Stream, task: Task, global_batch: int, epochs: int, seed: int, world: World, start: int = 0,
        workers: int = 0, position0: int = 0,
    ) -> None:
        n = len(task.train_ids)
        check(global_batch >= 1, "Loader", f"global_batch={global_batch}", "be at least 1")
        check(global_batch % world.size == 0, "Loader", f"global_batch={global_batch} on {world.size} ranks",
              "be divisible by the number of ranks")
        check(global_batch <= n, "Loader", f"global_batch={global_batch} and task {task.id} with {n} training samples",
              "be no larger than the task", "lower the batch size, or make fewer and larger tasks")
        check(epochs >= 1, "Loader", f"epochs={epochs}", "be at least 1")
        check_workers("Loader", workers)
        check(position0 >= 0, "Loader", f"position0={position0}", "be at least 0")
        self.stream, self.task, self.global_batch, self.epochs = stream, task, global_batch, epochs
        self.seed, self.world, self.start, self.workers, self.position0 = seed, world, start, workers, position0
        self.steps_per_epoch = n // global_batch
        check(0 <= start <= len(self), "Loader", f"start={start}", f"be in [0, {len(self)}]")
        self._order: tuple[int, Tensor] = (-1, task.train_ids[:0])

    def __len__(self) -> int:
        """Steps of the task, whatever `start` is."""
        return self.epochs * self.steps_per_epoch

    @property
    def end_position(self) -> int:
        """Position of the next task's first sample in the global stream."""
        return self.position0 + len(self) * self.global_batch

    def _global_ids(self, step: int) -> Tensor:
        if not 0 <= step < len(self):
            check(False, "Loader", f"step={step}", f"be in [0, {len(self)})")
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            ids = self.task.train_ids
            if not getattr(self.stream, "ordered", False):
                ids = ids[torch.randperm(len(ids), generator=generator(self.seed, "order", self.task.id, epoch))]
            self._order = (epoch, ids)
        return self._order[1][index * self.global_batch :][: self.global_batch]

    def global_rows(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, targets and positions (G,) of the whole global batch, on every rank, without communication."""
        ids = self._global_ids(step)
        position = self.position0 + step * self.global_batch + torch.arange(self.global_batch)
        return ids, self.stream.targets(ids), position

    @property
    def local(self) -> slice:
        """This rank's rows of a global batch."""
        share = self.global_batch // self.world.size
        return slice(self.world.rank * share, (self.world.rank + 1) * share)

    def batch(self, step: int) -> Batch:
        """This rank's rows of the global batch of `step`, un-augmented."""
        ids, _, position = (value[self.local] for value in self.global_rows(step))
        shown = self.task.id if bounded(self.stream) else 0
        with drawing(self.seed, "fetch", self.task.id, step):
            return Batch(*rows_of_stream(self.stream, ids), ids, position, task=shown)

    def __iter__(self) -> Iterator[Batch]:
        steps = range(self.start, len(self))
        if self.workers == 0 or not steps:
            return map(self.batch, steps)
        # Its own generator, because DataLoader otherwise draws the workers' base seed from torch's global one.
        ahead: DataLoader[Batch | ValueError] = DataLoader(
            _Steps(self), batch_size=None, sampler=steps, num_workers=self.workers, collate_fn=_same,
            generator=generator(self.seed, "workers", self.task.id), worker_init_fn=follow_trainer,
        )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Got pickle error")  # the error says it
                return map(_arrived, iter(ahead))
        except (AttributeError, TypeError, pickle.PicklingError) as error:  # as pickle says it, by type and version
            raise ValueError(f"Loader: workers={self.workers} with {self.stream.train.name!r} that cannot be sent to another "
                             f"process ({error}), must be a data set that pickle takes; define its parts in a module and "
                             "without lambdas, or set workers=0") from error


def evaluation_batches(
    stream: Stream, task: Task, batch_size: int, world: World, *, ids: Tensor | None = None,
) -> Iterator[Batch]:
    """This rank's share of a task's test samples, in equally many batches on every rank.

    The samples are cut into global batches of `batch_size` times the number of ranks, each shared out evenly and padded
    with repeats of its first sample, of `weight` 0 and position -1 (real rows: weight 1, position = index in the list).
    Sums of weight * correct over rows and ranks are therefore exact and the same on any number of ranks.

    Args:
        stream: where the samples come from.
        task: whose test samples.
        batch_size: most rows per rank and batch.
        world: this rank's place.
        ids: other samples of the stream to evaluate, say a fixed subset.

    Raises:
        ValueError: batch_size below 1 or no samples.
    """
    ids = task.test_ids if ids is None else ids
    check(batch_size >= 1, "evaluation_batches", f"batch_size={batch_size}", "be at least 1")
    check(len(ids) > 0, "evaluation_batches", f"no samples of task {task.id}", "be at least one")
    return _evaluation(stream, task.id, batch_size, world, ids)


def _evaluation(stream: Stream, task: int, batch_size: int, world: World, ids: Tensor) -> Iterator[Batch]:
    for start in range(0, len(ids), batch_size * world.size):
        rows = min(batch_size * world.size, len(ids) - start)
        share = -(-rows // world.size)
        index = start + world.rank * share + torch.arange(share)
        real = index < start + rows
        mine = ids[torch.where(real, index, start)]
        yield Batch(*rows_of_stream(stream, mine), mine, torch.where(real, index, -1), task=task,
                    part="evaluation", weight=real.float())
