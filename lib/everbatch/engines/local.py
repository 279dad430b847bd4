"""The host of plain torch, DDP and FSDP2: the optimizer's own parameters are the masters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Sharded
from torch.nn.parallel import DistributedDataParallel

from everbatch.distributed import World
from everbatch.engines.host import (
    SPARSE_CURE,
    Alone,
    Host,
    plain_name,
    refuse_complex,
    refuse_partly,
    refuse_sparse,
    unwrap,
)
from everbatch.engines.shards import Shard, Vector, count_bad
from everbatch.engines.unreduced import forget_unreduced, unreduced
from everbatch.engines.watch import Watch
from everbatch.engines.wrappers import holds, is_wrapped
from everbatch.errors import UnsupportedHost, check

__all__ = ["LocalHost"]


class Updated(Protocol):
    """What a host needs of the optimizer whose parameters are the masters."""

    param_groups: list[dict[str, Any]]
    state: Any

    def base_step(self) -> None:
        """The base optimizer's own update."""


@dataclass
class _Present:
    """The parameters that count at one time."""

    flags: list[bool] | None
    """Which are trained; None: those that are not count as well."""
    names: list[str]
    shards: list[Shard]


class LocalHost(Host):
    """Masters are `p` (plain, DDP: whole on every rank) or its local DTensor shard (FSDP2, sharded on dimension 0).

    Cost of one more pass: one forward and backward, with DDP's gradient reduction, or FSDP2's parameter gathers and gradient
    reduce-scatter, to which an outer replicating mesh dimension adds an all-reduce. Publishing is free: on FSDP2 it frees
    parameters that were left gathered.
    """

    def __init__(self, optimizer: Updated, module: nn.Module | None, scaler: Any | None) -> None:
        super().__init__()
        # The optimizer owns its host; a strong reference back would keep both alive until the garbage collector runs.
        self._optimizer = weakref.proxy(optimizer)
        self._built: dict[bool, _Present] = {}
        """Without and with frozen parameters."""
        self._in_step = False
        self._stepping: _Present | None = None
        """In a step: what counts in it, from when it was first asked for after the last pass."""
        self._placed: tuple[list[Tensor], set[torch.device]] = [], set()
        """The masters as they were found last, and the devices of them, and so of their gradients."""
        self._clean = False
        """Whether the next `discard` has nothing to do."""
        self._outer = module
        self.watch = Watch(module)
        self.module = None if module is None else unwrap(module)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        named = [pair for group in optimizer.param_groups for pair in _named(group)]
        ddp = any(isinstance(m, DistributedDataParallel) for m in (module.modules() if module is not None else ()))
        # Without the module, names that all begin alike are taken for those of ddp.named_parameters().
        wrapped = ddp if module is not None else all(n.startswith("module.") for n, _ in named)
        self._named = [(plain_name(n, ddp=wrapped), p) for n, p in named]
        names = [n for n, _ in self._named]
        check(len(set(names)) == len(names), type(optimizer).__name__, f"parameter names {_twice(names)} occur twice",
              "be unique", "pass the module, or named_parameters() with a prefix for each module")
        check(bool(names), type(optimizer).__name__, "no parameters", "get at least one")
        older = next((n for n, p in self._named if hasattr(p, "_fsdp_flattened")), None)
        if older is not None:
            raise UnsupportedHost(f"FullyShardedDataParallel (FSDP1): parameter {older!r} is this rank's part of a flat one, so "
                                  "that norms would be this rank's; use torch.distributed.fsdp.fully_shard (FSDP2)")
        refuse_complex(type(optimizer).__name__, self._counted)
        if module is not None:
            refuse_sparse(type(optimizer).__name__, module)
        self.device = _device(self._named[0][1])
        self.sync = True
        self._met: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        for part in module.modules() if module is not None else ():
            if isinstance(part, FSDPModule | DistributedDataParallel):
                self._met.add(part)
        sharded = [(n, p) for n, p in self._named if isinstance(p, DTensor)]
        self.sharded = bool(sharded)
        world = World.current()
        self.rank, self.world = world.rank, world.size
        self.replicas = self.world
        self._group = self._shard_group(sharded) if sharded else None
        self._call_it("FSDP2" if sharded else "DDP" if ddp or is_wrapped([p for _, p in named]) else "plain")

    def _call_it(self, title: str) -> None:
        """Set the engine's name, and what a pass costs on it."""
        self.title = title
        self.pass_cost = {"FSDP2": "parameter gathers of a forward and backward, one gradient reduce-scatter",
                          "DDP": "one gradient all-reduce", "plain": "no collective"}[title]

    def _shard_group(self, sharded: list[tuple[str, DTensor]]) -> Any:
        """The process group over which FSDP2 shards; refuses layouts whose elements we could not count once."""
        for name, p in self._named:
            if not isinstance(p, DTensor):
                raise UnsupportedHost(f"FSDP2: parameter {name!r} is not sharded, others are; its gradient would not be "
                                      "reduced; call fully_shard on the root module")
        mesh = sharded[0][1].device_mesh
        for name, p in sharded:
            placements = p.placements
            if p.device_mesh != mesh or type(placements[-1]) is not Sharded or placements[-1].dim != 0 \
                    or any(not x.is_replicate() for x in placements[:-1]):
                raise UnsupportedHost(f"FSDP2: parameter {name!r} has placements {placements}; supported: one mesh, sharded "
                                      "on dimension 0 (fully_shard's default), replicated on an outer mesh dimension")
        group = mesh.get_group(mesh.ndim - 1)
        self.replicas = self.world // dist.get_world_size(group)
        return group

    @property
    def names(self) -> list[str]:
        return self._now().names

    @property
    def _counted(self) -> list[tuple[str, Tensor]]:
        return [(n, p) for n, p in self._named if p.requires_grad or self._frozen_too]

    def master_layout(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        return {n: (p.dtype, p.shape) for n, p in self._counted}

    @property
    def shards(self) -> list[Shard]:
        return self._now().shards

    def _now(self) -> _Present:
        """What counts at present: in a step as after its last pass, in which a closure may have frozen some."""
        if self._stepping is not None and not self._frozen_too:
            return self._stepping
        flags = None if self._frozen_too else [p.requires_grad for _, p in self._named]
        kept = self._built.get(self._frozen_too)
        if kept is None or kept.flags != flags:
            shards = self._build_shards()
            kept = self._built[self._frozen_too] = _Present(flags, [n for n, _ in self._counted], shards)
        if self._in_step and not self._frozen_too:
            self._stepping = kept
        return kept

    def begin_step(self) -> None:
        self.watch.parts = []
        self._in_step, self._stepping = True, None

    def _build_shards(self) -> list[Shard]:
        index_of = self.group_index()
        result = []
        for name, p in self._counted:
            local, start = (p.to_local(), _start(p)) if isinstance(p, DTensor) else (p, 0)
            if local.numel():
                index = index_of[name]
                result.append(Shard(name, p.shape, start, p, view=_local_view, grad=_grad_of(p),
                                    group=lambda i=index: self.groups()[i], state=self.state))  # type: ignore[misc]
        return result

    def gradient(self) -> Vector:
        if self.sharded:
            return super().gradient()
        shards = self.shards
        gradients = [s.owner.grad for s in shards]
        if all(g is not None for g in gradients):
            return Vector(self, shards, gradients)  # type: ignore[arg-type]
        pairs = [(s, g) for s, g in zip(shards, gradients, strict=True) if g is not None]
        return Vector(self, [s for s, _ in pairs], [g for _, g in pairs])

    def state(self) -> dict[Any, Any]:
        return self._optimizer.state  # type: ignore[no-any-return]

    def groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups  # type: ignore[no-any-return]

    def total(self, value: Tensor) -> Tensor:
        if self._group is not None:
            dist.all_reduce(value, group=self._group)
        return value

    def publish(self) -> None:
        for module in self._met:
            if isinstance(module, FSDPModule):
                module.reshard()

    def left_over(self) -> str:
        if any(unreduced(m) for m in self._met if isinstance(m, FSDPModule)):
            return self.names[0]
        self._clean = all(p.grad is None for _, p in self._named)
        found = [] if self._clean else [(n, _local_view(p.grad)) for n, p in self._counted if p.grad is not None]
        if not found:
            return ""
        sizes = torch.stack([(g.coalesce().values() if g.is_sparse else g).count_nonzero() for _, g in found]).tolist()
        return next((n for (n, _), size in zip(found, sizes, strict=True) if size), "")

    def discard(self) -> None:
        for _, p in () if self._clean else self._named:
            p.grad = None
        self._clean = False
        for module in self._met:
            if isinstance(module, FSDPModule):
                forget_unreduced(module)

    def set_sync(self, last: bool) -> None:
        self.sync = last and not self.local
        for module in self._met:
            self._apply_sync(module)

    def _apply_sync(self, module: nn.Module) -> None:
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = self.sync
        elif isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(self.sync)

    def meet(self, parts: Iterable[nn.Module]) -> None:
        for part in parts:
            if isinstance(part, FSDPModule | DistributedDataParallel) and part not in self._met:
                self._met.add(part)
                self._apply_sync(part)
                # A wrapper that was made after the optimizer shows itself in its first pass.
                wrapper = isinstance(part, DistributedDataParallel) and self.title == "plain"
                if wrapper and holds(part, [p for _, p in self._named]):
                    self._call_it("DDP")

    def backward(self, loss: Tensor) -> None:
        for module in self._met if self.sync else ():
            before: Any = getattr(module, "before_backward", None)
            if before is not None:  # a DDP that looks for weights which this loss does not reach
                before(loss)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def end_pass(self) -> None:
        """Refuse sparse gradients, which a host given parameters alone sees here first. Unscale by hand: `GradScaler.unscale_`
        allows one call per step, and a step may have several passes."""
        self._stepping = None
        look = self.watch.looking or self.module is None
        sparse = [n for n, p in self._named if p.grad is not None and p.grad.is_sparse] if look else []
        if sparse:
            who = self._optimizer.__class__.__name__
            check(False, who, f"a sparse gradient of {sparse[:3]}", "be dense", SPARSE_CURE)
        if self.scaler is not None:
            inverse = 1.0 / self.scaler.scale(torch.ones((), device=self.device))
            self.gradient().mul_(inverse)

    def end_step(self, applied: bool | None) -> None:
        """The growth rule of `GradScaler.update`, fed with our own finding and kept in the scaler's own state."""
        self._in_step, self._stepping, self._clean = False, None, False
        if self.scaler is None or applied is None:
            return
        kept = self.scaler.state_dict()
        kept["_growth_tracker"] = kept["_growth_tracker"] + 1 if applied else 0
        if not applied:
            kept["scale"] *= kept["backoff_factor"]
        elif kept["_growth_tracker"] == kept["growth_interval"]:
            kept["scale"], kept["_growth_tracker"] = kept["scale"] * kept["growth_factor"], 0
        self.scaler.load_state_dict(kept)
        self.scaler.update(kept["scale"])

    def local_gradient(self) -> Vector:
        if self.sharded:
            return super().local_gradient()
        mine = self.gradient()
        return Vector(Alone(self), mine.shards, mine.tensors)

    def finite(self) -> Tensor:
        """Whether every gradient element is finite. On FSDP2 the same all-reduce tells whether ranks reached the same parameters.

        Raises:
            RuntimeError: gradients that were not reduced as they should have been: on FSDP2, when only some ranks reached a
                parameter; on DDP without `find_unused_parameters`, when a pass left one out.
        """
        if self._group is None:
            self._check_reduced()
            return self._bad() == 0
        flags = torch.tensor([float(p.grad is not None) for _, p in self._counted], dtype=torch.float64)
        table = torch.cat([self._bad().view(1), flags.to(self.device)])
        dist.all_reduce(table)  # replicas too: their gradients are averaged parameter by parameter
        bad, *ranks = table.tolist()
        refuse_partly(self.title, [n for n, count in zip(self.names, ranks, strict=True) if 0 < count < self.world])
        return torch.tensor(bad == 0)

    def _bad(self) -> Tensor:
        """> 0 where this rank holds a gradient or a master with an element that is not finite."""
        gradient = self.gradient()
        masters = self.scratch.masters(self.shards)
        if masters is not self._placed[0]:
            self._placed = masters, {t.device for t in masters}
        return count_bad(masters + gradient.tensors, self.device, self._placed[1])

    def any_gradient(self) -> bool:
        return any(p.grad is not None for _, p in self._named if p.requires_grad) or not self._counted

    def _check_reduced(self) -> None:
        """DDP that was not told of unused parameters waits for them: what shares a bucket with one is left unreduced."""
        for module in self._met or ():
            if not isinstance(module, DistributedDataParallel) or module.find_unused_parameters or module.static_graph:
                continue
            if hasattr(module, "before_backward"):  # it was told by the loss
                continue
            names = [n for n, p in module.module.named_parameters() if p.requires_grad and p.grad is None
                     and n not in module.parameters_to_ignore]
            if names and self.world > 1:
                raise RuntimeError(
                    f"DDP: no pass of this step reached {names[:5]}, so gradients were not averaged over the ranks; pass "
                    "find_unused_parameters=True to DistributedDataParallel, or freeze what is not used "
                    "(requires_grad=False)")

    def update(self) -> None:
        self._optimizer.base_step()

    def group_index(self) -> dict[str, int]:
        place = {id(p): i for i, g in enumerate(self.groups()) for p in g["params"]}
        lost = [n for n, p in self._counted if id(p) not in place]
        if lost:
            who = type(self._optimizer).__name__
            raise UnsupportedHost(f"{who}: {lost[:3]} are in no parameter group any more; an engine that put other tensors there "
                                  f"takes the plain base optimizer: initialise it with that, then {who}.on(engine)")
        return {n: place[id(p)] for n, p in self._counted}

    def recipe(self) -> tuple[Any, ...]:
        return (self._outer, self.scaler)


def _named(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    return list(zip(group.get("param_names", ()), group["params"], strict=True))


def _twice(names: list[str]) -> list[str]:
    return sorted({n for n in names if names.count(n) > 1})[:3]


def _device(p: Tensor) -> torch.device:
    return p.to_local().device if isinstance(p, DTensor) else p.device


def _start(p: DTensor) -> int:
    """Offset of the local shard: FSDP2 splits dimension 0 in chunks of ceil(n / ranks) rows."""
    size, rank = p.device_mesh.size(p.device_mesh.ndim - 1), p.device_mesh.get_local_rank(p.device_mesh.ndim - 1)
    rows = p.shape[0] if p.dim() else 1
    chunk = -(-rows // size)
    return min(rank * chunk, rows) * (p.numel() // max(rows, 1))


def _local_view(t: Tensor) -> Tensor:
    # .data, not detach(): an edit between passes must not count as a new version of a tensor that autograd may hold.
    return t.to_local().data if isinstance(t, DTensor) else t.data


def _grad_of(p: Tensor) -> Callable[[], Tensor | None]:
    def grad() -> Tensor | None:
        return None if p.grad is None else _local_view(p.grad)

    return grad
