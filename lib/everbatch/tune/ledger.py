"""The ledger: one atomic file for each finished stream. What it holds is done, whatever was killed since."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everbatch.version import __version__

__all__ = ["FAILURES", "Ledger", "canonical", "sha256", "unit_key", "write_atomically"]

FAILURES = ("diverged", "error", "time_limit", "out_of_memory", "died")


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value: keys in order, no spaces; numbers that are not finite are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256(value: Any) -> str:
    """Of bytes as they are, of anything else in its canonical spelling."""
    return hashlib.sha256(value if isinstance(value, bytes) else canonical(value)).hexdigest()


def unit_key(options: Mapping[str, Any], order: int, scenario: Mapping[str, Any], data_sha256: str) -> str:
    """The key of a unit: all that its numbers depend on. Two configurations with the same values share their units."""
    return sha256([options, order, scenario, data_sha256, __version__])


def write_atomically(path: Path, content: bytes) -> None:
    """Whole or not at all, also where the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


class Ledger:
    """Units in a folder.

    Args:
        folder: with `units/KEY.json`, and `work/KEY`, where a stream that is under way keeps its checkpoints.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """Where a unit lies."""
        return self.folder / "units" / f"{key}.json"

    def work(self, key: str) -> Path:
        """Where its stream runs."""
        return self.folder / "work" / key[:24]

    def read(self, key: str) -> dict[str, Any] | None:
        """A unit; None where it is not finished, or the file is no whole unit of this key."""
        try:
            row = json.loads(self.path(key).read_text())
        except (FileNotFoundError, ValueError):
            return None
        whole = isinstance(row, dict) and row.get("key") == key and ("avg_acc" in row or row.get("failed") in FAILURES)
        return row if whole else None

    def write(self, row: Mapping[str, Any]) -> None:
        """Keep a unit; one that is there already stays, so that no number is ever replaced."""
        if self.read(row["key"]) is None:
            write_atomically(self.path(row["key"]), canonical(row))

    def forget_failures(self, keys: list[str]) -> int:
        """Make room for another try of those that failed; says how many."""
        failed = [key for key in keys if "failed" in (self.read(key) or {})]
        for key in failed:
            with contextlib.suppress(FileNotFoundError):
                self.path(key).unlink()
        return len(failed)
