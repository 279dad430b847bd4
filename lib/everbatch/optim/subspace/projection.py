"""Keep updates of named matrices out of, or small in, chosen directions: what SAME, OSFT and GRIP share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from everbatch import seeds
from everbatch.contract import Cost, Made, parts_of
from everbatch.distributed import World
from everbatch.engines.local import LocalHost
from everbatch.engines.shards import Shard
from everbatch.errors import CompositionError, check, check_real, nearest
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.subspace.transforms import Projection, null_space

__all__ = ["SubspaceProjection"]

BUCKET = 1 << 26
"""Elements gathered by one all-reduce at most."""


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
    protected directions.
    Source: the surgery papers' common form; SAME (null, soft, curvature), GRIP (rows with bases of their own; Zhu et al. 2026,
    arXiv 2601.16905), OSFT (joint; Nayak et al. 2025, arXiv 2504.07097).
    """

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
    class State:
        factors: dict[str, Any] = field(default_factory=lambda: {"by_name": {}})
        """Encoded projections, the same on every rank; replaced, never edited."""

    def on_attach(self) -> None:
        """Set the first projections."""
        config: SubspaceProjection.Config = self.configs[SubspaceProjection]
        names = [p.__name__ for p in parts_of(type(self))]
        if config.space == "update" and "EMA" in names[names.index("SubspaceProjection") :]:
            raise CompositionError(f"{type(self).__name__}: EMA must stand to the left of SubspaceProjection, or it averages "
                                   "updates before they are projected")
        self.__known: tuple[dict[str, Any], dict[str, Projection], list[str]] | None = None
        self.__before: dict[str, Tensor] | None = None
        if config.projections:
            self.set_projections(config.projections)

    @property
    def projections(self) -> dict[str, Projection]:
        """The projections in force, by parameter name, on the host's device."""
        factors = self.states[SubspaceProjection].factors
        if self.__known is None or self.__known[0] is not factors:  # a state was loaded
            found = {n: Projection.decode(p, self.host.device) for n, p in factors["by_name"].items()}
            self.__known = factors, found, [n for n, p in found.items() if not p.identity]
        return self.__known[1]

    @torch.no_grad()
    def set_projections(self, projections: Mapping[str, Projection], *, project_moments: bool = False) -> None:
        """Replace all projections, between steps. Collective: where ranks differ in a bit, all take rank 0's.

        Args:
            projections: by parameter name; empty to remove them.
            project_moments: project momentum (`momentum_buffer`, `exp_avg`) once, so that stale momentum does not go on moving
                protected directions.
        """
        layout = self.host.master_layout()
        for name, projection in projections.items():
            check(name in layout, "SubspaceProjection", f"projections has {name!r}", "name a trained parameter",
                  nearest(name, layout))
            projection.fits(name, layout[name][1])
        plain = {n: projections[n].encode() for n in layout if n in projections}
        if self.host.world > 1 and self.host.title != "plain":
            # Eigenvectors of one matrix may differ in the last bits between devices.
            world = World.current()
            known = world.gather(hashlib.blake2b(json.dumps(plain, sort_keys=True).encode()).hexdigest())
            if len(set(known)) > 1:
                plain = world.gather(plain if world.rank == 0 else None)[0]  # type: ignore[assignment]
        self.states[SubspaceProjection].factors = {"by_name": plain}
        if project_moments:
            for key in ("momentum_buffer", "exp_avg"):
                self.__project({s.name: (s, s.moments[key]) for s in self.host.shards if key in s.moments})

    def edit_gradient(self) -> None:
        """Map the gradients of the named matrices."""
        super().edit_gradient()
        self.__before = None
        if self.configs[SubspaceProjection].space == "grad":
            self.__project({s.name: (s, g) for s in self.host.shards if (g := s.grad) is not None})

    def update(self) -> None:
        """Keep the named matrices as they were before the update."""
        config: SubspaceProjection.Config = self.configs[SubspaceProjection]
        if config.space == "update" and self.__active():
            self.__before = {s.name: s.data.clone() for s in self.host.shards if s.name in self.projections}
        super().update()

    def edit_parameters(self) -> None:
        """Map what the update has done to the named matrices."""
        super().edit_parameters()
        before, self.__before = self.__before, None
        if before is None:  # gradient space, or the update was replaced
            return
        shards = [s for s in self.host.shards if s.name in before]
        change = [s.data - before[s.name] for s in shards]
        mapped = [c.clone() for c in change]
        self.__project({s.name: (s, m) for s, m in zip(shards, mapped, strict=True)})
        for s, c, m in zip(shards, change, mapped, strict=True):
            s.data.copy_(torch.where(m == c, s.data, before[s.name] + m))  # an untouched entry keeps its bits
        self.host.touch()

    def __active(self) -> list[str]:
        """Names to project, in the same order on every rank."""
        if not self.configs[SubspaceProjection].strength:
            return []
        if not self.projections:
            return []
        assert self.__known is not None
        layout = self.host.master_layout()  # a matrix may have been frozen since
        return [n for n in self.__known[2] if n in layout]

    def __project(self, mine: dict[str, tuple[Shard, Tensor]]) -> None:
        """Map each named tensor of which `mine` holds this rank's slice, in place. Collective where matrices are gathered."""
        names, known = self.__active(), self.projections
        strength: float = self.configs[SubspaceProjection].strength
        by_rows = isinstance(self.host, LocalHost) and all(known[n].left is None for n in names)
        if not self.host.sharded or by_rows:
            for name in names:
                if name in mine:
                    shard, t = mine[name]
                    matrix = t.reshape(-1, _columns(shard.shape))
                    t.copy_(_blend(matrix, known[name].apply(matrix, shard.start // matrix.shape[1]), strength).view(t.shape))
            return
        for bucket in _buckets(names, self.host.master_layout()):
            for name, whole in self.__gathered(bucket, mine).items():
                if name in mine:
                    shard, t = mine[name]
                    new = _blend(whole, known[name].apply(whole), strength).reshape(-1)
                    t.copy_(new[shard.start : shard.start + t.numel()].view(t.shape))

    def __gathered(self, names: list[str], mine: dict[str, tuple[Shard, Tensor]]) -> dict[str, Tensor]:
        """Whole matrices (o, d) from slices, by one all-reduce of zeros and what each rank holds; float32 at least."""
        layout = self.host.master_layout()
        wide = torch.float64 if any(layout[n][0] == torch.float64 for n in names) else torch.float32
        sizes = [layout[n][1].numel() for n in names]
        flat = torch.zeros(sum(sizes), dtype=wide, device=self.host.device)
        for name, part in zip(names, torch.split(flat, sizes), strict=True):
            if name in mine:
                shard, t = mine[name]
                part[shard.start : shard.start + t.numel()] = t.reshape(-1).to(part)
        self.host.total(flat)
        return {n: part.view(-1, _columns(layout[n][1])) for n, part in zip(names, torch.split(flat, sizes), strict=True)}

    def cost(self) -> Cost:
        """Depends on what is set."""
        space = self.configs[SubspaceProjection].space
        return Cost(note=f"the named matrices: 4 o d k multiply-adds per side, gathered where sharded ({space} space)")


def _columns(shape: torch.Size | tuple[int, ...]) -> int:
    return int(torch.Size(shape[1:]).numel())


def _blend(old: Tensor, new: Tensor, strength: float) -> Tensor:
    return new if strength == 1.0 else old + strength * (new - old)


def _buckets(names: list[str], layout: Mapping[str, tuple[torch.dtype, torch.Size]]) -> list[list[str]]:
    """Names in order, cut where the next would make a bucket larger than BUCKET."""
    result: list[list[str]] = []
    room = 0
    for name in names:
        size = layout[name][1].numel()
        if not result or size > room:
            result.append([])
            room = BUCKET
        result[-1].append(name)
        room -= size
    return result
