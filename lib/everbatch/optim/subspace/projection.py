"""Keep updates of named matrices out of, or small in, chosen directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from everbatch import seeds
from everbatch.contract import Cost, Made
from everbatch.errors import check, check_real
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.subspace.maps import Maps, averages_after
from everbatch.optim.subspace.transforms import Projection, null_space

__all__ = ["SubspaceProjection"]


def _example(factory: Callable[[], nn.Module]) -> dict[str, Any]:
    """Every matrix of the model loses its gradient's part along two directions of its inputs."""
    maps: dict[str, Projection] = {}
    for name, weight in factory().named_parameters():
        if weight.ndim == 2:
            draw = seeds.normal(("example", name), 0, 2 * weight.shape[1]).view(-1, 2)
            maps[name] = Projection(right=null_space(torch.linalg.qr(draw)[0].contiguous()))
    return {"projections": maps}


def _off(factory: Callable[[], nn.Module]) -> dict[str, Any]:
    return {**_example(factory), "strength": 0.0}


class SubspaceProjection(OptimizerMixin):
    """Map the gradients, or the updates, of named matrices by fixed linear maps.

        space="grad":    G <- P(G)                                    after the reduction, before clipping and the update
        space="update":  W <- W_old + P(W_new - W_old)                exact for any base optimizer, decay and momentum included

    P is a `Projection` per matrix: null space, damping along directions, on the left, the right, or jointly. Set them at
    construction or, at a task start, by `opt.set_projections({name: projection})`; matrices without one are left alone.

    Args (Config): see the fields; strength=0, or no projection, leaves every bit.

    Raises:
        ValueError: a name the model does not have; a projection that does not fit the matrix.
        CompositionError: EMA to the right of it in update space: it would average what was not yet projected.

    Cost: 4 o d k multiply-adds per side on each rank. On ZeRO 1-3 one all-reduce of the named matrices (for each 2^26
    elements) per step; on FSDP2 none where only right maps are set, because its shards are whole rows. Update space: a
    copy of the owned slices of the named matrices inside the step, and one more publication.
    Order: right of ClipGradNorm and DynamicSparsity, which act on what it leaves; left of LARS and LAMB, whose update it cuts.
    Limits: in gradient space only plain SGD keeps what it promises: Adam rescales each element, decay and stale momentum move
    protected directions. OSFT and GRIP, which set projections by rules of their own, cannot stand beside it.
    Source: the surgery papers' common form; SAME (null, soft, curvature), GRIP (rows with bases of their own; Zhu et al. 2026,
    arXiv 2601.16905), OSFT (joint; Nayak et al. 2025, arXiv 2504.07097).
    """

    owns = ("projection",)
    left_of = ("trust ratio",)

    minimizes = False
    in_code = "its matrices are tensors, which no option can name"
    search = {"strength": (1.0, 0.5)}
    example = Made(_example)
    off = Made(_off)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        space: Literal["grad", "update"] = "grad"
        """What is mapped; "update" for Adam and whatever is not plain SGD."""
        strength: float = 1.0
        """G + strength * (P(G) - G); in [0, 1], 0 switches the projections off."""
        projections: Mapping[str, Projection] | None = field(default=None, repr=False)
        """The first projections, by parameter name."""

        def __post_init__(self) -> None:
            check(self.space in ("grad", "update"), "SubspaceProjection", f"space={self.space!r}", "be 'grad' or 'update'")
            check_real("SubspaceProjection", "strength", self.strength, 0.0, 1.0)

    @dataclass
    class State(Maps):
        """The projections."""

    def on_attach(self) -> None:
        """Set the first projections."""
        config: SubspaceProjection.Config = self.configs[SubspaceProjection]
        averages_after(type(self), "SubspaceProjection", config.space)
        if config.projections:
            self.set_projections(config.projections)

    @property
    def projections(self) -> dict[str, Projection]:
        """The projections in force, by parameter name, on the host's device."""
        maps: Maps = self.states[SubspaceProjection]
        return maps.on(self.host.device)

    def set_projections(self, projections: Mapping[str, Projection], *, project_moments: bool = False) -> None:
        """Replace all projections, between steps. Collective: where ranks differ in a bit, all take rank 0's.

        Args:
            projections: by parameter name; empty to remove them.
            project_moments: project momentum (`momentum_buffer`, `exp_avg`) once, so that stale momentum does not go on moving
                protected directions.
        """
        maps: Maps = self.states[SubspaceProjection]
        config: SubspaceProjection.Config = self.configs[SubspaceProjection]
        maps.replace(self.host, config, "SubspaceProjection", projections, project_moments=project_moments)

    def edit_gradient(self) -> None:
        """Map the gradients of the named matrices."""
        super().edit_gradient()
        self.states[SubspaceProjection].edit(self.host, self.configs[SubspaceProjection])

    def update(self) -> None:
        """Keep the named matrices as they were before the update."""
        self.states[SubspaceProjection].keep(self.host, self.configs[SubspaceProjection])
        super().update()

    def edit_parameters(self) -> None:
        """Map what the update has done to the named matrices."""
        super().edit_parameters()
        self.states[SubspaceProjection].settle(self.host, self.configs[SubspaceProjection])

    def cost(self) -> Cost:
        """Depends on what is set."""
        space = self.configs[SubspaceProjection].space
        return Cost(note=f"the named matrices: 4 o d k multiply-adds per side, gathered where sharded ({space} space)")
