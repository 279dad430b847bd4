"""Sums over rows of what each row's gradient is, from what layers were given and the gradient of what they returned: one backward
pass for all rows, and for linear layers no gradient of a row is ever built."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook

from everbatch.optim.memory.replica import Weights
from everbatch.rows import count_of, each

__all__ = ["ByLayer", "Size", "Unsuited", "Values", "of_one"]

Values = Callable[..., Tensor]
"""Of weights by name and rows: a value of each row, (n,), differentiable."""
Size = Callable[[Tensor], Tensor]
"""Elementwise, and of a product the product of both: a square, or an absolute value."""
NEAR, LEAST = 1e4, 10.0
"""How far sums may be from those found otherwise, of a tensor's norm, and what share of the largest gradient is rounding of each:
in units of the type's precision, so 1e-3 and 1e-6 in fp32."""
COMPARED, TRIES = 4, 12
"""Rows that are taken both ways, and how often at most, where some weight has no gradient in them."""
NEARBY, NARROW = 2**18, 24
"""Numbers that a processor keeps near it, and how many inputs are too few for a product of matrices of their own."""


class Unsuited(Exception):
    """A weight is used in a way that is not known here."""


@dataclass
class Product:
    """Gradients of each row that are products of matrices."""

    slopes: Tensor
    """(n, outputs, places), what arrives at them."""
    seen: list[Tensor]
    """(n, places, inputs) each, what was seen there; beside each other they are all inputs."""
    shape: Callable[[Tensor], Tensor]
    """From (..., outputs, inputs) to (..., *weight)."""

    def rows(self) -> Tensor:
        """(n, *weight)."""
        return self.shape(_joined([self.slopes @ part for part in self.seen]))

    def sum(self, size: Size) -> Tensor:
        """Sum of the rows' sizes, (*weight)."""
        n, outputs, places = self.slopes.shape
        inputs = sum(part.shape[-1] for part in self.seen)
        if places == 1:  # the size of a product is the product of sizes
            return self.shape(size(self.slopes[:, :, 0]).T @ size(_joined(self.seen)[:, 0]))
        at_once = NEARBY // (outputs * inputs)
        if n <= at_once or self.slopes.device.type != "cpu":
            return size(self.rows()).sum(0)
        # More are made piece by piece and added up at once: written to memory, they would take five times as long.
        if at_once >= 8:
            starts = range(0, n, at_once)
            return torch.stack([size(self._some(start, start + at_once).rows()).sum(0) for start in starts]).sum(0)
        total = self.slopes.new_zeros(outputs, inputs)
        some = max(1, NEARBY // inputs)
        buffer = total.new_empty(some, inputs)
        for slopes, *parts in zip(self.slopes, *self.seen, strict=True):
            seen = _joined(parts)
            for start in range(0, outputs, some):
                few, sums = slopes[start : start + some], total[start : start + some]
                gradient = torch.mm(few, seen, out=buffer[: len(few)])
                if size is torch.square:
                    sums.addcmul_(gradient, gradient)
                else:
                    sums.add_(size(gradient))
        return self.shape(total)

    def _some(self, start: int, end: int) -> Product:
        return Product(self.slopes[start:end], [part[start:end] for part in self.seen], self.shape)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


Rule = Callable[[Tensor], Tensor | Product]
"""From the gradient at a layer's output to that of a weight, for each row: (n, *weight), or what it is a product of."""


@dataclass
class _Use:
    """One call of a layer."""

    layer: nn.Module
    names: dict[str, str]
    """Of its weights: "weight" and "bias" to names in the model."""
    x: Tensor
    rules: dict[str, Rule]
    edge: GradientEdge


class ByLayer:
    """Whether a model's rows may be taken so, and their sums.

    Of a row with gradient g at a linear layer's output and input x the weight's gradient is g x^T, of which the square is
    g^2 (x^2)^T, so that the sum over rows is one product of matrices; with more dimensions, and for convolutions, g x^T is summed
    within each row first. All weights have to be those of torch's own Linear, Conv2d without groups, LayerNorm, GroupNorm or
    batch norm in evaluation mode. That nothing else uses them, and that rows do not see each other, shows in the first rows of an
    estimate, which are taken otherwise as well: a model that does so with later rows alone is not found out.
    """

    def __init__(self) -> None:
        self.fits: bool | None = None
        """Whether it does; None: not known yet."""
        self._tries = 0

    def compare(self, values: Values, weights: Weights, rows: list[Any], size: Size, wanted: Weights, *, weighted: bool) -> None:
        """Decide whether `sums` is right for this model, by what was found otherwise for these rows."""
        if count_of(rows[0]) < 2:
            return
        try:
            found = self.sums(values, weights, rows, size, weighted=weighted)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model cannot do with several rows, `wanted` was found without
            found = {}
        self._tries += 1
        if not found or not self._near(found, wanted, size):
            self.fits = False
        elif all(bool(value.any()) for value in wanted.values()):  # a weight without a gradient shows nothing
            self.fits = True
        elif self._tries == TRIES:
            self.fits = False

    @staticmethod
    def _near(found: Weights, wanted: Weights, size: Size) -> bool:
        """Whether they differ by rounding."""
        norms = torch.stack([value.norm() for value in wanted.values()])
        apart = torch.stack([(found[name] - value).norm() for name, value in wanted.items()])
        eps = torch.finfo(norms.dtype).eps
        if size is torch.square:  # (g + error)^2 - g^2
            error = LEAST * eps * norms.max().sqrt()
            rounding = 2 * norms.sqrt() * error + error.square()
        else:
            rounding = LEAST * eps * norms.max()
        return bool((apart <= NEAR * eps * norms + rounding).all())

    def sums(self, values: Values, weights: Weights, rows: list[Any], size: Size, *, weighted: bool) -> Weights:
        """sum_i a_i size(d values_i / d w) for every weight; a_i is exp(values_i) where `weighted`, of squares alone, else 1.

        Args:
            values: of weights and rows, (n,).
            rows: tensors, or several by name, of n rows each.

        Raises:
            Unsuited: take them otherwise.
        """
        if any(w.dtype.itemsize < 4 for w in weights.values()):  # whose squares vanish
            raise Unsuited
        uses: list[_Use] = []
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        names = {id(leaf): name for name, leaf in leaves.items()}
        handle = register_module_forward_hook(lambda layer, given, y: _note(uses, names, layer, given, y))
        try:
            with torch.enable_grad():
                found = values(leaves, *rows)
        finally:
            handle.remove()
        known = {name for use in uses for name in use.names.values()} == set(weights)
        if not known or not found.requires_grad or found.shape != (count_of(rows[0]),):
            raise Unsuited
        # The root of a_i goes with the row, wherever the model moves that.
        with torch.enable_grad():
            whole = (found * (found.detach() / 2).exp() if weighted else found).sum()
        slopes = torch.autograd.grad(whole, [use.edge for use in uses], allow_unused=True)
        by_name = defaultdict[str, list[tuple[str, _Use, Tensor]]](list)
        for use, slope in zip(uses, slopes, strict=True):
            if slope is None:
                continue
            if len(slope) != len(found):  # rows are not where they are looked for
                raise Unsuited
            for kind, name in use.names.items():
                by_name[name].append((kind, use, slope.to(weights[name].dtype)))
        return {name: _of_weight(by_name[name], w, size).reshape(w.shape) for name, w in weights.items()}


def of_one(values: Values, weights: Weights, row: list[Any]) -> tuple[Weights, Tensor]:
    """Gradient by every weight, and value, of one row: by autograd, which takes all that trains."""
    with torch.enable_grad():
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        (value,) = values(leaves, *(each(lambda v: v[None], r) for r in row))
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True)), value.detach()


def _note(uses: list[_Use], names: dict[int, str], layer: nn.Module, given: tuple[Any, ...], y: Any) -> None:
    """A layer was called: keep what its weights' gradients are made of."""
    own = {kind: names[id(w)] for kind, w in layer._parameters.items() if id(w) in names}
    if not own:
        return
    make = KNOWN.get(type(layer).forward)
    if make is None or "forward" in layer.__dict__ or not own.keys() <= {"weight", "bias"}:
        raise Unsuited
    if len(given) != 1 or not isinstance(y, Tensor) or not y.requires_grad:
        raise Unsuited
    x = given[0].detach().to(next(w.dtype for w in layer._parameters.values() if w is not None))  # autocast gives less
    uses.append(_Use(layer, own, x, make(layer, x), get_gradient_edge(y)))  # now: what follows may write into y


def _of_weight(uses: list[tuple[str, _Use, Tensor]], w: Tensor, size: Size) -> Tensor:
    """One weight's sum; a weight of several calls adds up its gradients first."""
    if not uses:
        return torch.zeros_like(w)
    gradients = [use.rules[kind](slope) for kind, use, slope in uses]
    first = gradients[0]
    if len(uses) == 1 and isinstance(first, Product):
        return first.sum(size)
    rows = functools.reduce(torch.add, [g.rows() if isinstance(g, Product) else g for g in gradients])
    return size(rows).sum(0)


# ------------------------------------------------------------------------------- gradients of each row, by kind of layer
def _linear(_layer: Any, x: Tensor) -> dict[str, Rule]:
    def flat(t: Tensor) -> Tensor:
        return t.reshape(len(t), -1, t.shape[-1])

    def weight(g: Tensor) -> Product:
        return Product(flat(g).transpose(1, 2), [flat(x)], lambda t: t)

    return {"weight": weight, "bias": lambda g: flat(g).sum(1)}


def _conv2d(layer: Any, x: Tensor) -> dict[str, Rule]:
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str) or x.ndim != 4:
        raise Unsuited
    (tall, broad), (down, right), (top, left) = layer.kernel_size, layer.stride, layer.padding
    below, beside = layer.dilation

    def shape(t: Tensor) -> Tensor:
        return t.reshape(*t.shape[:-1], tall, broad, x.shape[1]).movedim(-1, -3)

    def weight(g: Tensor) -> Product:
        n, out, high, wide = g.shape
        padded = functional.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top)).contiguous()
        row, line, place, _ = padded.stride()
        slopes = g.permute(0, 2, 3, 1).reshape(n, high * wide, out).transpose(1, 2)
        channels = padded.shape[3]
        if broad * channels < NARROW:
            strides: tuple[int, ...] = (row, down * line, right * place, below * line, beside * place, 1)
            seen = padded.as_strided((n, high, wide, tall, broad, channels), strides)
            return Product(slopes, [seen.flatten(3).flatten(1, 2)], shape)
        # What each place of a line sees of it, for all lines of the kernel: a third of what `unfold` makes.
        strides = (row, line, right * place, beside * place, 1)
        seen = padded.as_strided((n, padded.shape[1], wide, broad, channels), strides)
        if down == 1:  # lines share what is copied
            seen = seen.flatten(3).contiguous()
        starts = range(0, tall * below, below)
        lines = [seen[:, start : start + down * high : down].flatten(1, 2).flatten(2) for start in starts]
        return Product(slopes, lines, shape)

    return {"weight": weight, "bias": lambda g: g.flatten(2).sum(2)}


def _layer_norm(layer: Any, x: Tensor) -> dict[str, Rule]:
    places = len(layer.normalized_shape)

    def flat(t: Tensor) -> Tensor:
        return t.flatten(-places).reshape(len(t), -1, t.shape[-places:].numel())

    normal = functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    return {"weight": lambda g: flat(g * normal).sum(1), "bias": lambda g: flat(g).sum(1)}


def _group_norm(layer: Any, x: Tensor) -> dict[str, Rule]:
    normal = functional.group_norm(x, layer.num_groups, eps=layer.eps)
    return {"weight": lambda g: _over_places(g * normal), "bias": _over_places}


def _batch_norm(layer: Any, x: Tensor) -> dict[str, Rule]:
    if layer.training or layer.running_mean is None:
        raise Unsuited
    mean: Tensor = layer.running_mean.to(x.dtype)
    scale: Tensor = (layer.running_var + layer.eps).rsqrt().to(x.dtype)

    def weight(g: Tensor) -> Tensor:
        centred = x - mean.view(-1, *(1,) * (x.ndim - 2))  # first: means may be far above deviations
        return _over_places(g * centred) * scale

    return {"weight": weight, "bias": _over_places}


def _over_places(t: Tensor) -> Tensor:
    """Sum of each row's channel."""
    return t.sum(tuple(range(2, t.ndim))) if t.ndim > 2 else t


KNOWN: dict[Any, Callable[[Any, Tensor], dict[str, Rule]]] = {
    nn.Linear.forward: _linear, nn.Conv2d.forward: _conv2d, nn.LayerNorm.forward: _layer_norm, nn.GroupNorm.forward: _group_norm,
    nn.BatchNorm2d.forward: _batch_norm,
}
