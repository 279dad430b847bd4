"""Memory-aware synapses: every weight is pulled to where earlier tasks left it, by how much outputs
depend on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from everbatch.contract import Cost
from everbatch.engines.named import ByName
from everbatch.errors import check_real, check_whole
from everbatch.objective import table
from everbatch.objective.terms import WeightTerm
from everbatch.optim.memory.fisher import Factory, Rows, output_sensitivity
from everbatch.optim.memory.importance import slices
from everbatch.optim.memory.pull import penalty, pull, weights_now
from everbatch.optim.memory.replica import require_replica
from everbatch.optim.mixin import OptimizerMixin

__all__ = ["MAS"]


class MAS(OptimizerMixin):
    """Memory-aware synapses: importance is how much the outputs depend on each weight; no labels.

        penalty  strength * sum_i Omega_i (theta_i - theta*_i)^2         gradient  2 * strength * Omega (theta - theta*)
        Omega_new = mean_i |d ||u(x_i)||^2|;     Omega <- retain * Omega + (1 - retain) * Omega_new;     first task: Omega_new

    Call `opt.consolidate_mas(batches)` after a task. For what else holds see EWC.

    Cost: as EWC; one backward per sample in a consolidation. Order: any.

    Source: Aljundi et al. 2018, arXiv 1711.09601; moving average of Avalanche. Differs from
    Avalanche: per-sample gradients, the paper's definition, by default, because the mean over a
    batch depends on how the data is cut into batches and ranks.
    """

    called_by = "consolidate"
    between_tasks = True
    example = {"strength": 0.05}
    off = {"strength": 0.0}
    search = {"strength": (1.0, 0.1, 10.0)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        strength: float = 1.0
        """Factor on the penalty; >= 0, 0 switches it off."""
        retain: float = 0.5
        """Weight of the importance so far; in [0, 1]."""
        per_sample: bool = True
        """Absolute gradient of each sample (the paper), or of each batch's mean (Avalanche)."""
        chunk: int = 16
        """Samples differentiated at once, in memory chunk * weights; >= 1."""
        factory: Factory | None = None
        """Builds the bare model on the CPU; needed on ZeRO stage 3 and FSDP2 for the plain
        replica."""

        def __post_init__(self) -> None:
            check_real("MAS", "strength", self.strength, 0.0, cure="pass 0 to switch it off")
            check_real("MAS", "retain", self.retain, 0.0, 1.0)
            check_whole("MAS", "chunk", self.chunk, 1)

    @dataclass
    class State:
        importance: ByName = field(default_factory=ByName)
        anchor: ByName = field(default_factory=ByName)
        tasks: int = 0

    def on_attach(self) -> None:
        """Refuse at once what a consolidation would refuse after hours."""
        config: MAS.Config = self.configs[MAS]
        if config.strength:
            require_replica(self.host, config.factory, "MAS")

    def terms(self) -> tuple[WeightTerm, ...]:
        """The penalty."""
        state: MAS.State = self.states[MAS]
        return table.mas(self.configs[MAS].strength, state.importance, state.anchor)

    def add_penalty(self) -> None:
        """Pull towards the anchor."""
        super().add_penalty()
        pull(self.host, MAS.terms(self))

    @torch.no_grad()
    def consolidate_mas(self, batches: Iterable[Rows]) -> None:
        """Remember the present weights and how much the outputs depend on each. Between two steps,
        after a task. Collective.

        Args:
            batches: this rank's rows of the task's data; of each item only the first tensor, the
                inputs, is used.
        """
        config: MAS.Config = self.configs[MAS]
        state: MAS.State = self.states[MAS]
        whole = output_sensitivity(
            self, batches, per_sample=config.per_sample, chunk=config.chunk, factory=config.factory)
        new = slices(self.host, whole, "MAS")
        # What was added or unfrozen since is in its first task; what is frozen keeps what it has.
        for name, old in state.importance.items():
            if name in new:
                new[name] = torch.lerp(new[name], old.to(new[name]), config.retain)
            else:
                new[name] = old
        state.importance = new
        state.anchor = ByName({**state.anchor, **weights_now(self.host)})
        state.tasks += 1

    def at_task_end(self, rows: Iterable[Rows]) -> None:
        """`consolidate_mas`."""
        self.consolidate_mas(rows)

    @torch.no_grad()
    def mas_penalty(self) -> Tensor:
        """The term whose gradient is added: 0-dim float64. One all-reduce where weights are
        sharded."""
        return penalty(self.host, MAS.terms(self))

    def cost(self) -> Cost:
        """Importance and anchor."""
        return Cost(state_bytes=8, transient_bytes=4) if self.configs[MAS].strength else Cost()
