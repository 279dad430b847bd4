"""What every family shares: reading one file, comparing what it holds, and the result to print."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Array", "Comparison", "FormatError", "NotYet", "Result", "Tolerance", "Vectors"]

Array = NDArray[Any]


class FormatError(ValueError):
    """A file that does not follow the documented format of its family."""


class NotYet(Exception):
    """A file of a known family that needs something the library does not have yet; the text says what."""


@dataclass(frozen=True)
class Tolerance:
    """|got - want| <= atol + rtol * |want| must hold for every element; both 0: exact."""

    rtol: float = 0.0
    atol: float = 0.0

    @classmethod
    def of(cls, kind: np.dtype[Any]) -> Tolerance:
        """The tolerance for files computed in this dtype; exact for integers and booleans.

        Raises:
            FormatError: a dtype for which no tolerance is documented.
        """
        if kind.kind in "iub":
            return cls()
        known = {"float64": cls(1e-9, 1e-12), "float32": cls(1e-5, 1e-6)}
        if kind.name not in known:
            raise FormatError(f"dtype {kind.name}, must be one of {', '.join(known)}, or integer")
        return known[kind.name]


class Vectors:
    """The arrays of one file. Remembers which were used, so that a report can name those that were not."""

    def __init__(self, path: Path) -> None:
        """Read the whole file, so that damage anywhere shows; never unpickles.

        Raises:
            FormatError: no npz archive, or one that was cut short. Other damage: what numpy, zipfile and zlib raise.
        """
        self.path = path
        if not zipfile.is_zipfile(path):
            raise FormatError("no npz archive, or one that was cut short")
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            self.arrays: dict[str, Array] = {key: archive[key] for key in archive.files}
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Array:
        if key not in self.arrays:
            raise FormatError(f"key {key!r} is missing")
        self.used.add(key)
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def under(self, prefix: str) -> dict[str, Array]:
        """The arrays whose key begins with `prefix`, by the rest of it, in the file's order; marks them used."""
        return {key[len(prefix):]: self[key] for key in self.arrays if key.startswith(prefix)}

    def groups(self, prefix: str = "") -> list[str]:
        """The next path element of every key below `prefix`, each once, in the file's order."""
        below = (key[len(prefix):] for key in self.arrays if key.startswith(prefix))
        return list(dict.fromkeys(key.split("/")[0] for key in below if "/" in key))

    def integer(self, key: str) -> int:
        """A 0-dim integer."""
        value = self[key]
        if value.ndim or value.dtype.kind not in "iu":
            raise FormatError(f"key {key!r} is {value.dtype.name} of shape {value.shape}, must be one integer")
        return int(value)

    def hp(self) -> dict[str, Any]:
        """All hyper-parameters, from the JSON text under `hp_json`."""
        values = json.loads(str(self["hp_json"]))
        if not isinstance(values, dict):
            raise FormatError(f"hp_json is {values!r}, must be a JSON object")
        return values

    @property
    def unused(self) -> list[str]:
        return [key for key in self.arrays if key not in self.used]


@dataclass
class Comparison:
    """Collects differences between what the library gave and what a file holds."""

    floats: Tolerance | None = None
    """For floating-point values; None: the one of each array's dtype. Integers and booleans are always exact."""
    count: int = 0
    error: float = 0.0
    """Largest |got - want| / (atol + rtol * |want|): above 1 is a failure."""
    absolute: float = 0.0
    """Largest |got - want|."""
    worst: str = ""
    """Key of the largest error; empty when all values are equal."""
    used: set[Tolerance] = field(default_factory=set)

    def close(self, key: str, got: ArrayLike, want: Array) -> None:
        """Compare one array.

        Raises:
            FormatError: shapes differ.
        """
        exact = want.dtype.kind in "iub"
        tolerance = Tolerance.of(want.dtype) if exact or self.floats is None else self.floats
        got = np.asarray(got)
        if got.shape != want.shape:
            raise FormatError(f"{key} has shape {want.shape}, the library gives {got.shape}")
        a, b = got.astype(np.float64), want.astype(np.float64)
        same = (got == want) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore", divide="ignore"):
            away = np.where(same, 0.0, np.abs(a - b))
            away[np.isnan(away)] = math.inf
            scaled = np.where(same, 0.0, away / (tolerance.atol + tolerance.rtol * np.abs(b)))
        scaled[np.isnan(scaled)] = math.inf
        error = float(scaled.max(initial=0.0))
        if error > self.error:
            self.worst = key
        self.count += 1
        self.error, self.absolute = max(self.error, error), max(self.absolute, float(away.max(initial=0.0)))
        self.used.add(tolerance)

    @property
    def tolerance(self) -> Tolerance:
        """The widest in use."""
        return max(self.used, key=lambda t: (t.atol, t.rtol), default=Tolerance())


@dataclass
class Result:
    """What became of one file."""

    file: str
    status: str
    """"pass", "fail", or "unknown" (not checked, and no failure)."""
    message: str = ""
    """Why it is unknown, or why it failed other than by a difference."""
    error: float | None = None
    absolute: float | None = None
    rtol: float | None = None
    atol: float | None = None
    arrays: int = 0
    worst: str = ""
    unchecked: list[str] = field(default_factory=list)
    """Keys that nothing was compared with and nothing was computed from."""

    def measured(self, comparison: Comparison, unchecked: list[str]) -> Result:
        """This result with the figures of a comparison."""
        self.error, self.absolute = comparison.error, comparison.absolute
        self.rtol, self.atol = comparison.tolerance.rtol, comparison.tolerance.atol
        self.arrays, self.worst, self.unchecked = comparison.count, comparison.worst, unchecked
        return self

    def line(self) -> str:
        """One line for people."""
        head = f"{ {'pass': 'PASS', 'fail': 'FAIL', 'unknown': 'not yet'}[self.status]:<8}{self.file}: "
        if self.message:
            return head + self.message
        bound = "exact" if not self.rtol and not self.atol else f"rtol {self.rtol:g}, atol {self.atol:g}"
        text = f"largest error {self.error:.2e} of the tolerance ({bound}), absolute {self.absolute:.2e}"
        text += f", {self.arrays} arrays" + (f", worst {self.worst}" if self.worst else "")
        return head + text + (f"; not checked: {_brief(self.unchecked)}" if self.unchecked else "")

    def plain(self) -> dict[str, Any]:
        """For JSON: None where a figure is missing or not finite."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def _brief(names: list[str], limit: int = 3) -> str:
    def cut() -> Iterator[str]:
        yield from names[:limit]
        if len(names) > limit:
            yield f"and {len(names) - limit} more"

    return ", ".join(cut())
