"""Averaged gradient episodic memory: a step does not raise the loss of what is remembered, to first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everbatch.contract import Cost
from everbatch.engines.passes import Objective
from everbatch.engines.shards import Vector, inner
from everbatch.errors import check_whole
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.sharpness.ascent import combine_, masters_copy, paired

__all__ = ["AGEM", "share_to_add"]


@torch.no_grad()
def share_to_add(g: Vector, reference: Vector) -> Tensor:
    """How much of the reference gradient r is added to g, 0-dim float64:

        -<g, r> / ||r||^2  where <g, r> < 0,  else 0

    Then <g + share * r, r> = max(<g, r>, 0): of all such gradients it is the one nearest to g. One all-reduce of two scalars
    where weights are sharded; no host sync. NaN stays NaN.
    """
    g, r = paired(g, reference)
    product, square = inner(g.host, (g, r), (r, r)).unbind()
    share = -product / square.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(product >= 0, torch.zeros_like(share), share)


class AGEM(OptimizerMixin):
    """A-GEM: where the step's gradient conflicts with that of remembered samples, its part along it is taken out.

        r = grad L(memory);  g <- g - min(<g, r>, 0) / ||r||^2 r

    Both gradients are those of the global batches, and the product is over the whole model: the same at any world size and
    sharding. The samples come as an objective of the step, `opt.step(closure, reference=...)`, a closure like the first;
    `everbatch.train.EpisodicMemory` draws them. A step without it, while the memory is empty, is a plain one.

    Penalties on the weights are in g and not in r. The reference pass repeats the first one's noise and leaves statistics as
    they are. A parameter that only the reference pass reached has a gradient afterwards, of zeros where nothing conflicts.
    `metrics["agem_projected"]` is 1 in a step that was edited.

    Args (Config): see the fields.

    Raises:
        ValueError: at construction of a `Trainer`: one without a memory to draw from.

    Cost: one more pass (at every `every`-th step) over the samples drawn; one copy of the owned masters, two inside the edit;
    one all-reduce of two scalars where sharded.
    Order: left of sharpness mixins, whose gradient it edits. Limits: none.
    Source: Chaudhry et al. 2019, arXiv 1812.00420, eq. 11.
    Differs: `every`.
    """

    left_of = ("perturbation",)
    called_by = "episodic"
    example = {"every": 1}
    off = {"every": 0}
    search = {}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        every: int = 1
        """Steps between two that look at the memory; >= 0, 0 switches it off."""

        def __post_init__(self) -> None:
            check_whole("AGEM", "every", self.every)

    @classmethod
    def wants(cls, config: Any) -> tuple[str, ...]:
        """The memory's objective."""
        return ("reference",) if config.every else ()

    def estimate_gradient(self, objective: Objective) -> Any:
        """Take the gradient, then that of the memory, and edit the first; returns the loss of the first pass."""
        config: AGEM.Config = self.configs[AGEM]
        loss = super().estimate_gradient(objective)
        there = "reference" in objective.closures
        if not (there and config.every) or self.step_count % config.every:
            return loss
        g = masters_copy(self.host.gradient())
        objective("reference")
        reference = self.host.gradient()
        share = share_to_add(g, reference)
        combine_(self.host, reference, g, share, 1.0)
        self.metrics["agem_projected"] = (share != 0).float()
        return loss

    def cost(self) -> Cost:
        """One more pass at the steps that look."""
        every = self.configs[AGEM].every
        return Cost(passes=1 / every, transient_bytes=12, scalar_reductions=1 / every) if every else Cost()
