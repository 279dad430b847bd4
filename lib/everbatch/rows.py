"""Rows of samples: one tensor (n, ...), or a dict of tensors by name with as many rows each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from everbatch.errors import check

__all__ = ["Rows", "called", "count_of", "device_of", "each", "joined", "named", "one_tensor", "rows_of",
           "shapes", "split", "stacked", "unnamed"]

Rows: TypeAlias = "Tensor | dict[str, Tensor]"


def count_of(rows: Rows) -> int:
    """How many rows there are."""
    return len(next(iter(rows.values())) if isinstance(rows, dict) else rows)


def each(function: Callable[[Tensor], Tensor], rows: Rows) -> Rows:
    """`function` of every tensor."""
    if isinstance(rows, dict):
        return {name: function(value) for name, value in rows.items()}
    return function(rows)


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows of several parts, one after the other."""
    first = parts[0]
    if not isinstance(first, dict):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    dicts = [part for part in parts if isinstance(part, dict)]
    return {name: torch.cat([part[name] for part in dicts]) for name in first}


def split(rows: Rows, pieces: int) -> list[Rows]:
    """As `Tensor.tensor_split`."""
    if not isinstance(rows, dict):
        return list(rows.tensor_split(pieces))
    cut = {name: value.tensor_split(pieces) for name, value in rows.items()}
    return [{name: parts[index] for name, parts in cut.items()} for index in range(pieces)]


def rows_of(rows: Rows) -> Iterable[Rows]:
    """One row after the other, without the first dimension."""
    if not isinstance(rows, dict):
        return rows
    return ({name: value[index] for name, value in rows.items()} for index in range(count_of(rows)))


def stacked(rows: Sequence[Rows]) -> Rows:
    """The inverse of `rows_of`."""
    first = rows[0]
    if not isinstance(first, dict):
        return torch.stack([row for row in rows if isinstance(row, Tensor)])
    dicts = [row for row in rows if isinstance(row, dict)]
    return {name: torch.stack([row[name] for row in dicts]) for name in first}


def named(name: str, rows: Rows) -> dict[str, Tensor]:
    """Flat names for a memory: "raw"; or "raw/input_ids", "raw/attention_mask"."""
    if isinstance(rows, dict):
        return {f"{name}/{key}": value for key, value in rows.items()}
    return {name: rows}


def unnamed(name: str, flat: Mapping[str, Tensor]) -> Rows:
    """The inverse of `named`, among other entries."""
    if name in flat:
        return flat[name]
    start = f"{name}/"
    return {key.removeprefix(start): value for key, value in flat.items() if key.startswith(start)}


def called(function: Callable[..., Any], rows: Rows) -> Any:
    """A function of a model's inputs: named ones are its keyword arguments."""
    return function(**rows) if isinstance(rows, dict) else function(rows)


def device_of(rows: Rows) -> torch.device:
    """Where they are."""
    return next(iter(rows.values())).device if isinstance(rows, dict) else rows.device


def one_tensor(who: str, rows: Rows) -> Tensor:
    """Rows that are one tensor. Raises `ValueError` where they have names."""
    if isinstance(rows, dict):
        check(False, who, f"inputs by name, {', '.join(rows)}", "be one tensor")
    assert isinstance(rows, Tensor)
    return rows


def shapes(rows: Rows) -> str:
    """Shapes and types in words."""
    if isinstance(rows, dict):
        return ", ".join(f"{name}: {shapes(value)}" for name, value in rows.items())
    return f"shape {tuple(rows.shape)} and {rows.dtype}"
