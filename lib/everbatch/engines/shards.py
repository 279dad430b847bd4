"""What a mixin sees of a model: slices of master weights and gradients by name, and vectors over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from everbatch.engines.host import Host

__all__ = ["ByName", "Shard", "Vector", "inner", "wide"]


def wide(t: Tensor) -> torch.dtype:
    """The type of sums of many terms like `t`: bf16 stops at 256 equal ones, and fp16 has no squares below 6e-8."""
    return torch.promote_types(t.dtype, torch.float32)


COUNTERS = ("step", "mu_product", "eta", "mu")
"""State of torch's optimizers that is one number per parameter: of a parameter of one number, only the name tells it apart."""


class Shard:
    """One rank's slice of one parameter. Padding is never part of it.

    Attributes:
        name: the parameter's name in the bare model, the same on every host.
        shape: shape of the whole parameter.
        start: offset of the slice in the whole, flattened row by row.
        owner: the tensor the base optimizer updates; its key in the optimizer's state.
    """

    __slots__ = ("_grad", "_group", "_state", "_view", "name", "owner", "shape", "start")

    def __init__(
        self, name: str, shape: Sequence[int], start: int, owner: Tensor, *, view: Callable[[Tensor], Tensor],
        grad: Callable[[], Tensor | None], group: Callable[[], dict[str, Any]], state: Callable[[], dict[Any, Any]],
    ) -> None:
        self.name, self.shape, self.start, self.owner = name, tuple(shape), start, owner
        self._view, self._grad, self._group, self._state = view, grad, group, state

    @property
    def data(self) -> Tensor:
        """The master weights: a writable view, of any shape and memory format with this slice's elements."""
        return self._view(self.owner)

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


class Vector:
    """One tensor per shard: a vector over the whole model, of which each rank holds its part.

    Elementwise operations are local and in place (names end in `_`); `norm`, `norms` and `inner` are collectives where the
    weights are sharded, one all-reduce each, and count every element once. Scalars stay on the device: no host sync.
    """

    __slots__ = ("host", "shards", "tensors")

    def __init__(self, host: Host, shards: Sequence[Shard], tensors: Sequence[Tensor]) -> None:
        self.host, self.shards, self.tensors = host, list(shards), list(tensors)

    def __iter__(self) -> Iterator[tuple[Shard, Tensor]]:
        return iter(zip(self.shards, self.tensors, strict=True))

    def clone(self) -> Vector:
        """A copy with its own memory."""
        return Vector(self.host, self.shards, [t.clone() for t in self.tensors])

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
        tensors = other.tensors if isinstance(scale, float) else [t * _like(scale, t) for t in other.tensors]
        if self.tensors:
            torch._foreach_add_(self.tensors, tensors, alpha=scale if isinstance(scale, float) else 1.0)
        return self

    def mul_(self, scale: float | Tensor) -> Vector:
        """self *= scale."""
        if isinstance(scale, float) and self.tensors:
            torch._foreach_mul_(self.tensors, scale)
        elif len({(t.device, t.dtype) for t in self.tensors}) == 1:
            torch._foreach_mul_(self.tensors, _like(scale, self.tensors[0]))  # type: ignore[arg-type]
        else:
            for t in self.tensors:
                t.mul_(_like(scale, t))  # type: ignore[arg-type]
        return self

    def map_(self, function: Callable[[Shard, Tensor], Tensor]) -> Vector:
        """Replace each tensor by `function(shard, tensor)`."""
        self.tensors = [function(s, t) for s, t in self]
        return self

    def whole(self, name: str) -> Tensor:
        """The whole tensor of one parameter, gathered on every rank, in the parameter's shape (a copy)."""
        return self.host.gather([(s, t) for s, t in self if s.name == name], [name])[name]


def inner(host: Host, *pairs: tuple[Vector, Vector]) -> Tensor:
    """Inner products over the whole model of several pairs of vectors: (number of pairs,) float64, one collective for all."""
    local = torch.zeros(len(pairs), dtype=torch.float64, device=host.device)
    for i, (a, b) in enumerate(pairs):
        if a.tensors:
            parts = _local_squares(a.tensors, host.device) if a is b else _local_dots(a.tensors, b.tensors, host.device)
            local[i] = parts.sum()
    return host.total(local)


def _like(scale: Tensor, t: Tensor) -> Tensor:
    return scale.to(device=t.device, dtype=t.dtype)


def _local_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of each tensor, (n,) float64: fp32 accumulation at least inside a tensor, float64 across."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.stack(list(torch._foreach_norm(tensors, 2, dtype=wide))).to(device, torch.float64).square()


def _local_dots(a: list[Tensor], b: list[Tensor], device: torch.device) -> Tensor:
    """Inner product of each pair of tensors, (n,) float64."""
    return torch.stack([(x.float() * y.float() if x.dtype.itemsize < 4 else x * y).sum(dtype=torch.float64)
                        for x, y in zip(a, b, strict=True)]).to(device)


class ByName(dict[str, Tensor]):
    """State of a mixin that is per element: parameter name to this rank's slice. Saved whole, by name."""
