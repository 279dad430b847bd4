"""Trainer mixins: methods that touch data, modules and time, over `Trainer` or a trainer of your own.

The methods of `everbatch.methods` are imported when they are first used.
"""

from typing import TYPE_CHECKING

from everbatch import methods
from everbatch.evaluate.weights import load_model as load_model
from everbatch.evaluate.weights import model_info as model_info
from everbatch.train.begin import begin_from as begin_from
from everbatch.train.growing_head import GrowingHead as GrowingHead
from everbatch.train.mixin import TrainerMixin as TrainerMixin
from everbatch.train.record import StepRecord as StepRecord
from everbatch.train.schedule import Schedule as Schedule
from everbatch.train.trainer import Trainer as Trainer

if TYPE_CHECKING:  # for type checkers and editors; `python launch/methods.py` writes it from the table
    # <methods>
    from everbatch.train.adaptation.bn_adapt import BNAdapt as BNAdapt
    from everbatch.train.adaptation.cotta import CoTTA as CoTTA
    from everbatch.train.adaptation.tent import Tent as Tent
    from everbatch.train.adversarial.conadv import ConAdv as ConAdv
    from everbatch.train.consolidate import Consolidate as Consolidate
    from everbatch.train.evaluation import ContinualEvaluation as ContinualEvaluation
    from everbatch.train.memory.cls_er import CLSER as CLSER
    from everbatch.train.memory.cpr import CPR as CPR
    from everbatch.train.memory.episodic import EpisodicMemory as EpisodicMemory
    from everbatch.train.memory.er_ace import ErAce as ErAce
    from everbatch.train.memory.gdumb import GDumb as GDumb
    from everbatch.train.memory.joint import Joint as Joint
    from everbatch.train.memory.lwf import LwF as LwF
    from everbatch.train.memory.nearest_mean import NearestMean as NearestMean
    from everbatch.train.memory.replay import Replay as Replay
    from everbatch.train.mos.mixin import MOS as MOS
    from everbatch.train.plasticity import Plasticity as Plasticity
    from everbatch.train.same.same import SAME as SAME
    from everbatch.train.warm_start import WarmStart as WarmStart
    # </methods>
else:
    __all__ = sorted([*methods.names(__name__), "GrowingHead", "Schedule", "StepRecord", "Trainer", "TrainerMixin", "begin_from",
                      "load_model", "model_info"])
    __getattr__ = methods.lazily(__name__)

    def __dir__():
        return sorted({*globals(), *__all__})
