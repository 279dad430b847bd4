"""What two-phase tuning says: how far a protocol's own number lies above what its choice is worth, and why.

All of it is measured on the evaluation data D_E, on class orders that no search has seen. For a method, a search and
averages over orders:

    selection optimism = reported by the conventional search - its values on new orders     judged on the orders tuned on
    transfer gap       = the conventional values - the two-phase ones, on new orders        tuned on other classes
    sum                = reported by the conventional search - the two-phase values on new orders

Never a number of D_E minus one of the tuning data, whose classes may be easier. Intervals are Student's t, 95 %, over the new
orders, with the reported number as it stands; beside them is a percentile bootstrap, which is too narrow below 20 orders. An
interval that holds zero is "not resolved". Pure functions of records and rows as `everbatch.tune` describes them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from everbatch import seeds
from everbatch.metrics.estimate import LEVEL, estimate
from everbatch.tune.choices import Choice, choices
from everbatch.tune.rankings import ranks

__all__ = ["bootstrap", "bootstrap_optimism", "compare", "expected_maximum", "optimism"]

METRICS = ("avg_acc", "acc")
DRAWS = 2000
"""Of every bootstrap."""


# ------------------------------------------------------------------------------------------------------------------ the search
def expected_maximum(method: Mapping[str, Any], metric: str = "avg_acc") -> list[float]:
    """Expected best score of n of the configurations, drawn without putting back, for n = 1 to their number R.

    sum_i C(i - 1, n - 1) / C(R, n) v_(i) over scores in rising order (unbiased; Tang et al. 2020 after Dodge et al. 2019). A
    configuration that failed counts as a draw of score 0. Empty where a race left some behind: their scores are of fewer
    orders. It is the search's own score, which is optimistic as that is.
    """
    status = [row["status"] for row in method["configurations"]]
    if not status or any(each not in ("complete", "failed") for each in status):
        return []
    scores = sorted(statistics.fmean(order[metric] for order in row["orders"]) if row["status"] == "complete" else 0.0
                    for row in method["configurations"])
    total = len(scores)
    return [math.fsum(math.comb(i, n - 1) / math.comb(total, n) * score for i, score in enumerate(scores))
            for n in range(1, total + 1)]


def bootstrap_optimism(method: Mapping[str, Any], metric: str = "avg_acc") -> dict[str, float] | None:
    """The same selection optimism as a bootstrap of the search alone sees it: the orders are drawn anew, the choice is made anew.

    Mean, and the 2.5 and 97.5 % quantiles, of (best mean on the drawn orders) - (that configuration's mean on all). With few
    orders it is rough; it stands beside the measured one. None without two complete configurations of two orders.
    """
    rows = [row for row in method["configurations"] if row["status"] == "complete"]
    orders = sorted({order["order"] for row in rows for order in row["orders"]})
    if len(rows) < 2 or len(orders) < 2:
        return None
    scores = np.array([[next(o[metric] for o in row["orders"] if o["order"] == order) for order in orders] for row in rows])
    drawn = seeds.numpy_generator("bootstrap of a search").integers(0, len(orders), (DRAWS, len(orders)))
    again = scores[:, drawn].mean(2)  # configuration, draw
    best = again.argmax(0)
    excess = again.max(0) - scores.mean(1)[best]
    low, high = np.quantile(excess, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"mean": float(excess.mean()), "low": float(low), "high": float(high)}


def bootstrap(values: Sequence[float]) -> tuple[float, float] | None:
    """Percentile bootstrap, 95 %, of a mean; None of one value. Below 20 values it covers less than it says (74 % at 3, 90 % at
    10): it stands beside the t interval, never for it."""
    if len(values) < 2:
        return None
    drawn = seeds.numpy_generator("bootstrap of a mean").integers(0, len(values), (DRAWS, len(values)))
    means = np.asarray(values, dtype=float)[drawn].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


# -------------------------------------------------------------------------------------------------------------------- optimism
def optimism(two_phase: Choice, conventional: Choice) -> dict[str, Any]:
    """Selection optimism, transfer gap and their sum, of one method.

    Returns:
        `selection`, `transfer` and `sum`, each an estimate with `bootstrap` and `says` (None without a common order), `same`
        (both protocols chose the same values: the transfer gap is exactly 0), `orders`, and `reported`.
    """
    reported = conventional.reported
    assert reported is not None, "a method that was searched has a score"
    same = two_phase.values == conventional.values
    common = sorted(set(two_phase.found) & set(conventional.found))
    ours, theirs = ([choice.found[order] for order in common] for choice in (two_phase, conventional))
    # The same values under the same order are one stream, whichever protocol ran it.
    gap = [0.0] * len(common) if same else [b - a for a, b in zip(ours, theirs, strict=True)]
    return {
        "reported": reported, "same": same, "orders": common,
        "selection": _difference([reported - value for value in theirs]),
        "transfer": _difference(gap), "sum": _difference([reported - b + g for b, g in zip(theirs, gap, strict=True)])}


def _difference(values: Sequence[float]) -> dict[str, Any] | None:
    """An estimate of a paired difference, and what may be said of it."""
    if not values:
        return None
    found = estimate(values)
    zero = all(value == 0.0 for value in values)
    says = "exactly 0" if zero else "resolved" if found.resolved else "not resolved"
    return {**asdict(found), "bootstrap": bootstrap(values), "says": says}


# ------------------------------------------------------------------------------------------------------------------- the whole
def compare(
    record: Mapping[str, Any], conventional: Mapping[str, Any] | None, rows: Sequence[Mapping[str, Any]], metric: str = "avg_acc",
) -> dict[str, Any]:
    """Everything that the protocol says, as plain values: what tables and figures are made of.

    Args:
        record: of the two-phase search, {"body": ..., "sha256": ...}.
        conventional: of the search on D_E, the same form; None where there is none: no optimism can be told then.
        rows: of the evaluation, both protocols.
        metric: "avg_acc" or "acc".

    Returns:
        `choices` (each with `new`, its estimate on new orders, and a bootstrap), `optimism` by method, `ranks`, `cost` by
        protocol, `expected_maximum` by protocol and method, `bootstrap_optimism` by method, `other_records` (rows that were left
        out, of `cost` too), `metric`.
    """
    if metric not in METRICS:
        raise ValueError(f"compare: metric={metric!r}, must be one of {', '.join(METRICS)}")
    every = choices(record, conventional, rows, metric)
    by = {(choice.protocol, choice.method): choice for choice in every}
    records = {"two-phase": record, **({} if conventional is None else {"conventional": conventional})}
    mine = {p: [row for row in rows if (row["protocol"], row["record"]) == (p, kept["sha256"])] for p, kept in records.items()}
    cost = {p: {"search": kept["body"].get("cost"), "evaluation": _spent(mine[p])} for p, kept in records.items()}
    used = {kept["sha256"] for kept in records.values()}
    return {
        "metric": metric, "cost": cost, "choices": [_plain(choice) for choice in every],
        "optimism": {m: optimism(by["two-phase", m], by["conventional", m])
                     for p, m in by if p == "conventional" and ("two-phase", m) in by and by[p, m].reported is not None},
        "ranks": ranks(every),
        "expected_maximum": {p: {m: expected_maximum(method, metric) for m, method in kept["body"]["methods"].items()
                                 if method["space"]} for p, kept in records.items()},
        "bootstrap_optimism": {m: bootstrap_optimism(method, metric)
                               for m, method in (conventional["body"]["methods"].items() if conventional is not None else ())
                               if method["space"]},
        "other_records": sum(row["record"] not in used for row in rows)}


def _spent(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Streams of rows and their CPU seconds."""
    return {"streams": len(rows), "cpu_seconds": round(math.fsum(row.get("cpu_seconds", 0.0) for row in rows), 3)}


def _plain(choice: Choice) -> dict[str, Any]:
    """A choice as JSON holds it."""
    new = choice.new
    kept = None if new is None else {**asdict(new), "bootstrap": bootstrap(list(choice.found.values()))}
    return {**asdict(choice), "new": kept}
