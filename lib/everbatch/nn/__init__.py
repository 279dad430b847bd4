"""Layers and small networks."""

from everbatch.nn.small_conv import SmallConv
from everbatch.nn.statistics import bn_recalibrate

__all__ = ["SmallConv", "bn_recalibrate"]
