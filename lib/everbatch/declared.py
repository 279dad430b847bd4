"""What a part declares, as values: its cost, options to show it with, and what tuning varies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from everbatch.errors import check

__all__ = ["Cost", "Made", "Options", "Range", "Space", "check_kinds"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What one part adds to every step, for `describe()`."""

    passes: float = 0.0
    """Forward-backward passes beyond the one every step takes (mean over steps)."""
    state_bytes: float = 0.0
    """Bytes per owned master element that stay between steps."""
    transient_bytes: float = 0.0
    """Bytes per owned master element at the peak inside the step."""
    scalar_reductions: float = 0.0
    """All-reduces of a few scalars."""
    note: str = ""
    """Anything else a user pays."""


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval of a search space, its ends included.

    Args:
        low, high: finite, low < high. log: search it by orders of magnitude; low > 0.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        ends = f"low={self.low!r}, high={self.high!r}"
        check(-math.inf < self.low < self.high < math.inf, "Range", ends, "be finite, and ascend")
        check(self.low > 0 or not self.log, "Range", f"{ends}, log=True", "have low > 0")


@dataclasses.dataclass(frozen=True)
class Made:
    """Options that need the model: `by(factory)` gives them by field; factory() is the bare model."""

    by: Callable[[Callable[[], Any]], Mapping[str, Any]]


Options: TypeAlias = "Mapping[str, Any] | Made"
"""Options by field. A field `factory` that they leave out gets the factory of the bare model."""
Space: TypeAlias = "Mapping[str, tuple[Any, ...] | Range]"
"""Values to try, by field; the first of a tuple is where to begin."""


def check_kinds(part: type, given: Mapping[str, Any]) -> None:
    """Refuse options of another kind than the part's Config says, where any value would do: what is not True or False counts as
    one of them, a text as a sequence of letters, and what cannot be called is called hours later. Kinds that are not known here
    are the Config's own to check."""
    kinds = {f.name: getattr(f.type, "__name__", f.type) for f in dataclasses.fields(part.Config)}  # type: ignore[attr-defined]
    for name, value in given.items():
        kind, _, none = str(kinds[name]).partition(" | ")
        if none not in ("", "None") or (none and value is None):
            continue
        good, must = True, ""
        if kind == "bool":
            good = type(value).__name__ in ("bool", "bool_") or (isinstance(value, int) and value in (0, 1))
            must = "be True or False"
        elif kind == "tuple[str, ...]":
            good, must = not isinstance(value, str) and isinstance(value, Iterable), "be a tuple of texts"
            must += f", such as ({value!r},)" if isinstance(value, str) else ""
        elif kind == "Factory" or (kind.startswith("Callable[") and kind.endswith("]")):
            good, must = callable(value), "be a function"
        elif kind.startswith("Mapping[") and kind.endswith("]"):
            good, must = isinstance(value, Mapping), "be a mapping"
        check(good, part.__name__, f"{name}={value!r}", must)
