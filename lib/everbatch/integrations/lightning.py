"""Composed optimizers in Lightning, whose automatic accumulation otherwise runs backward outside of the step."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from everbatch.errors import check
from everbatch.integrations.bridged import composed

__all__ = ["ClosureModule"]


class ClosureModule:
    """Left of `LightningModule`, in a class with `loss(batch)` and `configure_optimizers`: one `opt.step(closure)`, under manual
    optimization, for `accumulate` micro-batches, or what is left at an epoch's end. One device or DDP.

    A scheduler moves once per update. Resume from an epoch's end, for Lightning saves no micro-batches; they stay on the device.

    Raises:
        ValueError: the optimizer is not composed, or the scheduler waits for a metric.
        UnsupportedHost: another strategy, or fp16; or a part that needs a second objective.
    """

    accumulate = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self._micro_batches: list[Any] = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        self._micro_batches = [*(self._micro_batches if batch_idx else ()), batch]  # none of a fit that was cut off
        if len(self._micro_batches) < self.accumulate and not self.trainer.is_last_batch:
            return
        batches, self._micro_batches = self._micro_batches, []
        opt, schedule = self._checked()

        def closure() -> Tensor:
            total, outer = torch.zeros((), device=self.device), self.trainer.strategy.model
            for i, batch in enumerate(batches, 1):
                with outer.no_sync() if i < len(batches) and outer is not self else nullcontext():  # DDP
                    loss = self.loss(batch) / len(batches)
                    self.manual_backward(loss)
                total += loss.detach()
            return total

        self.log("train_loss", opt.step(closure), sync_dist=True)
        self.log_dict(opt.metrics)
        if schedule is not None:
            schedule.step()

    def _checked(self: Any) -> tuple[Any, Any]:
        who, schedule = type(self).__name__, self.lr_schedulers()
        strategy, precision = type(self.trainer.strategy).__name__, self.trainer.precision
        plain = strategy in ("SingleDeviceStrategy", "DDPStrategy") and not precision.startswith("16")
        opt = composed(who, self.optimizers(), "return one Opt(self, ...) from configure_optimizers", plain,
                       f"{strategy} with precision {precision}")
        plateau = isinstance(schedule, list | ReduceLROnPlateau)
        check(not plateau, who, f"scheduler {type(schedule).__name__}", "be one that needs no metric", "step others yourself")
        return opt, schedule
