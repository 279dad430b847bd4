"""What a claim is: a paper's sentence, how it is run here, and the rule that judges it."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from everbatch.errors import check, check_whole, nearest

__all__ = ["Arm", "Claim", "Contrast", "Paper", "Tuning", "claims", "find"]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a claim stands."""

    authors: str
    year: int
    ref: str
    """arXiv number, or another address that lasts."""
    where: str
    """Table, figure or section."""

    def __str__(self) -> str:
        return f"{self.authors} {self.year}, {self.ref}, {self.where}"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the things compared."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Handed to the protocol, and part of the cell's key; JSON values."""
    series: str | None = None
    """With `x`: the curve that this arm is a point of."""
    x: float | None = None


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A weighted sum of arms, formed seed by seed, so that what a seed shares cancels.

    {"der": 1, "er": -1} is a difference; four weights make a difference of differences.
    """

    says: str
    """In words: "DER++ minus ER"."""
    weights: Mapping[str, float]
    statistic: str | None = None
    """None: the claim's."""
    above: float = 0.0
    """The claim holds where the whole interval lies above this."""
    least: float | None = None
    """The smallest effect that would matter: where the whole interval lies below it, the claim does not show. None: `above`."""
    decides: bool = True
    """Whether the verdict hangs on it; others are told beside it."""

    @property
    def bar(self) -> float:
        """Below this the whole interval must lie for "does not show"."""
        return self.above if self.least is None else max(self.above, self.least)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Options chosen by held-out samples before the arms are compared, with seeds of their own."""

    arms: Sequence[str]
    """Arms that have the option; the choice of one belongs to that arm alone."""
    option: str
    values: Sequence[float] | Mapping[str, Sequence[float]]
    """What is tried; by arm, where arms want other ranges."""
    seeds: int = 3
    first_seed: int = 1000
    """Apart from the seeds that are reported."""

    def values_of(self, arm: str) -> list[float]:
        """What is tried for an arm, ascending."""
        return sorted(self.values[arm] if isinstance(self.values, Mapping) else self.values)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One file of `benchmarks/claims`. `scale` is a frozen dataclass of what all cells share, which the command line may
    change; `arms` and `rule` may be functions of it. A claim whose method or run is not there yet has `needs` and no arms."""

    title: str
    methods: Sequence[str]
    """What of this package it is about."""
    paper: Paper
    says: str
    """The claim, in own words."""
    protocol: str
    """How the paper shows it."""
    scaled: str = ""
    """What is smaller or other here."""
    needs: str = ""
    """What is missing before it can run."""
    run: Callable[..., Mapping[str, float | None]] | None = None
    """A module-level function of (cell, home); returns numbers by name, None for what diverged."""
    scale: Any = None
    arms: Mapping[str, Arm] | Callable[[Any], Mapping[str, Arm]] = field(default_factory=dict)
    seeds: int = 5
    statistic: str = "accuracy"
    percent: bool = True
    """Whether numbers are shares that are told in percent and points."""
    rule: Sequence[Contrast] | Callable[[Any], Sequence[Contrast]] = ()
    tuning: Tuning | None = None
    shown: Sequence[str] = ()
    """More numbers for the table beside the statistic."""
    minutes: float = 0.0
    """On two idle cores, for all cells at the default scale; about."""

    def __post_init__(self) -> None:
        who = f"claim {self.title!r}"
        check(bool(self.says and self.protocol and self.methods), who, "a field left empty", "have says, protocol and methods")
        check_whole(who, "seeds", self.seeds, 2)
        if self.needs:
            check(self.run is None and not self.arms and not self.rule, who, "needs beside run, arms or rule",
                  "be without them, until what it needs is there")
            return
        check(self.run is not None and is_dataclass(self.scale), who, "no run or no scale", "have both, or say what it needs")
        check(bool(self.scaled), who, "scaled=''", "say what is smaller here than in the paper")
        self.check_arms(self.scale)

    def check_arms(self, scale: Any) -> None:
        """Refuse a rule or a tuning that names no arm, and a rule that decides nothing."""
        who, arms, rule = f"claim {self.title!r}", self.arms_of(scale), self.rule_of(scale)
        check(len(arms) >= 2, who, f"arms {list(arms)}", "be at least 2")
        check(any(c.decides for c in rule), who, "a rule without a contrast that decides", "have one")
        named = [name for c in rule for name in c.weights] + list(self.tuning.arms if self.tuning else ())
        for name in named:
            check(name in arms, who, f"arm {name!r}", "be one of its arms", nearest(name, arms))

    def arms_of(self, scale: Any) -> dict[str, Arm]:
        """The arms by label, at a scale."""
        return dict(self.arms(scale) if callable(self.arms) else self.arms)

    def rule_of(self, scale: Any) -> tuple[Contrast, ...]:
        """The contrasts, at a scale."""
        return tuple(self.rule(scale) if callable(self.rule) else self.rule)

    @property
    def runner(self) -> str:
        """How a cell names the protocol."""
        assert self.run is not None
        return f"{self.run.__module__}:{self.run.__qualname__}"


@functools.cache
def claims() -> dict[str, Claim]:
    """Every claim by the name of its file."""
    import benchmarks.claims as folder

    names = sorted(module.name for module in pkgutil.iter_modules(folder.__path__))
    return {name: importlib.import_module(f"{folder.__name__}.{name}").CLAIM for name in names}


def find(name: str) -> Claim:
    """A claim by name.

    Raises:
        ValueError: no such claim, with the nearest that is.
    """
    check(name in claims(), "ledger", f"claim {name!r}", "be one that `python -m benchmarks list` tells", nearest(name, claims()))
    return claims()[name]
