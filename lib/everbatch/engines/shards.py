"""What a mixin sees of a model: slices of master weights and gradients by name, and vectors over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["Scratch", "Shard", "Sums", "Vector", "count_bad", "inner", "step_length", "wide"]


def wide(t: Tensor) -> torch.dtype:
    """The type of sums of many terms like `t`: bf16 stops at 256 equal ones, and fp16 has no squares below 6e-8."""
    return torch.promote_types(t.dtype, torch.float32)


COUNTERS = ("step", "mu_product", "eta", "mu")
"""State of torch's optimizers that is one number per parameter: of a parameter of one number, only the name tells it apart."""
LARGEST = 2**22
"""Elements up to which memory for copies is kept: beyond, making views costs nothing beside the arithmetic, and memory does."""
NOBODY: Any = None
ANYWHERE = -2
CHUNK = 2**20
"""Elements of one tensor that are summed in fp32 at most, before sums go on in float64."""


class Sums(Protocol):
    """What a vector needs of a host: where its sums are taken, and over which parameters."""

    device: torch.device
    dirty: bool
    edits: int
    sharded: bool

    @property
    def names(self) -> list[str]:
        """Names of all trained parameters, the same list on every rank."""

    def total(self, value: Tensor) -> Tensor:
        """Sum over the ranks that share one copy of the model, in place."""

    def gather(self, pieces: Sequence[tuple[Shard, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
        """Whole tensors from slices, on every rank."""


class Shard:
    """One rank's slice of one parameter. Padding is never part of it.

    Attributes:
        name: the parameter's name in the bare model, the same on every host.
        shape: shape of the whole parameter.
        start: offset of the slice in the whole, flattened row by row.
        owner: the tensor the base optimizer updates; its key in the optimizer's state.
    """

    __slots__ = ("_data", "_grad", "_group", "_place", "_state", "_view", "name", "owner", "shape", "start")

    def __init__(
        self, name: str, shape: Sequence[int], start: int, owner: Tensor, *, view: Callable[[Tensor], Tensor],
        grad: Callable[[], Tensor | None], group: Callable[[], dict[str, Any]], state: Callable[[], dict[Any, Any]],
    ) -> None:
        self.name, self.shape, self.start, self.owner = name, tuple(shape), start, owner
        self._view, self._grad, self._group, self._state = view, grad, group, state
        self._data: Tensor | None = None
        self._place = ANYWHERE if isinstance(owner, DTensor) else -1  # a DTensor's local part may be replaced
        """Where in memory the owner was when `_data` was made."""

    @property
    def data(self) -> Tensor:
        """The master weights: a writable view, of any shape and memory format with this slice's elements."""
        if self._place == ANYWHERE:
            return self._view(self.owner)
        place = self.owner.data_ptr()
        if self._data is None or place != self._place:  # `p.data = other` moves it
            self._data, self._place = self._view(self.owner), place
        return self._data

    @property
    def grad(self) -> Tensor | None:
        """The reduced gradient: a writable view shaped like `data`, in the dtype the engine accumulates in; None when the
        last pass gave none."""
        return self._grad()

    @property
    def group(self) -> dict[str, Any]:
        """The live parameter group: `group["lr"]`, `group["weight_decay"]`, ..."""
        return self._group()

    def slice_of(self, tensor: Tensor) -> Tensor:
        """This slice of a tensor that is laid out as `owner`: a view."""
        return self._view(tensor)

    @property
    def moments(self) -> dict[str, Tensor]:
        """Views of the base optimizer's per-element state (`exp_avg`, `momentum_buffer`, ...); empty before the first step."""
        kept = self._state().get(self.owner, {})
        return {k: self._view(v) for k, v in kept.items() if torch.is_tensor(v) and v.shape == self.owner.shape
                and (v.dim() or k not in COUNTERS)}

    @property
    def numel(self) -> int:
        """Elements in this slice."""
        return self.data.numel()


@dataclass(eq=False, slots=True)
class Vector:
    """One tensor per shard: a vector over the whole model, of which each rank holds its part.

    Elementwise operations are local and in place (names end in `_`); `norm`, `norms` and `inner` are collectives where the
    weights are sharded, one all-reduce each, and count every element once. Scalars stay on the device: no host sync.

    Copies lie in one tensor where all have one type and device: then a norm, a sum or a product is one operation, and the
    tensors of single shards are views that are made when somebody asks for them.
    """

    host: Sums
    shards: list[Shard]
    _tensors: list[Tensor] | None
    flat: Tensor | None = None
    """The one tensor of which `tensors` are views, in order and without gaps, if they are."""
    lent: bool = False
    """Whether `Scratch` wants its memory back."""

    @property
    def tensors(self) -> list[Tensor]:
        """One tensor per shard, in the order of `shards`."""
        if self._tensors is None:
            assert self.flat is not None
            like = [s.data if s._data is None else s._data for s in self.shards]  # for their shapes
            self._tensors = list(torch._C._nn.unflatten_dense_tensors(self.flat, like))
        return self._tensors

    def __iter__(self) -> Iterator[tuple[Shard, Tensor]]:
        return iter(zip(self.shards, self.tensors, strict=True))

    def clone(self, dtype: torch.dtype | None = None) -> Vector:
        """A copy with its own memory, in another type if one is given."""
        if self.flat is not None:
            return Vector(self.host, self.shards, None, flat=self.flat.to(dtype or self.flat.dtype, copy=True))
        tensors = self.tensors
        kinds = {(t.dtype, t.device) for t in tensors}
        if len(kinds) != 1 or len(tensors) == 1 or dtype not in (None, tensors[0].dtype):
            return Vector(self.host, self.shards, [t.to(dtype or t.dtype, copy=True) for t in tensors])
        return Vector(self.host, self.shards, None, flat=torch._C._nn.flatten_dense_tensors(tensors))

    def norm(self) -> Tensor:
        """Euclidean norm over the whole model: 0-dim float64."""
        return inner(self.host, (self, self))[0].sqrt()

    def norms(self) -> dict[str, Tensor]:
        """Euclidean norm of each whole parameter, on every rank: name to 0-dim float64. One collective for all."""
        names = self.host.names
        place = {name: i for i, name in enumerate(names)}
        squares = torch.zeros(len(names), dtype=torch.float64, device=self.host.device)
        if self.tensors:
            index = torch.tensor([place[s.name] for s in self.shards], device=self.host.device)
            squares.index_add_(0, index, _local_squares(self.tensors, self.host.device))
        return dict(zip(names, self.host.total(squares).sqrt().unbind(), strict=True))

    def add_(self, other: Vector, scale: float | Tensor = 1.0) -> Vector:
        """self += scale * other."""
        mine, theirs = self._alike(other)
        if isinstance(scale, Tensor):
            theirs = _times(theirs, scale)
        if mine:
            torch._foreach_add_(mine, theirs, alpha=scale if isinstance(scale, float) else 1.0)
        return self

    def mul_(self, scale: float | Tensor) -> Vector:
        """self *= scale."""
        if self.flat is not None:
            self.flat.mul_(_like(scale, self.flat))
        elif isinstance(scale, float) and self.shards:
            torch._foreach_mul_(self.tensors, scale)
        elif len({(t.device, t.dtype) for t in self.tensors}) == 1:
            torch._foreach_mul_(self.tensors, _like(scale, self.tensors[0]))
        else:
            for t in self.tensors:
                t.mul_(_like(scale, t))
        return self

    def of_length(self, rho: float | Tensor, delta: float) -> Vector:
        """A copy in the masters' type, of length rho * n / (n + delta), where n is the norm."""
        copy = self.to_masters()
        return copy.mul_(step_length(rho, copy.norm(), delta))

    def to_masters(self) -> Vector:
        """A copy in the masters' type."""
        masters = {s.owner.dtype for s in self.shards}
        if len(masters) == 1:
            return self.clone(masters.pop())
        return Vector(self.host, self.shards, [t.to(s.owner.dtype, copy=True) for s, t in self])

    def times(self, factors: Sequence[Tensor | None]) -> Vector:
        """A new vector: each tensor times a factor with as many elements, or as it is."""
        result = []
        for t, m in zip(self.tensors, factors, strict=True):
            if m is not None:
                t = t * (m if m.shape == t.shape else m.to(t).view(t.shape))
            result.append(t)
        return Vector(self.host, self.shards, result)

    def copy_into(self, tensors: Sequence[Tensor]) -> None:
        """Copy each shard's tensor into another one."""
        if self.shards:
            torch._foreach_copy_(list(tensors), self.tensors)

    def map_(self, function: Callable[[Shard, Tensor], Tensor]) -> Vector:
        """Replace each tensor by `function(shard, tensor)`."""
        self._tensors, self.flat = [function(s, t) for s, t in self], None
        return self

    def _alike(self, other: Vector) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of both, as few as both can be seen as."""
        if self.flat is not None and other.flat is not None and self.shards == other.shards:
            return [self.flat], [other.flat]
        return self.tensors, other.tensors

    def whole(self, name: str) -> Tensor:
        """The whole tensor of one parameter, gathered on every rank, in the parameter's shape (a copy)."""
        return self.host.gather([(s, t) for s, t in self if s.name == name], [name])[name]


def step_length(rho: float | Tensor, norm: Tensor, delta: float) -> Tensor:
    """rho / (norm + delta), and 0 where the norm is: the quotient may overflow in a narrower dtype, and 0 * inf is NaN."""
    return (rho / (norm + delta).clamp_min(torch.finfo(torch.float64).tiny)).masked_fill(norm == 0, 0.0)


def count_bad(tensors: list[Tensor], device: torch.device, places: Collection[torch.device] = ()) -> Tensor:
    """0-dim float64 on `device`: > 0 where an element is not finite. No host sync. `places`: the tensors' devices, if known."""
    bad: list[Tensor] = []
    places = places or {t.device for t in tensors}
    for place in places:  # offload: masters on the CPU
        here = tensors if len(places) == 1 else [t for t in tensors if t.device == place]
        if place.type == "cuda" and (others := [t for t in here if t.dtype in (torch.bfloat16, torch.float64)]):
            # GradScaler's kernel refuses the one, and takes large values of the other for infinite. NaN stays NaN in a maximum.
            filled = [t for t in others if t.numel()] or [torch.zeros((), device=place)]
            largest = [m.double() for m in torch._foreach_norm(filled, math.inf)]
            bad.append((~torch.stack(largest).isfinite()).sum())
            here = [t for t in here if t.dtype not in (torch.bfloat16, torch.float64)]
        found, one = torch.zeros((), device=place), torch.ones((), device=place)
        # What GradScaler asks with: one kernel for all on GPUs, a fifth of aminmax's time on CPUs. Times one changes no bit.
        torch._amp_foreach_non_finite_check_and_unscale_(here, found, one)
        bad.append(found)
    counts = [b.to(device, torch.float64) for b in bad or [torch.zeros((), device=device)]]
    return counts[0] if len(counts) == 1 else torch.stack(counts).sum()


def inner(host: Sums, *pairs: tuple[Vector, Vector]) -> Tensor:
    """Inner products over the whole model of several pairs of vectors: (number of pairs,) float64, one collective for all."""
    local = _pile([_local_inner(a, b, host.device) for a, b in pairs])
    return host.total(local) if host.sharded else local


def _local_inner(a: Vector, b: Vector, device: torch.device) -> Tensor:
    """This rank's part of one inner product: 0-dim float64."""
    if not a.shards:
        return torch.zeros((), dtype=torch.float64, device=device)
    if a is b:
        parts = a.tensors if a.flat is None else [a.flat] if a.flat.numel() <= CHUNK else list(torch.split(a.flat, CHUNK))
        return _local_squares(parts, device).sum()
    return _local_dots(*a._alike(b), device).sum()


def _pile(scalars: list[Tensor]) -> Tensor:
    """(n,) of n 0-dim tensors: a view of one alone, which takes no kernel."""
    return torch.stack(scalars) if len(scalars) > 1 else scalars[0].unsqueeze(0)


def _like(scale: float | Tensor, t: Tensor) -> Any:
    return scale if isinstance(scale, float) else scale.to(device=t.device, dtype=t.dtype)


def _times(tensors: list[Tensor], scale: Tensor) -> list[Tensor]:
    """New tensors: each times a scalar in its own type."""
    if len({(t.device, t.dtype) for t in tensors}) == 1:
        return list(torch._foreach_mul(tensors, _like(scale, tensors[0])))
    return [t * _like(scale, t) for t in tensors]


def _local_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of each tensor, (n,) float64: fp32 accumulation at least inside a tensor, float64 across."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return _pile(list(torch._foreach_norm(tensors, 2, dtype=wide))).to(device, torch.float64).square()


def _local_dots(a: list[Tensor], b: list[Tensor], device: torch.device) -> Tensor:
    """Inner product of each pair of tensors, (n,) float64."""
    return _pile([(x.float() * y.float() if x.dtype.itemsize < 4 else x * y).sum(dtype=torch.float64)
                  for x, y in zip(a, b, strict=True)]).to(device)


class Scratch:
    """Lends vectors that lie in one tensor each, over the same shards as before, and takes them back.

    Making 150 views costs as much as a thin model's norm, sum and copy together. What is lent must not outlive its return: for
    what never leaves a function or a `with` block, and for state of which no one else holds tensors.

    Memory: as many copies of a model's masters as are lent at once (two, and what a method keeps), of up to 4 million elements.
    """

    def __init__(self) -> None:
        self._shards: list[Shard] = []
        """Of what lies here."""
        self._free: list[Vector] = []
        self._of: list[Shard] = []
        """Whose masters were asked for last."""
        self._places: list[int] = []
        self._masters: list[Tensor] = []

    def copy(self, vector: Vector) -> Vector:
        """A copy; give it back with `give`."""
        lent = self._lend(vector)
        if lent is None:
            return vector.clone()
        torch._foreach_copy_(lent.tensors, vector.tensors)
        return lent

    def to_masters(self, vector: Vector) -> Vector:
        """A copy in the masters' type; give it back with `give`."""
        alike = {s.owner.dtype for s in vector.shards} == {t.dtype for t in vector.tensors}
        return self.copy(vector) if alike else vector.to_masters()

    def give(self, *vectors: Vector) -> None:
        """Return what was lent; a vector that was not is let go."""
        for v in vectors:
            if v.lent and v.shards is self._shards:
                v.host = NOBODY  # whoever keeps this memory shall not keep the engine
                self._free.append(v)

    def displace(self, vector: Vector) -> Vector:
        """Add a vector to the masters of its shards. Returns a copy of them as they were, which is to be given back."""
        weights = Vector(vector.host, vector.shards, self.masters(vector.shards))
        saved = self.copy(weights)
        mine, theirs = saved.flat, vector.flat
        lent = self._lend(saved) if mine is not None and theirs is not None else None
        if lent is None or mine is None or theirs is None:
            weights.add_(vector)
        else:
            torch.add(mine, theirs, out=lent.flat)
            lent.copy_into(weights.tensors)
            self.give(lent)
        vector.host.dirty = True
        vector.host.edits += 1
        return saved

    def restore(self, saved: Vector) -> None:
        """Make the masters what `displace` returned, and take it back."""
        saved.copy_into(self.masters(saved.shards))
        saved.host.dirty = True
        saved.host.edits += 1
        self.give(saved)

    def masters(self, shards: list[Shard]) -> list[Tensor]:
        """The masters of these shards as views, in a list that is not to be edited: the same one while they lie where they do."""
        if shards and shards[0]._place == ANYWHERE:  # FSDP2's: all are, or none
            return [s.data for s in shards]
        places = [s.owner.data_ptr() for s in shards]
        if places != self._places or shards != self._of:
            self._of, self._places, self._masters = list(shards), places, [s.data for s in shards]
        return self._masters

    def _lend(self, like: Vector) -> Vector | None:
        """A vector over the same shards, with any values; None where memory is not kept."""
        kinds = {(t.dtype, t.device) for t in (like.tensors if like.flat is None else [like.flat])}
        if len(kinds) != 1 or len(like.shards) < 2:
            return None
        ((dtype, device),) = kinds
        if self._shards != like.shards:
            self._shards, self._free = list(like.shards), []
        for lent in self._free:
            if lent.flat is not None and (lent.flat.dtype, lent.flat.device) == (dtype, device):
                self._free.remove(lent)
                lent.host = like.host
                return lent
        size = sum(t.numel() for t in like.tensors)
        if size > LARGEST:
            return None
        # The list itself: by it, what is returned is known to be of these shards.
        return Vector(like.host, self._shards, None, flat=torch.empty(size, dtype=dtype, device=device), lent=True)
