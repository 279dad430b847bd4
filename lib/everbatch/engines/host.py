"""The interface of a host, and what every host shares."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from everbatch.engines.shards import Scratch, Shard, Vector
from everbatch.engines.watch import Watch
from everbatch.errors import UnsupportedHost, check

__all__ = ["Alone", "Host", "plain_name", "refuse_complex", "refuse_partly", "refuse_sparse", "unwrap"]


def plain_name(name: str, *, ddp: bool = False) -> str:
    """A name in the bare model: without what torch.compile and activation checkpointing add, and DDP where `ddp` says so."""
    bare = ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module"))
    return bare.removeprefix("module.") if ddp else bare


def refuse_complex(who: str, trained: Iterable[tuple[str, Tensor]]) -> None:
    """Norms, signs and penalties here are of real numbers."""
    names = [n for n, p in trained if p.is_complex()]
    check(not names, who, f"complex parameters {names[:3]}", "be real", "store torch.view_as_real of them")


def refuse_partly(title: str, names: Sequence[str]) -> None:
    """Raise `RuntimeError` when only some ranks reached these parameters, on an engine whose ranks share one sharded copy."""
    if names:
        raise RuntimeError(
            f"{title}: only some ranks reached the parameters {list(names[:5])} in this step; ranks that share one sharded "
            "copy of the weights gather and reduce them together, so all must take the same branch; decide from what is the "
            "same on every rank, or use ZeRO stage 0 to 2, or DDP with find_unused_parameters=True")


SPARSE_CURE = "build the layer with sparse=False"


def refuse_sparse(who: str, module: nn.Module) -> None:
    """Norms, clips and penalties here are of dense gradients; reductions too."""
    names = [n for n, m in module.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
             and m.sparse and m.weight.requires_grad]
    check(not names, who, f"sparse gradients of {names[:3]}", "be dense: a sparse gradient is not supported", SPARSE_CURE)


def unwrap(module: nn.Module) -> nn.Module:
    """The bare model inside DDP and torch.compile."""
    while True:
        inside = module.module if isinstance(module, DistributedDataParallel) else getattr(module, "_orig_mod", None)
        if not isinstance(inside, nn.Module):
            return module
        module = inside


class Host(abc.ABC):
    """One engine, seen as shards, sums over the model, and a gradient that can be asked for again.

    Masters are edited in place through `Shard.data`; `touch()` says so, and the next pass, or the end of the step, publishes
    them to the weights the model computes with. Nothing here decides anything a mixin could decide.
    """

    title: str
    """For describe(): "plain", "DDP", "FSDP2", "ZeRO stage 2 (bf16)", ..."""
    device: torch.device
    """Where sums over the model are computed."""
    module: nn.Module | None
    """The bare module, where the host knows it."""
    watch: Watch
    """What passes may run, and its buffers."""
    sharded: bool
    """Whether a rank holds only a part of the masters."""
    agrees: bool = False
    """Whether ranks that hold whole masters agree in each step, by one all-reduce, on what was reached."""
    rank: int = 0
    world: int = 1
    pass_cost: str = "one forward and backward"
    """For describe(): what one more pass costs here."""
    unproven: str = ""
    """What is to be proven in the first step with several passes, namely that a pass can be repeated; "" if it is known."""
    replicas: int = 1
    """Data-parallel ranks that hold the same masters."""
    flat: bool = False
    """Whether a parameter group is one tensor to the base, with one count of steps for all in it."""

    def __init__(self) -> None:
        self.dirty = False
        self.scratch = Scratch()
        self.edits = 0
        """How often masters were edited other than by the base's update."""
        self.local = False
        """Whether the pass under way shall leave each rank's own gradient."""
        self.replaced = False
        """Whether other weights stand in the place of the model's own, for a while."""
        self._frozen_too = False
        self._shards: list[Shard] | None = None
        self.unreached: frozenset[str] = frozenset()
        """Trained parameters to which no pass on any rank gave a gradient, where the engine holds something else than None for
        them: known from `finite()` on, until gradients are discarded. Their `Shard.grad` is None then."""

    @property
    def shards(self) -> list[Shard]:
        """This rank's non-empty slices, in the model's parameter order."""
        if self._shards is None:
            self._shards = self._build_shards()
        return self._shards

    @property
    @abc.abstractmethod
    def names(self) -> list[str]:
        """Names of all trained parameters, the same list on every rank."""

    @contextmanager
    def frozen_too(self) -> Iterator[None]:
        """Inside the block, parameters that are frozen just now count as trained: for what is kept by name and must neither be
        lost nor be left out. DeepSpeed's engines have no masters of parameters that were frozen when they were built."""
        before, self._frozen_too = self._frozen_too, True
        try:
            yield
        finally:
            self._frozen_too = before

    def with_masters(self) -> AbstractContextManager[None]:
        """Inside the block all that has masters of its own counts as trained, to be saved and restored: DeepSpeed's engines have
        them of what is frozen just now, and write them over the model's own weights."""
        return nullcontext()

    @abc.abstractmethod
    def _build_shards(self) -> list[Shard]: ...

    def total(self, value: Tensor) -> Tensor:
        """Sum over the ranks that share one copy of the model, in place; the identity where each rank holds it whole."""
        return value

    @abc.abstractmethod
    def publish(self) -> None:
        """Make the model compute with the masters as they are now. Collective; called when dirty only."""

    @abc.abstractmethod
    def discard(self) -> None:
        """Forget all gradients, so that the next backward starts from zero."""

    @abc.abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Back-propagate a scalar loss; at a synchronisation boundary the reduced gradient is ready afterwards."""

    @abc.abstractmethod
    def update(self) -> None:
        """Let the base optimizer update the masters from the gradients, and publish the result."""

    def left_over(self) -> str:
        """Before a step's first pass: the name of a parameter whose gradient is not zero, "" if there is none or where a host
        cannot tell. No collective; a host sync only where gradients lie about."""
        return ""

    def begin_step(self) -> None:  # noqa: B027
        """Before the first pass of a step. Gradients may be there already."""

    def any_gradient(self) -> bool:
        """Whether any trained parameter has a gradient; True where another check tells, or nothing is trained."""
        return True

    def claim(self, shard: Shard) -> Tensor | None:
        """The gradient of a shard for writing to, as zeros where it had none: its parameter counts as reached from then on. None
        where no gradients are held at all."""
        if shard.grad is None:
            shard.owner.grad = torch.zeros_like(shard.owner)
        return shard.grad

    def mix_passes(self) -> None:  # noqa: B027
        """Say that the gradient is made of all passes of this step so far: what any of them reached has one."""

    def reached(self) -> Tensor | None:
        """For each of `names`, > 0 where a rank's last pass gave the parameter a gradient: (n,) float64, the same on every rank;
        None where `gradient()` leaves the others out. At most one all-reduce of n numbers, no host sync."""
        return None

    def kept(self, shard: Shard) -> Mapping[str, Any]:
        """What the base optimizer keeps for this parameter, live, its step count among it; empty before its first update."""
        kept: dict[str, Any] = self.state().get(shard.owner, {})
        return kept

    def restore_clocks(self, saved: Mapping[str, tuple[dict[str, Any], bool]]) -> None:  # noqa: B027
        """After moments were read back: step counts by name, and whether there was any state, where parameters share a tensor."""

    def end_pass(self) -> None:  # noqa: B027
        """After the last backward of a pass (gradient unscaling)."""

    def end_step(self, applied: bool | None) -> None:  # noqa: B027
        """After a step that was applied, or skipped (loss-scale update); None: it raised."""

    def set_sync(self, last: bool) -> None:  # noqa: B027
        """Before each forward under accumulation: whether its backward shall reduce gradients."""

    def check_micro_batches(self, count: int) -> None:  # noqa: B027
        """Refuse a number of micro-batches that contradicts what the engine was configured for."""

    @property
    def working_dtype(self) -> torch.dtype:
        """Precision of the weights the model computes with."""
        return next(iter(self.master_layout().values()))[0]

    @property
    def masters_apart(self) -> bool:
        """Whether the masters are other tensors than the model's own parameters."""
        return False

    @property
    def apart(self) -> bool:
        """Whether each rank computes with working weights of its own, whole, which it may move apart from the others'."""
        return not self.sharded

    def set_gradient(self, gradient: Vector) -> None:
        """Make this vector the gradient of its parameters."""
        self.mix_passes()
        for shard, value in gradient:
            held = self.claim(shard)
            assert held is not None
            held.copy_(value)

    def working_shards(self) -> list[Shard]:
        """The working weights of every trained parameter, whole, the same list on every rank: what a rank may move apart."""
        return self.shards

    def local_gradient(self) -> Vector:
        """After a local pass: this rank's own gradient over its working weights, whole on every rank. Its norms are this
        rank's own; a displacement along it moves working weights only.

        Raises:
            UnsupportedHost: where ranks share one sharded copy of the working weights.
        """
        raise UnsupportedHost(f"{self.title}: ranks share one sharded copy of the weights, so they cannot move it apart; use "
                              "scope='global', or ZeRO stage 0 to 2, DDP or plain torch")

    def recipe(self) -> tuple[Any, ...]:
        """Arguments after the optimizer that rebuild this host, for copying and pickling."""
        raise NotImplementedError

    def meet(self, parts: Iterable[nn.Module]) -> None:  # noqa: B027
        """Called with all modules of every outermost one that a pass runs, before its forward, in a step that looks (`Watch`)."""

    def touch(self) -> None:
        """Say that masters were edited."""
        self.dirty = True
        self.edits += 1

    def publish_if_dirty(self) -> None:
        """Publish edited masters once."""
        if self.dirty:
            self.publish()
            self.dirty = False

    @abc.abstractmethod
    def finite(self) -> Tensor:
        """0-dim bool: whether every element of gradients and masters on every rank is finite: an update that overflowed is found
        here, also in weights that no pass reaches. At most one all-reduce."""

    def gradient(self) -> Vector:
        """The present gradient as views; in the engine's accumulation dtype."""
        pairs = [(s, s.grad) for s in self.shards]
        return Vector(self, [s for s, g in pairs if g is not None], [g for _, g in pairs if g is not None])

    def weights(self) -> Vector:
        """The masters as views."""
        shards = self.shards
        return Vector(self, shards, self.scratch.masters(shards))

    def reset_moments(self) -> None:
        """Drop the base optimizer's per-parameter state, as a newly built optimizer has none."""
        state = self.state()
        for shard in self.shards:
            state.pop(shard.owner, None)

    @abc.abstractmethod
    def state(self) -> dict[Any, Any]:
        """The base optimizer's live state."""

    @abc.abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """The base optimizer's live parameter groups."""

    @abc.abstractmethod
    def group_index(self) -> dict[str, int]:
        """Index of the parameter group of every trained parameter, by name, the same on every rank."""

    def gather(
        self, pieces: Sequence[tuple[Shard, Tensor]], names: Sequence[str], dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> dict[str, Tensor]:
        """Whole tensors from slices, on every rank: each rank adds the bits it owns to zeros, so every bit survives.

        Collective: one all-reduce of the whole tensor per name; for exports and tests, not for the step. Names of parameters that
        are frozen are left out, on every rank alike: no rank sees their slices.

        Args:
            dtypes: element type by name, the same on every rank; by default that of the masters.
        """
        mine = {s.name: (s, t) for s, t in pieces}
        trained, result = self.master_layout(), {}
        for name in names:
            if name not in trained:
                continue
            dtype, shape = self._layout(name, mine)
            dtype = dtype if dtypes is None else dtypes[name]
            flat = torch.zeros(shape.numel(), dtype=dtype, device=self.device)
            if name in mine:
                shard, t = mine[name]
                flat[shard.start : shard.start + t.numel()] = t.reshape(-1).to(self.device)
            if self.sharded:
                bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
                flat = self.total(bits.to(torch.int32) if dtype.itemsize == 2 else bits).to(bits.dtype).view(dtype)
            result[name] = flat.view(shape)
        return result

    def _layout(self, name: str, mine: dict[str, tuple[Shard, Tensor]]) -> tuple[torch.dtype, torch.Size]:
        dtype, shape = self.master_layout()[name]
        return (mine[name][1].dtype if name in mine and not self.sharded else dtype), shape

    @abc.abstractmethod
    def master_layout(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Master dtype and whole shape of every trained parameter, by name, the same on every rank."""


class Alone:
    """Stands in for a host under a vector that is this rank's own: sums stay here."""

    sharded = False

    def __init__(self, host: Host) -> None:
        self.dirty, self.edits = False, 0  # working copies of this rank, which are not published
        self.device, self._host = host.device, host

    @property
    def names(self) -> list[str]:
        return self._host.names

    def total(self, value: Tensor) -> Tensor:
        return value

    def gather(self, pieces: Sequence[tuple[Shard, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
        return {s.name: t.clone() for s, t in pieces if s.name in names}
