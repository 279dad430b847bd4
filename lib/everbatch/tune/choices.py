"""What each protocol chose for each method, and what that is worth on the evaluation data under new orders."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everbatch.metrics.estimate import Estimate, estimate

__all__ = ["Choice", "choices", "search_cost"]


@dataclass(frozen=True)
class Choice:
    """What a protocol chose for a method, and what that is worth."""

    protocol: str
    method: str
    values: dict[str, Any]
    """Chosen; empty for a method that is not searched."""
    reported: float | None
    """Mean over the search's own orders, on the search's own data; None for a method that is not searched."""
    found: dict[int, float]
    """By new order, on D_E."""
    failed: tuple[int, ...]
    """New orders under which the stream failed."""
    missing: tuple[int, ...]
    """Declared orders that have not been run."""
    streams: int
    """Of its search and its evaluation."""
    cpu_seconds: float
    amended: bool
    """Whether an evaluation with another record came before."""

    @property
    def new(self) -> Estimate | None:
        """Over the new orders that have a number."""
        return estimate(self.found.values()) if self.found else None


def choices(
    record: Mapping[str, Any], conventional: Mapping[str, Any] | None, rows: Sequence[Mapping[str, Any]], metric: str = "avg_acc",
) -> list[Choice]:
    """What both protocols chose, by protocol and method in the records' order.

    Args:
        record: of the two-phase search, with its checksum: {"body": ..., "sha256": ...}.
        conventional: of the search on D_E; None where there is none yet.
        rows: of the evaluation; those of other records are left out.
        metric: "avg_acc" (average incremental accuracy) or "acc" (last accuracy).
    """
    found = []
    records = {"two-phase": record} if conventional is None else {"two-phase": record, "conventional": conventional}
    for protocol, kept in records.items():
        for name, method in kept["body"]["methods"].items():
            judged = [row for row in rows if row["record"] == kept["sha256"] and row["protocol"] == protocol]
            mine = [row for row in judged if row["method"] == name]
            if mine or method["space"]:
                found.append(_choice(protocol, name, method, kept["body"], mine, metric))
    return found


def _choice(protocol: str, name: str, method: Mapping[str, Any], body: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
            metric: str) -> Choice:
    """One method of one protocol."""
    chosen = next((row for row in method["configurations"] if row["id"] == method["chosen"]), None)
    scores = [order[metric] for order in chosen["orders"]] if chosen is not None else []
    good = {int(row["order"]): float(row[metric]) for row in rows if "failed" not in row}
    failed = tuple(sorted({int(row["order"]) for row in rows if "failed" in row} - set(good)))
    missing = tuple(order for order in body["evaluation_orders"] if order not in good and order not in failed)
    streams, cpu = search_cost(method)
    return Choice(
        protocol, name, dict(chosen["values"]) if chosen is not None and method["space"] else {},
        statistics.fmean(scores) if scores else None, good, failed, missing, streams + len(rows),
        cpu + math.fsum(row.get("cpu_seconds", 0.0) for row in rows), any(row.get("amended", False) for row in rows))


def search_cost(method: Mapping[str, Any]) -> tuple[int, float]:
    """Streams that a method's search trained, failed ones too, and the CPU seconds of those that did not fail.

    Configurations that were drawn with the same values share their streams, which are counted once. A record does not list what
    each failure took; its own `cost` has that, of all methods together.
    """
    once: dict[str, Any] = {}
    for row in method["configurations"]:
        once.setdefault(str(sorted(row["values"].items())), row)
    orders = [order for row in once.values() for order in row["orders"]]
    drawn = {row["id"] for row in once.values()}
    failed = sum(failure["id"] in drawn for failure in method["failures"])
    return len(orders) + failed, math.fsum(order["cpu_seconds"] for order in orders)
