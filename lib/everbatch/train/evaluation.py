"""Continual evaluation: accuracy on every seen task while training goes on, without a trace in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from everbatch.data import Batch, Stream, Task
from everbatch.data.draws import drawing, seeded
from everbatch.data.tasks import bounded
from everbatch.errors import check, check_whole
from everbatch.evaluate.evaluator import Evaluator, evaluator_of
from everbatch.evaluate.subsets import stratified_subset
from everbatch.metrics.stability import UNITS, Stability
from everbatch.train.evaluation_report import drawn, told
from everbatch.train.mixin import TrainerMixin
from everbatch.train.record import Report, StepRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ContinualEvaluation"]

WHO = "ContinualEvaluation"


def _nothing() -> Tensor:
    return torch.full((0, 2), torch.nan, dtype=torch.float64)


class ContinualEvaluation(TrainerMixin):
    """Evaluate every seen task between task ends as well, and say what is lost for a while: the stability gap.

    After each of the first `dense` steps of a task, then after every `every` steps, and at a task's end, the
    tasks seen so far are evaluated on `subset` test samples each: drawn once by (seed, task), of each class
    its share, the same all along. Predictions are the trainer's own (`predict`): in evaluation mode, with
    the ranks' mean buffers, among the classes seen so far (class-incremental) or of the task
    (task-incremental), by the raw weights as the next step finds them, or, with averaged=True, by the
    average that the optimizer's EMA keeps. At a task's end that is after consolidation. Each task is
    evaluated once before its first step too, and all are before the very first, for forward transfer; a
    head that grows has no outputs for tasks to come, and no forward transfer.

    The metrics are those of `everbatch.metrics.Stability`; `stability` has them at any time, `curves` what was
    measured. A recorder gets evaluation/task_J, evaluation/min_accuracy and evaluation/worst_case_accuracy
    at each evaluated step. Accuracies on all test samples at task ends are in the trainer's matrix.

    Of a problem that is no classification, the first of its scores stands for accuracy. A trainer of your
    own also offers `module`, `stream`, `device`, `optimizer`, `inputs_of(raw)` and `config.eval_batch`.

    Training is as without: the same bits of weights, moments, buffers, memory and random numbers.

    Raises:
        ValueError: averaged=True with an optimizer that keeps no average, before any training.

    Cost: forwards alone: k tasks * subset samples at each evaluation, divided among the ranks, in equally
    many batches on each; one all-reduce of counts for all tasks, one of floating buffers if there are ranks
    and buffers; the host waits for the counts. `report` tells seconds and samples. cache=True keeps the
    subsets ready on the device.
    Order: leftmost, so that it sees what the others leave.
    Source: De Lange, van de Ven and Tuytelaars 2023, arXiv 2205.13452.
    Differs: subsets are fixed, where the released code draws them anew from the global generator at every
    step; every step is evaluated only after a task's start, where the gap is; windows count steps, not
    points, for then they mean the same where points are sparse.
    """

    observes = True
    makes = {}  # it measures
    example = {"every": 2, "dense": 2, "subset": 9}
    off = {}
    search = {}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        every: int = 10
        """Steps between two evaluations; >= 1."""
        dense: int = 100
        """First steps of each task, every one of which is evaluated; >= 0."""
        subset: int = 1000
        """Test samples of each task, over all ranks; >= 1. The standard error of an accuracy is at most
        0.5 / sqrt(subset), and a minimum over many points lies below the true one by some of them."""
        windows: tuple[int, ...] = (10, 100)
        """Widths of the windows of forgetting and plasticity; >= 1 each."""
        window_unit: Literal["points", "iterations"] = "iterations"
        """What they count: evaluations, as in the paper, or steps."""
        averaged: bool = False
        """Evaluate the average that optimizer.ema keeps, in place of the weights."""
        cache: bool = True
        """Keep the subsets on the device, as the model takes them; false fetches them every time."""

        def __post_init__(self) -> None:
            for name, least in (("every", 1), ("dense", 0), ("subset", 1)):
                check_whole(WHO, name, getattr(self, name), least)
            for width in self.windows:
                check_whole(WHO, "windows", width, 1)
            ascending = all(a < b for a, b in zip(self.windows, self.windows[1:], strict=False))
            check(ascending, WHO, f"windows={self.windows}", "ascend")
            check(self.window_unit in UNITS, WHO, f"window_unit={self.window_unit!r}",
                  "be points or iterations")

    @classmethod
    def idle(cls, config: ContinualEvaluation.Config) -> dict[str, str]:
        """What evaluation after every step leaves without effect."""
        return {"dense": "evaluation.every=1 evaluates every step"} if config.every == 1 else {}

    @classmethod
    def needs_boundaries(cls, config: ContinualEvaluation.Config) -> str:
        """No: what it knows of tasks, no method learns."""
        return ""

    @dataclass
    class State:
        table: Tensor = field(default_factory=_nothing)
        """(rows, 2 + tasks) float64: steps so far, task, accuracies; NaN where there is none."""
        points: int = 0
        """Rows that are filled."""
        before: Tensor = field(default_factory=_nothing)
        """(2, tasks): of the untrained network, and just before a task's first step."""
        task: int = -1
        """In training."""
        begun: int = 0
        """Steps before its first."""
        seconds: float = 0.0
        """Spent on evaluating."""
        samples: int = 0
        """Predicted, over all ranks."""

    if TYPE_CHECKING:
        optimizer: Any
        module: Any
        stream: Stream | None
        recorder: Any
        problem: Any
        device: torch.device
        config: Any
        inputs_of: Callable[[Any], Any]
        predict: Callable[[Any], Tensor]
    _metrics: Stability | None = None
    _kept: tuple[Stream, dict[int, list[Batch]]] | None = None
    """The stream, and the subsets of its tasks, ready."""

    # -------------------------------------------------------------------------------- for users
    @property
    def stability(self) -> Stability:
        """The metrics so far."""
        state: ContinualEvaluation.State = self.states[ContinualEvaluation]
        if self._metrics is None or self._metrics.points != state.points:  # resumed
            config: ContinualEvaluation.Config = self.configs[ContinualEvaluation]
            fraction = getattr(self, "problem", None) is None or self.problem.fraction
            self._metrics = Stability(config.windows, window_unit=config.window_unit,
                                      unit="fraction" if fraction else "score")
            for row in state.table[: state.points].tolist():
                task = int(row[1])
                self._metrics.add(int(row[0]), task, row[2 : 3 + task])
        return self._metrics

    @property
    def curves(self) -> dict[str, Any]:
        """What was measured: "step" (n,), steps done; "task" (n,), in training; "accuracy" (n, tasks), NaN
        where a task was not begun; "untrained" and "ahead" (tasks,), before the first step of all and of the
        task."""
        state: ContinualEvaluation.State = self.states[ContinualEvaluation]
        rows = state.table[: state.points]
        return {"step": rows[:, 0].long().numpy(), "task": rows[:, 1].long().numpy(),
                "accuracy": rows[:, 2:].numpy(), "untrained": state.before[0].numpy(),
                "ahead": state.before[1].numpy()}

    # -------------------------------------------------------------------------------- verbs
    def before_fit(self) -> None:
        """Begin anew; called by `Trainer.fit`, or before the first task of another trainer."""
        assert self.stream is not None
        averages = hasattr(self.optimizer, "averaged")
        check(averages or not self.configs[ContinualEvaluation].averaged, WHO,
              f"averaged=True and optimizer {type(self.optimizer).__name__}", "be composed with EMA",
              "or leave averaged out: the weights themselves are evaluated then")
        tasks = len(self.stream)
        self.states[ContinualEvaluation] = ContinualEvaluation.State(
            table=torch.full((64, 2 + tasks), torch.nan, dtype=torch.float64),
            before=torch.full((2, tasks), torch.nan, dtype=torch.float64))
        self._metrics = None

    def on_task_start(self, task: Task) -> None:
        """Evaluate the new task, before its first step."""
        super().on_task_start(task)  # type: ignore[misc]
        if not self.states[ContinualEvaluation].table.numel():
            self.before_fit()
        self.__begin(task, self.step)

    def after_step(self, record: StepRecord) -> None:
        """Evaluate where it is time. A task's last step is `on_task_end`'s; but where the stream shows no
        boundary, which an evaluation may know of, the task ends here and the next begins."""
        super().after_step(record)  # type: ignore[misc]
        config: ContinualEvaluation.Config = self.configs[ContinualEvaluation]
        state: ContinualEvaluation.State = self.states[ContinualEvaluation]
        if state.task < 0:  # a step outside of `fit`
            return
        assert self.stream is not None
        done, tasks = self.step + 1 - state.begun, self.stream.tasks
        last = getattr(self, "steps_left", 0) == 1
        untold = last and not bounded(self.stream) and state.task + 1 < len(tasks)
        due = done <= config.dense or done % config.every == 0
        if untold or (due and not last):
            self.__measure(self.step + 1)
        if untold:
            self.__begin(tasks[state.task + 1], self.step + 1)

    def on_task_end(self, task: Task) -> None:
        """Evaluate at the task's end."""
        super().on_task_end(task)  # type: ignore[misc]
        state: ContinualEvaluation.State = self.states[ContinualEvaluation]
        if not state.points or state.table[state.points - 1, 0] != self.step:
            self.__measure(self.step)

    def notes(self) -> str:
        """For describe(): when, on what, and what it costs."""
        c: ContinualEvaluation.Config = self.configs[ContinualEvaluation]
        weights = "averaged weights" if c.averaged else "raw weights"
        dense = f"each of a task's first {c.dense} steps, then " if c.dense and c.every > 1 else ""
        return (f"evaluates {weights} after {dense}every {c.every} step(s): forwards of {c.subset} samples of "
                "each seen task, 1 all-reduce of counts")

    def report(self) -> Report | None:
        """Metrics, cost and figures; metrics are None where one task leaves them undefined."""
        state: ContinualEvaluation.State = self.states[ContinualEvaluation]
        assert self.stream is not None
        if not state.points:
            return None
        before = None if bool(state.before.isnan().any()) else state.before.tolist()
        weights = "averaged" if self.configs[ContinualEvaluation].averaged else "raw"
        rows = state.table[: state.points, :2].long().tolist()
        ends = {task: step for step, task in rows}  # the last of each
        cost = {"task_ends": [*ends.values()], "weights": weights, "points": state.points, "evaluation_seconds": state.seconds,
                "evaluated_samples": state.samples,
                "subset_samples": [self.__size(task) for task in self.stream.tasks]}
        return told(self.stability, before, cost, self.figures())

    def figures(self) -> dict[str, Callable[[], Figure]]:
        """Figures of what was measured, by name; each is drawn when it is called (matplotlib)."""
        assert self.stream is not None
        names = [task.name for task in self.stream.tasks]
        title = str(getattr(self, "title", type(self).__name__))
        return drawn(self.stability, self.curves, names, title)

    # -------------------------------------------------------------------------------- how
    def __begin(self, task: Task, steps: int) -> None:
        """A task begins after so many steps."""
        assert self.stream is not None
        state: ContinualEvaluation.State = self.states[ContinualEvaluation]
        state.task, state.begun = task.id, steps
        growing = getattr(getattr(self, "growth", None), "build", None) is not None
        untrained = task.id == 0 and not growing
        tasks = list(self.stream.tasks) if untrained else [task]
        values = self.__evaluate(task.id, tasks)
        if untrained:
            state.before[0] = torch.tensor(values, dtype=torch.float64)
        state.before[1, task.id] = values[0]

    def __measure(self, step: int) -> None:
        """One more row: all tasks seen so far."""
        assert self.stream is not None
        state, met = self.states[ContinualEvaluation], self.stability
        values = self.__evaluate(state.task, list(self.stream.tasks[: state.task + 1]))
        if state.points == len(state.table):
            state.table = torch.cat([state.table, torch.full_like(state.table, torch.nan)])
        row = [step, state.task, *values]
        state.table[state.points, : len(row)] = torch.tensor(row, dtype=torch.float64)
        state.points += 1
        met.add(step, state.task, values)
        if getattr(self, "recorder", None) is not None:
            written = {f"evaluation/task_{j}": value for j, value in enumerate(values)}
            for name in ("min_accuracy", "worst_case_accuracy"):
                value = getattr(met, name)
                written |= {} if value is None else {f"evaluation/{name}": value}
            self.recorder.scalars(step - 1, written)

    def __evaluate(self, seen: int, tasks: list[Task]) -> list[float]:
        """The first score on each of these tasks' subsets. Collective."""
        assert self.stream is not None
        state, begun = self.states[ContinualEvaluation], time.perf_counter()
        evaluator = evaluator_of(self)
        with seeded(), self.__weights():
            found = evaluator.sums(self.stream, seen, tasks, lambda task: self.__batches(evaluator, task))
        assert found is not None
        state.seconds += time.perf_counter() - begun
        state.samples += sum(map(self.__size, tasks))
        return [next(iter(evaluator.problem.scores(row).values())) for row in found]

    def __weights(self) -> AbstractContextManager[Any]:
        averaged: AbstractContextManager[Any] = nullcontext()
        if self.configs[ContinualEvaluation].averaged:
            averaged = self.optimizer.averaged()
        return averaged

    def __batches(self, evaluator: Evaluator, task: Task) -> Sequence[Batch]:
        """This rank's share of a task's subset, ready."""
        stream = self.stream
        assert stream is not None
        if self._kept is None or self._kept[0] is not stream:
            self._kept = (stream, {})
        kept = self._kept[1]
        if task.id in kept:
            return kept[task.id]
        config: ContinualEvaluation.Config = self.configs[ContinualEvaluation]
        key = (self.seed, "continual evaluation", task.id)
        labels = getattr(self, "problem", None) is None or self.problem.labels
        ids = stratified_subset(stream, task.test_ids, config.subset, *key, by_label=labels)
        with drawing(*key):
            batches = list(evaluator.ready(stream, task, ids))
        if config.cache:
            kept[task.id] = batches
        return batches

    def __size(self, task: Task) -> int:
        """How many samples stand for a task."""
        return min(int(self.configs[ContinualEvaluation].subset), len(task.test_ids))
