"""Batch norms that normalise by the batch they are given, mixed with the statistics of what they were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from everbatch.errors import check, check_real, check_whole
from everbatch.nn.batch_norms import Converted, batch_norms, finished, put_back

__all__ = ["BatchAdapted", "adapt_batch_norm", "restore_adapted"]

ADDED = ("original", "alpha", "prior", "synchronised")


class BatchAdapted(Converted):
    """A batch norm with statistics of the batch, mixed with the source's m and v; made by `adapt_batch_norm`.

        mean = (1 - alpha) m + alpha mean_batch        var = (1 - alpha) v + alpha var_batch        biased, by channel
        y = (x - mean) / sqrt(var + eps) * weight + bias

    alpha is a number, or with a `prior` of N samples n / (N + n), n being the samples of the batch. `train()` and `eval()` change
    nothing, and the source's statistics never move. Gradients flow through the batch's statistics.

    Under data parallelism the batch is this rank's; with `synchronised` it is that of all ranks: one all-reduce of 2C + 1
    numbers per layer and forward, and every rank runs as many forwards.

    Source: Schneider et al. 2020, arXiv 2006.16971 (the prior N); Nado et al. 2020, arXiv 2006.10963 (alpha = 1).
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    eps: float
    alpha: float
    prior: int | None
    synchronised: bool

    def forward(self, input: Tensor) -> Tensor:
        """The normalised input: same shape and dtype."""
        shared = self.synchronised and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        source = (self.running_mean, self.running_var, self.weight, self.bias)
        if self.prior is None and self.alpha == 0.0:
            return finished(self, functional.batch_norm(input, *source, training=False, eps=self.eps))
        if self.prior is None and self.alpha == 1.0 and not shared:
            return finished(self, functional.batch_norm(input, None, None, *source[2:], training=True, eps=self.eps))
        return finished(self, self._mixed(input, shared))

    def _mixed(self, input: Tensor, shared: bool) -> Tensor:
        """By statistics of both."""
        x = input.to(torch.promote_types(self.running_mean.dtype, torch.float32))
        wide = (1, -1, *(1,) * (x.dim() - 2))
        mean, var, rows = self._of_batch(x, shared)
        share = self.alpha if self.prior is None else rows / (rows + self.prior)
        mean = torch.lerp(self.running_mean.to(mean), mean, torch.as_tensor(share).to(mean))
        var = torch.lerp(self.running_var.to(var), var, torch.as_tensor(share).to(var))
        scale = (var + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight.to(scale.dtype)
        y = (x - mean.view(wide)) * scale.view(wide)
        return (y if self.bias is None else y + self.bias.to(y.dtype).view(wide)).to(input.dtype)

    def _of_batch(self, x: Tensor, shared: bool) -> tuple[Tensor, Tensor, float | Tensor]:
        """Mean, biased variance (C,) and number of samples. Relative to the source's mean: squares of large means cancel."""
        axes = (0, *range(2, x.dim()))
        middle = self.running_mean.to(x.dtype)
        centred = x - middle.view(1, -1, *(1,) * (x.dim() - 2))
        each = x[0, 0].numel()
        first, second, rows = centred.sum(axes), centred.square().sum(axes), float(len(x))
        if not shared:
            moved = first / (rows * each)
            return middle + moved, (second / (rows * each) - moved.square()).clamp(min=0), rows
        flat = torch.cat([first, second, first.new_tensor([rows])])
        first, second, total = _Summed.apply(flat).split([len(first), len(first), 1])
        count = total.detach() * each
        moved = first / count
        return middle + moved, (second / count - moved.square()).clamp(min=0), total.detach()

    def extra_repr(self) -> str:
        """For print."""
        share = f"alpha={self.alpha:g}" if self.prior is None else f"prior={self.prior}"
        return f"{len(self.running_mean)}, eps={self.eps}, {share}" + (", synchronised" if self.synchronised else "")


class _Summed(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of their gradients. torch's own says it is deprecated, or is private."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor) -> Tensor:
        total = flat.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def adapt_batch_norm(
    model: nn.Module, alpha: float = 1.0, *, prior: int | None = None, synchronised: bool = False, exclude: Sequence[str] = (),
) -> list[str]:
    """Make every batch norm of `model` a `BatchAdapted` layer, in place; see there for the equations.

    Layers change their class and keep their identity, hooks, names, weights and source statistics; state dicts are as before.
    `restore_adapted` undoes it. Layers that are converted already, `UnMixTNS` too, are left as they are.

    Args:
        model: with running statistics, in its trained state.
        alpha: weight of the batch's statistics, in [0, 1]: 0 is the batch norm as evaluated, 1 as trained.
        prior: how many samples the source's statistics count as, >= 0, in place of `alpha`; None: `alpha` says it.
        synchronised: take the batch of all ranks.
        exclude: patterns (`layer4.*`) of names to leave out.

    Returns:
        Names of the layers converted.

    Raises:
        NoNormalizationLayers: no batch norm to convert.
        NoSourceStatistics: one without running statistics.
        ValueError: options out of range; a batch norm without shape, split, or with a forward of
            its own. Nothing is changed then.

    Cost: nothing. No collective.
    """
    who = "adapt_batch_norm"
    check_real(who, "alpha", alpha, 0.0, 1.0)
    if prior is not None:
        check_whole(who, "prior", prior)
    check(not isinstance(exclude, str), who, f"exclude={exclude!r}", "be a sequence of patterns")
    layers = batch_norms(model, exclude, who)
    for layer in layers.values():
        settings = {"original": type(layer), "alpha": float(alpha), "prior": prior, "synchronised": synchronised}
        layer.__class__ = BatchAdapted  # type: ignore[assignment]
        for key, setting in settings.items():
            setattr(layer, key, setting)
    return list(layers)


def restore_adapted(model: nn.Module) -> list[str]:
    """Undo `adapt_batch_norm`, in place; names of the layers restored."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BatchAdapted)}
    for layer in layers.values():
        put_back(layer, ADDED)
    return list(layers)
