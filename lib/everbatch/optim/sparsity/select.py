"""The k best entries of each layer over shards of it, exactly, without gathering a tensor.

A radix descent over the bits of the scores as sortable integers: a round counts how many candidates of each layer have each
value of the next 8 bits, one all-reduce of all layers' counts decides for all, and only candidates in the bin of the
threshold go on. float32 needs at most 4 rounds, float64 8. Ties go by position, by the same descent. Integer sums are exact in any
order, so every rank takes the same decisions and the choice does not depend on the sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Piece", "choose"]

BITS = 8


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
    pieces: Sequence[Piece], counts: Tensor, total: Callable[[Tensor], Tensor], *, ties: str = "first", span: int = 0,
) -> list[Tensor]:
    """Choose the `counts[g]` candidates of each group g that have the largest scores, or all where there are fewer.

    Args:
        pieces: what this rank holds; may be empty.
        counts: (groups,) int64 on CPU, the same on every rank.
        total: sums a tensor over the ranks that share one copy of the model, in place (`Host.total`).
        ties: among equal scores at the threshold take the "first" positions, the "last", or "all" (more than asked then).
        span: positions of the largest group, at least; the same on every rank. Needed for ties "first" and "last".

    Returns:
        One bool mask (n,) per piece.

    Cost: one all-reduce of 256 counts per group and round; rounds end as soon as every threshold is settled. One host sync
    per round: for topology updates, not for every step.
    """
    device = pieces[0].scores.device if pieces else torch.device("cpu")
    chosen = [torch.zeros_like(p.candidates) for p in pieces]
    alive = [p.candidates.nonzero().view(-1) for p in pieces]
    need = counts.clone()
    ranked = bool(pieces) and pieces[0].priority is not None
    stages: list[tuple[Callable[[int], Tensor], int, bool]] = []
    # Every rank must take the same rounds, whatever it holds: the flags travel with the first question.
    width = torch.tensor([max([p.scores.element_size() for p in pieces], default=0), int(ranked)], device=device)
    kinds = torch.zeros(10, dtype=torch.int64, device=device)
    kinds[width[0]] += 1
    kinds[9] += width[1]
    kinds = total(kinds).cpu()
    size = max([b for b in (2, 4, 8) if kinds[b]], default=4)
    if kinds[9]:
        stages.append((lambda i: _priority(pieces[i])[alive[i]], 1, False))
    keys: dict[int, Tensor] = {}

    def score(i: int) -> Tensor:
        if i not in keys:
            keys[i] = _sortable(pieces[i].scores, size)
        return keys[i][alive[i]]

    stages.append((score, size, True))
    if ties != "all":
        depth = max(1, -(-max(span, 1).bit_length() // BITS))

        def position(i: int) -> Tensor:
            at = alive[i] + pieces[i].offset
            return span - at if ties == "first" else at

        stages.append((position, depth, False))
    for read, size_, signed in stages:
        for byte in reversed(range(size_)):
            if not bool((need > 0).any()):
                return chosen
            digits = []
            counted = torch.zeros(len(need), 1 << BITS, dtype=torch.int64, device=device)
            for i, piece in enumerate(pieces):
                digit = ((read(i) >> (BITS * byte)) & 255).to(torch.int64)
                digit = digit ^ 128 if signed and byte == size_ - 1 else digit
                digits.append(digit)
                counted[piece.group] += torch.bincount(digit, minlength=1 << BITS)
            above, settled, need = _settle(total(counted).cpu(), need)
            _advance(pieces, chosen, alive, digits, above, settled, need)
    if ties == "all":
        for i, piece in enumerate(pieces):
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
    bin_ = torch.where(idle, torch.full_like(bin_, 1 << BITS), bin_)
    return bin_, whole & ~idle, torch.where(whole | idle, torch.zeros_like(left), left)


def _advance(
    pieces: Sequence[Piece], chosen: list[Tensor], alive: list[Tensor], digits: list[Tensor], bins: Tensor, whole: Tensor,
    need: Tensor,
) -> None:
    """Take what is above the threshold's bin, or in it where the whole bin is taken; keep the bin's entries otherwise."""
    edge, all_of, more = bins.tolist(), whole.tolist(), need.tolist()
    for i, piece in enumerate(pieces):
        g, digit = piece.group, digits[i]
        taken = digit >= edge[g] if all_of[g] else digit > edge[g]
        chosen[i][alive[i][taken]] = True
        alive[i] = alive[i][digit == edge[g]] if more[g] > 0 else alive[i][:0]


def _sortable(scores: Tensor, size: int) -> Tensor:
    """Signed integers of `size` bytes, in the order of the scores. -0.0 counts as 0.0."""
    wide = scores.to({2: torch.float32, 4: torch.float32, 8: torch.float64}[size]) + 0.0
    kind, bits, top = (torch.int64, 63, 2**63 - 1) if size == 8 else (torch.int32, 31, 2**31 - 1)
    raw = wide.view(kind)
    return raw ^ ((raw >> bits) & top)


def _priority(piece: Piece) -> Tensor:
    assert piece.priority is not None
    return piece.priority
