"""The verdict: a function of the declared rule and of the cells, of nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from benchmarks.ledger.claim import Contrast
from benchmarks.ledger.estimate import Estimate, estimate

__all__ = ["Found", "Verdict", "found", "verdict"]

Values = Mapping[str, Mapping[int, float | None]]
"""A statistic by arm and seed; None where that run diverged."""


class Verdict(str, Enum):
    """What a claim's cells say."""

    SHOWS = "shows"
    NOT_HERE = "does not show at this scale"
    UNDECIDED = "undecided"
    NOT_RUN = "not run"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Found:
    """A contrast and what the cells say of it."""

    contrast: Contrast
    estimate: Estimate | None
    """None: no seed has all its arms."""
    missing: int
    """Seeds of which an arm diverged."""

    @property
    def verdict(self) -> Verdict:
        """Of this contrast alone."""
        of, bounds = self.contrast, self.estimate
        if self.missing or bounds is None or bounds.low is None or bounds.high is None:
            return Verdict.UNDECIDED
        if bounds.high < of.bar:
            return Verdict.NOT_HERE
        return Verdict.SHOWS if bounds.low > of.above else Verdict.UNDECIDED


def found(contrast: Contrast, values: Values, seeds: Iterable[int]) -> Found:
    """The contrast seed by seed, and its mean with an interval."""
    each, missing = [], 0
    for seed in seeds:
        parts = [(weight, values.get(arm, {}).get(seed)) for arm, weight in contrast.weights.items()]
        known = [weight * value for weight, value in parts if value is not None]
        if len(known) == len(parts):
            each.append(sum(known))
        else:
            missing += 1
    return Found(contrast, estimate(each) if each else None, missing)


def verdict(parts: Sequence[Found], *, complete: bool) -> Verdict:
    """Of all contrasts that decide: one that does not show settles it, all must show for the claim to.

    Every one must show, so no correction for their number is needed. Before all declared cells are there nothing is judged:
    a verdict that may be looked at after each seed would not hold its level.
    """
    said = [part.verdict for part in parts if part.contrast.decides]
    if not complete or not said:
        return Verdict.NOT_RUN
    if Verdict.NOT_HERE in said:
        return Verdict.NOT_HERE
    return Verdict.SHOWS if all(each is Verdict.SHOWS for each in said) else Verdict.UNDECIDED
