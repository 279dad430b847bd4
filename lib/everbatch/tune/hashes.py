"""By which hashes a sample is known again: its numbers whatever type holds them, and an image whatever range its pixels have."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Known", "keyed", "row_hashes"]

SIDE = 4
"""Pixels of a side from which on an array is an image."""
LEVELS = 17
"""Values of a channel up to which an image has few: digits have 0 to 16."""
LEVEL_PIXELS = 64
"""Pixels below which few values say nothing."""
LOOK = 512
"""Pixels that are looked at before all values of a channel are counted."""
RECURRING = 1e-3
"""Share of a side's images that it may have in several ranges, as copies that were made brighter, before ranges are what tells
its images apart."""


def keyed(salt: bytes, data: bytes) -> str:
    """A salted hash of 64 bits."""
    return hashlib.blake2b(data, key=salt, digest_size=8).hexdigest()


def row_hashes(salt: bytes, inputs: NDArray[Any], *, asking: bool = False) -> Iterator[tuple[str, ...]]:
    """Salted hashes of every sample, the one of its numbers first; two samples are the same where they share one of any kind.

    Numbers: the same in every type that holds them (7 and 7.0). Floats of 64 bits are found by their rounding to 32 bits where
    the other side has 32; two of 64 bits that round to the same number are two.

    Images, (H, W) or (C, H, W) with sides of 4 pixels or more, not constant: v = (x - min) / (max - min) of each channel,
    channels that are then equal as one, floor(1024 v + 1/4). No v = k / n with n <= 255 lies nearer to a step than 1 / (4096 n),
    so bytes agree with floats of them, divided or standardised. Values 0 to n <= 16 that were rounded to bytes do not: where
    channels have at most 17 values, from 64 pixels on, also the rank of each pixel and floor(17 v) of each value, which that
    rounding leaves as they are. Not seen: other sizes, crops, colours made grey, lossy compression.

    Args:
        asking: of the side that is compared, where the other one was kept.

    Cost: row by row, no copy of the whole; 25 to 50 us of processor time for a small image, 1 ms for 3 x 224 x 224.
    """
    for row in inputs:
        narrow = _narrowed(row)
        found = [_headed("numbers", narrow)]
        if row.dtype.kind == "f":
            wide = row.dtype.itemsize > 4
            with np.errstate(over="ignore"):
                single = _narrowed(row.astype(np.float32)) if wide else narrow
            # Named by the type of the side that was kept: two of 64 bits never meet at what both round to.
            found.append(_headed("of 64 bits" if wide != asking else "of 32 bits", single))
        yield tuple(keyed(salt, data) for data in [*found, *_as_image(row)])


def _headed(kind: str, array: NDArray[Any]) -> bytes:
    array = np.ascontiguousarray(array)
    return f"{kind} {array.dtype.str} {array.shape} ".encode() + array.tobytes()


def _narrowed(row: NDArray[Any]) -> NDArray[Any]:
    """The same numbers in the narrowest of bytes, floats of 32 and of 64 bits; as they are where none holds them."""
    if row.dtype.kind == "b" or row.dtype == np.uint8 or not row.size:
        return row.astype(np.uint8)
    row = row + row.dtype.type(0)  # -0.0 is 0.0
    if row.min() >= 0 and row.max() <= 255:
        as_bytes = row.astype(np.uint8)
        if (as_bytes == row).all():
            return as_bytes
    with np.errstate(over="ignore"):
        for kind in (np.float32, np.float64):
            floats = row.astype(kind)
            # Compared as 64 bits; an integer that those cannot hold differs by itself from what it came back as.
            if (floats.astype(np.float64) == row).all() and (row.dtype.kind == "f" or bool((np.abs(floats) <= 2**53).all())):
                return floats
    return row.astype(np.float64) if row.dtype.kind == "f" else row.astype(np.int64)


def _as_image(row: NDArray[Any]) -> list[bytes]:
    """What an image is but for the range of its channels; nothing of other arrays, and of constant images."""
    if row.ndim not in (2, 3) or min(row.shape[-2:]) < SIDE:
        return []
    pixels = row.reshape(-1, row.shape[-2] * row.shape[-1]).astype(np.float64)
    low, high = pixels.min(1, keepdims=True), pixels.max(1, keepdims=True)
    if not (np.isfinite(low).all() and np.isfinite(high).all()) or not (high > low).any():
        return []
    span = np.where(high > low, high - low, 1.0)
    size = f"{row.shape[-2:]}"
    shares = (pixels - low) / span
    found = [_headed(f"image {size}", _one_of_equals(np.floor(shares * 1024 + 0.25).astype(np.uint16)))]
    if pixels.shape[1] >= LEVEL_PIXELS and all(len(np.unique(channel[:LOOK])) <= LEVELS for channel in pixels):
        known = [np.unique(channel, return_inverse=True) for channel in shares]
        if all(len(values) <= LEVELS for values, _ in known):
            levels = np.zeros((len(known), LEVELS), np.uint8)
            for line, (values, _) in zip(levels, known, strict=True):
                line[:len(values)] = np.floor(LEVELS * values)
            ranks = np.stack([rank for _, rank in known]).astype(np.uint8)
            found.append(_headed(f"levels {size}", _one_of_equals(np.concatenate([levels, ranks], 1))))
    return found


def _one_of_equals(channels: NDArray[Any]) -> NDArray[Any]:
    return channels[:1] if (channels == channels[0]).all() else channels


@dataclass(frozen=True)
class Known:
    """What the samples of one side, that is kept, are known again by."""

    hashes: frozenset[str]
    numbers: frozenset[str]
    """Those of them that are of a sample's numbers."""
    recurring: int
    """Images that a side itself has in several ranges, where they are more than 1 in 1000, so that numbers alone tell; else 0."""

    @classmethod
    def of(cls, salt: bytes, kept: Sequence[NDArray[Any]], asked: Sequence[NDArray[Any]]) -> Known:
        """Of two sides.

        An image that one side itself has in several ranges, a dot of several brightnesses say, is told apart by its range: the
        same one in another range on the other side is no other encoding of it. Such images are known by their numbers, and
        where they are more than 1 in 1000 of a side, all are.

        Cost: as `row_hashes` of both sides.
        """
        sides = [_noted(salt, kept, asking=False), _noted(salt, asked, asking=True)]
        several = [{form for form, found in side.forms.items() if len(found) > 1} for side in sides]
        mixed = max(len(found) if len(found) > RECURRING * len(side.forms) else 0
                    for found, side in zip(several, sides, strict=True))
        forms = set() if mixed else sides[0].forms.keys() - several[0] - several[1]
        numbers = frozenset(sides[0].numbers)
        return cls(numbers | forms, numbers, mixed)


@dataclass
class _Side:
    numbers: set[str] = field(default_factory=set)
    forms: dict[str, set[str]] = field(default_factory=dict)
    """By the hash of an image without its range: those of the numbers that have it."""


def _noted(salt: bytes, arrays: Sequence[NDArray[Any]], *, asking: bool) -> _Side:
    side = _Side()
    for array in arrays:
        exact = 2 if array.dtype.kind == "f" else 1
        for row in row_hashes(salt, array, asking=asking):
            side.numbers.update(row[:exact])
            for form in row[exact:]:
                side.forms.setdefault(form, set()).add(row[0])
    return side
