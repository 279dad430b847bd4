"""Linear maps of a matrix's gradient that treat some directions of its input or output space apart. Pure functions."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everbatch.errors import check, check_real

__all__ = ["Projection", "Subspace", "damped", "high_block", "inverse", "null_space", "rows", "window_damped"]

ORTHONORMAL = 1e-3
"""Largest entry of V^T V - I that is let through: float32 eigenvectors reach 1e-5, bfloat16 ones (refused) 4e-3."""


@dataclass(frozen=True, eq=False)
class Subspace:
    """The symmetric map  M = V diag(a) V^T + b (I - V V^T)  in factored form.

    a = 0, b = 1 removes the span of V; a = b = 1 is the identity. G M = b G + (G V) diag(a - b) V^T costs 4 o d k
    multiply-adds for G (o, d). Maps with the same V compose by multiplying a and b.

    Args:
        basis: V, (d, k), orthonormal columns (zero columns are padding); or (o, d, k), one basis for each row of G, as GRIP's
            routers have. float32 or float64: bfloat16 loses orthogonality.
        scale: a, (k,) or (o, k).
        rest: b.

    Raises:
        ValueError: shapes that do not fit, entries that are not finite, columns that are not orthonormal, half precision.
    """

    basis: Tensor
    scale: Tensor
    rest: float = 1.0

    def __post_init__(self) -> None:
        v, a = self.basis, self.scale
        check(v.dim() in (2, 3), "Subspace", f"basis of shape {tuple(v.shape)}", "be (d, k) or (o, d, k)")
        check(a.shape == v.shape[:-2] + v.shape[-1:], "Subspace", f"scale of shape {tuple(a.shape)}",
              f"be {tuple(v.shape[:-2] + v.shape[-1:])}")
        check(v.dtype in (torch.float32, torch.float64) and a.dtype == v.dtype, "Subspace",
              f"basis in {v.dtype}, scale in {a.dtype}", "both be float32 or float64")
        check(v.shape[-1] <= v.shape[-2], "Subspace", f"{v.shape[-1]} directions in {v.shape[-2]} dimensions",
              "be at most as many")
        check_real("Subspace", "rest", self.rest)
        check(bool(torch.isfinite(v).all() and torch.isfinite(a).all()), "Subspace", "entries that are not finite", "be finite")
        gram = v.mT @ v
        wanted = torch.diag_embed((gram.diagonal(dim1=-2, dim2=-1) > 0.5).to(v))
        off = float((gram - wanted).abs().max()) if v.shape[-1] else 0.0
        check(off <= ORTHONORMAL, "Subspace", f"columns orthonormal to {off:.2g}", f"be so to {ORTHONORMAL:g}",
              "pass eigenvectors, or QR them")

    @property
    def width(self) -> int:
        """d."""
        return self.basis.shape[-2]

    @property
    def identity(self) -> bool:
        """Whether it changes nothing."""
        return self.rest == 1.0 and bool((self.scale == 1.0).all())

    def right(self, g: Tensor, first: int = 0) -> Tensor:
        """G M for G (o, d), in G's dtype where that is wider than the basis'; `first`: row of the whole that G begins with."""
        v, a = self.basis, self.scale - self.rest
        wide = g.to(torch.promote_types(g.dtype, v.dtype))
        v, a = v.to(wide), a.to(wide)
        base = wide if self.rest == 1.0 else wide * self.rest
        if v.dim() == 2:
            return base + ((wide @ v) * a) @ v.T
        v, a = v[first : first + len(g)], a[first : first + len(g)]
        return base + (v @ (torch.einsum("od,odk->ok", wide, v) * a).unsqueeze(-1)).squeeze(-1)

    def then(self, other: Subspace) -> Subspace:
        """The product with a map of the same basis.

        Raises:
            ValueError: another basis; the product of maps with different bases has no factored form of this kind.
        """
        same = self.basis.shape == other.basis.shape and torch.equal(self.basis, other.basis)
        check(same, "Subspace", "maps with different bases", "share one basis to compose", "apply one after the other")
        return Subspace(self.basis, self.scale * other.scale, self.rest * other.rest)


@dataclass(frozen=True, eq=False, kw_only=True)
class Projection:
    """What to do with one matrix's gradient G (o, d); dimensions after the first are flattened into d.

        G' = L G R                            left and right maps, either may be missing
        G' = G - (I - L) G (I - R)            joint: only what both act on; with null spaces, the block U U^T G V V^T is removed

    The side is said, never inferred: `right` acts on columns (the inputs of a Linear), `left` on rows (its outputs). A module
    that stores (in, out) has them the other way round.
    """

    left: Subspace | None = None
    right: Subspace | None = None
    joint: bool = False

    def __post_init__(self) -> None:
        check(self.left is not None or self.right is not None, "Projection", "neither left nor right", "have a side")
        check(not self.joint or (self.left is not None and self.right is not None), "Projection", "joint with one side",
              "have both", "leave joint out")
        check(self.left is None or self.left.basis.dim() == 2, "Projection", "a basis for each row on the left",
              "be on the right")

    @property
    def identity(self) -> bool:
        """Whether it changes nothing."""
        sides = [s.identity for s in (self.left, self.right) if s is not None]
        return any(sides) if self.joint else all(sides)

    def fits(self, name: str, shape: Sequence[int]) -> None:
        """Raise `ValueError` unless a parameter of this shape has these sides."""
        columns = 1
        for n in shape[1:]:
            columns *= n
        check(len(shape) >= 2, "Projection", f"{name} of shape {tuple(shape)}", "have two dimensions or more")
        for side, size, label in ((self.left, shape[0], "left"), (self.right, columns, "right")):
            check(side is None or side.width == size, "Projection", f"{label} of {name} has width {side.width if side else 0}",
                  f"be {size}", "is the matrix stored the other way round?")
        if self.right is not None and self.right.basis.dim() == 3:
            check(self.right.basis.shape[0] == shape[0], "Projection", f"{name}: {self.right.basis.shape[0]} bases for rows",
                  f"be {shape[0]}")

    def apply(self, g: Tensor, first: int = 0) -> Tensor:
        """G' for G (o, d), or rows `first` and on of it where nothing is done on the left."""
        if self.left is None:
            assert self.right is not None
            return self.right.right(g, first)
        if self.right is None:
            return self.left.right(g.T).T
        if not self.joint:
            return self.right.right(self.left.right(g.T).T)
        away = g - self.left.right(g.T).T
        return g - (away - self.right.right(away))

    def tensors(self) -> dict[str, Tensor]:
        """Bases and scales by side: what a checkpoint keeps beside `outline`."""
        sides = {"left": self.left, "right": self.right}
        return {f"{name}.{part}": getattr(side, part) for name, side in sides.items() if side is not None
                for part in ("basis", "scale")}

    def outline(self) -> dict[str, Any]:
        """The rest of it, JSON-able: what each side does off its basis."""
        rests = {name: None if side is None else side.rest for name, side in (("left", self.left), ("right", self.right))}
        return {**rests, "joint": self.joint}

    @classmethod
    def of(cls, outline: dict[str, Any], tensors: Mapping[str, Tensor]) -> Projection:
        """What `outline` and `tensors` gave."""
        sides = {name: None if outline[name] is None else
                 Subspace(tensors[f"{name}.basis"], tensors[f"{name}.scale"], outline[name])
                 for name in ("left", "right")}
        return cls(left=sides["left"], right=sides["right"], joint=outline["joint"])

    def encode(self) -> dict[str, Any]:
        """Plain values that hold every bit: JSON-able, and a third larger than `tensors`."""
        return {"left": _encode(self.left), "right": _encode(self.right), "joint": self.joint}

    @classmethod
    def decode(cls, plain: dict[str, Any], device: torch.device | str = "cpu") -> Projection:
        """What `encode` gave: checkpoints once held this."""
        return cls(left=_decode(plain["left"], device), right=_decode(plain["right"], device), joint=plain["joint"])


def null_space(basis: Tensor) -> Subspace:
    """I - V V^T: nothing along V. Idempotent; never enlarges a gradient."""
    return Subspace(basis, torch.zeros_like(basis[..., 0, :]))


def damped(basis: Tensor, values: Tensor, mu: float) -> Subspace:
    """mu (C + mu I)^-1 with the kept eigenpairs of C: a_i = mu / (lambda_i + mu), b = 1. What C has not seen keeps its rate.

    Args:
        mu: > 0, in the units of C; mu_rel * tr(C) / d is portable, with mu_rel from 0.01 to 0.1.
    """
    check_real("damped", "mu", mu, 0.0, open_low=True)
    return Subspace(basis, mu / (values + mu))


def inverse(basis: Tensor, values: Tensor, mu: float) -> Subspace:
    """(C + mu I)^-1 with the kept eigenpairs: a_i = 1 / (lambda_i + mu), b = 1 / mu; exact where all are kept. mu > 0.

    It enlarges gradients by up to 1 / mu; prefer `damped`.
    """
    check_real("inverse", "mu", mu, 0.0, open_low=True)
    return Subspace(basis, 1 / (values + mu), 1 / mu)


def window_damped(basis: Tensor, values: Tensor, window: int = 3) -> Subspace:
    """a_i = lambda_i / mean(lambda_{max(1, i - window + 1)} .. lambda_i), b = 1: SAME's router rule as printed.

    A mild damping where the spectrum drops, no protection: old inputs lie in the span of V, and there it acts.
    """
    check(window >= 1, "window_damped", f"window={window!r}", "be >= 1")
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    at = torch.arange(1, len(values) + 1, device=values.device)
    start = (at - window).clamp_min(0)
    means = (sums[at] - sums[start]) / (at - start)
    return Subspace(basis, torch.where(means > 0, values / means, 1.0))


def rows(bases: Sequence[Tensor]) -> Tensor:
    """One basis (d, k_j) for each row, padded with zero columns: (o, d, max k). GRIP's expert-wise bases."""
    most = max(b.shape[1] for b in bases)
    return torch.stack([torch.nn.functional.pad(b, (0, most - b.shape[1])) for b in bases])


def high_block(weight: Tensor, rank: int) -> Projection:
    """OSFT in weight space: G' = G - U U^T G V V^T with the `rank` leading singular pairs of W (o, ...).

    The mixed blocks stay free; rank = min(o, d) of a square W freezes it.

    Source: Nayak et al. 2025, arXiv 2504.07097.
    """
    matrix = weight.detach().flatten(1)
    check(1 <= rank <= min(matrix.shape), "high_block", f"rank={rank!r}", f"be in [1, {min(matrix.shape)}]")
    wide = matrix.double() if matrix.device.type == "cpu" else matrix.float()
    u, _, vh = torch.linalg.svd(wide, full_matrices=False)
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    sides = (null_space(m.to(dtype).contiguous()) for m in (u[:, :rank], vh[:rank].T))
    return Projection(left=next(sides), right=next(sides), joint=True)


def _encode(side: Subspace | None) -> dict[str, Any] | None:
    if side is None:
        return None
    return {"shape": list(side.basis.shape), "dtype": str(side.basis.dtype).removeprefix("torch."), "basis": _text(side.basis),
            "scale": _text(side.scale), "rest": side.rest}


def _decode(plain: dict[str, Any] | None, device: torch.device | str) -> Subspace | None:
    if plain is None:
        return None
    shape = tuple(plain["shape"])
    basis, scale = (torch.frombuffer(bytearray(base64.b64decode(plain[k])), dtype=getattr(torch, plain["dtype"]))
                    if plain[k] else torch.empty(0, dtype=getattr(torch, plain["dtype"])) for k in ("basis", "scale"))
    return Subspace(basis.view(shape).to(device), scale.view(shape[:-2] + shape[-1:]).to(device), plain["rest"])


def _text(t: Tensor) -> str:
    return base64.b64encode(t.detach().cpu().contiguous().numpy().tobytes()).decode()
