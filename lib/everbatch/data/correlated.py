"""Orders of samples in which labels come in runs, as in a stream from one place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from everbatch.errors import check, check_real, check_whole

__all__ = ["dirichlet_order"]

LEAST = 10
"""Samples a chunk must hold for a try to count."""


def dirichlet_order(labels: Tensor | Sequence[int], concentration: float, seed: int, *, tries: int = 10_000) -> list[int]:
    """Places of `labels` in an order where neighbours share classes: the smaller the concentration, the longer the runs.

    As many chunks as classes; each class is spread over them by Dirichlet(concentration) shares, of which chunks that are full
    get none; within a chunk, classes come one after another in an order of its own. A try that leaves a chunk with fewer than
    10 samples is drawn anew.

    Args:
        labels: (n,) integers from 0.
        concentration: > 0; 0.1 for ten classes, 0.01 for a hundred or more.
        seed: 0 to 2^32 - 1. The same seed gives the same order, and the published code's (numpy's legacy generator).
        tries: before it is refused.

    Raises:
        ValueError: bad arguments; no try gave every chunk its 10 samples: few samples, or a small concentration.

    Source: Yuan et al., CVPR 2023 (RoTTA), and the code of arXiv 2401.08328.
    """
    who = "dirichlet_order"
    check_real(who, "concentration", concentration, 0.0, open_low=True)
    check_whole(who, "seed", seed, 0, 2**32 - 1)
    check_whole(who, "tries", tries, 1)
    known = np.asarray(labels)
    check(known.ndim == 1 and known.dtype.kind in "iu" and len(known) > 0, who, f"labels of {known.dtype} {known.shape}",
          "be a vector of integers, not empty")
    check(int(known.min()) >= 0, who, f"label {int(known.min())}", "be >= 0")
    draws = np.random.RandomState(seed)
    classes = int(known.max()) + 1
    for _ in range(tries):
        chunks = _spread(known, classes, concentration, draws)
        if min(sum(map(len, chunk)) for chunk in chunks) >= LEAST:
            break
    else:
        raise ValueError(f"{who}: {len(known)} labels of {classes} classes at concentration={concentration}, must give each of "
                         f"{classes} chunks {LEAST} samples in {tries} tries; use more samples, or a larger concentration")
    order: list[int] = []
    for chunk in chunks:
        turn = list(range(classes))
        draws.shuffle(turn)
        order.extend(int(place) for label in turn for place in chunk[label])
    return order


def _spread(known: np.ndarray, classes: int, concentration: float, draws: np.random.RandomState) -> list[list[np.ndarray]]:
    """One try: the places of each class in each chunk."""
    chunks: list[list[np.ndarray]] = [[] for _ in range(classes)]
    held = np.zeros(classes)
    for label in range(classes):
        places = np.where(known == label)[0]  # afresh in every try, or seeds give other orders than published
        draws.shuffle(places)
        shares = draws.dirichlet(np.repeat(concentration, classes))
        shares = np.array([share * (count < len(known) / classes) for share, count in zip(shares, held, strict=True)])
        shares = shares / shares.sum()
        cuts = (np.cumsum(shares) * len(places)).astype(int)[:-1]
        for chunk, part in zip(chunks, np.split(places, cuts), strict=True):
            chunk.append(part)
        held = np.array([sum(map(len, chunk)) for chunk in chunks])
    return chunks
