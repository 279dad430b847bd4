"""Efficient SAM: perturb some tensors, take the second gradient on some samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everbatch import seeds
from everbatch.contract import Cost
from everbatch.engines.passes import Objective
from everbatch.engines.shards import Vector
from everbatch.errors import check_real
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.sharpness.ascent import ascent

__all__ = ["ESAM", "select_samples"]


def select_samples(before: Tensor, after: Tensor, gamma: float, *, strict: bool = True) -> Tensor:
    """Rows whose loss a perturbation raises most: indices of d = after - before above its q-th largest value, q = floor(gamma n).

    strict: d > that value, so q - 1 rows without ties, as in the authors' code; otherwise d >= it. No row left: all rows.
    """
    rise, q = after - before, int(gamma * len(before))
    if q < 1:
        return torch.arange(len(before), device=before.device)
    bar = rise.topk(q).values[-1]
    rows = torch.nonzero(rise > bar if strict else rise >= bar).flatten()
    return rows if len(rows) else torch.arange(len(before), device=before.device)


class ESAM(OptimizerMixin):
    """SAM whose second pass sees only the samples that the perturbation hurts most (SDS), and whose perturbation moves only a
    random part of the tensors (SWP).

        e as SAM, each tensor kept with probability beta and divided by beta;  f = grad of the mean loss over selected samples

    Needs `opt.step(closure, per_sample=fn)`, fn(rows) giving the losses (n,) of those rows of the batch (None: all), with a
    graph; both passes run through it. Under data parallelism each rank selects among its own rows.

    Cost: two forwards more, one of them without a graph, and a backward over gamma of the batch; otherwise as SAM.
    Order: any. Limits: one owner of the perturbation; global scope; no micro-batches inside per_sample.
    Source: Du et al. 2022, arXiv 2110.03141, and the authors' code (strict selection).
    """

    owns = ("perturbation",)
    needs = ("per_sample",)
    # Each rank selects among its own rows, one process among all: equal only where all are selected (gamma 1, ties included),
    # which still runs both passes through per_sample, and perturbs the tensors that a seeded coin picks.
    example = {"rho": 0.5, "gamma": 1.0, "strict": False, "beta": 0.6}
    off = {"rho": 0.0}
    search = {"rho": (0.02, 0.05, 0.1), "beta": (1.0, 0.6), "gamma": (0.5, 0.6)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        rho: float = 0.05
        """Radius of the perturbation, in parameter units; >= 0."""
        gamma: float = 0.5
        """Share of samples the second pass sees; in (0, 1]."""
        beta: float = 1.0
        """Probability that a tensor is perturbed; in (0, 1]."""
        delta: float = 1e-7
        """Guard added to the gradient norm, as in the authors' code; >= 0."""
        strict: bool = True
        """Select above the threshold only, as the authors' code does; False includes it."""

        def __post_init__(self) -> None:
            check_real("ESAM", "rho", self.rho, 0.0, cure="pass rho=0 to switch it off")
            check_real("ESAM", "delta", self.delta, 0.0)
            check_real("ESAM", "gamma", self.gamma, 0.0, 1.0, open_low=True)
            check_real("ESAM", "beta", self.beta, 0.0, 1.0, open_low=True)

    def estimate_gradient(self, objective: Objective) -> Any:
        """Perturb, select, take the gradient of the selected; returns the loss of the first pass."""
        config: ESAM.Config = self.configs[ESAM]
        if not config.rho:
            return super().estimate_gradient(objective)
        per_sample: Callable[..., Tensor] = objective.closures["per_sample"]
        before: list[Tensor] = []

        def whole() -> Tensor:
            losses = per_sample(None)
            before[:] = [losses.detach()]
            self.backward(losses.mean())
            return losses.mean()

        def selected() -> Tensor:
            with torch.no_grad():
                after = per_sample(None)
            losses = per_sample(select_samples(before[0], after, config.gamma, strict=config.strict))
            self.backward(losses.mean())
            return losses.mean()

        objective.closures = {**objective.closures, "loss": whole}
        loss = super().estimate_gradient(objective)
        with self.displaced(self._esam_thin(ascent(self.host.gradient(), config.rho, config.delta))):
            objective(selected)
        return loss

    def _esam_thin(self, move: Vector) -> Vector:
        config: ESAM.Config = self.configs[ESAM]
        if config.beta == 1.0:
            return move
        return move.map_(lambda s, t: t.mul_(
            float(torch.rand((), generator=seeds.generator(self.seed, "esam", self.step_count, s.name)) < config.beta)
            / config.beta))

    def cost(self) -> Cost:
        """A second pass over part of the batch while rho > 0."""
        config = self.configs[ESAM]
        note = "one more forward, without a graph, to select the samples"
        return Cost(passes=config.gamma, transient_bytes=8, scalar_reductions=1, note=note) if config.rho else Cost()
