"""How a search is going: trials done, running and failed, the best so far, and the time that is left."""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from everbatch.tune.ledger import Ledger
from everbatch.tune.trial import Trial

__all__ = ["Board", "reporter"]

SHOWN = 5
"""Failed trials whose cause is told in the end."""
WIDTH = 200
"""Characters of a cause that are told."""


class Board:
    """A table on standard output, anew every few seconds.

    Args:
        title: of the phase. every: seconds between tables. choosing: tell the best trial; else the mean of all.
    """

    def __init__(self, title: str, *, every: float = 15.0, choosing: bool = True, out: TextIO | None = None) -> None:
        self.title, self.every, self.out = title, every, out
        self.choosing = choosing
        self.running: set[str] = set()
        self.trials: Sequence[Trial] = ()
        self.begun = self.last = time.monotonic()
        self.first = 0

    def begin(self, trials: Sequence[Trial]) -> None:
        """These are to run; the ledger says which are done already."""
        self.trials, self.running = trials, set()
        self.begun = self.last = time.monotonic()
        self.first = self._streams()[0]
        total = self._streams()[1]
        self._say(f"{self.title}: {total} streams of {len(trials)} trials, {self.first} of them done before")

    def end(self) -> None:
        """The last table, and why what failed did."""
        self.running = set()
        self._say("\n".join([self.table(), *self._causes()]))

    def tick(self) -> None:
        """Something happened."""
        if time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            self._say(self.table())

    def table(self) -> str:
        """By method: trials done, running, failed, and the best so far, over whole trials."""
        lines = [f"{'method':<24} {'done':>7} {'running':>8} {'failed':>7}  "
                 f"{'best' if self.choosing else 'mean'} so far"]
        for method in dict.fromkeys(trial.method for trial in self.trials):
            mine = [trial for trial in self.trials if trial.method == method]
            states = [_state(trial) for trial in mine]
            scores = [(score, trial.id) for trial, (state, score) in zip(mine, states, strict=True) if state == "done"]
            failed = sum(state == "failed" for state, _ in states)
            running = sum(trial.units[0][1] in self.running for trial in mine)
            shown = "-" if not scores else self._shown(scores)
            lines.append(f"{method:<24} {f'{len(scores)}/{len(mine)}':>7} {running:>8} {failed:>7}  {shown}")
        return "\n".join([*lines, self._times()])

    def _causes(self) -> list[str]:
        """A line for each trial that failed, for the first few."""
        failed = []
        for trial in self.trials:
            rows = [Ledger(trial.ledger).read(key) for _, key in trial.units]
            failed += [(trial, row) for row in rows if row is not None and "failed" in row][:1]
        lines = []
        for trial, row in failed[:SHOWN]:
            cause = " ".join(str(row["cause"]).split())
            short = cause if len(cause) <= WIDTH else f"{cause[:WIDTH]} ..."
            lines.append(f"failed: {trial.name}, order {row['order']} ({row['failed']}): {short}")
        more = len(failed) - len(lines)
        where = Path(self.trials[0].ledger) / "units" if more else ""
        return [*lines, f"and {more} more: see `failures` in the record, or {where}"] if more else lines

    def _shown(self, scores: list[tuple[float, int]]) -> str:
        if not self.choosing:
            return f"{100 * math.fsum(score for score, _ in scores) / len(scores):.2f} %"
        best = max(scores, key=lambda pair: (pair[0], -pair[1]))
        return f"{100 * best[0]:.2f} % (#{best[1]})"

    def _times(self) -> str:
        gone, (done, total) = time.monotonic() - self.begun, self._streams()
        fresh = done - self.first
        left = "?" if not fresh else _clock((total - done) * gone / fresh)
        return f"{done}/{total} streams, {_clock(gone)} gone, about {left} left"

    def _streams(self) -> tuple[int, int]:
        """Units that need no more work, and all."""
        done = 0
        for trial in self.trials:
            rows = [Ledger(trial.ledger).read(key) for _, key in trial.units]
            failed = any(row is not None and "failed" in row for row in rows)
            done += len(rows) if failed else sum(row is not None for row in rows)
        return done, sum(len(trial.units) for trial in self.trials)

    def _say(self, text: str) -> None:
        print(text, file=self.out or sys.stdout, flush=True)


def _state(trial: Trial) -> tuple[str, float]:
    rows = [Ledger(trial.ledger).read(key) for _, key in trial.units]
    if any(row is not None and "failed" in row for row in rows):
        return "failed", 0.0
    scores = [row["avg_acc"] for row in rows if row is not None]
    return ("done", math.fsum(scores) / len(scores)) if scores and len(scores) == len(rows) else ("open", 0.0)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def reporter(board: Board) -> Any:
    """A callback of Tune that tells a board what happens."""
    tune: Any = importlib.import_module("ray.tune")

    class Reporter(tune.Callback):  # type: ignore[misc]
        """Of the class that only ray has."""

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            board.running.add(_name(trial))

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            board.running.discard(_name(trial))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            board.running.discard(_name(trial))

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            board.tick()

    return Reporter()


def _name(trial: Any) -> str:
    """The key of its first unit."""
    key: str = trial.config["trial"]["units"][0][1]
    return key
