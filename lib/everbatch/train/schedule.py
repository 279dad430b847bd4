"""Learning-rate schedules measured in epochs, by torch's own schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    PolynomialLR,
    SequentialLR,
)

from everbatch.errors import check, check_real, check_whole
from everbatch.optim.layerwise.rules import lr_at

__all__ = ["Schedule", "set_rates", "task_schedule"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up, then decay, over the steps of one task; step 0 is the first update.

    Warm-up:  lr(s) = peak * (s + 1) / (w + 1)  for s < w steps, so that the first update is not a no-op.
    Then, over the remaining S steps:  constant;  cosine to 0;  polynomial peak * (1 - s/S)^power;  or steps: times `factor`
    at each milestone.

    first="zero" is the TPU recipes' polynomial instead, `everbatch.optim.layerwise.rules.lr_at`: over all s of S steps,
        lr(s) = peak * epoch / warmup_epochs, from lr(0) = 0;   after it (peak - end) * (1 - d / D)^power + end,
        epoch = s / (steps per epoch),  d = max(1, s - w),  D = S - w + 1,  w whole steps of warm-up.
    An epoch is what the trainer trains on, without the incomplete last batch.
    """

    kind: Literal["constant", "cosine", "polynomial", "steps"] = "constant"
    """Shape after the warm-up."""
    warmup_epochs: float = 0.0
    """Length of the linear warm-up, in epochs of the task; >= 0."""
    warmup_samples: int = 0
    """Length of the linear warm-up, in samples of the stream, in place of epochs; >= 0."""
    power: float = 2.0
    """Exponent of the polynomial decay; > 0. 2 for LARS recipes, 1 for LAMB."""
    milestones: tuple[float, ...] = ()
    """kind="steps": epochs of the task at which the rate drops, ascending."""
    factor: float = 0.1
    """kind="steps": factor at each milestone; in (0, 1]."""
    first: Literal["peak_share", "zero"] = "peak_share"
    """Rate of the first update of a warm-up: peak / (w + 1), or 0 as in TPU recipes (with kind="polynomial")."""
    end_lr: float = 0.0
    """first="zero": rate at the end; in [0, 1], at most the peak."""

    def __post_init__(self) -> None:
        check(self.kind in ("constant", "cosine", "polynomial", "steps"), "Schedule", f"kind={self.kind!r}",
              "be constant, cosine, polynomial or steps")
        check_real("Schedule", "warmup_epochs", self.warmup_epochs, 0.0)
        check_whole("Schedule", "warmup_samples", self.warmup_samples, high=2**53)
        check(not (self.warmup_samples and self.warmup_epochs), "Schedule",
              f"warmup_samples={self.warmup_samples} and warmup_epochs={self.warmup_epochs}", "be one of them")
        check_real("Schedule", "power", self.power, 0.0, open_low=True)
        check_real("Schedule", "factor", self.factor, 0.0, 1.0, open_low=True)
        for value in self.milestones:
            check_real("Schedule", "milestones", value, 0.0)
        rising = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        check(rising, "Schedule", f"milestones={self.milestones}", "ascend")
        check(self.first in ("peak_share", "zero"), "Schedule", f"first={self.first!r}", "be peak_share or zero")
        check(self.first == "peak_share" or self.kind == "polynomial", "Schedule", f"first='zero' with kind={self.kind!r}",
              "go with kind='polynomial'")
        check_real("Schedule", "end_lr", self.end_lr, 0.0, 1.0)
        check(self.end_lr == 0 or self.first == "zero", "Schedule", f"end_lr={self.end_lr}", "be 0 without first='zero'")

    def build(self, optimizer: torch.optim.Optimizer, *, epochs: int, steps_per_epoch: int, batch_size: int = 1) -> LRScheduler:
        """A scheduler to be stepped once after every training step.

        Raises:
            ValueError: a warm-up as long as the training or longer.
        """
        total = epochs * steps_per_epoch
        warm = -(-self.warmup_samples // batch_size) if self.warmup_samples else round(self.warmup_epochs * steps_per_epoch)
        given = f"warmup_samples={self.warmup_samples}" if self.warmup_samples else f"warmup_epochs={self.warmup_epochs}"
        check(warm < total, "Schedule", given, f"be shorter than the {epochs} epochs of the task")
        if self.first == "zero":
            warm_epochs = self.warmup_samples / batch_size / steps_per_epoch if self.warmup_samples else self.warmup_epochs
            peak = float(optimizer.param_groups[0]["lr"])
            check(self.end_lr <= peak, "Schedule", f"end_lr={self.end_lr}", f"be at most the learning rate {peak:g}")
            return LambdaLR(optimizer, lambda step: lr_at(
                step, peak=1.0, batch=1, samples=steps_per_epoch, warmup_epochs=warm_epochs, train_steps=total,
                power=self.power, end=self.end_lr / peak))
        rest = total - warm
        main: LRScheduler
        if self.kind == "cosine":
            main = CosineAnnealingLR(optimizer, T_max=rest)
        elif self.kind == "polynomial":
            main = PolynomialLR(optimizer, total_iters=rest, power=self.power)
        elif self.kind == "steps":
            main = MultiStepLR(optimizer, [round(m * steps_per_epoch) - warm for m in self.milestones], gamma=self.factor)
        else:
            main = ConstantLR(optimizer, factor=1.0, total_iters=0)
        if not warm:
            return main
        ramp = LinearLR(optimizer, start_factor=1.0 / (warm + 1), total_iters=warm)
        return SequentialLR(optimizer, [ramp, main], milestones=[warm])


def task_schedule(
    schedule: Schedule, rates: Sequence[float], *, epochs: int, steps_per_epoch: int, batch_size: int, done: int = 0,
) -> LRScheduler:
    """A task's scheduler, `done` steps on. Its groups are its own, one for each rate: each value is made from the last, and a
    tensor, as an optimizer may hold, rounds. Put its rates into an optimizer with `set_rates`."""
    like = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in rates])
    made = schedule.build(like, epochs=epochs, steps_per_epoch=steps_per_epoch, batch_size=batch_size)
    like._opt_called = True  # type: ignore[attr-defined]  # it warns of a schedule that is stepped before its optimizer
    for _ in range(done):
        made.step()
    return made


def set_rates(groups: Sequence[dict[str, Any]], schedule: LRScheduler) -> None:
    """Give these parameter groups the rates that the schedule has now."""
    for group, like in zip(groups, schedule.optimizer.param_groups, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(like["lr"])  # a captured graph may hold it
        else:
            group["lr"] = like["lr"]
