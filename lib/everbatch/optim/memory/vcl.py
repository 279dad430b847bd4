"""Variational continual learning: weights are Gaussians, and the last task's are the prior of the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from everbatch import seeds
from everbatch.contract import Cost
from everbatch.engines.named import ByName
from everbatch.engines.passes import Objective
from everbatch.engines.shards import Shard, Vector, wide
from everbatch.errors import check_real, check_whole
from everbatch.objective.table import vcl
from everbatch.objective.terms import PosteriorTerm
from everbatch.optim.memory.fisher import Rows
from everbatch.optim.memory.pull import weights_now
from everbatch.optim.mixin import OptimizerMixin

__all__ = ["VCL"]

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
"""Of Adam, by which the deviations are learned."""


class VCL(OptimizerMixin):
    """Variational continual learning, mean field: every weight is a Gaussian, held to what it was after the last task.

        q = prod N(mu_i, sigma_i^2);   L = E_q[ loss ] + strength / samples * KL(q || q_old);   first task: q_old = N(0, prior^2)

    The weights of the model are mu. Each step runs its pass at one sample, mu + sigma * n, so that the gradient g there is
    that of mu, and g * n that of sigma; the divergence and its gradients are in closed form. mu is updated by the base,
    ln sigma by Adam. The sample is a function of seed, step and name: the same at any sharding and in each micro-batch.
    Call `opt.consolidate_vcl()` after a task: q_old <- q.

    Predictions (`Trainer.predict`, or `opt.predicted(lambda: model(x))`) average the probabilities of `predictions` samples,
    the same ones each time: they are logarithms of the mean, or of another problem than classification the mean outputs. What
    is exported are the means.

    Args (Config): see the fields.

    Cost: 20 bytes per owned weight, kept; as many random numbers as weights per step, drawn on the CPU. A prediction:
    `predictions` forwards, and one publication of the weights more than that.
    Order: left of mixins that run passes (SAM), which then run at the sample; right of what limits the gradient (ClipGradNorm).
    Limits: one sample per step; normalisation layers keep statistics of sampled passes.
    Source: Nguyen et al. 2018, arXiv 1710.10628, eq. 4 and 5. Differs: no coresets; one sample per step, not one per row;
    sigma begins at a constant, theirs at exp(-3).
    """

    called_by = "consolidate"
    moves_first = True
    left_of = ("perturbation",)
    example = {"sigma": 0.05, "samples": 40}
    off = {"sigma": 0.0}
    search = {"strength": (1.0, 0.1, 10.0), "sigma": (0.02, 0.05)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        strength: float = 1.0
        """Factor on the divergence, beta; >= 0; 1 is the bound of the evidence."""
        sigma: float = 0.02
        """Standard deviation with which every weight begins; >= 0, 0 switches VCL off."""
        prior: float = 1.0
        """Standard deviation of the first prior, around 0; > 0."""
        sigma_lr: float = 0.01
        """Adam's learning rate of ln sigma; >= 0, 0 keeps the deviations."""
        samples: int = 0
        """Training samples of a task; >= 0, 0: as the trainer says."""
        predictions: int = 10
        """Samples of the weights that a prediction averages over; >= 1."""

        def __post_init__(self) -> None:
            for name in ("strength", "sigma", "sigma_lr"):
                check_real("VCL", name, getattr(self, name), 0.0)
            check_real("VCL", "prior", self.prior, 0.0, open_low=True)
            check_whole("VCL", "samples", self.samples)
            check_whole("VCL", "predictions", self.predictions, 1)

        @property
        def active(self) -> bool:
            """Whether there is a posterior."""
            return self.sigma > 0

    @dataclass
    class State:
        spread: ByName = field(default_factory=ByName)
        """ln sigma."""
        first: ByName = field(default_factory=ByName)
        second: ByName = field(default_factory=ByName)
        """Adam's moments of its gradient, of the present task."""
        steps: int = 0
        """Of the present task."""
        old_mean: ByName = field(default_factory=ByName)
        old_spread: ByName = field(default_factory=ByName)
        """q_old; the first prior where it has no entry."""
        tasks: int = 0

    _vcl_noise: dict[str, Tensor] | None = None
    """n of the step under way, by name."""

    def terms(self) -> tuple[PosteriorTerm, ...]:
        """The divergence."""
        config: VCL.Config = self.configs[VCL]
        if not config.active:
            return ()
        state: VCL.State = self.states[VCL]
        mean, old, now = {}, {}, {}
        for shard in self.host.shards:
            name, like = shard.name, shard.data.new_zeros((), dtype=wide(shard.data))
            mean[name] = state.old_mean.get(name, like)
            old[name] = state.old_spread.get(name, like + math.log(config.prior))
            now[name] = state.spread.get(name, like + math.log(config.sigma))
        return vcl(config.strength, config.samples or self.task_samples, mean, old, now)

    # ---------------------------------------------------------------------------------------------- step
    def estimate_gradient(self, objective: Objective) -> Any:
        """Run the passes at a sample of the weights."""
        config: VCL.Config = self.configs[VCL]
        if not config.active:
            return super().estimate_gradient(objective)
        who = type(self).__name__
        if "loss" not in objective.closures:
            raise RuntimeError(f"{who}: VCL needs opt.step(closure), and the step was given none")
        if not (config.samples or self.task_samples):
            raise RuntimeError(f"{who}: VCL weighs its divergence by the number of a task's training samples, and knows none; "
                               "pass samples=, or set opt.task_samples before each task")
        sample, self._vcl_noise = self._vcl_sample("step", self.step_count)
        with self.displaced(sample):
            return super().estimate_gradient(objective)

    def edit_gradient(self) -> None:
        """Learn the deviations, and add the divergence's gradient to that of the means."""
        super().edit_gradient()
        config: VCL.Config = self.configs[VCL]
        noise, self._vcl_noise = self._vcl_noise, None
        if not config.active or noise is None:
            return
        (term,) = VCL.terms(self)
        state: VCL.State = self.states[VCL]
        state.steps += 1
        for shard, g in self.host.gradient():
            name, data = shard.name, shard.data
            here = g.to(data.device, wide(data))
            spread = self._vcl_spread(shard)
            slope = here * noise[name].to(here) * spread.exp() + term.spread_gradient(name)
            state.spread[name] = spread - config.sigma_lr * self._vcl_adam(name, slope)
            g.add_(term.gradient(name, data).to(g))

    def _vcl_adam(self, name: str, slope: Tensor) -> Tensor:
        """The direction of Adam's step."""
        state: VCL.State = self.states[VCL]
        first, second = state.first.get(name), state.second.get(name)
        state.first[name] = slope * (1 - BETA1) if first is None else torch.lerp(first, slope, 1 - BETA1)
        squares = slope.square()
        state.second[name] = squares * (1 - BETA2) if second is None else torch.lerp(second, squares, 1 - BETA2)
        mean = state.first[name] / (1.0 - BETA1**state.steps)
        root = torch.sqrt(state.second[name] / (1.0 - BETA2**state.steps))
        return mean / (root + EPS)

    def _vcl_spread(self, shard: Shard) -> Tensor:
        """ln sigma of a slice."""
        state: VCL.State = self.states[VCL]
        known = state.spread.get(shard.name)
        if known is not None:
            return known
        return torch.full_like(shard.data, math.log(self.configs[VCL].sigma), dtype=wide(shard.data))

    def _vcl_sample(self, purpose: str, number: int) -> tuple[Vector, dict[str, Tensor]]:
        """sigma * n, and n by name."""
        shards, noises, moves = self.host.shards, {}, []
        for shard in shards:
            data = shard.data
            noise = seeds.normal((self.seed, "vcl", purpose, number, shard.name), shard.start, shard.numel)
            noises[shard.name] = noise.to(data.device, wide(data)).view(data.shape)
            moves.append((noises[shard.name] * self._vcl_spread(shard).exp()).to(data))
        return Vector(self.host, shards, moves), noises

    # ------------------------------------------------------------------------------------------ prediction
    @torch.no_grad()
    def predicted(self, run: Callable[[], Tensor]) -> Tensor:
        """The mean over samples of the weights. Collective."""
        config: VCL.Config = self.configs[VCL]
        if not config.active:
            return super().predicted(run)
        found = []
        for number in range(config.predictions):
            sample, _ = self._vcl_sample("prediction", number)
            with self.displaced(sample):
                self.host.publish_if_dirty()
                found.append(super().predicted(run))
        self.host.publish_if_dirty()
        outputs = torch.stack(found)
        if self.problem is not None:
            return outputs.mean(0)
        return outputs.log_softmax(-1).logsumexp(0) - math.log(config.predictions)

    # -------------------------------------------------------------------------------------------- task end
    @torch.no_grad()
    def consolidate_vcl(self) -> None:
        """q_old <- q. Between two steps, after a task. No collective, no data."""
        state: VCL.State = self.states[VCL]
        if not self.configs[VCL].active:
            return
        state.old_mean = ByName({**state.old_mean, **weights_now(self.host)})
        spreads = {shard.name: self._vcl_spread(shard).clone() for shard in self.host.shards}
        state.old_spread = ByName({**state.old_spread, **spreads})
        state.first, state.second, state.steps = ByName(), ByName(), 0
        state.tasks += 1

    def at_task_end(self, rows: Iterable[Rows]) -> None:
        """`consolidate_vcl`."""
        self.consolidate_vcl()

    @torch.no_grad()
    def vcl_divergence(self) -> Tensor:
        """The divergence, weighed: 0-dim float64. One all-reduce where weights are sharded."""
        total = torch.zeros((), dtype=torch.float64, device=self.host.device)
        for term in VCL.terms(self):
            mine = term.distance(((s.name, s.data) for s in self.host.shards), self.host.device)
            total = total + term.value(self.host.total(mine))
        return total

    def cost(self) -> Cost:
        """Deviations, Adam's moments of them, and the old posterior; inside the step noise and the weights before."""
        if not self.configs[VCL].active:
            return Cost()
        return Cost(state_bytes=20, transient_bytes=12, note="VCL: each step draws a normal number for every weight on the CPU")
