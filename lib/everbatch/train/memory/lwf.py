"""Learning without forgetting: what the model said of a task's samples before the task is held on to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from everbatch.data import Batch, Stream, Task, share
from everbatch.data.by_id import RowsById
from everbatch.data.tasks import rows_of_stream
from everbatch.distributed import World
from everbatch.errors import check, check_real, check_whole
from everbatch.evaluate.evaluator import evaluating
from everbatch.objective.table import lwf
from everbatch.objective.terms import OutputTerm, evaluate
from everbatch.rows import Rows, each
from everbatch.train.mixin import TrainerMixin

__all__ = ["LwF"]

Ranges = tuple[tuple[int, int], ...]


class LwF(TrainerMixin):
    """Hold on to what the model said of a task's samples before the task:  L <- L - strength * mean_i sum_c q_old,c ln q_c.

        q = softmax(u / temperature) over the old classes; q_old of the model as it was before the task

    The stream's loss is over the classes seen so far. heads="joint" has one softmax over all old classes; "by_task" one for
    each earlier task, summed, and the stream's loss over the task's own classes, as where the task is known at test time.

    Before each task but the first, one pass without augmentation and in evaluation mode over the task's training samples gives
    the old logits of all of them, which are kept by sample id: they are all that the term reads of the previous model, are
    fewer numbers than it mostly, cost no pass in the step and no copy of the weights, and lie sharded over the ranks on any
    engine. A checkpoint inside a task holds them, so a resumed run repeats the run that was not interrupted.

    Args (Config): see the fields. A trainer of your own also offers `stream`, `module`, `device` and `inputs_of(raw)`.

    Raises:
        ValueError: at construction: a problem other than classification. At a task's start: heads="by_task" on a stream that
            is not task-incremental.

    Cost: one forward of each training sample before a task; old classes * 4 bytes for each, over all ranks' CPUs; in a step one
    all-to-all of the batch's rows.
    Order: left of mixins that change weights when a task begins (WarmStart), or the stream's loss (MOS); right of those that
    craft from the stream.
    Limits: of the stream's own samples, not of those that other mixins add.
    Source: Li and Hoiem 2017, arXiv 1606.09282, eq. 2 and 3; defaults of aimagelab/mammoth, which has no factor
    temperature^2 either. Differs: the head is not trained alone first.
    """

    left_of = ("WarmStart", "MOS")
    between_tasks = True
    example = {"strength": 0.5, "rows": 6}
    off = {"strength": 0.0}
    search = {"strength": (0.5, 0.2, 1.0, 3.0), "temperature": (2.0, 1.0)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        strength: float = 0.5
        """Weight of the term, alpha; >= 0, 0 switches it off, and the loss is over all classes then."""
        temperature: float = 2.0
        """What logits are divided by; > 0."""
        heads: Literal["joint", "by_task"] = "joint"
        """One softmax over all old classes, or one for the classes of each earlier task."""
        rows: int = 64
        """Samples per rank in a forward of the pass before a task; >= 1."""

        def __post_init__(self) -> None:
            check_real("LwF", "strength", self.strength, 0.0)
            check_real("LwF", "temperature", self.temperature, 0.0, open_low=True)
            check(self.heads in ("joint", "by_task"), "LwF", f"heads={self.heads!r}", "be joint or by_task")
            check_whole("LwF", "rows", self.rows, 1)

    @dataclass
    class State:
        old: RowsById = field(default_factory=lambda: RowsById(World()))
        """Old logits of the present task's training samples; empty in the first task, and between tasks."""

    stream: Stream | None
    module: Any
    device: torch.device

    def terms(self) -> tuple[OutputTerm, ...]:
        """For describe(): the term, whatever the classes."""
        return self.__term(())

    def configure_model(self, model: nn.Module) -> nn.Module:
        """Refuse what has no classes; know the ranks."""
        problem = getattr(self, "problem", None)
        check(problem is None or problem.cross_entropy, "LwF", f"problem={problem!r}", "be classification")
        self.states[LwF].old = RowsById(self.world)
        return super().configure_model(model)  # type: ignore[misc, no-any-return]

    def on_task_start(self, task: Task) -> None:
        """Record the old logits, before anybody changes a weight."""
        config: LwF.Config = self.configs[LwF]
        stream = self.__stream()
        check(config.heads == "joint" or stream.kind == "task", "LwF", f"heads='by_task' on a stream of kind {stream.kind!r}",
              "be task-incremental", "use heads='joint', or task_incremental(...)")
        self.states[LwF].old.clear()
        if config.strength and task.id:
            self.__record(task)
        super().on_task_start(task)  # type: ignore[misc]

    def augment_batch(self, parts: list[Batch]) -> list[Batch]:
        """Give the stream's rows their old logits."""
        parts = super().augment_batch(parts)  # type: ignore[misc]
        old: RowsById = self.states[LwF].old
        if not len(old):
            return parts
        made = []
        for part in parts:
            if part.part == "stream":
                ids, _, _ = self.global_rows(part)
                rows = old.fetch(ids.numpy(), share(len(ids), self.world.size))
                part = replace(part, extras={**part.extras, "old": rows.to(part.targets.device)})
            made.append(part)
        return made

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The stream's loss over the classes that count, and the term."""
        config: LwF.Config = self.configs[LwF]
        if not config.strength or batch.part != "stream":
            return super().loss_terms(outputs, batch)  # type: ignore[misc, no-any-return]
        first, last = self.__present(batch.task)
        own = batch if first == 0 else replace(batch, targets=batch.targets - first)
        terms: dict[str, Tensor] = super().loss_terms(outputs[:, first:last], own)  # type: ignore[misc]
        if "old" not in batch.extras:
            return terms
        return terms | evaluate(self.__term(self.__earlier(batch.task)), outputs, batch)

    def on_task_end(self, task: Task) -> None:
        """Let the old logits go."""
        self.states[LwF].old.clear()
        super().on_task_end(task)  # type: ignore[misc]

    # ------------------------------------------------------------------------------------------------
    def __term(self, ranges: Ranges) -> tuple[OutputTerm, ...]:
        config: LwF.Config = self.configs[LwF]
        return lwf(config.strength, config.temperature, ranges)

    def __stream(self) -> Stream:
        assert self.stream is not None
        return self.stream

    def __present(self, task: int) -> tuple[int, int]:
        """The logits that the stream's loss is over."""
        stream = self.__stream()
        if self.configs[LwF].heads == "by_task":
            classes = stream.tasks[task].classes
            return min(classes), max(classes) + 1
        return 0, max(stream.seen_classes(task)) + 1

    def __earlier(self, task: int) -> Ranges:
        """The logits that each softmax of the term is over."""
        if self.configs[LwF].heads == "by_task":
            return tuple(self.__present(k) for k in range(task))
        return (self.__present(task - 1),)

    @torch.no_grad()
    def __record(self, task: Task) -> None:
        """The pass before a task, as predictions are made. Collective: every rank makes as many forwards."""
        rows, old = self.configs[LwF].rows, self.states[LwF].old
        mine = old.begin(task.train_ids.numpy())
        width = max(last for _, last in self.__earlier(task.id))
        most = int(np.diff(old.bounds).max())
        found = []
        with evaluating(self.module, self.world):
            for start in range(0, most, rows):
                part = mine[start : start + rows]
                asked = part if len(part) else old.ids[:1]  # a rank that has no more goes along
                outputs = self.predict(self.__batch(torch.from_numpy(asked), task))  # type: ignore[attr-defined]
                found.append(outputs[: len(part), :width].float().cpu())
        old.fill(torch.cat(found))

    def __batch(self, ids: Tensor, task: Task) -> Batch:
        """Samples without augmentation, ready for the model."""
        raw, targets = rows_of_stream(self.__stream(), ids)
        on_device: Rows = each(lambda value: value.to(self.device), raw)
        inputs = self.inputs_of(on_device)  # type: ignore[attr-defined]
        return Batch(inputs, targets.to(self.device), ids, ids, task=task.id, part="old")
