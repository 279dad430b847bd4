"""Stateless randomness: every number is a function of (seed, purpose, ...), never of a stream's history.

What is replicated (noise on weights, class order, buffer keys) is keyed without the rank, so it is the same at any world
size, ZeRO stage and sharding; what belongs to a rank (dropout, augmentation) is keyed with it. Nothing of it is saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

__all__ = ["BLOCK", "derive", "derive_each", "generator", "normal", "numpy_generator", "seed_step", "uniform",
           "uniform_keys"]

BLOCK = 65_536
"""Elements drawn from one generator; a shard draws only the blocks it touches."""


def derive(*parts: int | str) -> int:
    """A 63-bit seed from a tuple of integers and strings (BLAKE2b, the same on every platform)."""
    return int.from_bytes(hashlib.blake2b(_text(parts), digest_size=8).digest(), "little") >> 1


def derive_each(ids: Iterable[int], *parts: int | str) -> list[int]:
    """`derive(*parts, id)` for each of these; what they have in common is hashed once."""
    common = hashlib.blake2b(_text(parts), digest_size=8)
    between = b"\x1f" if parts else b""
    found = []
    for key in ids:
        hashed = common.copy()
        hashed.update(b"%bint:%d" % (between, key))
        found.append(int.from_bytes(hashed.digest(), "little") >> 1)
    return found


def _text(parts: tuple[int | str, ...]) -> bytes:
    """What is hashed of them."""
    if any(isinstance(part, str) and "\x1f" in part for part in parts):
        raise ValueError(f"derive: {parts!r} holds the unit separator that keeps parts apart; use names without it")
    return "\x1f".join(f"{type(part).__name__}:{part}" for part in parts).encode()


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded with `derive(*parts)`."""
    return torch.Generator().manual_seed(derive(*parts))


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator seeded with `derive(*parts)`."""
    return np.random.default_rng(derive(*parts))


def normal(parts: tuple[int | str, ...], start: int, count: int) -> Tensor:
    """Elements `start` to `start + count` of the standard normal sequence named by `parts`: float32, CPU, shape (count,).

    The sequence is drawn in blocks of `BLOCK` elements, each from its own generator, so any slice of it is the same
    whoever asks. Cost: at most two blocks more than asked.
    """
    return _in_blocks(torch.randn, parts, start, count)


def uniform(parts: tuple[int | str, ...], start: int, count: int) -> Tensor:
    """`normal`, of the uniform sequence in [0, 1) that `parts` name."""
    return _in_blocks(torch.rand, parts, start, count)


def _in_blocks(
    draw: Callable[..., Tensor], parts: tuple[int | str, ...], start: int, count: int,
) -> Tensor:
    if count == 0:
        return torch.empty(0)
    first, last = start // BLOCK, (start + count - 1) // BLOCK
    blocks = [draw(BLOCK, generator=generator(*parts, block)) for block in range(first, last + 1)]
    return torch.cat(blocks)[start - first * BLOCK :][:count]


def uniform_keys(ids: np.ndarray, *parts: int | str) -> np.ndarray:
    """One number in (0, 1) for each integer id, a function of (parts, id) alone: float64, same shape.

    SplitMix64 over (id + seed); 53 bits, offset by half a unit so that neither end is reached.
    """
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(derive(*parts))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z = z ^ (z >> np.uint64(31))
    keys: np.ndarray = ((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return keys


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators for one training step of one rank (dropout, stochastic depth)."""
    # Where there is no device, torch.manual_seed formats a stack trace for each kind of device that might come.
    seed_all = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    seed_all(derive(seed, "step", step, rank))
