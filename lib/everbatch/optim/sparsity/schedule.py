"""When the topology changes, and how much of it. Pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from everbatch.errors import check, check_real, check_whole

__all__ = ["Schedule", "drop_fraction", "scaled_interval"]


def drop_fraction(
    step: int, end: float, start: float, *, anneal: str = "cosine", floor: float = 0.0, power: float = 1.0,
) -> float:
    """Share of the active weights dropped by an update at `step`.

        cosine:    floor + (start - floor) * (1 + cos(pi * step / end)) / 2
        linear:    floor + (start - floor) * (1 - step / end)^power
        constant:  start

    Args:
        step: steps done, counted from 1; beyond `end` the value at `end`.
        end: step at which the fraction reaches `floor`.
        start: fraction at step 0; in [0, 1].

    Source: Evci et al. 2020, arXiv 1911.11134, section 3 (cosine, inverse power); floor .005: the ITOP code.
    """
    if anneal == "constant":
        return start
    progress = min(step / end, 1.0)
    shape = (1.0 + math.cos(math.pi * progress)) / 2.0 if anneal == "cosine" else (1.0 - progress) ** power
    return floor + (start - floor) * shape


def scaled_interval(interval: int, reference_batch: int, batch: int) -> int:
    """The update interval that keeps the samples between updates constant: interval * reference_batch / batch, at least 1."""
    check(min(interval, reference_batch, batch) >= 1, "scaled_interval", f"got {(interval, reference_batch, batch)}",
          "be integers >= 1")
    return max(1, round(interval * reference_batch / batch))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Topology updates of one task: at every `interval`-th step after `begin` and before `end`, counted from 1."""

    interval: int
    start: float
    anneal: str = "cosine"
    floor: float = 0.0
    begin: int = 0
    total: int | None = None
    """Steps of the task; None: unknown, then updates never stop and `anneal` must be "constant"."""
    stop: float = 0.75
    """Share of `total` after which the topology stays."""
    score_steps: int = 1
    """Gradients of the last so many steps before an update are averaged for growth."""

    def __post_init__(self) -> None:
        check_whole("DynamicSparsity", "update_every", self.interval, 1)
        check_real("DynamicSparsity", "drop_fraction", self.start, 0.0, 1.0, cure="pass 0 for a mask that stays")
        check_real("DynamicSparsity", "drop_floor", self.floor, 0.0, 1.0)
        check_real("DynamicSparsity", "stop_fraction", self.stop, 0.0, 1.0)
        check_whole("DynamicSparsity", "begin_step", self.begin)
        check(self.anneal in ("cosine", "linear", "constant"), "DynamicSparsity", f"anneal={self.anneal!r}",
              "be 'auto', 'cosine', 'linear' or 'constant'")
        if self.total is not None:
            check_whole("DynamicSparsity", "total_steps", self.total, 1, cure="or None")
        check(self.total is not None or self.anneal == "constant", "DynamicSparsity", f"anneal={self.anneal!r} without "
              "total_steps", "know the steps of the task", "pass total_steps=, or anneal='constant'")
        n = self.score_steps
        check(isinstance(n, int) and 1 <= n and (n == 1 or n < self.interval), "DynamicSparsity", f"score_steps={n!r}",
              f"be an integer in [1, update_every={self.interval})")

    @property
    def end(self) -> float:
        """First step without updates."""
        return math.inf if self.total is None else self.stop * self.total

    def due(self, step: int) -> bool:
        """Whether the topology changes at this step."""
        return self.start > 0 and step % self.interval == 0 and self.begin < step < self.end

    def scoring(self, step: int) -> bool:
        """Whether this step's gradient counts for the next update."""
        upcoming = -step % self.interval
        return upcoming < self.score_steps and self.due(step + upcoming)

    def events(self, step: int) -> tuple[bool, bool]:
        """Whether this step's gradient counts for the next update, and whether the topology changes at it."""
        return self.scoring(step), self.due(step)

    def fraction(self, step: int) -> float:
        """Share of the active weights that an update at this step drops."""
        return drop_fraction(step, self.end, self.start, anneal=self.anneal, floor=self.floor)
