"""Optimizer mixins: methods that touch weights, written once against shards, over any `torch.optim` class."""

from everbatch.optim.clip import ClipGradNorm
from everbatch.optim.ema import EMA
from everbatch.optim.esam import ESAM
from everbatch.optim.gradient_norm import WSAM, GradientNorm
from everbatch.optim.groups import groups
from everbatch.optim.gsam import GSAM
from everbatch.optim.ignite import Ignite
from everbatch.optim.lamb import LAMB
from everbatch.optim.lars import LARS
from everbatch.optim.looksam import LookSAM, StaleSAM
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.rules import conadv_peak, lr_at, scaled_lr
from everbatch.optim.sam import ASAM, SAM
from everbatch.optim.shrink_perturb import ShrinkPerturb

__all__ = [
    "ASAM", "EMA", "ESAM", "GSAM", "LAMB", "LARS", "SAM", "WSAM", "ClipGradNorm", "GradientNorm", "Ignite", "LookSAM",
    "OptimizerMixin", "ShrinkPerturb", "StaleSAM", "conadv_peak", "groups", "lr_at", "scaled_lr",
]
