"""Tasks, and streams of them: what is trained when, how labels are numbered, and how samples arrive."""

from __future__ import annotations

import typing
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from everbatch.data.notes import notes_of, speaks
from everbatch.data.sources import TARGETS, ConcatSource, Source, digest, target_bytes
from everbatch.errors import check
from everbatch.rows import Rows, unnamed

__all__ = ["Kind", "Stream", "Task", "bounded", "finished", "manner", "rows_of_stream"]

Kind = Literal["class", "task", "domain", "growing", "iid"]


@dataclass(frozen=True)
class Task:
    """One stretch of a stream."""

    id: int
    """Place in the stream, from 0."""
    name: str
    classes: tuple[int, ...]
    """The labels of the task, as the stream numbers them, ascending."""
    train_ids: Tensor
    """(n,) int64 ids of the training samples."""
    test_ids: Tensor
    """(m,) int64 ids of the test samples."""
    others: tuple[int, ...] = ()
    """Labels of other tasks that some of its training samples have, ascending; see `everbatch.data.blurry`."""


@dataclass(frozen=True)
class Stream:
    """Tasks over a training and a test source. Build one with the functions of this page, which check it."""

    tasks: tuple[Task, ...]
    train: Source
    test: Source
    num_classes: int
    """Labels after numbering them in order of appearance; the width of a head for the whole stream."""
    kind: Kind
    label_map: Tensor
    """(source classes,) int64: the stream's label of each source label, -1 where the stream never shows it."""
    blur: float = 0.0
    """Share of each task's training samples that come in other tasks; see `everbatch.data.blurry`."""
    one_pass: bool = False
    """Every sample comes once; see `everbatch.data.online`."""
    boundaries: bool = True
    """Whether a method may know where tasks begin and end; see `everbatch.data.task_free`."""
    ordered: bool = False
    """Training samples come as `train_ids` name them, not shuffled; see `everbatch.data.ordered`."""

    def __post_init__(self) -> None:
        kinds = typing.get_args(Kind)
        check(self.kind in kinds, "Stream", f"kind={self.kind!r}", f"be one of {', '.join(kinds)}",
              "it says among which classes a prediction chooses")
        check(len(self.tasks) > 0, "Stream", "no tasks", "be at least one")

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the results should know of the samples, one line each: classes with a single training sample, or
        with none in training or test."""
        return notes_of(self)

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each label, in the stream's numbering."""
        names = {int(new): self.train.classes[old] for old, new in enumerate(self.label_map) if new >= 0}
        return tuple(names[label] for label in range(self.num_classes))

    @cached_property
    def _everything(self) -> ConcatSource:
        return ConcatSource((self.train, self.test))

    def targets(self, ids: Tensor) -> Tensor:
        """(n,) labels of the samples `ids`, as the stream numbers them."""
        return self.label_map[self._everything.targets[ids]]

    def fetch(self, ids: Tensor) -> Rows:
        """(n, ...) un-augmented inputs of the samples `ids`, training and test samples alike; or several by name."""
        return self.rows(ids)[0]

    def rows(self, ids: Tensor) -> tuple[Rows, Tensor]:
        """Inputs and targets of the samples `ids`: the targets that the source gives with its rows, else their labels."""
        rows = self._everything.fetch(ids)
        if not isinstance(rows, dict):
            return rows, self.targets(ids)
        inputs = {name: value for name, value in rows.items() if name != TARGETS}
        return unnamed("inputs", inputs) if inputs.keys() == {"inputs"} else inputs, rows.get(TARGETS, self.targets(ids))

    @property
    def has_targets(self) -> bool:
        """Whether the source gives targets of its own with its rows, beside labels. Cost: one sample."""
        rows = self._everything.fetch(self.tasks[0].train_ids[:1])
        return isinstance(rows, dict) and TARGETS in rows

    @cached_property
    def _seen(self) -> dict[int, tuple[int, ...]]:
        return {}

    def seen_classes(self, task: int) -> tuple[int, ...]:
        """Labels of tasks 0 to `task`, ascending, and of what else they train on. The last answer is kept: an evaluation asks
        for the same one once for each task."""
        if task not in self._seen:
            earlier = self.tasks[: task + 1]
            self._seen.clear()
            self._seen[task] = tuple(sorted({label for one in earlier for label in (*one.classes, *one.others)}))
        return self._seen[task]

    def fingerprint(self) -> str:
        """A short hash of data, task order and labels: equal streams, and only those, resume each other."""
        parts: list[str | bytes] = [manner(self), self.train.fingerprint(), self.test.fingerprint()]
        parts.append(target_bytes(self.label_map))
        for task in self.tasks:
            parts += [str(task.classes), target_bytes(task.train_ids), target_bytes(task.test_ids)]
        return digest(*parts)


def bounded(stream: Stream) -> bool:
    """Whether methods may know where its tasks begin and end; of a stream of one's own that does not say, they may."""
    return bool(getattr(stream, "boundaries", True))


def manner(stream: Stream) -> str:
    """Its kind, and how its samples arrive where that is not as usual."""
    words = [str(stream.kind)]
    words += [f"blurry {stream.blur:g}"] if getattr(stream, "blur", 0.0) else []
    words += ["online"] if getattr(stream, "one_pass", False) else []
    words += [] if bounded(stream) else ["task-free"]
    words += ["ordered"] if getattr(stream, "ordered", False) else []
    return ", ".join(words)


def rows_of_stream(stream: Stream, ids: Tensor) -> tuple[Rows, Tensor]:
    """Inputs and targets of samples, also of a stream of one's own that knows of labels alone."""
    return stream.rows(ids) if hasattr(stream, "rows") else (stream.fetch(ids), stream.targets(ids))


def finished(who: str, stream: Stream) -> Stream:
    """Refuse empty tasks and samples of a class that is not their task's, warn on rank 0 of classes that a task promises and
    never shows."""
    for task in stream.tasks:
        for part, ids in (("training", task.train_ids), ("test", task.test_ids)):
            check(len(ids) > 0, who, f"task {task.id} ({task.name}) has no {part} samples", "have some")
            allowed = {*task.classes, *(task.others if part == "training" else ())}
            labels = stream.targets(ids)
            odd = sorted(set(torch.unique(labels).tolist()) - allowed)
            if odd:
                first = int(ids[labels == odd[0]][0])
                check(False, who, f"label {odd[0]} of {part} sample {first} in task {task.id} ({task.name})",
                      "be of a class of the task")
        absent = sorted(set(task.classes) - set(torch.unique(stream.targets(task.train_ids)).tolist()))
        # An early round of growing data may well miss a class that arrives later.
        if absent and speaks() and (stream.kind != "growing" or task is stream.tasks[-1]):
            warnings.warn(f"{who}: task {task.id} has no training samples of classes "
                          f"{[stream.classes[label] for label in absent[:5]]}", stacklevel=3)
    return stream
