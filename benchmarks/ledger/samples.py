"""The samples of a claim: decoded once, kept in one file, known by the hash of their bytes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ledger.cells import Cell
from everbatch.data import Source, load
from everbatch.data.sources import digest
from everbatch.errors import check

__all__ = ["Samples", "opened", "prepare", "recipe_data", "rows", "spec", "top"]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The first fields of a scale: which samples its cells train on."""

    data: str = "digits"
    """digits, or any source of everbatch.data.load."""
    image_size: int | None = None
    """Side in pixels; by default the size the data has."""


def prepare(source: str, image_size: int | None, home: Path) -> str:
    """The hash of a data set's samples, which a cell keeps as `data`; other processes open them by it.

    Args:
        source: as `everbatch.data.load` takes it: "digits", a folder of images, an .npz file, torchvision:NAME:ROOT.
        image_size: side of the images; None keeps theirs.
        home: of the ledger's results; decoded images are kept in `data` below it.
    """
    if source == "digits":
        return f"digits-{_hash(*_parts(source, image_size))}"
    folder = home / "data"
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f"{digest(source, str(image_size), _listing(source))}.hash"
    if mark.exists() and (folder / f"{mark.read_text()}.npz").exists():
        return mark.read_text()
    train, test = _parts(source, image_size)
    found = _hash(train, test)
    pieces = [(part, kind, values) for part in (train, test) for kind, values in (("x", part.x), ("y", part.y))]
    arrays: dict[str, Any] = {f"{kind}_{part.name}": values for part, kind, values in pieces}
    draft = folder / f".{found}.{os.getpid()}.npz"
    np.savez(draft, **arrays)
    draft.replace(folder / f"{found}.npz")
    mark.write_text(found)
    return found


def spec(cell: Cell, home: Path) -> str:
    """What `load` takes to open a cell's samples."""
    return "digits" if cell.data.startswith("digits-") else str(home / "data" / f"{cell.data}.npz")


def opened(cell: Cell, home: Path) -> tuple[Source, Source]:
    """Training and test source of a cell."""
    options = {"image_size": cell.scale["image_size"]} if cell.data.startswith("digits-") else {}
    train, test = (load(spec(cell, home), train=part, **options) for part in (True, False))
    return train, test


def recipe_data(cell: Cell, home: Path) -> dict[str, Any]:
    """The option `data` of a recipe that trains on a cell's samples."""
    return {"source": spec(cell, home), "image_size": cell.scale["image_size"] if cell.data.startswith("digits-") else None}


def rows(source: Source, ids: torch.Tensor) -> torch.Tensor:
    """Samples of a source whose inputs have no names."""
    found = source.fetch(ids)
    check(isinstance(found, torch.Tensor), "ledger", f"{source.name} with inputs by name", "be images or numbers alone")
    assert isinstance(found, torch.Tensor)
    return found


def top(cell: Cell, inputs: torch.Tensor) -> float:
    """The largest value that such pixels can have."""
    return 16.0 if cell.data.startswith("digits-") else 255.0 if inputs.dtype == torch.uint8 else 1.0


class _Part:
    """One side of a data set, in memory."""

    def __init__(self, source: str, train: bool, image_size: int | None) -> None:
        found = load(source, train=train, image_size=image_size)
        self.name = "train" if train else "test"
        self.x = rows(found, torch.arange(len(found))).contiguous().numpy()
        self.y = found.targets.numpy()


def _parts(source: str, image_size: int | None) -> tuple[_Part, _Part]:
    return _Part(source, True, image_size), _Part(source, False, image_size)


def _hash(*parts: _Part) -> str:
    return digest(*(piece for p in parts for piece in (str((p.x.shape, p.x.dtype)), p.x.tobytes(), p.y.tobytes())))


def _listing(source: str) -> str:
    """What tells a folder or file apart from itself after a change, without reading it: names, sizes, times."""
    path = Path(source.rpartition(":")[2]).expanduser()
    check(path.exists(), "ledger", f"data={source!r}", "be digits, or name a folder or file that exists")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return "\n".join(f"{p} {(s := p.stat()).st_size} {s.st_mtime_ns}" for p in files)
