"""Optimizer mixins: methods that touch weights, written once against shards, over any `torch.optim` class.

The methods of `everbatch.methods` are imported when they are first used.
"""

from typing import TYPE_CHECKING

from everbatch import methods
from everbatch.optim.groups import groups as groups
from everbatch.optim.layerwise.rules import conadv_peak as conadv_peak
from everbatch.optim.layerwise.rules import lr_at as lr_at
from everbatch.optim.layerwise.rules import scaled_lr as scaled_lr
from everbatch.optim.memory.fisher import diagonal_fisher as diagonal_fisher
from everbatch.optim.memory.fisher import output_sensitivity as output_sensitivity
from everbatch.optim.mixin import OptimizerMixin as OptimizerMixin
from everbatch.optim.subspace.second_moment import LowRankSecondMoment as LowRankSecondMoment
from everbatch.optim.subspace.second_moment import SecondMoment as SecondMoment
from everbatch.optim.subspace.splits import free_split as free_split
from everbatch.optim.subspace.splits import spectral_split as spectral_split
from everbatch.optim.subspace.transforms import Projection as Projection
from everbatch.optim.subspace.transforms import Subspace as Subspace

if TYPE_CHECKING:  # for type checkers and editors; `python launch/methods.py` writes it from the table
    # <methods>
    from everbatch.optim.clip import ClipGradNorm as ClipGradNorm
    from everbatch.optim.ema import EMA as EMA
    from everbatch.optim.layerwise.lamb import LAMB as LAMB
    from everbatch.optim.layerwise.lars import LARS as LARS
    from everbatch.optim.memory.agem import AGEM as AGEM
    from everbatch.optim.memory.ewc import EWC as EWC
    from everbatch.optim.memory.mas import MAS as MAS
    from everbatch.optim.memory.ncl import NCL as NCL
    from everbatch.optim.memory.refresh import Refresh as Refresh
    from everbatch.optim.memory.semantic import SemanticMemory as SemanticMemory
    from everbatch.optim.memory.si import SI as SI
    from everbatch.optim.memory.vcl import VCL as VCL
    from everbatch.optim.restart.mean_teacher import MeanTeacher as MeanTeacher
    from everbatch.optim.restart.shrink_perturb import ShrinkPerturb as ShrinkPerturb
    from everbatch.optim.sharpness.esam import ESAM as ESAM
    from everbatch.optim.sharpness.gradient_norm import WSAM as WSAM
    from everbatch.optim.sharpness.gradient_norm import GradientNorm as GradientNorm
    from everbatch.optim.sharpness.gsam import GSAM as GSAM
    from everbatch.optim.sharpness.ignite import Ignite as Ignite
    from everbatch.optim.sharpness.looksam import LookSAM as LookSAM
    from everbatch.optim.sharpness.sam import ASAM as ASAM
    from everbatch.optim.sharpness.sam import SAM as SAM
    from everbatch.optim.sharpness.stale import StaleSAM as StaleSAM
    from everbatch.optim.sparsity.dynamic import DynamicSparsity as DynamicSparsity
    from everbatch.optim.subspace.grip import GRIP as GRIP
    from everbatch.optim.subspace.osft import OSFT as OSFT
    from everbatch.optim.subspace.projection import SubspaceProjection as SubspaceProjection
    # </methods>
else:
    __all__ = sorted([*methods.names(__name__), "LowRankSecondMoment", "OptimizerMixin", "Projection", "SecondMoment",
                      "Subspace", "conadv_peak", "diagonal_fisher", "free_split", "groups", "lr_at", "output_sensitivity",
                      "scaled_lr", "spectral_split"])
    __getattr__ = methods.lazily(__name__)

    def __dir__():
        return sorted({*globals(), *__all__})
