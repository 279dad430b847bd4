"""Refresh learning: forget a little of the current batch's fit, then learn it again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from everbatch import seeds
from everbatch.contract import Cost
from everbatch.engines.named import ByName
from everbatch.engines.passes import Objective
from everbatch.engines.shards import Shard, Vector
from everbatch.errors import check, check_real, check_whole
from everbatch.optim.memory.fisher import Estimator, Factory, Rows
from everbatch.optim.memory.importance import accumulate, check_estimator, chosen_importance, slices
from everbatch.optim.memory.replica import require_replica
from everbatch.optim.memory.unlearning import inverse_fisher, normalized_move, norms_of, sde_move
from everbatch.optim.mixin import OptimizerMixin

__all__ = ["Refresh"]


class Refresh(OptimizerMixin):
    """Refresh learning: every few steps the weights first ascend the loss, where earlier tasks do
    not mind.

        sde:         theta <- theta + gamma * P grad L(theta) + N(0, 2 gamma P),  unlearn_steps times;  P = 1 / (F + damping)
        normalized:  theta_t <- theta_t + delta * (||theta_t|| g_t / ||g_t|| + noise_coef n) / (1 + fisher_coef F_t)  per tensor t
        then         the ordinary step from there, with every other mixin

    F is the diagonal Fisher information of earlier tasks; call `opt.update_fisher(batches)` after a
    task. Before that P = 1 and F = 0. After it F = 0 for a parameter that was added or unfrozen
    since, and a frozen one keeps its F. "sde" is the paper's algorithm, "normalized" the released
    code's. The latter's own settings are `form="normalized", loss="current_ce", every=1`, with the
    defaults of all else.

    The unlearning gradient is the one of the global batch (all micro-batches), with penalties for
    loss="full". It has dropout noise of its own and moves no statistics. Masters are moved in fp32.
    Noise is a function of (seed, step, name, position), the same at any sharding. A skipped step
    puts the weights back bit for bit. A gradient of the unlearning pass that is not finite cancels
    the whole move of that step, on every rank; such steps are counted in
    `opt.states[Refresh].refused`.

    Args (Config): see the fields; gamma = 0 (sde) or delta = 0 (normalized) switches it off and
    leaves every bit.

    Cost: unlearn_steps / every passes per step; one copy of the owned masters, kept (F), and up to
    four inside a refreshed step; one host sync and one scalar all-reduce per unlearning pass,
    "normalized" one more for all norms; the draw of the noise on the CPU.
    Order: left of mixins that take further passes, so that its weights are put back also when one
    of those raises.
    Limits: masters in bf16 (a bf16 model without an engine) swallow moves of 1e-5.

    A refreshed step of plain SGD moves the weights by (gamma P - lr) grad L, to first order: with
    gamma P = lr it learns nothing, beyond that it unlearns. A small conv net on digits has no F
    above 0.05, and 5e-5 on average, so that at the default damping P is 1 to within 5 %, after the
    first task as in it, and F hardly guides anything. For F to matter, take damping near F's own
    size and gamma as much smaller.

    Source: Wang et al. 2024, arXiv 2403.13249, and joey-wang123/CL-refresh-learning, which differ
    as said. Differs from the paper: F is damped; gamma is a tenth of the recipes' learning rate,
    where the paper's are 0.02 to 0.04, at a scale of F that we do not know. 0.03 beside a rate of
    0.03 left DER++ at 4.4 % on 50 characters of Omniglot in 10 tasks (one seed), where it has 37.6 %
    without refresh, 38.0 % at 0.003 and 39.6 % with form="normalized", a spread that seeds have
    too: no gain is claimed. Noise is off by default
    (`noise_scale=1` is the paper's): its standard deviation is sqrt(2 gamma P) for every weight,
    0.08 at this gamma, as much as most weights are large.
    """

    moves_first = True
    left_of = ("perturbation",)
    called_by = "consolidate"
    example = {"gamma": 0.1, "noise_scale": 0.05}
    off = {"gamma": 0.0}
    search = {"gamma": (0.003, 0.001, 0.01), "every": (5, 2, 1)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        form: Literal["sde", "normalized"] = "sde"
        """The paper's algorithm, or the released code's."""
        every: int = 2
        """Refresh in steps 0, every, 2 * every, ...; >= 1."""
        unlearn_steps: int = 1
        """Ascent steps before a refreshed step (J); >= 1."""
        loss: Literal["full", "current_ce"] = "full"
        """What is ascended: the step's closure with all penalties, or the closure passed as
        `opt.step(closure, data=...)`."""
        gamma: float = 0.003
        """form="sde": step size of the ascent, which wants to be well below the learning rate;
        >= 0."""
        damping: float = 1.0
        """form="sde": added to F before it is inverted; >= 1e-8. At 1, P is 1 where F is 0, as
        before the first task's end."""
        noise_scale: float = 0.0
        """form="sde": factor on the noise, 1 being the paper's; >= 0."""
        delta: float = 1e-5
        """form="normalized": relative move of each tensor; >= 0."""
        fisher_coef: float = 1e-3
        """form="normalized": factor on F; >= 0."""
        noise_coef: float = 1e-3
        """form="normalized": factor on the noise before delta; >= 0."""
        fisher_decay: float = 1e-5
        """Factor on F at each update: the default keeps the last task's alone, as the released
        code; in [0, 1]."""
        estimator: Estimator | Literal["given"] = "reference"
        """Which Fisher information `update_fisher` estimates (see `fisher_sums`); "given": it must
        be handed in."""
        denominator: Literal["samples", "loader"] = "samples"
        """What sums are divided by: the samples, or batches * batch size as the reference code."""
        chunk: int = 16
        """Samples differentiated at once, in memory chunk * weights; >= 1."""
        factory: Factory | None = None
        """Builds the bare model on the CPU; needed on ZeRO stage 3 and FSDP2 for the plain
        replica."""

        def __post_init__(self) -> None:
            check(self.form in ("sde", "normalized"), "Refresh", f"form={self.form!r}", "be sde or normalized")
            check(self.loss in ("full", "current_ce"), "Refresh", f"loss={self.loss!r}", "be full or current_ce")
            for name in ("every", "unlearn_steps"):
                value = getattr(self, name)
                check_whole("Refresh", name, value, 1)
            for name in ("gamma", "delta", "noise_scale", "fisher_coef", "noise_coef"):
                check_real("Refresh", name, getattr(self, name), 0.0)
            check_real("Refresh", "damping", self.damping, 1e-8)
            check_real("Refresh", "fisher_decay", self.fisher_decay, 0.0, 1.0)
            check_estimator("Refresh", self)

        @property
        def active(self) -> bool:
            """Whether weights are moved at all."""
            return bool(self.gamma if self.form == "sde" else self.delta)

    @classmethod
    def wants(cls, config: Refresh.Config) -> tuple[str, ...]:
        """The loss of the stream alone, to unlearn it."""
        return ("data",) if config.loss == "current_ce" else ()

    @dataclass
    class State:
        fisher: ByName = field(default_factory=ByName)
        tasks: int = 0
        refused: int = 0
        """Applied steps whose unlearning gradient was not finite."""

    _refresh_undo: Vector | None = None
    """The weights before this step's move, until the gradient has been taken."""

    def on_attach(self) -> None:
        """Refuse at once what `update_fisher` would refuse after hours."""
        config: Refresh.Config = self.configs[Refresh]
        if config.active and config.estimator != "given":
            require_replica(self.host, config.factory, "Refresh")

    def move_parameters(self, objective: Objective) -> None:
        """Unlearn, in every `every`-th step."""
        super().move_parameters(objective)
        config: Refresh.Config = self.configs[Refresh]
        if not config.active:
            return
        name = "data" if config.loss == "current_ce" else "loss"
        for needed, given in (("loss", "step(closure)"), (name, f"step(closure, {name}=...)")):
            if needed not in objective.closures:
                raise RuntimeError(f"{type(self).__name__}: Refresh needs opt.{given}, and the step was not given it")
        if self.step_count % config.every:
            return
        kept = self._refresh_undo = self.host.weights().clone()
        self.on_skip(lambda: self._put_back(kept))
        try:
            for iteration in range(config.unlearn_steps):
                objective(name, probe=True)
                if not bool(self.host.finite()):
                    self._put_back(kept)
                    self.on_apply(self._count_refused)
                    break
                move = self.displacement(self._unlearning(config, iteration))
                Vector(self.host, move.shards, [s.data for s in move.shards]).add_(move)
                self.host.touch()
        except BaseException:
            self._put_back(kept)
            raise

    def estimate_gradient(self, objective: Objective) -> Any:
        """Put the weights back if a pass raises."""
        try:
            return super().estimate_gradient(objective)
        except BaseException:
            if self._refresh_undo is not None:
                self._put_back(self._refresh_undo)
            raise
        finally:
            self._refresh_undo = None

    def _unlearning(self, config: Refresh.Config, iteration: int) -> Vector:
        """The move along the present gradient, in the masters' dtype."""
        state: Refresh.State = self.states[Refresh]
        # Parameters that the pass did not reach stay where they are, noise included, unlike in the
        # released code: a step that has no use for the head of an old task does not wear it away.
        dense = self.host.gradient()
        shards = dense.shards
        weights = [shard.data for shard in shards]
        gradients = [g.to(data) for g, data in zip(dense.tensors, weights, strict=True)]
        noises = [self._noise(config, shard, iteration) for shard in shards]
        fishers = [state.fisher.get(shard.name) for shard in shards]
        if config.form == "sde":
            moves = []
            for g, f, noise in zip(gradients, fishers, noises, strict=True):
                inverse = inverse_fisher(g, f, config.damping) if state.tasks else torch.ones_like(g)
                moves.append(sde_move(g, inverse, config.gamma, noise).to(g))
            return Vector(self.host, shards, moves)

        weight_norms, norms = norms_of(self.host, shards, weights, gradients)
        moves = []
        for shard, g, f, noise in zip(shards, gradients, fishers, noises, strict=True):
            move = normalized_move(
                g, weight_norms[shard.name], norms[shard.name], f, noise, delta=config.delta,
                fisher_coef=config.fisher_coef, noise_coef=config.noise_coef)
            moves.append(move.to(g))
        return Vector(self.host, shards, moves)

    def _noise(self, config: Refresh.Config, shard: Shard, iteration: int) -> Tensor | None:
        """n of one slice: "sde" takes it times its scale, "normalized" applies a coefficient of its
        own."""
        scale = config.noise_scale if config.form == "sde" else config.noise_coef
        if not scale:
            return None
        data = shard.data
        noise = self.refresh_noise(shard, iteration).to(data).view(data.shape)
        return noise * scale if config.form == "sde" else noise

    def refresh_noise(self, shard: Shard, iteration: int) -> Tensor:
        """Standard normal noise of one slice, (numel,) float32, CPU: a function of (seed, step,
        iteration, name, position)."""
        return seeds.normal((self.seed, "refresh", self.step_count, iteration, shard.name), shard.start, shard.numel)

    def _put_back(self, kept: Vector) -> None:
        if kept.tensors:
            torch._foreach_copy_([s.data for s in kept.shards], kept.tensors)
        self.host.touch()

    def _count_refused(self) -> None:
        self.states[Refresh].refused += 1

    @torch.no_grad()
    def update_fisher(
        self, batches: Iterable[Rows] | None = None, *, importance: Mapping[str, Tensor] | None = None,
    ) -> None:
        """F <- fisher_decay * F + F_new, at the present weights. Between two steps, after a task.
        Collective.

        Arguments and errors are those of `EWC.consolidate_ewc`; F_new is importance there.
        """
        config: Refresh.Config = self.configs[Refresh]
        state: Refresh.State = self.states[Refresh]
        whole = chosen_importance(self, "Refresh", config, batches, importance, state.tasks)
        fisher = ByName(state.fisher)
        for name, f in slices(self.host, whole, "Refresh").items():
            fisher[name] = accumulate(fisher.get(name), f, "online", config.fisher_decay, state.tasks)
        state.fisher = fisher
        state.tasks += 1

    def at_task_end(self, rows: Iterable[Rows]) -> None:
        """`update_fisher`."""
        self.update_fisher(rows)

    def cost(self) -> Cost:
        """The unlearning passes; F; inside the step the weights before, the move and what it is
        made of."""
        config: Refresh.Config = self.configs[Refresh]
        if not config.active:
            return Cost()
        share = config.unlearn_steps / config.every
        return Cost(passes=share, state_bytes=4, transient_bytes=16,
                    scalar_reductions=share * (2 if config.form == "normalized" else 1),
                    note=f"Refresh: one step in {config.every} has {config.unlearn_steps} unlearning pass(es) first, and one "
                         "host sync for each")
