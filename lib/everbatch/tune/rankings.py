"""Whether methods change rank between what a protocol reports and what its choices are worth."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from everbatch import seeds
from everbatch.tune.choices import Choice

__all__ = ["LEAST", "above", "ranks", "tau"]

LEAST = 5
"""Methods below which no order of theirs could be told from chance: 3 or 4 cannot reach p < 0.05, 5 only where they agree
throughout."""
DRAWS = 2000
SURE = 0.975
"""Probability from which on an order of two methods is called resolved."""


def ranks(choices: Sequence[Choice]) -> dict[str, Any] | None:
    """Ranks of the methods that both protocols evaluated, best first, on new orders; and by what the conventional search reports.

    Returns:
        `methods`; `two_phase`, `conventional` and `reported`, each the methods best first; `changes` (pairs whose order differs
        between what is reported and what the two-phase choices are worth), each with the bootstrap's probability; from five
        methods on `tau` (Kendall's) and `p`. None with fewer than two methods.
    """
    by = {(choice.protocol, choice.method): choice for choice in choices}
    names = [m for p, m in by if p == "conventional" and ("two-phase", m) in by]
    good = [m for m in names if by["two-phase", m].found and by["conventional", m].found
            and by["conventional", m].reported is not None]
    if len(good) < 2:
        return None
    mean = {kind: {m: float(np.mean(list(by[kind, m].found.values()))) for m in good} for kind in ("two-phase", "conventional")}
    reported = {m: float(by["conventional", m].reported or 0.0) for m in good}
    result: dict[str, Any] = {
        "methods": good, "two_phase": _best_first(mean["two-phase"]), "conventional": _best_first(mean["conventional"]),
        "reported": _best_first(reported), "pairs": []}
    for a, b in itertools.combinations(good, 2):
        sure = above(by["two-phase", a].found, by["two-phase", b].found)
        changed = (reported[a] - reported[b]) * (mean["two-phase"][a] - mean["two-phase"][b]) < 0
        says = "resolved" if sure is not None and max(sure, 1 - sure) >= SURE else "not resolved"
        result["pairs"].append({"pair": [a, b], "probability": sure, "changes": changed, "says": says})
    if len(good) >= LEAST:
        result |= tau(reported, mean["two-phase"])
    return result


def above(a: Mapping[int, float], b: Mapping[int, float]) -> float | None:
    """The bootstrap's probability that the mean of `a` over orders is above that of `b`: orders are drawn anew, the same for
    both; a tie counts half. None with fewer than two common orders."""
    common = sorted(set(a) & set(b))
    if len(common) < 2:
        return None
    difference = np.array([a[order] - b[order] for order in common])
    drawn = seeds.numpy_generator("bootstrap of a rank").integers(0, len(common), (DRAWS, len(common)))
    means = difference[drawn].mean(1)
    return float(((means > 0) + 0.5 * (means == 0)).mean())


def tau(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """Kendall's tau-b of two scores of the same methods, and its two-sided p."""
    from scipy.stats import kendalltau

    found = kendalltau([a[name] for name in a], [b[name] for name in a])
    return {"tau": float(found.statistic), "p": float(found.pvalue)}


def _best_first(scores: Mapping[str, float]) -> list[str]:
    return sorted(scores, key=lambda name: -scores[name])
