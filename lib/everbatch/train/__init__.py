"""Trainer mixins: methods that touch data, modules and time, over `Trainer` or a trainer of your own."""

from everbatch.train.mixin import TrainerMixin
from everbatch.train.record import StepRecord
from everbatch.train.replay import Replay
from everbatch.train.schedule import Schedule
from everbatch.train.trainer import Trainer
from everbatch.train.warm_start import WarmStart

__all__ = ["Replay", "Schedule", "StepRecord", "Trainer", "TrainerMixin", "WarmStart"]
