"""Cells: one run each, in one JSON file each, named by the hash of all that decides its numbers."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everbatch.errors import check
from everbatch.report.recorder import write_json

__all__ = ["Cell", "Damaged", "Store"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of one arm under one seed."""

    run: str
    """The protocol, module:function. One whose numbers change gets another name, so that no older cell stands for them."""
    scale: Mapping[str, Any]
    options: Mapping[str, Any]
    """The arm's, with what was tuned."""
    seed: int
    held_out: bool = False
    """Judge by samples cut from the training part: while an option is chosen, the test part is not looked at."""
    data: str = ""
    """Hash of the samples; "" where the seed makes them."""
    label: str = field(default="", compare=False)
    """For people."""

    def never_held_out(self) -> None:
        """For a protocol that has no held-out samples: tuning would look at the test samples."""
        check(not self.held_out, self.run, "a cell with held_out", "be without", "this protocol cannot tune an option")

    @property
    def described(self) -> dict[str, Any]:
        """All that decides the numbers."""
        return {"run": self.run, "scale": dict(self.scale), "options": dict(self.options), "seed": self.seed,
                "held_out": self.held_out, "data": self.data}

    @property
    def key(self) -> str:
        """The hash of it."""
        return _hash(self.described)

    def __hash__(self) -> int:
        return hash(self.key)


class Damaged(Exception):
    """A cell's file cannot be trusted."""


class Store:
    """The cells in a folder. Files appear whole or not at all; a lock that ends with its process says who is at work.

    Args:
        home: of the ledger's results; cells are in `cells` below it.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / "cells"
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, cell: Cell, kind: str = "json") -> Path:
        """HASH.json, and beside it .failed.json, .lock, .log and .damaged."""
        return self.folder / f"{cell.key}.{kind}"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """The record of a finished cell, None where there is none.

        Raises:
            Damaged: a file that was cut off or changed, or that is of another cell.
        """
        path = self.path(cell)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise Damaged(f"{path}: not JSON ({error})") from error
        if not isinstance(record, dict) or record.pop("sum", None) != _hash(record):
            raise Damaged(f"{path}: its checksum is another")
        if record.get("cell") != json.loads(json.dumps(cell.described)):
            raise Damaged(f"{path}: it is of another cell")
        return record

    def write(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Keep what a cell gave, and forget that it failed before."""
        plain = json.loads(json.dumps({"cell": cell.described, **record}, allow_nan=False))
        write_json(self.path(cell), {**plain, "sum": _hash(plain)})
        self.path(cell, "failed.json").unlink(missing_ok=True)
        self.path(cell, "log").unlink(missing_ok=True)

    def set_aside(self, cell: Cell) -> Path:
        """Move a damaged file out of the way, so that its cell is run again."""
        return self.path(cell).replace(self.path(cell, "damaged"))

    def fail(self, cell: Cell, cause: str) -> None:
        """Keep why a cell failed; it is not done."""
        write_json(self.path(cell, "failed.json"), {"cell": cell.described, "label": cell.label, "cause": cause})

    def failure(self, cell: Cell) -> str | None:
        """Why its last try failed."""
        try:
            return str(json.loads(self.path(cell, "failed.json").read_text(encoding="utf-8"))["cause"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return "its record cannot be read"

    @contextmanager
    def claimed(self, cell: Cell) -> Iterator[bool]:
        """Whether this process has the cell to itself inside the block; the system lets go when the process ends, however."""
        with open(self.path(cell, "lock"), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def at_work(self, cell: Cell) -> bool:
        """Whether some process runs it."""
        if not self.path(cell, "lock").exists():
            return False
        with self.claimed(cell) as mine:
            return not mine


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


