"""What a part declares, as values: its cost, options to show it with, and what tuning varies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
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
    one of them, a text as a sequence of letters, and what cannot be called is called hours later."""
    kinds = {f.name: getattr(f.type, "__name__", f.type) for f in dataclasses.fields(part.Config)}  # type: ignore[attr-defined]
    for name, value in given.items():
        kind, good, must = str(kinds[name]), True, ""
        if kind == "bool":
            good, must = type(value).__name__ in ("bool", "bool_"), "be True or False"
        elif kind == "tuple[str, ...]":
            good = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
            must = f"be a tuple of texts, such as ({value!r},)" if isinstance(value, str) else "be a tuple of texts"
        elif kind.startswith(("Factory", "Callable[")):
            good, must = callable(value) or (value is None and "None" in kind), "be a function"
        elif kind.startswith("Mapping["):
            good, must = isinstance(value, Mapping) or (value is None and "None" in kind), "be a mapping"
        check(good, part.__name__, f"{name}={value!r}", must)
