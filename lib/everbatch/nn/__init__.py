"""Layers and small networks."""

from everbatch.nn.small_conv import SmallConv

__all__ = ["SmallConv"]
