"""An episodic memory whose samples the optimizer asks about: what A-GEM's reference gradient is of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from everbatch import seeds
from everbatch.data import Batch, ClassBalanced, ReplayStore, Stream, Task
from everbatch.errors import check, check_whole
from everbatch.train.memory.offer import drawn_part, offer
from everbatch.train.mixin import TrainerMixin

__all__ = ["EpisodicMemory"]


class EpisodicMemory(TrainerMixin):
    """Keep samples of each task that has ended, and give the optimizer their loss as an objective of its own ("reference").

    What is drawn takes no part in the loss that trains: `AGEM` alone asks for its gradient. Samples are kept as they are before
    augmentation, and augmented anew where they are drawn; each draw is min(batch, filled) of them without replacement. The
    memory is a function of the stream: the same at any world size.

    Args (Config): see the fields.

    Raises:
        ValueError: at the first task, before any training: an optimizer that asks for no reference gradient.

    Cost: at each step the optimizer's reference pass over `batch` samples, and one all-to-all; payload capacity / world rows on
    each rank's CPU. At a task's end at most `capacity` samples are fetched.
    Order: any.
    Source: Chaudhry et al. 2019, arXiv 1812.00420, Algorithm 1.
    Differs: the capacity is shared by the tasks (or classes) seen so far, where theirs has as many slots for each task from the
    beginning; which samples of a task stay is drawn uniformly from all of them.
    """

    gives = ("reference",)
    example = {"capacity": 12, "batch": 8}
    off = {"capacity": 0}
    search = {"batch": (64, 32, 128)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        capacity: int = 500
        """Samples in the memory, over all ranks; >= 0, 0 keeps nothing."""
        batch: int = 64
        """Samples per reference gradient, over all ranks; >= 1."""
        balance: Literal["task", "class"] = "task"
        """Whose samples are equally many."""

        def __post_init__(self) -> None:
            check_whole("EpisodicMemory", "capacity", self.capacity)
            check_whole("EpisodicMemory", "batch", self.batch, 1)
            check(self.balance in ("task", "class"), "EpisodicMemory", f"balance={self.balance!r}", "be task or class")

    @dataclass
    class State:
        store: ReplayStore | None = None

    @classmethod
    def asked(cls, config: EpisodicMemory.Config) -> bool:
        """It only gives what the optimizer asks for."""
        return False

    optimizer: Any
    stream: Stream | None

    def configure_model(self, model: nn.Module) -> nn.Module:
        """Make the empty memory."""
        config: EpisodicMemory.Config = self.configs[EpisodicMemory]
        if config.capacity:
            memory = ClassBalanced(config.capacity, seed=self.seed, key="sample", by=config.balance)
            self.states[EpisodicMemory].store = ReplayStore(memory, self.world, self.seed)
        return super().configure_model(model)  # type: ignore[misc, no-any-return]

    def on_task_start(self, task: Task) -> None:
        """Refuse a memory that nobody asks."""
        super().on_task_start(task)  # type: ignore[misc]
        asking = any("reference" in part.wants(config) for part, config in self.optimizer.configs.items())
        check(asking or self.states[EpisodicMemory].store is None, "EpisodicMemory",
              f"optimizer {type(self.optimizer).__name__}", "ask for a reference gradient", "compose it with AGEM")

    def draw_batch(self, parts: list[Batch]) -> list[Batch]:
        """Add the part "reference", once a task has ended."""
        parts = super().draw_batch(parts)  # type: ignore[misc]
        store: ReplayStore | None = self.states[EpisodicMemory].store
        rows = None if store is None else store.draw(self.configs[EpisodicMemory].batch, self.step, "reference")
        return parts if rows is None else [*parts, drawn_part(rows, parts[0].task, "reference")]

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The problem's loss of that part."""
        terms: dict[str, Tensor] = super().loss_terms(outputs, batch)  # type: ignore[misc]
        if batch.part == "reference":
            problem: Any = self.problem  # type: ignore[attr-defined]
            terms["reference"] = batch.mean(problem.losses(outputs, batch.targets))
        return terms

    def consolidate(self, task: Task) -> None:
        """Keep some of the task's samples. Collective."""
        super().consolidate(task)  # type: ignore[misc]
        store: ReplayStore | None = self.states[EpisodicMemory].store
        if store is None:
            return
        order = torch.randperm(len(task.train_ids), generator=seeds.generator(self.seed, "episodic", task.id))
        offer(store, self, task, task.train_ids[order[: store.buffer.capacity]])
