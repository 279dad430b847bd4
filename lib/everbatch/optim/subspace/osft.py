"""Orthogonal subspace fine-tuning: what earlier tasks wrote into the leading directions of each matrix stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from everbatch.contract import Cost
from everbatch.optim.memory.replica import require_replica
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.subspace.maps import Maps, averages_after
from everbatch.optim.subspace.options import OsftOptions
from everbatch.optim.subspace.ranks import kept_blocks, target_sizes
from everbatch.optim.subspace.visits import Rows

__all__ = ["OSFT"]


class OSFT(OptimizerMixin):
    """Orthogonal subspace fine-tuning (adaptive SVD): later tasks leave the leading singular directions of each matrix alone.

        W = U S V^T,  U_h, V_h: the k leading pairs        form="weight":  D <- D - U_h U_h^T D V_h V_h^T
        D: the update, or the gradient                     form="factor":  D <- (I - U_h U_h^T) D (I - V_h V_h^T)
        k = floor((mrr + I (trr - mrr)) min(o, d)),  I: how alike a layer's inputs and outputs are, over its mean

    Call `opt.consolidate_osft(batches)` after a task, with its un-augmented data; the first task is trained by the base alone,
    unless `pretrained`. k = 0 is plain fine-tuning of a matrix; a square one of which all is kept is frozen (form "weight").

    Args (Config): see the fields.

    Raises:
        ValueError: a pattern that matches no trained matrix; importance that does not fit.
        NoFreeSubspace: every target is wholly kept.
        UnsupportedHost: at construction, where importance needs a replica and has none.

    Cost: of a step, 6 k (o + d) + 4 o d k multiply-adds per matrix, one all-reduce of the targets where weights are sharded, a
    copy of the owned slices; of a call, an SVD per matrix on every rank, and a forward pass per row.
    Order: as SubspaceProjection, beside which it cannot stand: both own the projection.
    Source: Nayak et al. 2025, arXiv 2504.07097. Differs: in update space, where Adam and decay keep it too; form "factor" is
    what the released factors can reach, without them; linear CKA where W is not square; I < 0 counts as 0.
    """

    owns = ("projection",)
    left_of = ("trust ratio",)
    minimizes = False
    called_by = "consolidate"
    between_tasks = True
    example = {"unfreeze_rank_ratio": 0.5, "pretrained": True}
    off = {"strength": 0.0}
    search = {"mrr": (0.1, 0.3), "trr": (0.8, 0.5)}

    @dataclass(frozen=True, kw_only=True)
    class Config(OsftOptions):
        __doc__ = OsftOptions.__doc__

    @dataclass
    class State(Maps):
        tasks: int = 0

    @classmethod
    def idle(cls, config: Any) -> dict[str, str]:
        """A fixed share leaves the rule aside."""
        why = "unfreeze_rank_ratio gives the share"
        return {} if config.unfreeze_rank_ratio is None else {"mrr": why, "trr": why}

    def on_attach(self) -> None:
        """Refuse at once what a consolidation would refuse after hours, and keep the first weights where asked to."""
        config: OSFT.Config = self.configs[OSFT]
        averages_after(type(self), "OSFT", config.space)
        if not config.strength:
            return
        target_sizes(self.host, config.targets)
        if config.unfreeze_rank_ratio is None:
            require_replica(self.host, config.factory, "OSFT")
        if config.pretrained:
            self.consolidate_osft()
            self.states[OSFT].tasks = 0

    def consolidate_osft(
        self, batches: Iterable[Rows] | None = None, *, importance: Mapping[str, float] | None = None,
    ) -> None:
        """Keep the leading directions of the present weights, in place of those kept before. Between two steps, after a task.
        Collective.

        Args:
            batches: this rank's rows of the task's data, from which importance is measured; only the inputs are used.
            importance: that of every target, in place of it. With neither, or a fixed share, all count alike.
        """
        config: OSFT.Config = self.configs[OSFT]
        state: OSFT.State = self.states[OSFT]
        maps = kept_blocks(self.host, config, batches, importance)
        state.replace(self.host, config, "OSFT", maps, project_moments=True)
        state.tasks += 1

    def at_task_end(self, rows: Iterable[Rows]) -> None:
        """`consolidate_osft`."""
        self.consolidate_osft(rows)

    def edit_gradient(self) -> None:
        """Map the gradient, in gradient space."""
        super().edit_gradient()
        self.states[OSFT].edit(self.host, self.configs[OSFT])

    def update(self) -> None:
        """Keep the targets as they were before the update."""
        self.states[OSFT].keep(self.host, self.configs[OSFT])
        super().update()

    def edit_parameters(self) -> None:
        """Map what the update has done to them."""
        super().edit_parameters()
        self.states[OSFT].settle(self.host, self.configs[OSFT])

    def cost(self) -> Cost:
        """Depends on what is kept."""
        return Cost(note="OSFT: targets are projected, gathered where sharded") if self.configs[OSFT].strength else Cost()
