"""What EWC, MAS and Refresh do with the importance of weights: where it comes from, and how tasks
add up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from everbatch.engines.host import Host
from everbatch.engines.named import ByName
from everbatch.engines.shards import wide
from everbatch.errors import check, check_whole
from everbatch.optim.memory.fisher import ESTIMATORS, Rows, diagonal_fisher
from everbatch.optim.mixin import OptimizerMixin

__all__ = ["accumulate", "check_estimator", "chosen_importance", "slices"]


def check_estimator(who: str, config: Any) -> None:
    """Check the fields estimator, denominator and chunk."""
    allowed = (*ESTIMATORS, "given")
    check(config.estimator in allowed, who, f"estimator={config.estimator!r}", f"be one of {', '.join(allowed)}")
    check(config.denominator in ("samples", "loader"), who, f"denominator={config.denominator!r}", "be samples or loader")
    check_whole(who, "chunk", config.chunk, 1)


def chosen_importance(
    opt: OptimizerMixin, who: str, config: Any, batches: Iterable[Rows] | None,
    importance: Mapping[str, Tensor] | None, draw: int,
) -> Mapping[str, Tensor]:
    """Whole importances: those given, or the Fisher information of the batches."""
    check((batches is None) != (importance is None), who, "both or neither of batches and importance", "be exactly one")
    if importance is not None:
        return importance
    check(config.estimator != "given", who, "batches for estimator='given'", "be importance=...",
          f"build with {who.lower()}_estimator='empirical', or pass importance=diagonal_fisher(opt, batches)")
    assert batches is not None
    return diagonal_fisher(opt, batches, config.estimator, chunk=config.chunk, denominator=config.denominator,
                           factory=config.factory, draw=draw)


def accumulate(old: Tensor | None, new: Tensor, form: str, gamma: float, tasks: int) -> Tensor:
    """Importance after a further task: gamma * old + new, or for form="mean" the running mean of
    all tasks."""
    if old is None or not tasks:
        return new
    return (old * tasks + new) / (tasks + 1) if form == "mean" else old * gamma + new


def slices(host: Host, whole: Mapping[str, Tensor], who: str) -> ByName:
    """This rank's slices of whole importances, in the masters' dtype, float32 at least.

    Raises:
        ValueError: names or shapes that are not the model's, negative entries or entries that are
            not finite.
    """
    layout = host.master_layout()
    odd = sorted(set(layout) ^ set(whole))
    check(not odd, who, f"importance of parameters {odd[:5]} is missing or too much", "name the trained parameters")
    odd = [n for n in layout if tuple(whole[n].shape) != tuple(layout[n][1])]
    check(not odd, who, f"importance of {odd[:5]} has shape {[tuple(whole[n].shape) for n in odd[:5]]}",
          f"be {[tuple(layout[n][1]) for n in odd[:5]]}")
    odd = [n for n in layout if not bool((torch.isfinite(whole[n]) & (whole[n] >= 0)).all())]
    check(not odd, who, f"importance of {odd[:5]} is negative or not finite", "be finite numbers >= 0")
    return ByName({s.name: whole[s.name].reshape(-1)[s.start : s.start + s.numel].to(
        s.data.device, wide(s.data), copy=True).view(s.data.shape) for s in host.shards})
