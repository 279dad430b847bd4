"""What data sets draw at random: under a seed of (run, task, step, sample) where a `Loader` fetches, else of the sample alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch

from everbatch import seeds

__all__ = ["drawing", "seed_sample", "seeded"]

_key: ContextVar[tuple[int | str, ...]] = ContextVar("everbatch_draws", default=("fetch",))


@contextmanager
def drawing(*key: int | str) -> Iterator[None]:
    """Inside the block, what data sets draw at random is a function of `key` and the sample."""
    token = _key.set(key)
    try:
        yield
    finally:
        _key.reset(token)


@contextmanager
def seeded() -> Iterator[None]:
    """Puts the global generators back that `seed_sample` seeds."""
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])  # noqa: NPY002


def seed_sample(index: int) -> None:
    """Seed the global generators for one sample."""
    seed = seeds.derive(*_key.get(), index)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # the generator that transforms draw from
