"""Optimizer mixins: methods that touch weights, written once against shards, over any `torch.optim` class."""

from everbatch.optim.clip import ClipGradNorm
from everbatch.optim.ema import EMA
from everbatch.optim.groups import groups
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.sam import SAM
from everbatch.optim.shrink_perturb import ShrinkPerturb

__all__ = ["EMA", "SAM", "ClipGradNorm", "OptimizerMixin", "ShrinkPerturb", "groups"]
