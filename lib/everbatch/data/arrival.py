"""How the samples of a stream arrive: mixed among its tasks, once, in an order, or without a sign of where a task ends.

Each function takes a stream and gives the same stream in another manner; they may follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from everbatch.data.tasks import Stream, finished
from everbatch.errors import check, check_real
from everbatch.seeds import generator

__all__ = ["blurry", "online", "ordered", "task_free"]


def blurry(stream: Stream, share: float = 0.1, seed: int = 0) -> Stream:
    """The same stream with a share of every task's training samples dealt out evenly among the other tasks.

    Task k of n_k samples gives away round(share * n_k) of them, drawn by (seed, k), each to one other task; so every sample
    still comes in exactly one task. Tasks of one size keep it, to rounding. Test samples stay with their class or domain, and a
    prediction is among the classes that training has shown by then. share = (T - 1) / T makes T equal tasks alike.

    Args:
        stream: class- or domain-incremental, of two tasks or more.
        share: in (0, 1).
        seed: of what goes where; the same on every rank, whatever else draws.

    Raises:
        ValueError: another kind of stream, a single task, a stream that is blurry already, a share outside (0, 1) or so small
            that no task gives a sample away.

    Cost: one permutation of each task's samples, one sort of those that move.

    Source: Bang et al. 2021, arXiv 2103.17230, where the tasks' classes are disjoint but for such a share ("blurry10").
    Differs: they draw anew the share of each task from the others' samples; here samples move, so none is lost or doubled.
    """
    who, count = "blurry", _tasks("blurry", stream)
    check_real(who, "share", share, 0.0, 1.0, open_low=True, open_high=True)
    check(stream.kind in ("class", "domain"), who, f"a stream of kind {stream.kind!r}", "be class- or domain-incremental",
          "elsewhere a sample has no task to leave")
    check(count > 1, who, "a stream of one task", "have two or more")
    check(not stream.blur, who, f"a stream that is blurry already, by {stream.blur:g}", "be blurred once")
    stay, leave, goals = [], [], []
    for task in stream.tasks:
        ids, g = task.train_ids, generator(seed, "blurry", task.id)
        moved = min(round(share * len(ids)), len(ids) - 1)
        order = torch.randperm(len(ids), generator=g)
        # Dealt like cards, to the other tasks in an order of this task's own.
        others = (task.id + 1 + torch.randperm(count - 1, generator=g)) % count
        stay.append(ids[order[moved:]])
        leave.append(ids[order[:moved]])
        goals.append(others[torch.arange(moved) % (count - 1)])
    least = max(len(task.train_ids) for task in stream.tasks)
    check(any(map(len, leave)), who, f"share={share:g} of tasks of at most {least} samples", "move at least one sample",
          "raise the share")
    arrived = _dealt(torch.cat(leave), torch.cat(goals), count)
    tasks = []
    for task, kept, came in zip(stream.tasks, stay, arrived, strict=True):
        ids = torch.cat([kept, came]).sort().values
        foreign = set(torch.unique(stream.targets(came)).tolist()) - set(task.classes)
        tasks.append(replace(task, train_ids=ids, others=tuple(sorted(foreign))))
    return finished(who, replace(stream, tasks=tuple(tasks), blur=float(share)))


def _tasks(who: str, stream: Stream) -> int:
    """The number of tasks of what must be a stream."""
    check(isinstance(stream, Stream), who, f"a {type(stream).__name__}", "be a stream",
          "make one: class_incremental(train, test), or as_stream([(train, test), ...])")
    return len(stream)


def _dealt(ids: Tensor, goals: Tensor, count: int) -> tuple[Tensor, ...]:
    """The samples that go to each task."""
    sizes = torch.bincount(goals, minlength=count).tolist()
    return torch.split(ids[goals.argsort(stable=True)], sizes)


def online(stream: Stream) -> Stream:
    """The same stream, to be trained on in a single pass: a trainer refuses more than one epoch of it.

    Batches are the trainer's: take small ones (10 is usual). What does not fill a last batch of a task is not trained on, up to
    batch_size - 1 samples of each task.

    Raises:
        ValueError: a growing stream, which shows earlier samples again in every round.

    Source: Lopez-Paz and Ranzato 2017, arXiv 1706.08840; Aljundi et al. 2019, arXiv 1812.03596.
    """
    _tasks("online", stream)
    check(stream.kind != "growing", "online", "a stream of kind 'growing'", "show each sample once",
          "every round trains on all that has arrived")
    return replace(stream, one_pass=True)


def ordered(stream: Stream, orders: Sequence[Sequence[int]] | None = None) -> Stream:
    """The same stream, whose training samples come once and in order: what a model that is in use predicts.

    Args:
        stream: any but a growing one.
        orders: for each task a permutation of the places of its training samples, such as `dirichlet_order` gives; None: as the
            source has them.

    The samples of an incomplete last batch of a task are left out, up to batch_size - 1 of each.

    Raises:
        ValueError: a growing stream, which shows earlier samples again; orders that are no permutations.
    """
    stream, who = online(stream), "ordered"
    if orders is None:
        return replace(stream, ordered=True)
    check(len(orders) == len(stream), who, f"{len(orders)} orders of {len(stream)} tasks", "be one for each")
    tasks = []
    for task, order in zip(stream.tasks, orders, strict=True):
        places = torch.as_tensor(order, dtype=torch.int64)
        whole = torch.equal(places.sort().values, torch.arange(len(task.train_ids)))
        check(whole, who, f"an order of {len(places)} places for task {task.id}", "be a permutation of the places of its "
              f"{len(task.train_ids)} training samples")
        tasks.append(replace(task, train_ids=task.train_ids[places]))
    return replace(stream, tasks=tuple(tasks), ordered=True)


def task_free(stream: Stream) -> Stream:
    """The same stream without visible boundaries: tasks are still evaluated one by one, and no method is told of them.

    To a method such a stream is one task: it begins with the first sample and ends with the last. Batches are of task 0, the
    optimizer's moments are never reset, the learning rate's schedule runs over the whole stream, and what has to know where
    tasks begin or end (EWC, SI, MAS, Refresh, isolated tasks, growing heads, warm starts, ring memories) is refused by name.

    Raises:
        ValueError: a task-incremental stream, whose predictions are given the task; a growing one, whose rounds repeat.

    Source: Aljundi et al. 2019, arXiv 1812.03596; "general continual learning" in Buzzega et al. 2020, arXiv 2004.07211.
    """
    _tasks("task_free", stream)
    check(stream.kind != "task", "task_free", "a task-incremental stream", "be class- or domain-incremental, or i.i.d.",
          "its predictions are given the task")
    check(stream.kind != "growing", "task_free", "a stream of kind 'growing'", "show each sample in one task",
          "its rounds repeat what has arrived")
    return replace(stream, boundaries=False)
