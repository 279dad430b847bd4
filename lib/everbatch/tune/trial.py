"""What Ray runs: a configuration with its class orders, one after the other, in the trial's own process."""

from __future__ import annotations

import faulthandler
import importlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from everbatch.tune.ledger import Ledger

__all__ = ["Trial", "late_row", "run_trial", "told", "trainable"]

OVER_LIMIT = 75
"""Exit code of a trial's process that was over its time."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A configuration and the units that it is to fill; plain values, as Ray pickles them."""

    method: str
    id: int
    options: list[dict[str, Any]]
    """Scenario, method and drawn values, by path; later over earlier."""
    increments: list[int]
    units: list[tuple[int, str]]
    """(order, key)."""
    data: str
    """File with the samples of this phase."""
    data_sha256: str
    seal: str | None
    """seal.json, in the tuning phase."""
    ledger: str
    time_limit: float
    """Seconds for all its units."""
    ranks: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.method} #{self.id}"


def trainable(config: Mapping[str, Any]) -> None:
    """A function trainable of Tune: reports after each order."""
    from ray import tune

    run_trial(told(config), tune.report)


def run_trial(trial: Trial, report: Callable[[dict[str, Any]], None]) -> None:
    """Fill the units of a trial that the ledger lacks. After one that failed the rest is left: it cannot be chosen."""
    ledger = Ledger(trial.ledger)
    check_data(trial)
    if trial.ranks == 1:
        importlib.import_module("everbatch.tune.stream")  # seconds in a new process, which are not the trial's
    begun = time.monotonic()
    scores: list[float] = []
    for order, key in trial.units:
        row = ledger.read(key)
        if row is None:
            left = trial.time_limit - (time.monotonic() - begun)
            row = _filled(trial, ledger, order, key, left)
        if "failed" in row:
            report({"orders_done": len(scores), "failed": 1})
            return
        scores.append(row["avg_acc"])
        report({"orders_done": len(scores), "failed": 0, "avg_acc": sum(scores) / len(scores)})


def _filled(trial: Trial, ledger: Ledger, order: int, key: str, seconds: float) -> dict[str, Any]:
    late = late_row(trial, order, key)
    if seconds <= 0:
        ledger.write(late)
        return late
    folder = ledger.work(key)
    if trial.ranks > 1:
        from everbatch.tune.ranks import unit_on_ranks

        row: dict[str, Any] = unit_on_ranks(trial, key, order, folder, seconds, late)
    else:
        from everbatch.tune.stream import unit

        with _watched(ledger, late, seconds):
            row = unit(key, trial.options, trial.increments, order, trial.data, folder)
    ledger.write(row)
    shutil.rmtree(folder, ignore_errors=True)
    return row


def late_row(trial: Trial, order: int, key: str) -> dict[str, Any]:
    """The unit of a stream in which its trial's time ran out."""
    about = {"key": key, "options": {p: v for layer in trial.options for p, v in layer.items()}, "order": order}
    cause = {"failed": "time_limit", "cause": f"over {trial.time_limit:g} s"}
    return {**about, **cause, "seconds": trial.time_limit, "cpu_seconds": 0.0}


class _watched:
    """End this process where the block takes longer, with the unit filled in: a stream that hangs hears no exception."""

    GRACE_S = 20.0

    def __init__(self, ledger: Ledger, late: Mapping[str, Any], seconds: float) -> None:
        self.ledger, self.late, self.seconds = ledger, late, seconds
        self.timer = threading.Timer(seconds, self._end)
        self.timer.daemon = True

    def __enter__(self) -> None:
        self.timer.start()
        try:
            faulthandler.dump_traceback_later(self.seconds + self.GRACE_S, exit=True)  # where Python itself is held up
        except (RuntimeError, ValueError, AttributeError):  # standard error that is no file, as under pytest
            print("tune: a trial held up inside a C call is not ended here", file=sys.stdout)

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        self.ledger.write(self.late)
        os._exit(OVER_LIMIT)


_checked: set[tuple[str, str]] = set()


def check_data(trial: Trial) -> None:
    """Guard this process, and refuse samples of the evaluation data, before anything is trained on them.

    Raises:
        LeakageError: some are. ValueError: the data is not what `prepare` wrote.
    """
    if (trial.data, trial.data_sha256) in _checked:
        return
    from pathlib import Path

    from everbatch.tune.check import check_npz

    check_npz(Path(trial.data), trial.data_sha256, trial.seal)
    _checked.add((trial.data, trial.data_sha256))


def plain(trial: Trial) -> dict[str, Any]:
    """As Ray carries it."""
    return {**asdict(trial), "units": [list(unit) for unit in trial.units]}


def told(config: Mapping[str, Any]) -> Trial:
    """What `plain` made a trial of Tune's carry."""
    return Trial(**{**config["trial"], "units": [tuple(unit) for unit in config["trial"]["units"]]})
