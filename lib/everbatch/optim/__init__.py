"""Optimizer mixins: methods that touch weights, written once against shards, over any `torch.optim` class."""

from everbatch.optim.clip import ClipGradNorm
from everbatch.optim.ema import EMA
from everbatch.optim.groups import groups
from everbatch.optim.layerwise.lamb import LAMB
from everbatch.optim.layerwise.lars import LARS
from everbatch.optim.layerwise.rules import conadv_peak, lr_at, scaled_lr
from everbatch.optim.memory.fisher import diagonal_fisher, output_sensitivity
from everbatch.optim.memory.quadratic import EWC, MAS, SI
from everbatch.optim.memory.refresh import Refresh
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.restart.shrink_perturb import ShrinkPerturb
from everbatch.optim.sharpness.esam import ESAM
from everbatch.optim.sharpness.gradient_norm import WSAM, GradientNorm
from everbatch.optim.sharpness.gsam import GSAM
from everbatch.optim.sharpness.ignite import Ignite
from everbatch.optim.sharpness.looksam import LookSAM, StaleSAM
from everbatch.optim.sharpness.sam import ASAM, SAM
from everbatch.optim.sparsity import DynamicSparsity
from everbatch.optim.subspace.projection import SubspaceProjection
from everbatch.optim.subspace.second_moment import LowRankSecondMoment, SecondMoment, free_split, spectral_split
from everbatch.optim.subspace.transforms import Projection, Subspace

__all__ = [
    "ASAM", "EMA", "ESAM", "EWC", "GSAM", "LAMB", "LARS", "MAS", "SAM", "SI", "WSAM", "ClipGradNorm", "DynamicSparsity",
    "GradientNorm", "Ignite", "LookSAM", "LowRankSecondMoment", "OptimizerMixin", "Projection", "Refresh", "SecondMoment",
    "ShrinkPerturb", "StaleSAM", "Subspace", "SubspaceProjection", "conadv_peak", "diagonal_fisher", "free_split", "groups",
    "lr_at", "output_sensitivity", "scaled_lr", "spectral_split",
]
