"""Progress of a run by the clock: throughput, and the accuracy between epochs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from everbatch.errors import check_whole
from everbatch.evaluate.evaluator import accuracies
from everbatch.train import StepRecord, TrainerMixin

__all__ = ["Progress"]


class Progress(TrainerMixin):
    """Throughput by wall clock, and the accuracy between epochs.

    Loading, augmentation and checkpoints count as part of the steps, evaluation does not; nor do the first `SKIPPED` steps of
    a process, in which memory is allocated and kernels are chosen.
    """

    SKIPPED = 3

    @dataclass(frozen=True, kw_only=True)
    class Config:
        eval_every: int = 0
        """Epochs between evaluations; 0 for none."""
        devices: int = 1
        """Over which the throughput is divided."""

        def __post_init__(self) -> None:
            check_whole("Progress", "eval_every", self.eval_every)
            check_whole("Progress", "devices", self.devices, 1)

    @dataclass
    class State:
        curve: list[list[float]] = field(default_factory=list)
        """[epoch, test accuracy]."""

    __last: float | None = None
    __seen = __steps = 0
    __seconds = 0.0

    def after_step(self, record: StepRecord) -> None:
        """Take the time, and evaluate at the end of an epoch."""
        super().after_step(record)  # type: ignore[misc]
        trainer: Any = self
        options, now, batch = self.configs[Progress], time.perf_counter(), trainer.config.batch_size
        if self.__last is not None:
            self.__steps += 1
            seconds = now - self.__last
            if self.__steps > self.SKIPPED:
                self.__seen, self.__seconds = self.__seen + batch, self.__seconds + seconds
            if trainer.recorder is not None:
                rate = batch / seconds
                trainer.recorder.scalars(record.step, {"throughput/samples_per_s": rate,
                                                       "throughput/samples_per_s_per_device": rate / options.devices})
        epoch, rest = divmod(trainer.task_step + 1, trainer.loader.steps_per_epoch)
        if options.eval_every and rest == 0 and epoch % options.eval_every == 0 and epoch < trainer.config.epochs:
            accuracy = accuracies(trainer, trainer.stream, 0, list(trainer.stream.tasks))[0]
            self.states[Progress].curve.append([epoch, accuracy])
            if trainer.recorder is not None:
                trainer.recorder.scalars(record.step, {"accuracy/test": accuracy})
                trainer.recorder.say(f"epoch {epoch}: test accuracy {100 * accuracy:.2f} %")
            now = time.perf_counter()
        self.__last = now

    @property
    def throughput(self) -> dict[str, float | None]:
        """Mean over the counted steps of this process; None without any."""
        rate = self.__seen / self.__seconds if self.__seconds else None
        devices = self.configs[Progress].devices
        return {"samples_per_s": rate, "samples_per_s_per_device": None if rate is None else rate / devices, "devices": devices}
