"""Data: sources of samples, streams of tasks over them, batches, and memories for replay."""

from everbatch.data.arrival import blurry, online, ordered, task_free
from everbatch.data.batch import Batch
from everbatch.data.buffers import Buffer, ClassBalanced, Reservoir, Ring, Slots
from everbatch.data.correlated import dirichlet_order
from everbatch.data.corruptions import CORRUPTIONS, corrupt
from everbatch.data.datasets import DatasetSource, as_source
from everbatch.data.domains import Permute, Rotate, permuted, rotated
from everbatch.data.kinds import STREAMS, StreamKind, StreamName, make_stream
from everbatch.data.load import load
from everbatch.data.loader import Loader, evaluation_batches
from everbatch.data.pairs import as_stream
from everbatch.data.row_dataset import RowDataset
from everbatch.data.row_source import RowSource
from everbatch.data.slots import balancoir_index, group_quotas, largest, reservoir_index, ring_index, share
from everbatch.data.sources import (
    ConcatSource,
    Source,
    SubsetSource,
    TensorSource,
    TransformedSource,
    stratified_split,
)
from everbatch.data.store import ReplayStore
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
    "CORRUPTIONS", "STREAMS", "Batch", "Buffer", "ClassBalanced", "ConcatSource", "DatasetSource", "Loader", "Permute",
    "ReplayStore", "Reservoir", "Ring", "Rotate", "RowDataset", "RowSource", "Slots", "Source", "Stream", "StreamKind",
    "StreamName", "SubsetSource",
    "Task", "TensorSource", "TransformedSource", "as_source", "as_stream", "balancoir_index", "blurry",
    "class_incremental", "corrupt", "dirichlet_order", "domain_incremental", "evaluation_batches", "group_quotas", "growing",
    "iid", "largest", "load", "make_stream", "online", "ordered", "permuted", "pilot_increments", "reservoir_index", "ring_index",
    "rotated", "share", "stratified_split", "task_free", "task_incremental", "validation",
]
