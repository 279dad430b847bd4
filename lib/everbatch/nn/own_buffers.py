"""Buffers that belong to one rank's stream, of which no mean over ranks is taken."""

from __future__ import annotations

from torch import nn

__all__ = ["own_buffers"]


def own_buffers(model: nn.Module) -> set[str]:
    """Their names in `model`: those that a module names in its attribute `own_buffers`, a tuple of names.

    Evaluation and export take the mean over ranks of every other floating buffer, and a checkpoint that is read by another
    number of ranks gives them that mean; of these, each rank keeps its own, and reads that of a rank that was there.
    """
    return {f"{path}.{name}".lstrip(".") for path, part in model.named_modules() for name in getattr(part, "own_buffers", ())}
