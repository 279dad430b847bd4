"""What paired values of a few seeds say; the library's, by the name that claims use."""

from everbatch.metrics.estimate import LEVEL, Estimate, chance, estimate, quantile

__all__ = ["LEVEL", "Estimate", "chance", "estimate", "quantile"]
