"""Layer-wise adaptive moments over AdamW."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everbatch.contract import Cost
from everbatch.engines.host import Host
from everbatch.engines.shards import Shard, Vector
from everbatch.errors import UnsupportedHost, check, check_real
from everbatch.optim.layerwise.trust import adapted_names, check_groups, log_ratios, require_place, rewritten, trust_ratios
from everbatch.optim.mixin import OptimizerMixin

__all__ = ["LAMB", "adam_direction", "lamb_ratio"]

Number = float | Tensor
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def adam_direction(
    gradients: Sequence[Tensor], moments: Sequence[dict[str, Tensor]], steps: Sequence[Number], *,
    betas: tuple[float, float], eps: float, amsgrad: bool = False, scale: float = 1.0,
) -> list[Tensor]:
    """The direction of Adam's coming step, with this gradient in its moments:  r = scale * mhat / (sqrt(vhat) + eps).

    Args:
        gradients: in the moments' dtype; not modified.
        moments: of each tensor, what torch keeps: "exp_avg", "exp_avg_sq", "max_exp_avg_sq"; empty before the first
            step. Not modified.
        steps: of each tensor, the number of the coming step, from 1.
        scale: factor on the result.

    Returns:
        New tensors. Cost: two copies of the gradients at the peak, one of which is the result.

    Source: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1; the arithmetic of `torch.optim.AdamW`.
    """
    beta1, beta2 = betas
    kept = [m or {name: torch.zeros_like(g) for name in MOMENTS} for m, g in zip(moments, gradients, strict=True)]
    result = torch._foreach_lerp([m["exp_avg"] for m in kept], list(gradients), 1.0 - beta1)
    squares = torch._foreach_mul([m["exp_avg_sq"] for m in kept], beta2)
    torch._foreach_addcmul_(squares, list(gradients), list(gradients), value=1.0 - beta2)
    if amsgrad:
        torch._foreach_maximum_(squares, [m["max_exp_avg_sq"] for m in kept])
    torch._foreach_sqrt_(squares)
    torch._foreach_div_(squares, _alike([(1.0 - beta2**t) ** 0.5 for t in steps], squares))
    torch._foreach_add_(squares, eps)
    torch._foreach_div_(result, squares)
    torch._foreach_mul_(result, _alike([scale / (1.0 - beta1**t) for t in steps], result))
    return list(result)


def _alike(values: list[Number], tensors: Sequence[Tensor]) -> list[Any]:
    """All numbers, or, if one lives on a device (a fused step count), all 0-dim tensors: no host sync."""
    if not any(isinstance(v, Tensor) for v in values):
        return values
    return [torch.as_tensor(v).to(t) for v, t in zip(values, tensors, strict=True)]


def lamb_ratio(weight_norm: Tensor, update_norm: Tensor, *, low: float = 0.0, high: float = math.inf) -> Tensor:
    """Trust ratios of LAMB:  q = wn / un between `low` and `high` where wn > 0 and un > 0, else 1.

    Args:
        weight_norm, update_norm: Euclidean norms of whole tensors, any one shape; not modified.

    Source: You et al. 2020, arXiv 1904.00962, algorithm 2, with phi the identity.
    """
    q = (weight_norm / update_norm).clamp(low, high)
    return torch.where((weight_norm > 0) & (update_norm > 0), q, torch.ones_like(q))


class LAMB(OptimizerMixin):
    """Layer-wise adaptive moments: each tensor's AdamW step, brought to the norm of its weights.

        r = mhat / (sqrt(vhat) + eps);  u = r + wd * w;  q = ||w|| / ||u||, 1 where a norm is 0;  w <- w - lr * q * u

    Norms are those of whole tensors at any sharding, where `timm.optim.Lamb` sees slices and padding (NaN at ZeRO stage
    3). Moments, step counts, betas, eps, amsgrad, maximize and the decay are the base's; their defaults are torch's
    (eps 1e-8; timm and the authors: 1e-6).

    How: u and the new weights are computed from the moments before the base's step; the base then steps at lr = 0,
    which moves the moments and publishes the weights as they stand. So no copy of the masters is kept, and none of them
    is published twice, as rescaling a finished AdamW step would (a second all-gather at stages 1 to 3).

    Exclusions: a group with weight_decay 0 is left to AdamW, bit for bit (unless `always_adapt`), so put biases and
    norm scales into one: `everbatch.optim.groups(model, weight_decay=...)` does. Tensors without a gradient are not
    touched.

    Args (Config): see the fields. Raises `ValueError` when no group would get a ratio, `CompositionError` for another
    base. `min_ratio=1, max_ratio=1` is AdamW, bit for bit.

    Cost: 8 bytes per owned element inside the step (u, and the root of the second moment); Adam's elementwise
    arithmetic twice; one all-reduce of 2 numbers per tensor where weights are sharded, and one of a scalar with
    `max_grad_norm`.
    Order: right of other parts that wrap `update`: the base's own step, inside LAMB, does not move the weights.
    Limits: base `torch.optim.AdamW`, neither capturable nor differentiable, whose arithmetic divides by lr.

    Source: You et al. 2020, arXiv 1904.00962, algorithm 2; `timm.optim.Lamb` 1.0.31, which is reproduced but for its
    caution and corrected_weight_decay. Differs: pre-clipping is off by default (timm: 1.0); one group with decay must
    exist.
    """

    owns = ("trust ratio",)

    minimizes = False
    bases = ("AdamW",)
    makes = {"lamb": {"optimizer.base": "adamw"}}
    example = {"max_grad_norm": 0.5}
    off = {"min_ratio": 1.0, "max_ratio": 1.0}
    search = {"max_grad_norm": (1.0, 0.3, 3.0)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        trust_clip: bool = False
        """LAMBC: the ratio is at most 1; short for max_ratio=1."""
        min_ratio: float = 0.0
        """Least trust ratio; >= 0. DeepSpeed's FusedLamb: 0.01."""
        max_ratio: float = math.inf
        """Largest trust ratio; >= min_ratio, > 0; infinite for no bound. DeepSpeed's FusedLamb: 10."""
        always_adapt: bool = False
        """Give groups without weight decay a ratio, too."""
        max_grad_norm: float | None = None
        """NVLAMB: first g <- g / max(1, ||g|| / max_grad_norm), the norm over the whole model; > 0, None for never."""
        decoupled_decay: bool = False
        """Decay first, w <- w - lr * wd * w, then u = r and q from the decayed weights."""
        grad_averaging: bool = True
        """False: the first moment sums gradients with weight 1, not 1 - beta1: r is 1 / (1 - beta1) times as large."""

        def __post_init__(self) -> None:
            check_real("LAMB", "min_ratio", self.min_ratio, 0.0)
            good = isinstance(self.max_ratio, int | float) and self.max_ratio > 0 and self.max_ratio >= self.min_ratio
            check(good, "LAMB", f"max_ratio={self.max_ratio!r}", f"be > 0 and >= min_ratio={self.min_ratio!r}",
                  "pass math.inf for no bound")
            check(not self.trust_clip or self.min_ratio <= 1, "LAMB", f"min_ratio={self.min_ratio!r}",
                  "be <= 1 with trust_clip=True")
            if self.max_grad_norm is not None:
                check_real("LAMB", "max_grad_norm", self.max_grad_norm, 0.0, open_low=True, cure="pass None for never")

        @property
        def high(self) -> float:
            """Largest ratio, with `trust_clip`."""
            return min(self.max_ratio, 1.0) if self.trust_clip else self.max_ratio

        @property
        def off(self) -> bool:
            """Whether the ratio is 1 everywhere, and the rest is AdamW."""
            return self.min_ratio == self.high == 1 and self.grad_averaging

    def on_attach(self) -> None:
        """Refuse another base than AdamW, a wrong place, groups without any ratio, and a base that divides by lr."""
        config: LAMB.Config = self.configs[LAMB]
        require_place(self, LAMB, torch.optim.AdamW)
        if not config.off:
            check_groups(self, LAMB, always_adapt=config.always_adapt)
        for option in ("capturable", "differentiable"):
            if any(g[option] for g in self.host.groups()):
                raise UnsupportedHost(f"LAMB: AdamW has {option}=True, must be False: the base steps at lr=0, by which "
                                      "it would divide")

    def update(self) -> None:
        """Move the weights, and let AdamW move the moments alone."""
        config: LAMB.Config = self.configs[LAMB]
        if config.max_grad_norm is not None:
            gradient = self.host.gradient()
            gradient.mul_(1.0 / (gradient.norm() / config.max_grad_norm).clamp(min=1.0))
        if config.off:
            super().update()
            return
        adapted = adapted_names(self.host, always_adapt=config.always_adapt)
        # AdamW averages gradients, so without that it cannot be left any group.
        moved = list(adapted) if config.grad_averaging else range(len(self.host.groups()))
        log_ratios(self, move_weights(self.host, config, adapted, moved))
        with rewritten(self, {i: {"lr": 0.0, "weight_decay": 0.0} for i in moved}):
            super().update()

    def cost(self) -> Cost:
        """One direction, one reduction, and the clipping's."""
        config: LAMB.Config = self.configs[LAMB]
        clip = float(config.max_grad_norm is not None)
        if config.off:
            return Cost(scalar_reductions=clip)
        return Cost(transient_bytes=8, scalar_reductions=1 + clip,
                    note="LAMB: a reduction has 2 numbers per tensor with a trust ratio; Adam's arithmetic runs twice")


@torch.no_grad()
def move_weights(
    host: Host, config: LAMB.Config, adapted: dict[int, list[str]], moved: Collection[int],
) -> dict[str, Tensor]:
    """Write w - lr * q * u into the masters of the groups in `moved`; q = 1 where they are not in `adapted`.

    Returns:
        The trust ratios by name.
    """
    groups, index = host.groups(), host.group_index()
    held: dict[int, list[tuple[Shard, Tensor]]] = {i: [] for i in moved}
    for s, g in host.gradient():
        if index[s.name] in held:
            held[index[s.name]].append((s, g))
    updates = {i: _update(host, config, pairs, groups[i]) if pairs else [] for i, pairs in held.items()}

    def rule(group: dict[str, Any], weight_norm: Tensor, update_norm: Tensor) -> Tensor:
        decayed = (weight_norm * _kept(config, group)).abs()
        return lamb_ratio(decayed, update_norm, low=config.min_ratio, high=config.high)

    shards = [s for i in adapted for s, _ in held[i]]
    weights = Vector(host, shards, [s.data for s in shards])
    ratios = trust_ratios(host, adapted, weights, Vector(host, shards, [u for i in adapted for u in updates[i]]), rule)
    for i, pairs in held.items():
        if not pairs:
            continue
        masters, update = [s.data for s, _ in pairs], updates[i]
        if config.decoupled_decay and groups[i]["weight_decay"]:
            torch._foreach_mul_(masters, _kept(config, groups[i]))
        if i in adapted:
            torch._foreach_mul_(update, [ratios[s.name].to(u) for (s, _), u in zip(pairs, update, strict=True)])
        torch._foreach_mul_(update, groups[i]["lr"])
        torch._foreach_sub_(masters, update)
    # The base's step publishes them; should it raise, the mark makes the next pass do so.
    host.touch()
    return ratios


def _update(host: Host, config: LAMB.Config, pairs: list[tuple[Shard, Tensor]], group: dict[str, Any]) -> list[Tensor]:
    """u of one group's shards: new tensors in the masters' dtype."""
    masters = [s.data for s, _ in pairs]
    gradients = [g.to(w.dtype) for (_, g), w in zip(pairs, masters, strict=True)]
    if group["maximize"]:
        gradients = list(torch._foreach_neg(gradients))
    beta1, beta2 = group["betas"]
    update = adam_direction(
        gradients, [_moments(host, s) for s, _ in pairs], [_next_step(host, s) for s, _ in pairs], betas=(beta1, beta2),
        eps=group["eps"], amsgrad=group["amsgrad"], scale=1.0 if config.grad_averaging else 1.0 / (1.0 - beta1))
    if group["weight_decay"] and not config.decoupled_decay:
        torch._foreach_add_(update, masters, alpha=group["weight_decay"])
    return update


def _moments(host: Host, shard: Shard) -> dict[str, Tensor]:
    if shard.owner.dim():
        return shard.moments
    # A shard cannot tell the moments of a 0-dim parameter from a step count; here their names are known.
    kept = host.kept(shard)
    return {name: kept[name] for name in MOMENTS if name in kept}


def _next_step(host: Host, shard: Shard) -> Number:
    """Number of the base's coming step of a tensor; read without a sync where it lives on the CPU, as torch does."""
    step = host.kept(shard).get("step", 0.0)
    return step + 1.0 if isinstance(step, Tensor) and step.device.type != "cpu" else float(step) + 1.0


def _kept(config: LAMB.Config, group: dict[str, Any]) -> Number:
    """What decoupled decay leaves of a weight."""
    return 1.0 - group["lr"] * group["weight_decay"] if config.decoupled_decay else 1.0
