"""Layer-wise adaptive rate scaling over SGD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everbatch.contract import Cost
from everbatch.engines.host import Host
from everbatch.engines.shards import Shard, Vector
from everbatch.errors import check_real
from everbatch.optim.layerwise.trust import adapted_names, check_groups, log_ratios, require_place, rewritten, trust_ratios
from everbatch.optim.mixin import OptimizerMixin

__all__ = ["LARS", "fold_decay_", "lars_ratio"]


def lars_ratio(
    weight_norm: Tensor, gradient_norm: Tensor, *, weight_decay: float, trust_coeff: float, trust_eps: float = 0.0,
    clip_lr: float | Tensor | None = None,
) -> Tensor:
    """Trust ratios of LARS:  q = c * wn / (gn + wd * wn + eps) where wn > 0 and gn > 0, else 1.

    LARC's clipping:  q <- min(q / lr, 1).

    Args:
        weight_norm, gradient_norm: Euclidean norms of whole tensors, any one shape; not modified.
        weight_decay: of their group, >= 0.
        trust_coeff: c, > 0.
        trust_eps: added to the denominator, >= 0.
        clip_lr: learning rate for LARC's clipping; None for none.

    Returns:
        A new tensor of the same shape.

    Source: You et al. 2017, arXiv 1708.03888, eq. 6; the clipping: NVIDIA's LARC, as in `timm.optim.Lars`.
    """
    q = trust_coeff * weight_norm / (gradient_norm + weight_decay * weight_norm + trust_eps)
    q = torch.where((weight_norm > 0) & (gradient_norm > 0), q, torch.ones_like(q))
    return q if clip_lr is None else (q / clip_lr).clamp(max=1.0)


def fold_decay_(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], ratios: Sequence[Tensor], weight_decay: float,
) -> None:
    """g <- q * (g + wd * w), in place, for each triple of gradient, weights (same shape) and 0-dim ratio.

    Gradients narrower than the weights (bf16) are computed in the weights' dtype and rounded once. Cost: no copy, but
    for those one tensor at a time.
    """
    if all(g.dtype == w.dtype for g, w in zip(gradients, weights, strict=True)):
        if gradients:
            torch._foreach_add_(list(gradients), list(weights), alpha=weight_decay)
            torch._foreach_mul_(list(gradients), [q.to(g) for q, g in zip(ratios, gradients, strict=True)])
        return
    for g, w, q in zip(gradients, weights, ratios, strict=True):
        g.copy_(w.mul(weight_decay).add_(g).mul_(q.to(w)))


class LARS(OptimizerMixin):
    """Layer-wise adaptive rate scaling: each tensor's gradient is brought to a fixed fraction of its weights' norm.

        d = q * (g + wd * w);  q = trust_coeff * ||w|| / (||g|| + wd * ||w|| + trust_eps), 1 where a norm is 0

        lr outside the buffer (default):  m <- mu * m + (1 - dampening) * d;       w <- w - lr * m
        lr inside (lr_in_buffer=True):    m <- mu * m + (1 - dampening) * lr * d;  w <- w - m

    Outside is torch's and timm's way, inside TensorFlow's, MLPerf's and ConAdv's. Both are the same at a constant rate.
    Inside, an old gradient keeps the rate of its step, and momentum goes on where lr = 0; peak rates quoted for TPU
    recipes belong to it. Nesterov, momentum, dampening, maximize and the decay are torch's own options of the base.
    Norms are those of whole tensors at any sharding, where `timm.optim.Lars` sees slices and padding.

    Exclusions: a group with weight_decay 0 gets no ratio and no decay (unless `always_adapt`), so put biases and norm
    scales into one: `everbatch.optim.groups(model, weight_decay=...)` does. Tensors without a gradient are not touched.
    A tensor of zeros has q = 1: at LARS-size rates (10 to 40) its first step is that large, so initialise matrices away
    from zero or exclude them.

    Args (Config): see the fields. Raises `ValueError` when no group would get a ratio, `CompositionError` for another
    base.

    Cost: one all-reduce of 2 numbers per tensor where weights are sharded, for all layers; no copy, no host sync.
    Order: right of other parts that wrap `update`, which then see the gradient and the options as they are. Clipping,
    projections and masks come before it, wherever they stand. The engine's own figure for the gradient norm is that of
    d; ClipGradNorm logs that of g.
    Limits: base `torch.optim.SGD`. Gradients that an engine accumulates in bf16 round d to bf16; accumulate in fp32
    where the decay matters.

    Source: You et al. 2017, arXiv 1708.03888; `timm.optim.Lars` 1.0.31 and the TPU code of ConAdv (9e02df30), both
    reproduced.
    Differs: one group with decay must exist, where timm would silently be SGD.
    """

    owns = ("trust ratio",)

    minimizes = False
    bases = ("SGD",)
    example = {"trust_coeff": 0.2}
    off = {"trust_coeff": 1e30, "trust_clip": True}
    search = {"trust_coeff": (0.1, 0.01, 0.001)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        trust_coeff: float = 0.001
        """Fraction of the weights' norm that a step at lr = 1 may have; > 0."""
        trust_eps: float = 1e-8
        """Added to the ratio's denominator; >= 0. ConAdv: 0."""
        trust_clip: bool = False
        """LARC: q <- min(q / lr, 1), so that the rate of a tensor, lr * q, is at most lr."""
        always_adapt: bool = False
        """Give groups without weight decay a ratio, too."""
        lr_in_buffer: bool = False
        """Multiply by the learning rate before the momentum buffer rather than after it."""

        def __post_init__(self) -> None:
            check_real("LARS", "trust_coeff", self.trust_coeff, 0.0, open_low=True)
            check_real("LARS", "trust_eps", self.trust_eps, 0.0)

    def on_attach(self) -> None:
        """Refuse another base than SGD, a wrong place, and groups in which nothing would be adapted."""
        require_place(self, LARS, torch.optim.SGD)
        check_groups(self, LARS, always_adapt=self.configs[LARS].always_adapt)

    def update(self) -> None:
        """Turn the gradient into d, and let SGD do without decay (and, with lr inside, at rate 1)."""
        config: LARS.Config = self.configs[LARS]
        log_ratios(self, scale_gradient(self.host, config))
        options = {"weight_decay": 0.0, **({"lr": 1.0} if config.lr_in_buffer else {})}
        with rewritten(self, {i: options for i in range(len(self.host.groups()))}):
            super().update()

    def cost(self) -> Cost:
        """All norms in one reduction."""
        return Cost(scalar_reductions=1, note="LARS: its reduction has 2 numbers per tensor with a trust ratio")


@torch.no_grad()
def scale_gradient(host: Host, config: LARS.Config) -> dict[str, Tensor]:
    """Write d (times lr, with `lr_in_buffer`) into the host's gradient; returns the trust ratios by name."""
    groups, index = host.groups(), host.group_index()
    adapted = adapted_names(host, always_adapt=config.always_adapt)
    held: dict[int, list[tuple[Shard, Tensor]]] = {i: [] for i in range(len(groups))}
    for s, g in host.gradient():
        held[index[s.name]].append((s, g))

    def rule(group: dict[str, Any], weight_norm: Tensor, gradient_norm: Tensor) -> Tensor:
        return lars_ratio(
            weight_norm, gradient_norm, weight_decay=group["weight_decay"], trust_coeff=config.trust_coeff,
            trust_eps=config.trust_eps, clip_lr=group["lr"] if config.trust_clip else None)

    mine = [pair for i in adapted for pair in held[i]]
    shards = [s for s, _ in mine]
    weights, gradient = Vector(host, shards, [s.data for s in shards]), Vector(host, shards, [g for _, g in mine])
    ratios = trust_ratios(host, adapted, weights, gradient, rule)
    for i, group in enumerate(groups):
        gradients, masters = [g for _, g in held[i]], [s.data for s, _ in held[i]]
        if i in adapted:
            # SGD negates what it gets under maximize; the decay pulls towards zero either way.
            decay = -group["weight_decay"] if group["maximize"] else group["weight_decay"]
            fold_decay_(gradients, masters, [ratios[s.name] for s, _ in held[i]], decay)
        if config.lr_in_buffer and gradients:
            torch._foreach_mul_(gradients, group["lr"])
    return ratios
