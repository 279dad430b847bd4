"""Trainer mixins: methods that touch data, modules and time, over `Trainer` or a trainer of your own."""

from everbatch.train.adversarial.conadv import ConAdv
from everbatch.train.begin import begin_from
from everbatch.train.consolidate import Consolidate
from everbatch.train.memory.replay import Replay
from everbatch.train.mixin import TrainerMixin
from everbatch.train.record import StepRecord
from everbatch.train.schedule import Schedule
from everbatch.train.trainer import Trainer
from everbatch.train.warm_start import WarmStart
from everbatch.train.weights import load_model, model_info

__all__ = ["ConAdv", "Consolidate", "Replay", "Schedule", "StepRecord", "Trainer", "TrainerMixin", "WarmStart", "begin_from",
           "load_model", "model_info"]
