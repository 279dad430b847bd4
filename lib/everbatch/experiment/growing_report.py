"""What arms of a comparison over seeds say, and no more than that."""

from __future__ import annotations

import statistics

from everbatch.metrics.estimate import estimate

__all__ = ["ARMS", "gap", "report", "verdict"]

ARMS = {"fresh": "start over", "warm": "warm start", "shrink_perturb": "shrink and perturb"}


def gap(a: list[float], b: list[float]) -> dict[str, float | None]:
    """Paired difference a - b over the seeds: mean, sample standard deviation, standard error of the mean, and the low and
    high end of its 95 % t interval."""
    found = estimate(x - y for x, y in zip(a, b, strict=True))
    return {"mean": found.mean, "std": found.std, "error": found.error, "low": found.low, "high": found.high}


def report(accuracy: dict[str, list[list[float]]], epochs: dict[str, list[list[int]]]) -> list[str]:
    """A line for each arm."""
    lines = ["after the last round          test accuracy, %     epochs until 99 % of the training set"]
    for arm, rows in accuracy.items():
        last = [100 * row[-1] for row in rows]
        spread = f"+- {statistics.stdev(last):.2f}" if len(last) > 1 else ""
        fitted = [e[-1] for e in epochs[arm]]
        reached = [e for e in fitted if e]
        every = len(reached) == len(fitted)
        text = f"{statistics.fmean(reached):.1f}" if every else f"reached in {len(reached)} of {len(fitted)} runs"
        lines.append(f"  {ARMS[arm]:<28}{statistics.fmean(last):6.2f} {spread:<14} {text}")
    return lines


def verdict(name: str, found: dict[str, float | None], count: int) -> str:
    """What a paired difference says, and no more than that."""
    a, b = name.split("_minus_")
    mean, error = 100 * (found["mean"] or 0.0), found["error"]
    head = f"{ARMS[a]} minus {ARMS[b]}: {mean:+.2f} points"
    if error is None:
        return f"{head} with one seed: no statement about spread"
    said = "more than 2 standard errors from zero" if abs(mean) > 200 * error else "no difference beyond 2 standard errors"
    interval = f"95 % t interval {100 * (found['low'] or 0.0):.2f} to {100 * (found['high'] or 0.0):.2f}"
    return f"{head}, standard error {100 * error:.2f} over {count} seeds, {interval}: {said}"
