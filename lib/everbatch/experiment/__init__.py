"""Experiments: a run as a function of its options, in a process of its own or in yours.

>>> from everbatch.experiment import ClassIncremental, run       # doctest: +SKIP
>>> run(ClassIncremental(tasks=5, output="runs/mine")).values["final_average_accuracy"]       # doctest: +SKIP
"""

from everbatch.ends import guard
from everbatch.experiment.adapted import AdaptedTasks
from everbatch.experiment.base import Experiment, Finished, Result
from everbatch.experiment.class_incremental import ClassIncremental
from everbatch.experiment.growing_data import GrowingData
from everbatch.experiment.job import Job, would_refuse
from everbatch.experiment.large_batch import LargeBatch
from everbatch.experiment.main import main
from everbatch.experiment.model import Factory, Model
from everbatch.experiment.options import (
           MEMORY,
           MIXINS,
           TRAINER_MIXINS,
           Data,
           Engine,
           Optimizer,
           Parts,
           check_together,
           learner,
           unused_together,
)
from everbatch.experiment.run import run
from everbatch.experiment.same import Experts
from everbatch.experiment.test_time import CorruptedStream
from everbatch.train import Trainer

__all__ = [
    "AdaptedTasks", "ClassIncremental", "CorruptedStream", "Data", "Engine", "Experiment", "Experts", "Factory", "Finished",
    "GrowingData", "Job", "LargeBatch", "MEMORY", "MIXINS", "Model", "Optimizer", "Parts", "Result", "TRAINER_MIXINS",
    "Trainer", "check_together", "guard", "learner", "main", "run", "unused_together", "would_refuse",
]
