"""Trials that hear nothing any more: ended from outside."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

from everbatch.tune.ledger import Ledger
from everbatch.tune.trial import late_row, told

__all__ = ["GRACE_S", "Overdue", "ender"]

GRACE_S = 40.0
"""Longer than a trial takes to start, and than it gives itself past its limit."""


class Overdue:
    """What the driver knows of the time of its trials.

    A trial ends itself at its limit, also where Python is held up in a C call. One whose whole
    process stands still, as after SIGSTOP or in a call that the kernel does not end, cannot: some
    time after the limit its unit is listed as `time_limit`, and its process is killed. Started
    again, it finds the unit and runs none of the others.

    Args:
        kill: ends an actor of Ray, whatever its process is doing.
    """

    def __init__(self, kill: Callable[[Any], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.kill, self.clock = kill, clock
        self.begun: dict[str, tuple[Any, float]] = {}

    def start(self, running: Any) -> None:
        """A trial of Tune's runs, or runs again, from now on."""
        self.begun[running.trial_id] = running, self.clock()

    def end(self, running: Any) -> None:
        """It has ended."""
        self.begun.pop(running.trial_id, None)

    def look(self) -> None:
        """End those that are late."""
        for running, begun in list(self.begun.values()):
            trial = told(running.config)
            if self.clock() - begun <= trial.time_limit + GRACE_S:
                continue
            self.end(running)
            ledger = Ledger(trial.ledger)
            left = [unit for unit in trial.units if ledger.read(unit[1]) is None]
            if left:
                order, key = left[0]
                ledger.write(late_row(trial, order, key))
            self.kill(running.temporary_state.ray_actor)


def ender() -> Any:
    """A callback of Tune that ends what is late."""
    tune: Any = importlib.import_module("ray.tune")
    overdue = Overdue(importlib.import_module("ray").kill)

    class Ender(tune.Callback):  # type: ignore[misc]
        """Of the class that only ray has."""

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            overdue.start(trial)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            overdue.end(trial)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            overdue.end(trial)

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            overdue.look()

    return Ender()
