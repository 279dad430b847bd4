"""Gradient clipping by the norm over the whole model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from everbatch.contract import Cost
from everbatch.errors import check
from everbatch.optim.mixin import OptimizerMixin

__all__ = ["ClipGradNorm"]


class ClipGradNorm(OptimizerMixin):
    """Scale the final gradient down to a largest norm:  f <- f * min(1, max_norm / (||f|| + 1e-6)).

    The norm is the one of the whole model at any sharding, taken after the last pass and the reduction: a sharpness mixin's
    first gradient is never clipped. The norm before clipping is logged as `grad_norm`.

    Args (Config):
        max_norm: > 0; infinity switches clipping off and leaves every bit.

    Cost: one all-reduce of a scalar where weights are sharded; no host sync.
    Order: left of mixins that project or mask the gradient, so that what is clipped is what is applied.
    Source: the rule of `torch.nn.utils.clip_grad_norm_`, its 1e-6 included.
    """

    left_of = ("DynamicSparsity", "projection")

    minimizes = False
    example = {"max_norm": 0.3}
    off = {"max_norm": math.inf}
    search = {"max_norm": (1.0, 0.1, 10.0)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        max_norm: float = 1.0
        """Largest Euclidean norm of the gradient; > 0, infinity for none."""

        def __post_init__(self) -> None:
            good = isinstance(self.max_norm, int | float) and not math.isnan(self.max_norm) and self.max_norm > 0
            check(good, "ClipGradNorm", f"max_norm={self.max_norm!r}", "be > 0", "pass math.inf to switch it off")

    def edit_gradient(self) -> None:
        """Clip, after every mixin to the right has edited."""
        super().edit_gradient()
        config: ClipGradNorm.Config = self.configs[ClipGradNorm]
        gradient = self.host.gradient()
        norm = gradient.norm()
        self.metrics["grad_norm"] = norm
        if not math.isinf(config.max_norm):
            gradient.mul_((config.max_norm / (norm + 1e-6)).clamp(max=1.0))

    def cost(self) -> Cost:
        """One norm."""
        return Cost(scalar_reductions=1)
