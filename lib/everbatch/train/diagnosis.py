"""Where a step that was skipped went wrong: which rank, which samples, which tensor."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from everbatch.distributed import World
from everbatch.engines.nonfinite import nonfinite_weights
from everbatch.optim.mixin import OptimizerMixin
from everbatch.rows import named
from everbatch.train.record import StepRecord

__all__ = ["warn_of_no_units", "where_not_finite"]


def where_not_finite(optimizer: OptimizerMixin, world: World, record: StepRecord) -> str:
    """What in a skipped step was not finite, in words, the same on every rank: of the first rank that has any, the samples and
    the first tensor on the way from inputs over weights and logits to gradients. One gather; host syncs."""
    weights = nonfinite_weights(optimizer.host)
    mine = _inputs(record) or ((f"weight {weights[0]!r}", []) if weights else _logits(record))
    ids = [key for part in record.parts for key in part.ids.tolist()]
    if mine is None and not bool(torch.isfinite(record.loss).all()):
        mine = "the loss", ids
    everywhere: list[Any] = world.gather((mine, ids, optimizer.last_nonfinite))
    gradient = next((name for *_, name in everywhere if name), None)
    tail = f", and the first gradient is that of {gradient!r}" if gradient else ""
    for rank, (found, all_ids, _) in enumerate(everywhere):
        if found is not None:
            what, chosen = found
            return f"the first tensor that is not finite is {what} on rank {rank}, samples {_short(chosen or all_ids)}{tail}"
    rank = next((r for r, (*_, name) in enumerate(everywhere) if name), 0)
    samples = _short(everywhere[rank][1])
    return (f"losses are finite on every rank, and the first tensor that is not finite is the gradient of {gradient!r} on rank "
            f"{rank}, samples {samples}")


def _inputs(record: StepRecord) -> tuple[str, list[int]] | None:
    """The first part with inputs that are not finite, and the ids of their samples."""
    for part in record.parts:
        for name, value in named("the input", part.inputs).items():
            bad = _bad(value)
            if not bad.any():
                continue
            return f"{name} (part {part.part!r})", part.ids[bad[: len(part.ids)].to(part.ids.device)].tolist()
    return None


def _logits(record: StepRecord) -> tuple[str, list[int]] | None:
    """The same of logits."""
    for part in record.parts:
        outputs = record.outputs.get(part.part)
        bad = _bad(outputs) if outputs is not None else torch.zeros(0, dtype=torch.bool)
        if bad.any() and len(bad) == len(part.ids):
            return f"the logits (part {part.part!r})", part.ids[bad.to(part.ids.device)].tolist()
    return None


def _bad(rows: Tensor) -> Tensor:
    """(n,) bool: rows with an element that is not finite."""
    return ~torch.isfinite(rows.reshape(len(rows), -1)).all(1) if rows.is_floating_point() else torch.zeros(0, dtype=torch.bool)


def _short(ids: list[int]) -> str:
    return f"{ids[:8]}{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}"


def warn_of_no_units(problem: str, where: str, rank: int) -> None:
    """Warn, on rank 0, of samples in which nothing counts: they teach nothing, and scores of them are not a number."""
    if rank == 0:
        warnings.warn(f"{problem}: no unit of {where} counts, so they teach nothing and scores of them are NaN; look at the "
                      "targets, of which a language model leaves out those that equal `ignore`", stacklevel=6)
