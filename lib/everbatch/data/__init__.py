"""Data: sources of samples, streams of tasks over them, batches, and memories for replay."""

from everbatch.data.batch import Batch
from everbatch.data.domains import Permute, Rotate, permuted, rotated
from everbatch.data.loader import Loader, evaluation_batches
from everbatch.data.sources import (
    ConcatSource,
    Source,
    SubsetSource,
    TensorSource,
    TransformedSource,
    load,
    stratified_split,
)
from everbatch.data.streams import (
    Stream,
    Task,
    class_incremental,
    domain_incremental,
    growing,
    iid,
    pilot_increments,
    task_incremental,
    validation,
)

__all__ = [
    "Batch", "ConcatSource", "Loader", "Permute", "Rotate", "Source", "Stream", "SubsetSource", "Task", "TensorSource",
    "TransformedSource", "class_incremental", "domain_incremental", "evaluation_batches", "growing", "iid", "load",
    "permuted", "pilot_increments", "rotated", "stratified_split", "task_incremental", "validation",
]
