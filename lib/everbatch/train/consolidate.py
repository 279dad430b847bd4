"""What weight-space memory does at a task's end: EWC, SI, MAS and Refresh take importance, isolated tasks are frozen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everbatch import seeds
from everbatch.data import Batch, Stream, Task
from everbatch.errors import check
from everbatch.optim import EWC, MAS, SI, DynamicSparsity, Refresh
from everbatch.train.evaluate import mean_buffers
from everbatch.train.mixin import TrainerMixin

__all__ = ["Consolidate"]

MEMORY = (EWC, MAS, Refresh, SI)


class Consolidate(TrainerMixin):
    """Call what the optimizer's parts want called at a task's end, on the task's own training samples.

        EWC      consolidate_ewc(rows)        Refresh          update_fisher(rows)
        MAS      consolidate_mas(rows)        DynamicSparsity  end_task(), with isolate=True
        SI       consolidate_si()

    Those parts say what the calls do; here is only when, and on what: after the last step of a task, inputs without
    augmentation, `samples` of them drawn by (seed, task), each on one rank. The result is the same at any world size, to
    rounding; running statistics that differ by rank are averaged for it. Parts at strength 0 are not called.

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
    """

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
                check(isinstance(value, int) and not isinstance(value, bool) and value >= least, "Consolidate",
                      f"{name}={value!r}", f"be an integer >= {least}")

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
        opt = self.optimizer
        with mean_buffers(self.module, self.world):  # or importance would depend on which rank holds which sample
            if self.__active(EWC):
                opt.consolidate_ewc(self.__rows(task))
            if self.__active(MAS):
                opt.consolidate_mas(self.__rows(task))
            if self.__active(Refresh):
                opt.update_fisher(self.__rows(task))
        if self.__active(SI):
            opt.consolidate_si()
        if self.configs[Consolidate].isolate:
            opt.end_task()

    def predict(self, batch: Batch) -> Tensor:
        """With the mask and weights of the batch's task, where tasks are isolated and it has ended."""
        if self.configs[Consolidate].isolate and batch.task < self.optimizer.states[DynamicSparsity].done:
            with self.optimizer.task(batch.task + 1):
                return super().predict(batch)  # type: ignore[misc, no-any-return]
        return super().predict(batch)  # type: ignore[misc, no-any-return]

    def __active(self, part: type) -> bool:
        config = self.optimizer.configs.get(part)
        return config is not None and bool(config.active if part is Refresh else config.strength)

    def __rows(self, task: Task) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's (inputs, targets, ids), the task's samples in a seeded order dealt out in turn."""
        config: Consolidate.Config = self.configs[Consolidate]
        assert self.stream is not None
        order = torch.randperm(len(task.train_ids), generator=seeds.generator(self.seed, "consolidate", task.id))
        chosen = task.train_ids[order[: config.samples or None]]
        mine = chosen[self.world.rank :: self.world.size].contiguous()
        for ids in torch.split(mine, config.rows) if len(mine) else ():
            raw = self.stream.fetch(ids).to(self.optimizer.host.device)
            yield self.inputs_of(raw), self.stream.targets(ids), ids  # type: ignore[attr-defined]

    def __check(self) -> None:
        config: Consolidate.Config = self.configs[Consolidate]
        kind, configs = type(self.optimizer).__name__, self.optimizer.configs
        check(any(part in configs for part in MEMORY) or config.isolate, "Consolidate",
              f"optimizer {kind} has nothing to call at a task's end", "be composed with EWC, SI, MAS or Refresh",
              "or set isolate=True with DynamicSparsity")
        for part in (EWC, Refresh):
            check(not self.__active(part) or configs[part].estimator != "given", "Consolidate",
                  f"estimator='given' of {part.__name__}", "be one that is estimated here", "or hand importance in yourself, "
                  "without Consolidate")
        if config.isolate:
            check(DynamicSparsity in configs, "Consolidate", f"isolate=True and optimizer {kind}", "hold DynamicSparsity")
            scenario = self.stream.kind if self.stream is not None else "task"
            check(scenario == "task", "Consolidate", f"isolate=True on a stream of kind {scenario!r}",
                  "be task-incremental, for predictions need the task id", "use task_incremental(...)")
