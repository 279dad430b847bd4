"""Projections by parameter name: how they are kept, agreed on, and applied to gradients or updates on any host."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from everbatch.contract import parts_of
from everbatch.distributed import World
from everbatch.engines.host import Host
from everbatch.engines.local import LocalHost
from everbatch.engines.named import Whole
from everbatch.engines.shards import Shard
from everbatch.errors import CompositionError, check, nearest
from everbatch.optim.subspace.transforms import Projection

__all__ = ["Maps", "agreed", "averages_after", "gathered"]

BUCKET = 1 << 26
"""Elements gathered by one all-reduce at most."""
MOMENTUM = ("momentum_buffer", "exp_avg")
"""Moments that move weights as a gradient does."""


class _Mapped(Protocol):
    """Options of a part that projects."""

    @property
    def space(self) -> str: ...

    @property
    def strength(self) -> float: ...


@dataclass
class Maps:
    """The projections in force, the same on every rank; and, of each verb of a part, what is done with them.

    A part that projects has this as its State, and calls `edit`, `keep` and `settle` in `edit_gradient`, `update` and
    `edit_parameters`. Bases are tensors of a checkpoint; the few numbers beside them are in its manifest.
    """

    factors: dict[str, Any] = field(default_factory=lambda: {"by_name": {}})
    """Outlines by parameter name; in old checkpoints the bases as well, as text. Replaced, never edited."""
    bases: Whole = field(default_factory=Whole)
    """Bases and scales, by "parameter/side.part"."""

    def __post_init__(self) -> None:
        self._known: tuple[dict[str, Any], dict[str, Projection], list[str]] | None = None
        self._before: dict[str, Tensor] | None = None

    def on(self, device: torch.device) -> dict[str, Projection]:
        """The projections by parameter name."""
        if self._known is None or self._known[0] is not self.factors:  # a state was loaded
            plain = self.factors["by_name"]
            if any(_is_text(p) for p in plain.values()):
                found = {n: Projection.decode(p, device) for n, p in plain.items()}
                self.factors = {"by_name": {n: p.outline() for n, p in found.items()}}
                self.bases = _flat(found)
            else:
                found = {n: Projection.of(p, _below(self.bases, n, device)) for n, p in plain.items()}
            self._known = self.factors, found, [n for n, p in found.items() if not p.identity]
        return self._known[1]

    @torch.no_grad()
    def replace(self, host: Host, config: _Mapped, who: str, projections: Mapping[str, Projection], *,
                project_moments: bool = False) -> None:
        """Take these in place of all. Collective: where ranks differ in a bit, all take rank 0's.

        Raises:
            ValueError: a name that is no trained parameter; a projection that does not fit its matrix.
        """
        layout = host.master_layout()
        for name, projection in projections.items():
            check(name in layout, who, f"projections has {name!r}", "name a trained parameter", nearest(name, layout))
            projection.fits(name, layout[name][1])
        held = {n: projections[n] for n in layout if n in projections}
        outlines, tensors = agreed(host, {n: p.outline() for n, p in held.items()}, _flat(held))
        self.factors, self.bases = {"by_name": outlines}, Whole(tensors)
        if project_moments:
            for key in MOMENTUM:
                self.project(host, config.strength, {s.name: (s, s.moments[key]) for s in host.shards if key in s.moments})

    def edit(self, host: Host, config: _Mapped) -> None:
        """Map the gradients of the named matrices, in gradient space."""
        self._before = None
        if config.space == "grad":
            self.project(host, config.strength, {s.name: (s, g) for s in host.shards if (g := s.grad) is not None})

    def keep(self, host: Host, config: _Mapped) -> None:
        """Keep the named matrices as they are before the update, in update space."""
        if config.space == "update" and self.active(host, config.strength):
            self._before = {s.name: s.data.clone() for s in host.shards if s.name in self.on(host.device)}

    def settle(self, host: Host, config: _Mapped) -> None:
        """Map what the update has done to them."""
        before, self._before = self._before, None
        if before is None:  # gradient space, or the update was replaced
            return
        shards = [s for s in host.shards if s.name in before]
        change = [s.data - before[s.name] for s in shards]
        mapped = [c.clone() for c in change]
        self.project(host, config.strength, {s.name: (s, m) for s, m in zip(shards, mapped, strict=True)})
        for s, c, m in zip(shards, change, mapped, strict=True):
            s.data.copy_(torch.where(m == c, s.data, before[s.name] + m))  # an untouched entry keeps its bits
        host.touch()

    def active(self, host: Host, strength: float) -> list[str]:
        """Names to project, in the same order on every rank."""
        if not strength or not self.on(host.device):
            return []
        assert self._known is not None
        layout = host.master_layout()  # a matrix may have been frozen since
        return [n for n in self._known[2] if n in layout]

    def project(self, host: Host, strength: float, mine: dict[str, tuple[Shard, Tensor]]) -> None:
        """Map each named tensor of which `mine` holds this rank's slice, in place. Collective where matrices are gathered."""
        names, known = self.active(host, strength), self.on(host.device)
        by_rows = isinstance(host, LocalHost) and all(known[n].left is None for n in names)
        if not host.sharded or by_rows:
            for name in names:
                if name in mine:
                    shard, t = mine[name]
                    matrix = t.reshape(-1, _columns(shard.shape))
                    t.copy_(_blend(matrix, known[name].apply(matrix, shard.start // matrix.shape[1]), strength).view(t.shape))
            return
        for bucket in _buckets(names, host.master_layout()):
            for name, whole in gathered(host, bucket, mine).items():
                if name in mine:
                    shard, t = mine[name]
                    new = _blend(whole, known[name].apply(whole), strength).reshape(-1)
                    t.copy_(new[shard.start : shard.start + t.numel()].view(t.shape))


def averages_after(cls: type, part: str, space: str) -> None:
    """Refuse EMA to the right of a part that projects updates."""
    names = [p.__name__ for p in parts_of(cls)]
    if space == "update" and "EMA" in names[names.index(part) :]:
        raise CompositionError(f"{cls.__name__}: EMA must stand to the left of {part}, or it averages updates before they are "
                               "projected")


def gathered(host: Host, names: list[str], mine: dict[str, tuple[Shard, Tensor]]) -> dict[str, Tensor]:
    """Whole matrices (o, d) from slices, by one all-reduce of zeros and what each rank holds; float32 at least."""
    layout = host.master_layout()
    wide = torch.float64 if any(layout[n][0] == torch.float64 for n in names) else torch.float32
    sizes = [layout[n][1].numel() for n in names]
    flat = torch.zeros(sum(sizes), dtype=wide, device=host.device)
    for name, part in zip(names, torch.split(flat, sizes), strict=True):
        if name in mine:
            shard, t = mine[name]
            part[shard.start : shard.start + t.numel()] = t.reshape(-1).to(part)
    host.total(flat)
    return {n: part.view(-1, _columns(layout[n][1])) for n, part in zip(names, torch.split(flat, sizes), strict=True)}


def agreed(host: Host, plain: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Plain values and tensors as rank 0 has them, on this host's device.

    Eigenvectors of one matrix may differ in the last bits between devices. Compared by a hash; sent where it differs.
    """
    held = {key: _fresh(t.detach().to(host.device)) for key, t in tensors.items()}
    if host.world == 1 or host.title == "plain":
        return plain, held
    world = World.current()
    if len(set(world.gather(_hash(plain, held)))) == 1:
        return plain, held
    told: Any = world.gather((plain, {key: (t.shape, t.dtype) for key, t in held.items()}) if world.rank == 0 else None)[0]
    result = {}
    for key, (shape, dtype) in told[1].items():
        mine = held[key] if world.rank == 0 else torch.zeros(shape, dtype=dtype, device=host.device)
        result[key] = world.sum(mine)
    return told[0], result


def _fresh(t: Tensor) -> Tensor:
    """A copy that lies as it does after loading: a product rounds by how its factors lie. Strides of dimensions of size 1
    count too, which `contiguous` leaves."""
    return t.clone(memory_format=torch.contiguous_format)


def _hash(plain: Any, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(json.dumps(plain, sort_keys=True).encode())
    for key in sorted(tensors):
        t = _fresh(tensors[key].cpu())
        digest.update(f"{key} {t.dtype} {tuple(t.shape)};".encode())
        digest.update(t.view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return digest.hexdigest()


def _is_text(plain: Mapping[str, Any]) -> bool:
    """Whether an entry holds its bases itself."""
    return any(isinstance(plain[side], dict) for side in ("left", "right"))


def _flat(projections: Mapping[str, Projection]) -> Whole:
    return Whole({f"{n}/{key}": t for n, p in projections.items() for key, t in p.tensors().items()})


def _below(bases: Mapping[str, Tensor], name: str, device: torch.device) -> dict[str, Tensor]:
    start = f"{name}/"
    return {key.removeprefix(start): t.to(device) for key, t in bases.items() if key.startswith(start)}


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
