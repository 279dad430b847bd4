"""Errors that say who, got what, expected what, and what to do about it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

__all__ = ["CheckpointMismatch", "CompositionError", "NoNormalizationLayers", "NoSourceStatistics", "UnsupportedHost", "check",
           "check_real", "check_whole", "nearest"]


class CompositionError(TypeError):
    """A class that was put together in a way that cannot work; raised when the class is created."""


class UnsupportedHost(RuntimeError):
    """The engine, or a mode of it, cannot run a method exactly; raised at construction."""


class CheckpointMismatch(RuntimeError):
    """A checkpoint that is damaged, or that belongs to another model, configuration or data set."""


class NoNormalizationLayers(ValueError):
    """A model without the normalisation layers that a method works on."""


class NoSourceStatistics(ValueError):
    """A batch norm that has kept no running statistics of what it was trained on."""


def check(
    good: bool, who: str, got: str, must: str, cure: str = "", *, error: type[ValueError] = ValueError,
) -> None:
    """Raise `error` "who: got, must ...; cure" unless `good`."""
    if not good:
        raise error(f"{who}: {got}, must {must}" + (f"; {cure}" if cure else ""))


def check_real(
    who: str, name: str, value: float, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False,
    open_high: bool = False, cure: str = "",
) -> None:
    """Raise unless `value` is a finite real number inside the interval from `low` to `high`."""
    left, right = ("(" if open_low else "["), (")" if open_high else "]")
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    inside = number and (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    if low == -math.inf and high == math.inf:
        must = "be a finite number"
    elif high == math.inf:
        must = f"be a finite number {'>' if open_low else '>='} {low:g}"
    else:
        must = f"be in {left}{low:g}, {high:g}{right}"
    check(inside, who, f"{name}={value!r}", must, cure)


def check_whole(who: str, name: str, value: int, low: int = 0, high: int = 2**31 - 1, *, cure: str = "") -> None:
    """Raise unless `value` is an integer from `low` to `high`: larger ones are no counts but slips of the keyboard."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    check(whole and value >= low, who, f"{name}={value!r}", f"be an integer >= {low}", cure)
    check(value <= high, who, f"{name}={value!r}", f"be at most {high}", cure)


def nearest(name: str, choices: Iterable[str]) -> str:
    """Text that names the choice most like `name`, or all choices when none is near."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(known) - 30} more" if len(known) > 30 else ""
    return f"known: {', '.join(known[:30]) or 'none'}{more}"
