"""The results of two-phase tuning as text: what `statistics.compare` gives, in lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["costs", "optimism", "ranks", "report", "results"]

NAMES = {"avg_acc": "average incremental accuracy", "acc": "last accuracy"}


def report(found: Mapping[str, Any]) -> str:
    """All tables, one under the other."""
    parts = [results(found), optimism(found), ranks(found), curve(found), notes(found)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def results(found: Mapping[str, Any]) -> list[str]:
    """A line for each protocol and method: what its search reports, what the choice is worth on new orders, what that cost."""
    lines = [f"{NAMES[found['metric']]}, %, on the evaluation data under new orders; 95 % t intervals",
             f"{'protocol':<13} {'method':<16} {'reported':>8} {'new orders':>10} {'interval':>15} {'n':>3} {'streams':>8} "
             f"{'CPU s':>7}  chosen"]
    for row in found["choices"]:
        new = row["new"]
        mean = "-" if new is None else f"{100 * new['mean']:.2f}"
        interval = "-" if new is None or new["low"] is None else f"{100 * new['low']:.2f} to {100 * new['high']:.2f}"
        reported = "-" if row["reported"] is None else f"{100 * row['reported']:.2f}"
        count = 0 if new is None else new["count"]
        chosen = ", ".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                           for key, value in row["values"].items())
        lines.append(f"{row['protocol']:<13} {row['method']:<16} {reported:>8} {mean:>10} {interval:>15} {count:>3} "
                     f"{row['streams']:>8} {row['cpu_seconds']:>7.0f}  {chosen or '(not searched)'}{_flags(row)}")
    lines += costs(found)
    if any(row["protocol"] == "two-phase" and row["reported"] is not None for row in found["choices"]):
        lines.append("(reported: on a search's own data and orders; two-phase: of other classes, so no gap is taken to it)")
    return lines


def _flags(row: Mapping[str, Any]) -> str:
    """What a reader must know before the number is believed."""
    said = []
    if row["failed"]:
        said.append(f"failed under orders {_listed(row['failed'])}, which the mean leaves out")
    if row["missing"]:
        said.append(f"incomplete: orders {_listed(row['missing'])} have not run")
    if row["amended"]:
        said.append("amended")
    return "".join(f"; {text}" for text in said)


def _listed(numbers: Any) -> str:
    return ", ".join(str(number) for number in numbers)


def costs(found: Mapping[str, Any]) -> list[str]:
    """Streams and CPU seconds of each protocol; a stream that both need is counted with each."""
    lines = []
    for protocol, cost in found["cost"].items():
        parts = [(name, cost[name]) for name in ("search", "evaluation") if cost[name] is not None]
        told = ", ".join(f"{name} {part['streams']:g} streams in {part['cpu_seconds']:.0f} CPU s" for name, part in parts)
        lines.append(f"{protocol}: {told}")
    return lines


def optimism(found: Mapping[str, Any]) -> list[str]:
    """How far the conventional number lies above what choices are worth, in its two parts."""
    if not found["optimism"]:
        return []
    lines = ["optimism of tuning on what one is judged on, points, within the evaluation data, paired over new orders",
             f"{'method':<16} {'selection optimism':<38} {'transfer gap':<38} sum"]
    for method, parts in found["optimism"].items():
        cells = [_difference(parts[name]) for name in ("selection", "transfer", "sum")]
        same = "  (same values chosen)" if parts["same"] else ""
        lines.append(f"{method:<16} {cells[0]:<38} {cells[1]:<38} {cells[2]}{same}")
        beside = [_bootstrap(parts[name]) for name in ("selection", "transfer", "sum")]
        lines.append(f"{'  by bootstrap':<16} {beside[0]:<38} {beside[1]:<38} {beside[2]}")
    for method, value in found["bootstrap_optimism"].items():
        if value is not None:
            bounds = f"{100 * value['low']:+.2f} to {100 * value['high']:+.2f}"
            lines.append(f"(a bootstrap of the conventional search of {method} alone, choice and all, puts its selection "
                         f"optimism at {100 * value['mean']:+.2f}, {bounds})")
    return lines


def _bootstrap(part: Mapping[str, Any] | None) -> str:
    """The percentile bootstrap's interval of a difference."""
    if part is None or part["bootstrap"] is None:
        return "-"
    low, high = part["bootstrap"]
    return f"      ({100 * low:+.2f} to {100 * high:+.2f})"


def _difference(part: Mapping[str, Any] | None) -> str:
    """One difference in points, and whether it is one."""
    if part is None:
        return "- (no common order)"
    if part["says"] == "exactly 0":
        return "exactly 0"
    if part["low"] is None:
        return f"{100 * part['mean']:+.2f} (one order: not resolved)"
    bounds = f"{100 * part['low']:+.2f} to {100 * part['high']:+.2f}"
    return f"{100 * part['mean']:+.2f} ({bounds})" + (", not resolved" if part["says"] == "not resolved" else "")


def ranks(found: Mapping[str, Any]) -> list[str]:
    """Whether methods change rank between what is reported and what the two-phase choices are worth."""
    of = found["ranks"]
    if of is None:
        return []
    lines = ["ranks, best first", f"  reported by the conventional search   {' > '.join(of['reported'])}",
             f"  its values on new orders              {' > '.join(of['conventional'])}",
             f"  the two-phase values on new orders    {' > '.join(of['two_phase'])}"]
    for pair in of["pairs"]:
        (a, b), sure = pair["pair"], pair["probability"]
        told = "no probability from one order" if sure is None else f"probability {sure:.3f}, two-phase, by bootstrap"
        lines.append(f"  {a} above {b}: {told}, {pair['says']}{'; their order changes' if pair['changes'] else ''}")
    if "tau" in of:
        lines.append(f"  Kendall's tau of reported and two-phase ranks: {of['tau']:.3f}, p = {of['p']:.3f}")
    else:
        lines.append(f"  {len(of['methods'])} methods: too few for a test of ranks")
    return lines


def curve(found: Mapping[str, Any]) -> list[str]:
    """Expected best score of the search by its number of configurations."""
    lines = []
    for protocol, methods in found["expected_maximum"].items():
        for method, values in methods.items():
            if values:
                counts = sorted({1, 2, 3, 5, 8, len(values)} & set(range(1, len(values) + 1)))
                told = "  ".join(f"{n}: {100 * values[n - 1]:.2f}" for n in counts)
                lines.append(f"  {protocol:<13} {method:<16} {told}")
            else:
                lines.append(f"  {protocol:<13} {method:<16} - (a race left configurations behind)")
    return ["expected best score of the search, %, by number of configurations (failures count as 0)", *lines] if lines else []


def notes(found: Mapping[str, Any]) -> list[str]:
    """What was left out."""
    count = found["other_records"]
    return [f"left out: rows of other records ({count})"] if count else []
