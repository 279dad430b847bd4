"""Shrink and perturb when new data arrive: a warm start that generalises like a fresh one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from everbatch.data import Task
from everbatch.errors import check, check_whole
from everbatch.train.mixin import TrainerMixin
from everbatch.train.record import StepRecord

__all__ = ["WarmStart"]


class WarmStart(TrainerMixin):
    """Call `optimizer.shrink_perturb()` before the first step of every task but the first.

    The optimizer is composed with `everbatch.optim.ShrinkPerturb`, which says what the call does; here is only when. A run
    that resumes inside a task does not repeat the call.

    Args (Config):
        first: call it before the first task too, as the authors' code does (the first network is then smaller than its
            initialiser's).
        every_steps: call it also after every so many applied steps, as soft resets; 0 for never. Use shrink close to 1
            (1 - shrink about 1e-4 to 1e-3) and moments="keep" then.

    Raises:
        ValueError: at the first task, before any training: an optimizer without ShrinkPerturb; one that shall keep moments under
            a trainer that drops them.

    Cost: that of the call.
    Order: any.
    Source: Ash and Adams 2020, arXiv 1910.08475: between rounds of growing data. every_steps counts applied steps without
    wrapping; the optax port's counter wraps at every_n and its rule never fires.
    """

    example = {"first": True}
    off = {}
    search = {}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        first: bool = False
        """Before the first task too."""
        every_steps: int = 0
        """Applied steps between further calls; >= 0, 0 for none."""

        def __post_init__(self) -> None:
            check_whole("WarmStart", "every_steps", self.every_steps)

    @classmethod
    def asked(cls, config: WarmStart.Config) -> bool:
        """It only calls what the optimizer has."""
        return False

    optimizer: Any
    """The trainer's, composed with ShrinkPerturb."""

    def on_task_start(self, task: Task) -> None:
        """Shrink and perturb, before anything to the left looks at the weights."""
        super().on_task_start(task)  # type: ignore[misc]
        self.__require_method()
        if task.id >= 1 or self.configs[WarmStart].first:
            self.optimizer.shrink_perturb()

    def after_step(self, record: StepRecord) -> None:
        """Shrink and perturb after every so many applied steps."""
        super().after_step(record)  # type: ignore[misc]
        every = self.configs[WarmStart].every_steps
        if every and record.applied and self.optimizer.step_count % every == 0:
            self.optimizer.shrink_perturb()

    def __require_method(self) -> None:
        from everbatch.optim import ShrinkPerturb

        kind = type(self.optimizer).__name__
        check(isinstance(self.optimizer, ShrinkPerturb), "WarmStart", f"optimizer {kind} has no shrink_perturb()",
              "be composed with ShrinkPerturb", f"class {kind}(ShrinkPerturb, torch.optim....)")
        moments = self.optimizer.configs[ShrinkPerturb].moments
        drops = getattr(getattr(self, "config", None), "reset_optimizer", False)
        check(moments == "reset" or not drops, "WarmStart",
              f"moments={moments!r} in ShrinkPerturb and reset_optimizer=True in the trainer", "agree",
              "set reset_optimizer=False")
