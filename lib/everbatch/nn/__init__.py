"""Layers and small networks."""

from everbatch.nn.heads import PartsHead, grow_head
from everbatch.nn.small_conv import SmallConv
from everbatch.nn.split_bn import SplitBatchNorm, branch_parameters, convert_split_bn, split_branch, strip_split_bn
from everbatch.nn.statistics import bn_recalibrate, frozen_statistics
from everbatch.nn.unmix import UnMixTNS
from everbatch.nn.unmix_convert import convert_unmix_tns, restore_batch_norm, unmix_layers, unmix_mode

__all__ = [
    "PartsHead", "SmallConv", "SplitBatchNorm", "UnMixTNS", "bn_recalibrate", "branch_parameters", "convert_split_bn",
    "convert_unmix_tns", "frozen_statistics", "grow_head", "restore_batch_norm", "split_branch", "strip_split_bn",
    "unmix_layers", "unmix_mode",
]
