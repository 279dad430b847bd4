"""What weight-space memory does at a task's end: EWC, SI, MAS and Refresh take importance, isolated tasks are frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from everbatch.data import Batch, Stream, Task
from everbatch.errors import check, check_whole
from everbatch.optim import DynamicSparsity
from everbatch.train.mixin import TrainerMixin
from everbatch.train.task_ends import active_parts, called_parts, remember

__all__ = ["Consolidate"]

class Consolidate(TrainerMixin):
    """Call what the optimizer's parts want called at a task's end, on the task's own training samples.

        EWC      consolidate_ewc(rows)        Refresh          update_fisher(rows)
        MAS      consolidate_mas(rows)        DynamicSparsity  end_task(), with isolate=True
        SI       consolidate_si()             NCL              consolidate_ncl(rows)
        VCL      consolidate_vcl()

    Those parts say what the calls do; here is only when, and on what: after the last step of a task, inputs without
    augmentation, `samples` of them drawn by (seed, task), each on one rank. The result is the same at any world size, to
    rounding; running statistics that differ by rank are averaged for it. Parts at strength 0 are not called.

    `Trainer` does this by itself where the class lists no Consolidate, with the options' defaults: list it for other options, for
    isolate=True, or over a trainer of your own.

    isolate=True gives every task of DynamicSparsity a mask of its own: `begin_task` before its first step, `end_task` after its
    last, and predictions for the samples of a task that ended are made with its mask and weights. That needs the task id at
    test, so the stream must be task-incremental.

    A trainer of your own also offers `optimizer`, `module`, `stream` and `inputs_of(raw)` (samples as the source gives them to
    model inputs), and `steps_left` (of the present task), if masks shall anneal over each task.

    Args (Config): see the fields.

    Raises:
        ValueError: at the first task, before any training: an optimizer with nothing to call; importance that would have to be
            handed in (estimator="given"); isolate without DynamicSparsity, or on a stream that is not task-incremental. In a
            second `Trainer.fit` with isolate: the tasks are frozen.

    Cost: nothing per step. At a task's end an estimate for each of EWC, MAS and Refresh: see `diagonal_fisher`; with isolate,
    two publications of the weights per predicted batch.
    Order: left of mixins that change weights in consolidate(), so that importance is of the weights that stay.
    Source: this library; the methods it calls name theirs.
    """

    example = {"samples": 6, "rows": 4}
    off = {}
    search = {}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        samples: int = 0
        """Training samples of the task that importance is estimated from, over all ranks; >= 0, 0 for all."""
        rows: int = 64
        """Samples per rank fetched at once; >= 1. A batch of the estimator "batch", and of denominator "loader"."""
        isolate: bool = False
        """Give every task of DynamicSparsity a mask of its own, frozen when the task ends; needs the task id at test."""

        def __post_init__(self) -> None:
            for name, least in (("samples", 0), ("rows", 1)):
                value = getattr(self, name)
                check_whole("Consolidate", name, value, least)

    @classmethod
    def asked(cls, config: Consolidate.Config) -> bool:
        """Isolated tasks begin and end here; all else waits for parts that want to be called."""
        return config.isolate

    optimizer: Any
    """The trainer's, composed with at least one of the parts above."""
    stream: Stream | None
    module: Any

    def before_fit(self) -> None:
        """Called by `Trainer.fit`, before anything of a run that begins anew: an isolated task is trained once."""
        state = self.optimizer.states.get(DynamicSparsity)
        begun = max(state.done, state.task) if state is not None and self.configs[Consolidate].isolate else 0
        check(not begun, "Consolidate", f"isolate=True in a run after {begun} isolated tasks", "come before the first",
              "build a new trainer, or go on from its checkpoints with resume=True")

    def on_task_start(self, task: Task) -> None:
        """Check what can be checked, and begin an isolated task."""
        super().on_task_start(task)  # type: ignore[misc]
        self.__check()
        if self.configs[Consolidate].isolate:
            self.optimizer.begin_task(task.id + 1, steps=getattr(self, "steps_left", None))

    def consolidate(self, task: Task) -> None:
        """Take importance, then freeze an isolated task. Collective."""
        super().consolidate(task)  # type: ignore[misc]
        config: Consolidate.Config = self.configs[Consolidate]
        remember(self, task, samples=config.samples, rows=config.rows)
        if config.isolate:
            self.optimizer.end_task()

    def predict(self, batch: Batch | Tensor) -> Tensor:
        """With the mask and weights of the batch's task, where tasks are isolated and it has ended."""
        if isinstance(batch, Tensor):
            check(not self.configs[Consolidate].isolate, "Consolidate", "predict(tensor) with isolate=True", "be a Batch, "
                  "whose task chooses the mask", "pass everbatch.data.Batch(..., task=k)")
            return super().predict(batch)  # type: ignore[misc, no-any-return]
        if self.configs[Consolidate].isolate and batch.task < self.optimizer.states[DynamicSparsity].done:
            with self.optimizer.task(batch.task + 1):
                return super().predict(batch)  # type: ignore[misc, no-any-return]
        return super().predict(batch)  # type: ignore[misc, no-any-return]

    def __check(self) -> None:
        config: Consolidate.Config = self.configs[Consolidate]
        kind, configs = type(self.optimizer).__name__, self.optimizer.configs
        check(bool(called_parts(self.optimizer)) or config.isolate, "Consolidate",
              f"optimizer {kind} has nothing to call at a task's end", "be composed with a part that has, such as EWC",
              "or set isolate=True with DynamicSparsity; `everbatch methods` lists all")
        for part in active_parts(self.optimizer):
            check(getattr(configs.get(part), "estimator", "") != "given", "Consolidate",
                  f"estimator='given' of {part.__name__}", "be one that is estimated here", "or hand importance in yourself, "
                  "without Consolidate")
        if config.isolate:
            check(DynamicSparsity in configs, "Consolidate", f"isolate=True and optimizer {kind}", "hold DynamicSparsity")
            scenario = self.stream.kind if self.stream is not None else "task"
            check(scenario == "task", "Consolidate", f"isolate=True on a stream of kind {scenario!r}",
                  "be task-incremental, for predictions need the task id", "use task_incremental(...)")
