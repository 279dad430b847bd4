"""The k best entries of each layer over shards of it, exactly, without gathering a tensor.

A radix descent over the bits of the scores as sortable integers: a round counts how many candidates of each layer have each
value of the next 8 bits, one all-reduce of all layers' counts decides for all, and only candidates in the bin of the
threshold go on. float32 needs at most 4 rounds, float64 8. Ties go by position, by the same descent. Integer sums are exact in
any order, so every rank takes the same decisions and the choice does not depend on the sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Piece", "choose"]

BITS = 8
BINS = 1 << BITS


@dataclass
class Piece:
    """One rank's slice of one layer, flattened."""

    group: int
    """Which of the counts it competes for: its layer, or one number for all layers."""
    offset: int
    """Position of the first entry within the group."""
    scores: Tensor
    """Floating point, (n,); no NaN; infinite ones are the best or worst."""
    candidates: Tensor
    """Entries to choose from: bool (n,)."""
    priority: Tensor | None = None
    """uint8 (n,): entries of a higher priority are taken before all others; None: all equal. For all pieces or none."""


def choose(
    pieces: Sequence[Piece], counts: Tensor, total: Callable[[Tensor], Tensor], *, span: int, dtype: torch.dtype,
    device: torch.device | str = "cpu", ties: str = "first", ranked: bool = False,
) -> list[Tensor]:
    """Choose the `counts[g]` candidates of each group g that have the largest scores, or all where there are fewer.

    Args:
        pieces: what this rank holds; may be empty.
        counts: (groups,) int64 on CPU. This and what follows must be the same on every rank.
        total: sums a tensor over the ranks that share one copy of the model, in place (`Host.total`).
        span: positions in the largest group, at least.
        dtype: of the scores, float32 or float64.
        device: where `total` sums.
        ties: among equal scores at the threshold take the "first" positions, the "last", or "all" (more than asked then).
        ranked: whether pieces have priorities.

    Returns:
        One bool mask (n,) per piece.

    Cost: one all-reduce of 256 counts per group and round; rounds end as soon as every threshold is settled. One host sync
    per round: for topology updates, not for every step.
    """
    chosen = [torch.zeros_like(p.candidates) for p in pieces]
    alive = [p.candidates.nonzero().view(-1) for p in pieces]
    need = counts.clamp(min=0)
    keys = [_sortable(p.scores.to(dtype)) for p in pieces]

    def priority(i: int) -> Tensor:
        return pieces[i].priority[alive[i]]  # type: ignore[index]

    def score(i: int) -> Tensor:
        return keys[i][alive[i]]

    def position(i: int) -> Tensor:
        at = alive[i] + pieces[i].offset
        return span - at if ties == "first" else at

    stages: list[tuple[Callable[[int], Tensor], int]] = [(priority, 1)] if ranked else []
    stages.append((score, dtype.itemsize))
    if ties != "all":
        stages.append((position, -(-span.bit_length() // BITS)))
    for read, size in stages:
        for byte in reversed(range(size)):
            if not bool((need > 0).any()):
                return chosen
            digits = []
            counted = torch.zeros(len(need), BINS, dtype=torch.int64, device=device)
            for i, piece in enumerate(pieces):
                digit = ((read(i) >> (BITS * byte)) & (BINS - 1)).to(torch.int64)
                if read is score and byte == size - 1:
                    digit = digit ^ (BINS // 2)  # the sign bit: negative ones first
                digits.append(digit)
                counted[piece.group] += torch.bincount(digit, minlength=BINS).to(counted.device)
            edge, whole, need = _settle(total(counted).cpu(), need)
            _advance(pieces, chosen, alive, digits, edge.tolist(), whole.tolist(), need.tolist())
    for i, piece in enumerate(pieces):  # ties == "all": what is left of a group has the threshold's score
        if need[piece.group] > 0:
            chosen[i][alive[i]] = True
    return chosen


def _settle(counted: Tensor, need: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each group: the bin of the threshold, whether the whole bin is taken, and how many of it are still to be chosen.

    Bins above the threshold's are taken. A group that needs nothing more has need 0 and its bin at 256: nothing is taken.
    """
    upto = counted.flip(1).cumsum(1).flip(1)  # candidates in this bin or above
    enough = (upto >= need[:, None]).sum(1) - 1  # the highest bin at which there are enough; -1: never
    short = enough < 0
    bin_ = enough.clamp(min=0)
    rows = torch.arange(len(need))
    inside = counted[rows, bin_]
    left = need - (upto[rows, bin_] - inside)
    whole = short | (left == inside)
    bin_ = torch.where(short, torch.zeros_like(bin_), bin_)
    idle = need <= 0
    bin_ = torch.where(idle, torch.full_like(bin_, BINS), bin_)
    return bin_, whole & ~idle, torch.where(whole | idle, torch.zeros_like(left), left)


def _advance(
    pieces: Sequence[Piece], chosen: list[Tensor], alive: list[Tensor], digits: list[Tensor], edge: list[int],
    whole: list[bool], need: list[int],
) -> None:
    """Take what is above the threshold's bin, or in it where the whole bin is taken; keep the bin's entries otherwise."""
    for i, piece in enumerate(pieces):
        g, digit = piece.group, digits[i]
        taken = digit >= edge[g] if whole[g] else digit > edge[g]
        chosen[i][alive[i][taken]] = True
        alive[i] = alive[i][digit == edge[g]] if need[g] > 0 else alive[i][:0]


def _sortable(scores: Tensor) -> Tensor:
    """Signed integers as wide as the scores, and in their order. -0.0 counts as 0.0."""
    kind, bits = (torch.int64, 63) if scores.dtype == torch.float64 else (torch.int32, 31)
    raw = (scores + 0.0).view(kind)
    return torch.bitwise_xor(raw, (raw >> bits) & (2**bits - 1))
