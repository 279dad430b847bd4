"""Streams of tasks over data: class-, task- and domain-incremental, growing data, and i.i.d.

A stream decides what arrives when and how labels are numbered; it moves no data. Sample ids number all training samples
of the stream, then all test samples, so an id names one sample among everything the stream will ever show.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everbatch.data.arrays import check_labels
from everbatch.data.datasets import Samples, as_source
from everbatch.data.label_space import Pair, as_pair, in_one_label_space, same_classes
from everbatch.data.memory import check_memory
from everbatch.data.sources import ConcatSource, Source, stratified_split
from everbatch.data.tasks import Kind, Stream, Task, finished, rows_of_stream
from everbatch.errors import check
from everbatch.seeds import generator

__all__ = [
    "Stream", "Task", "class_incremental", "domain_incremental", "finished", "growing", "iid", "pilot_increments",
    "rows_of_stream", "task_incremental", "validation",
]


def _pair(who: str, train: Samples, test: Samples) -> Pair:
    one, other = as_pair(who, train, test)
    _check_pair(who, one, other)
    return one, other


def _check_pair(who: str, train: Source, test: Source) -> None:
    check(train.classes == test.classes, who, f"train has classes {train.classes[:5]}, test has {test.classes[:5]}",
          "be the same classes in the same order")
    for source in (train, test):
        check(len(source) > 0, who, f"{source.name!r} is empty", "hold samples")
        check_labels(f"{who}: {source.name}", source.targets, len(source.classes))


def pilot_increments(num_classes: int, initial: int, increment: int) -> tuple[int, ...]:
    """Task sizes in PILOT's "B initial, Inc increment" notation: `initial`, then `increment` each, the rest last.

    Example:
        >>> pilot_increments(100, 50, 20)
        (50, 20, 20, 10)
    """
    check(1 <= initial <= num_classes, "pilot_increments", f"initial={initial}", f"be in [1, {num_classes}]")
    check(increment >= 1, "pilot_increments", f"increment={increment}", "be at least 1")
    steps, rest = divmod(num_classes - initial, increment)
    return (initial, *[increment] * steps, *([rest] if rest else []))


def _whole(who: str, label: str, given: Sequence[int]) -> list[int]:
    """A list of whole numbers, from a list, an array or a tensor."""
    listed = isinstance(given, list | tuple | range) or getattr(given, "ndim", 0) == 1
    check(listed, who, f"{label}={given!r}", "be a list of whole numbers")
    values: list[Any] = given.tolist() if isinstance(given, Tensor | np.ndarray) else list(given)
    odd = [value for value in values if isinstance(value, bool) or not hasattr(value, "__index__")]
    check(not odd, who, f"{label} has {odd[:1]}", "be of whole numbers")
    return [operator.index(value) for value in values]


def _class_order(
    who: str, names: tuple[str, ...], seed: int, class_order: Sequence[int] | None, classes: Sequence[int] | None,
) -> list[int]:
    """Source labels in order of appearance."""
    given = class_order if class_order is not None else classes
    label = "class_order" if class_order is not None else "classes"
    order = list(range(len(names))) if given is None else _whole(who, label, given)
    check(isinstance(seed, int | np.integer) and 0 <= seed < 2**32, who, f"seed={seed!r}", "be an integer in [0, 2^32)",
          "every rank needs the same")
    check(class_order is None or classes is None, who, "both class_order and classes", "be at most one of them")
    check(len(order) > 0, who, f"{label}=[]", "name at least one class")
    repeated = [c for c, count in Counter(order).items() if count > 1]
    check(not repeated, who, f"{label} has class {repeated[:1]} twice", "name every class once")
    odd = [c for c in order if not 0 <= c < len(names)]
    check(not odd, who, f"{label} has {odd[:1]}", f"be in [0, {len(names)})")
    if class_order is None:
        # The legacy generator of numpy, because PILOT, PyCIL and GTEP publish class orders by its seeds.
        order = [order[i] for i in np.random.RandomState(seed).permutation(len(order)).tolist()]
    return order


def _split_classes(
    kind: Kind, train: Samples, test: Samples, tasks: int | None, seed: int, class_order: Sequence[int] | None,
    increments: Sequence[int] | str | None, classes: Sequence[int] | None,
) -> Stream:
    who = f"{kind}_incremental"
    train, test = _pair(who, train, test)
    order = _class_order(who, train.classes, seed, class_order, classes)
    sizes = _sizes(who, tasks, increments, len(order))
    label_map = torch.full((len(train.classes),), -1)
    label_map[torch.tensor(order)] = torch.arange(len(order))
    home = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    train_ids, test_ids = (_by_task(label_map[source.targets], home, len(sizes)) for source in (train, test))
    made, start = [], 0
    for index, size in enumerate(sizes):
        stop = start + size
        name = ",".join(train.classes[c] for c in order[start:stop][:4]) + ("..." if size > 4 else "")
        made.append(Task(index, name, tuple(range(start, stop)), train_ids[index], test_ids[index] + len(train)))
        start = stop
    return finished(who, Stream(tuple(made), train, test, len(order), kind, label_map))


def _sizes(who: str, tasks: int | None, increments: Sequence[int] | str | None, classes: int) -> list[int]:
    """Classes of each task."""
    if increments is None:
        count, = (5,) if tasks is None else _whole(who, "tasks", [tasks])
        check(1 <= count <= classes, who, f"{count} tasks of {classes} classes", "be at least one class per task")
        return [classes // count + (k < classes % count) for k in range(count)]
    if isinstance(increments, str):
        found = re.fullmatch(r"B(\d+)[-_ ]?Inc(\d+)", increments, re.IGNORECASE)
        check(found is not None, who, f"increments={increments!r}", "be B<classes of the first task>-Inc<of each other>",
              "say B50-Inc10, or B0-Inc10 for equal tasks")
        first, each = (int(number) for number in found.groups()) if found is not None else (0, 0)
        increments = pilot_increments(classes, first or each, each)
    sizes = _whole(who, "increments", increments)
    check(tasks is None or tasks == len(sizes), who, f"tasks={tasks} and {len(sizes)} increments", "agree")
    check(all(size >= 1 for size in sizes), who, f"increments={sizes}", "be at least one class each")
    check(sum(sizes) == classes, who, f"increments={sizes} cover {sum(sizes)} classes",
          f"cover the {classes} classes of the stream")
    return sizes


def _by_task(labels: Tensor, home: Tensor, tasks: int) -> tuple[Tensor, ...]:
    """Places of the samples of each task, ascending; one sort for all tasks.

    Args:
        labels: (n,) labels of the samples, -1 for those that are in no task.
        home: (classes,) task of each label.
    """
    places = torch.where(labels < 0, tasks, home[labels])
    counts = torch.bincount(places, minlength=tasks + 1)
    return torch.split(places.argsort(stable=True), counts.tolist())[:tasks]


def class_incremental(
    train: Samples, test: Samples, tasks: int | None = None, seed: int = 0, class_order: Sequence[int] | None = None, *,
    increments: Sequence[int] | str | None = None, classes: Sequence[int] | None = None,
) -> Stream:
    """Disjoint sets of classes, one task after the other; no task id at test time.

    Args:
        train: training samples. test: test samples with the same classes.
        tasks: number of tasks (default 5) of equal numbers of classes; the first ones get one more where they do not
            divide.
        seed: shuffles the classes by numpy's legacy generator, as PILOT, PyCIL and GTEP do.
        class_order: source labels in order of appearance, instead of `seed`; those left out are not in the stream.
        increments: classes of each task instead of `tasks`: a list, or PILOT's notation of a first task and of those after it,
            "B50-Inc10"; see `pilot_increments`.
        classes: the source labels that take part, shuffled by `seed`; by default all.

    Raises:
        ValueError: more tasks than classes, a class twice or out of range, increments that do not cover the classes, a
            task without training or test samples, other classes in `test`, labels out of range.
    """
    return _split_classes("class", train, test, tasks, seed, class_order, increments, classes)


def task_incremental(
    train: Samples, test: Samples, tasks: int | None = None, seed: int = 0, class_order: Sequence[int] | None = None, *,
    increments: Sequence[int] | str | None = None, classes: Sequence[int] | None = None,
) -> Stream:
    """`class_incremental` with the task known at test time: predictions choose among the task's own classes."""
    return _split_classes("task", train, test, tasks, seed, class_order, increments, classes)


def domain_incremental(domains: Sequence[tuple[Samples, Samples]]) -> Stream:
    """One set of classes, the distribution of inputs changes from task to task.

    Args:
        domains: one (train, test) pair per task, all with the same classes; see `permuted` and `rotated`.

    Raises:
        ValueError: no domains, an empty one, or classes that differ between domains.
    """
    who = "domain_incremental"
    check(len(domains) > 0, who, "no domains", "be at least one (train, test) pair")
    for index, pair in enumerate(domains):
        check(isinstance(pair, tuple | list) and len(pair) == 2, who, f"a {type(pair).__name__} in place {index}",
              "be a (train, test) pair")
    flat = in_one_label_space(who, [as_source(part) for pair in domains for part in pair])
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    same_classes(who, pairs)
    for pair in pairs:
        _check_pair(who, *pair)
    train, test = ConcatSource([pair[0] for pair in pairs]), ConcatSource([pair[1] for pair in pairs])
    check(train.classes == test.classes, who, "train and test classes differ", "be the same")
    width = len(train.classes)
    tasks, start, test_start = [], 0, len(train)
    for index, (one, other) in enumerate(pairs):
        ids = torch.arange(start, start + len(one)), torch.arange(test_start, test_start + len(other))
        tasks.append(Task(index, one.name, tuple(range(width)), *ids))
        start, test_start = start + len(one), test_start + len(other)
    return finished(who, Stream(tuple(tasks), train, test, width, "domain", torch.arange(width)))


def growing(
    train: Samples, test: Samples, rounds: int | None = None, seed: int = 0, *, sizes: Sequence[int] | None = None,
) -> Stream:
    """Data that keep arriving: round k trains on everything that has arrived by then, and tests on all test samples.

    Args:
        train: training samples, shuffled by `seed` and cut into rounds. test: test samples with the same classes.
        rounds: number of rounds (default 5) of equal numbers of new samples; the first ones get one more.
        seed: the order of arrival.
        sizes: new samples of each round instead of `rounds`; may leave samples out.

    Returns:
        A stream whose `train_ids` are in order of arrival: round k begins with the ids of round k - 1.

    Raises:
        ValueError: more rounds than samples, sizes below 1 or above the samples there are.
    """
    who = "growing"
    train, test = _pair(who, train, test)
    if sizes is None:
        count = 5 if rounds is None else rounds
        check(1 <= count <= len(train), who, f"{count} rounds of {len(train)} samples", "be at least one sample each")
        sizes = [len(train) // count + (k < len(train) % count) for k in range(count)]
    check(rounds is None or rounds == len(sizes), who, f"rounds={rounds} and {len(sizes)} sizes", "agree")
    check(len(sizes) > 0 and all(size >= 1 for size in sizes), who, f"sizes={list(sizes)}", "be at least 1 each")
    check(sum(sizes) <= len(train), who, f"sizes={list(sizes)} sum to {sum(sizes)}", f"sum to at most {len(train)}")
    check_memory(who, f"{len(sizes)} rounds", 8 * int(np.cumsum(sizes, dtype=np.int64).sum()), "make fewer rounds")
    order = torch.randperm(len(train), generator=generator(seed, "growing"))
    everything = torch.arange(len(train), len(train) + len(test))
    width = len(train.classes)
    tasks = tuple(
        Task(index, f"round {index}", tuple(range(width)), order[:stop].clone(), everything)
        for index, stop in enumerate(np.cumsum(sizes).tolist())
    )
    return finished(who, Stream(tasks, train, test, width, "growing", torch.arange(width)))


def iid(train: Samples, test: Samples) -> Stream:
    """Everything in one task: ordinary training."""
    train, test = _pair("iid", train, test)
    width = len(train.classes)
    task = Task(0, train.name, tuple(range(width)), torch.arange(len(train)),
                torch.arange(len(train), len(train) + len(test)))
    return finished("iid", Stream((task,), train, test, width, "iid", torch.arange(width)))


def validation(stream: Stream, fraction: float = 0.1, seed: int = 0) -> Stream:
    """The same stream with a stratified share of every task's training samples held out in place of its test samples.

    For tuning: the test samples are never shown. In a growing stream a sample held out in one round is held out in all. In a
    blurry one samples are held out by class, wherever they come, and belong to the test part of their class's task.

    Raises:
        ValueError: fraction outside (0, 1), or a class with a single sample.
    """
    last = stream.tasks[-1].train_ids
    everywhere = last if stream.kind == "growing" else torch.cat([task.train_ids for task in stream.tasks])
    shared = stream.kind == "growing" or bool(stream.blur)
    held = everywhere[stratified_split(stream.targets(everywhere), fraction, seed)[1]] if shared else None
    tasks = []
    for task in stream.tasks:
        if held is None:
            kept, out = stratified_split(stream.targets(task.train_ids), fraction, seed)
            ids = task.train_ids[kept], task.train_ids[out]
        else:
            own = torch.isin(stream.targets(held), torch.tensor(task.classes))
            ids = task.train_ids[~torch.isin(task.train_ids, held)], held[own].sort().values
        tasks.append(replace(task, train_ids=ids[0], test_ids=ids[1]))
    return finished("validation", replace(stream, tasks=tuple(tasks)))
