"""Layers and small networks."""

from everbatch.nn.heads import PartsHead, grow_head
from everbatch.nn.small_conv import SmallConv
from everbatch.nn.split_bn import SplitBatchNorm, branch_parameters, convert_split_bn, split_branch, strip_split_bn
from everbatch.nn.statistics import bn_recalibrate, frozen_statistics

__all__ = [
    "PartsHead", "SmallConv", "SplitBatchNorm", "bn_recalibrate", "branch_parameters",
    "convert_split_bn", "frozen_statistics", "grow_head", "split_branch", "strip_split_bn",
]
