"""UnMix-TNS: normalisation by instance statistics mixed with components that follow the stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from everbatch.nn.batch_norms import Converted, finished

__all__ = ["UnMixTNS", "momentum_of"]

FLOOR = 1e-12
"""Least norm in a cosine."""
COMPONENTS = ("component_means", "component_vars", "noise")

Mode = Literal["adapt", "frozen", "source"]


def momentum_of(momentum: float, batch_size: int, batch_size_max: int) -> float:
    """1 - (1 - momentum)^(batch_size / batch_size_max): what smaller batches move components by."""
    return -math.expm1(batch_size / batch_size_max * math.log1p(-momentum))


class UnMixTNS(Converted):
    """A batch norm whose statistics are those of each sample, mixed with K components; made by `convert_unmix_tns`.

    With m_b, v_b the mean and biased variance of sample b over its positions, by channel:

        p_bk = softmax_k(cos(m_b, mu_k) / temperature)                              without gradient
        mean_b = (1/K) sum_k mu_bk          mu_bk = (1 - p_bk) mu_k + p_bk m_b
        var_b  = (1/K) sum_k s_bk + (1/K) sum_k mu_bk^2 - mean_b^2         s_bk alike, of s_k and v_b
        y = (x - mean_b) / sqrt(var_b + eps) * weight + bias
        mu_k += momentum mean_b p_bk (m_b - mu_k)       s_k alike, after the statistics were taken

    Outputs depend on nothing else of the batch, so that neither its size nor the order of labels disturbs them. Computed from
    centred values, without a tensor of samples x components x channels and without a host sync.

    Shapes: (n, C, positions...) as the layer it was; (n, C) has no positions and is normalised by the source's statistics.
    What the original class does afterwards (timm's drop and activation) is done here too.

    `train()` and `eval()` change nothing here; `mode` does:
        adapt: as above. frozen: components stay. source: the batch norm as evaluated, from the source's statistics.

    Samples whose statistics are not finite move no component; `skipped` counts them.

    Under data parallelism, with `synchronised`, components move by the samples of all ranks, as one process on the whole batch
    would move them: one all-reduce of 2KC + K + 1 numbers per layer and forward, and every rank runs as many forwards. Without
    it each rank follows its own stream. Components are float32 (float64 in a float64 model), whatever the weights are.

    Cost: 3KC numbers of state; beside a batch norm's, matrix products of (n, K) with (K, C).

    Source: Tomar et al., ICLR 2024, arXiv 2401.08328, and the authors' code, where (n, C, L) takes the source's statistics and
    whose layers have no modes. `total_variance` adds p (1 - p) (m_b - mu_k)^2 to s_bk, which stands there as a comment.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    component_means: Tensor
    component_vars: Tensor
    noise: Tensor
    skipped: Tensor
    eps: float
    step: float
    temperature: float
    spread: float
    synchronised: bool
    by_batch: tuple[float, int] | None
    total_variance: bool
    mode: Mode

    own_buffers = COMPONENTS
    """Buffers that belong to a rank's stream: no mean over ranks is taken of them."""

    def forward(self, input: Tensor) -> Tensor:
        """The normalised input: same shape and dtype."""
        if self.mode == "source" or input.dim() == 2:
            of_source = (self.running_mean, self.running_var, self.weight, self.bias)
            result = functional.batch_norm(input, *of_source, training=False, eps=self.eps)
        elif torch.is_autocast_enabled(input.device.type):
            with torch.autocast(input.device.type, enabled=False):
                result = self._unmixed(input)
        else:
            result = self._unmixed(input)
        return finished(self, result)

    def _unmixed(self, input: Tensor) -> Tensor:
        x = input.to(self.component_means.dtype)
        positions, count = tuple(range(2, x.dim())), math.prod(x.shape[2:])
        if x.is_contiguous():  # a product with a vector is the faster mean of short rows
            mean = (x.flatten(2) @ x.new_full((count,), 1 / count)).view(*x.shape[:2], *(1,) * len(positions))
        else:
            mean = x.mean(positions, keepdim=True)
        centred = x - mean
        # vector_norm: the one reduction that is fast along trailing dimensions on a CPU, and is differentiable.
        var = torch.linalg.vector_norm(centred, dim=positions, keepdim=True).square() / count
        offset, spread = self._mixed(mean.flatten(1), var.flatten(1))
        scale = (spread + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight.to(scale.dtype)
        shift = offset * scale if self.bias is None else torch.addcmul(self.bias.to(scale.dtype), offset, scale)
        # Without a graph to keep it for, the centred input becomes the output: a new tensor costs its pages.
        scaled = centred.mul(scale.view_as(mean)) if torch.is_grad_enabled() else centred.mul_(scale.view_as(mean))
        return scaled.add_(shift.view_as(mean)).to(input.dtype)

    def _mixed(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """m_b - mean_b and var_b, (n, C) each. Everything is relative to the middle of the components: squares of large means
        would cancel."""
        count, width = self.component_means.shape
        held = torch.cat([self.component_means, self.component_vars], 1)
        middle, level = held.mean(0).chunk(2)
        mu = held[:, :width].sub_(middle)
        relative = mean - middle
        with torch.no_grad():
            p = self.assignments(mean)
            rest, own = 1 - p, p.square().sum(1, keepdim=True)
            drawn, drawn_vars = (p @ held).chunk(2, 1)
            far, near = rest.square() @ mu.square(), (p * rest) @ mu
        apart = relative - drawn  # count times mean_b, from the middle
        inner = torch.addcmul(near, relative, own, value=0.5)
        seen = torch.addcmul(var - drawn_vars + far, relative, inner, value=2)
        if self.total_variance:
            seen = seen + (p * rest) @ mu.square() - 2 * relative * near + relative.square() * (1 - own)
        spread = torch.addcmul(torch.add(level, seen, alpha=1 / count), apart, apart, value=-1 / count**2)
        if self.mode == "adapt":
            self._follow(p, torch.cat([relative, var], 1).detach(), held)
        return torch.add(relative, apart, alpha=-1 / count), spread.clamp(min=0)

    def assignments(self, mean: Tensor) -> Tensor:
        """p: how much of each component each sample takes, (n, K), from means over its positions (n, C)."""
        lengths, others = (torch.linalg.vector_norm(rows, dim=1).clamp(min=FLOOR) for rows in (mean, self.component_means))
        cosines = mean @ self.component_means.T / torch.outer(lengths * self.temperature, others)
        return cosines.softmax(1)

    @torch.no_grad()
    def _follow(self, p: Tensor, seen: Tensor, held: Tensor) -> None:
        """Move the components, (K, 2C) relative to their middle, towards what was seen, (n, 2C)."""
        bad = ~seen.sum(1, keepdim=True).isfinite()
        p, seen = p.masked_fill(bad, 0), seen.nan_to_num(0, 0, 0)  # of what is left of bad rows p takes nothing
        sums, weights = p.T @ seen, p.sum(0)
        here = float(len(p))
        rows: float | Tensor = here
        if self.synchronised and dist.is_available() and dist.is_initialized():
            sums, weights, rows = self._everywhere(sums, weights, here)
        step: float | Tensor = self.step
        if self.by_batch is not None:
            momentum, at = self.by_batch
            step = 1 - (1 - momentum) ** (rows / at)
        share = step / (rows + (rows == 0))
        moved = torch.addcmul(sums, weights[:, None], held, value=-1)
        moved, alpha = (moved * share, 1.0) if isinstance(share, Tensor) else (moved, share)
        means, variances = moved.chunk(2, 1)
        self.component_means.add_(means, alpha=alpha)
        self.component_vars.add_(variances, alpha=alpha)
        self.skipped.add_(bad.sum())

    def _everywhere(self, sums: Tensor, weights: Tensor, rows: float) -> tuple[Tensor, Tensor, Tensor]:
        """The sums over all ranks, whose components are alike."""
        flat = torch.cat([sums.flatten(), weights, weights.new_tensor([rows])])
        dist.all_reduce(flat)
        return flat[:sums.numel()].view_as(sums), flat[sums.numel():-1], flat[-1]

    @torch.no_grad()
    def reset(self) -> None:
        """Put the first components back: mu_k = m + sqrt(alpha K / (K - 1)) sqrt(v) noise_k, s_k = (1 - alpha) v; of one
        component m and v."""
        count = len(self.noise)
        alpha = self.spread if count > 1 else 0.0
        mean, var = self.running_mean.to(self.noise.dtype), self.running_var.to(self.noise.dtype)
        far = math.sqrt(alpha * count / (count - 1)) if count > 1 else 0.0
        self.component_means.copy_(mean + far * var.sqrt() * self.noise)
        self.component_vars.copy_((1 - alpha) * var.expand(count, -1))
        self.skipped.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UnMixTNS:
        kept = {name: getattr(self, name) for name in COMPONENTS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in kept.items():
            new = getattr(self, name)
            if torch.finfo(new.dtype).bits < 32:  # `half()` and `bfloat16()` are for weights
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        """For print."""
        count, channels = self.component_means.shape
        text = f"{channels}, components={count}, momentum={self.step:.4g}, eps={self.eps}, mode={self.mode}"
        return text + (", synchronised" if self.synchronised else "")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mode" and value not in ("adapt", "frozen", "source"):
            raise ValueError(f"UnMixTNS: mode={value!r}, must be adapt, frozen or source")
        super().__setattr__(name, value)
