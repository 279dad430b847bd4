"""What cells of `conadv.py` say: means and standard errors, gaps to the smallest batch, and sentences about them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["ARMS", "analyse", "chance", "mean_error", "plot", "report", "sentence"]

ARMS = {"lars": "LARS", "conadv": "LARS + ConAdv", "sam": "LARS + SAM", "augment": "LARS + crop, flip"}


def mean_error(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean (None for one value)."""
    found = list(values)
    return statistics.fmean(found), statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else None


def chance(count: int, bound: float = 2.0) -> float:
    """Probability that a mean of `count` differences without an effect lies beyond `bound` standard errors (Student's t)."""
    n, parts = count - 1, 2000
    scale = math.gamma((n + 1) / 2) / (math.sqrt(n * math.pi) * math.gamma(n / 2))
    at = [bound * (i + 0.5) / parts for i in range(parts)]
    return 1 - 2 * scale * sum((1 + t * t / n) ** (-(n + 1) / 2) for t in at) * bound / parts


def analyse(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Mean accuracies, gaps to the smallest batch, and how the gaps differ from plain LARS's; all paired by seed."""
    table: dict[tuple[str, int], dict[int, float | None]] = {}
    for row in rows:
        table.setdefault((row["arm"], row["batch"]), {})[row["seed"]] = row["accuracy"]
    batches, arms = sorted({b for _, b in table}), [a for a in ARMS if any(a == arm for arm, _ in table)]
    result: dict[str, Any] = {"arms": arms, "batches": batches, "accuracy": {}, "gap": {}, "shrinks": {}}
    gaps: dict[tuple[str, int], dict[int, float]] = {}
    for (arm, batch), by_seed in table.items():
        good = {s: a for s, a in by_seed.items() if a is not None}
        mean, error = mean_error(good.values()) if good else (None, None)
        result["accuracy"][f"{arm}/{batch}"] = {"mean": mean, "error": error, "seeds": len(good),
                                                "diverged": len(by_seed) - len(good)}
        first = table.get((arm, batches[0]), {})
        pairs = {s: first[s] - a for s, a in good.items() if first.get(s) is not None}  # type: ignore[operator]
        if batch != batches[0] and pairs:
            gaps[arm, batch] = pairs
            mean, error = mean_error(pairs.values())
            result["gap"][f"{arm}/{batch}"] = {"mean": mean, "error": error, "seeds": len(pairs)}
    for (arm, batch), mine in gaps.items():
        plain = gaps.get(("lars", batch), {})
        both = sorted(set(plain) & set(mine))
        if arm != "lars" and both:
            mean, error = mean_error(plain[s] - mine[s] for s in both)
            result["shrinks"][f"{arm}/{batch}"] = {"mean": mean, "error": error, "seeds": len(both)}
    return result


def sentence(arm: str, batch: int, smallest: int, found: dict[str, Any]) -> str:
    """What a difference of gaps says, and no more than that."""
    mean, error, count = found["mean"], found["error"], found["seeds"]
    side = "smaller" if mean > 0 else "larger"
    head = f"{ARMS[arm]}, {smallest} -> {batch}: gap {100 * abs(mean):.2f} points {side} than LARS's"
    if error is None:
        return f"{head}; one seed: no statement about spread"
    said = "no difference beyond 2 standard errors"
    if abs(mean) > 2 * error:
        said = f"the gap {'shrinks' if mean > 0 else 'grows'} beyond 2 standard errors"
    return f"{head}, standard error {100 * error:.2f} over {count} seeds: {said}"


def report(found: dict[str, Any]) -> list[str]:
    """The table, the gaps, the sentences."""
    def cell(value: dict[str, Any] | None) -> str:
        if value is None or value["mean"] is None:
            return "diverged" if value else "-"
        error = "" if value["error"] is None else f" +- {100 * value['error']:.2f}"
        return f"{100 * value['mean']:.2f}{error}" + (f" ({value['diverged']} div.)" if value.get("diverged") else "")

    arms, batches, lines = found["arms"], found["batches"], []
    for title, key in (("test accuracy, %: mean +- standard error", "accuracy"),
                       (f"gap to batch {batches[0]}, points, paired by seed", "gap")):
        lines += [f"{title:<46}".rstrip(), f"{'':<20}" + "".join(f"{b:>18}" for b in batches)]
        lines += [f"{ARMS[a]:<20}" + "".join(f"{cell(found[key].get(f'{a}/{b}')):>18}" for b in batches) for a in arms]
    for key, value in found["shrinks"].items():
        arm, batch = key.split("/")
        lines.append(sentence(arm, int(batch), batches[0], value))
    counts = {v["seeds"] for v in found["shrinks"].values() if v["seeds"] > 1}
    lines += [f"(with {n} seeds, {100 * chance(n):.0f} % of comparisons without an effect lie beyond 2 standard errors)"
              for n in sorted(counts)]
    return lines


def plot(found: dict[str, Any], path: Path, title: str) -> None:
    """Accuracy over batch size, with standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for arm in found["arms"]:
        points = [(b, v["mean"], v["error"] or 0.0) for b in found["batches"]
                  if (v := found["accuracy"].get(f"{arm}/{b}")) and v["mean"] is not None]
        x, y, error = zip(*points, strict=True) if points else ((), (), ())
        axes.errorbar(x, [100 * a for a in y], [100 * e for e in error], marker="o", capsize=3, label=ARMS[arm])
    axes.set_xscale("log", base=2)
    axes.set_xticks(found["batches"], [str(b) for b in found["batches"]])
    axes.minorticks_off()
    axes.set_xlabel("batch size")
    axes.set_ylabel("test accuracy, % (mean, standard error)")
    axes.set_title(title, fontsize=9)
    axes.legend()
    figure.savefig(path)
