"""Layers and small networks."""

from everbatch.nn.adapter_values import AdapterLayout, flat_adapters, load_adapters, reading_adapters
from everbatch.nn.adapters import (
    AdaptedBlock,
    BottleneckAdapter,
    UnsupportedAdapterTarget,
    adapters_of,
    attach_adapters,
    detach_adapters,
)
from everbatch.nn.batch_adapted import BatchAdapted, adapt_batch_norm, restore_adapted
from everbatch.nn.experts import MoELoRALinear
from everbatch.nn.experts_attach import UnknownTarget, attach_experts, detach_experts, expert_layers, merge_experts
from everbatch.nn.heads import PartsHead, grow_head
from everbatch.nn.retrieval import Retrieved, retrieve
from everbatch.nn.retriever import Retriever
from everbatch.nn.small_conv import SmallConv
from everbatch.nn.split_bn import SplitBatchNorm, branch_parameters, convert_split_bn, split_branch, strip_split_bn
from everbatch.nn.statistics import bn_recalibrate, frozen_statistics
from everbatch.nn.trunk import AdapterTrunk
from everbatch.nn.unmix import UnMixTNS
from everbatch.nn.unmix_convert import convert_unmix_tns, restore_batch_norm, unmix_layers, unmix_mode

__all__ = [
    "AdaptedBlock", "AdapterLayout", "AdapterTrunk", "BatchAdapted", "BottleneckAdapter", "MoELoRALinear", "PartsHead",
    "Retrieved", "Retriever", "SmallConv", "SplitBatchNorm", "UnMixTNS", "UnknownTarget", "UnsupportedAdapterTarget",
    "adapt_batch_norm", "adapters_of", "attach_adapters", "attach_experts", "bn_recalibrate", "branch_parameters",
    "convert_split_bn", "convert_unmix_tns", "detach_adapters", "detach_experts", "expert_layers", "flat_adapters",
    "frozen_statistics", "grow_head", "load_adapters", "merge_experts", "reading_adapters", "restore_adapted",
    "restore_batch_norm", "retrieve", "split_branch", "strip_split_bn", "unmix_layers", "unmix_mode",
]
