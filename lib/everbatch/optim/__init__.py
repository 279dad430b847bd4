"""Optimizer mixins: methods that touch weights, written once against shards, over any `torch.optim` class."""

from everbatch.optim.clip import ClipGradNorm
from everbatch.optim.ema import EMA
from everbatch.optim.esam import ESAM
from everbatch.optim.fisher import diagonal_fisher, output_sensitivity
from everbatch.optim.gradient_norm import WSAM, GradientNorm
from everbatch.optim.groups import groups
from everbatch.optim.gsam import GSAM
from everbatch.optim.ignite import Ignite
from everbatch.optim.lamb import LAMB
from everbatch.optim.lars import LARS
from everbatch.optim.looksam import LookSAM, StaleSAM
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.quadratic import EWC, MAS, SI
from everbatch.optim.refresh import Refresh
from everbatch.optim.rules import conadv_peak, lr_at, scaled_lr
from everbatch.optim.sam import ASAM, SAM
from everbatch.optim.second_moment import LowRankSecondMoment, SecondMoment, free_split, spectral_split
from everbatch.optim.shrink_perturb import ShrinkPerturb
from everbatch.optim.sparsity import DynamicSparsity
from everbatch.optim.subspace import SubspaceProjection
from everbatch.optim.transforms import Projection, Subspace

__all__ = [
    "ASAM", "EMA", "ESAM", "EWC", "GSAM", "LAMB", "LARS", "MAS", "SAM", "SI", "WSAM", "ClipGradNorm", "DynamicSparsity",
    "GradientNorm", "Ignite", "LookSAM", "LowRankSecondMoment", "OptimizerMixin", "Projection", "Refresh", "SecondMoment",
    "ShrinkPerturb", "StaleSAM", "Subspace", "SubspaceProjection", "conadv_peak", "diagonal_fisher", "free_split", "groups",
    "lr_at", "output_sensitivity", "scaled_lr", "spectral_split",
]
