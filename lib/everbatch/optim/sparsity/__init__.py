"""Dynamic sparse training: the `DynamicSparsity` mixin, its kernels, accounting and export."""

from everbatch.optim.sparsity.densities import draw_mask, erdos_renyi, exact_counts, layer_densities, uniform
from everbatch.optim.sparsity.dynamic import DynamicSparsity
from everbatch.optim.sparsity.export import SparseLinear, fits_two_four, sparsify, violations
from everbatch.optim.sparsity.files import load_sparse, save_sparse
from everbatch.optim.sparsity.flops import Account, account, layer_flops
from everbatch.optim.sparsity.frozen import Capacity
from everbatch.optim.sparsity.layers import maskable, weight_modules
from everbatch.optim.sparsity.schedule import Schedule, drop_fraction, scaled_interval

__all__ = [
    "Account", "Capacity", "DynamicSparsity", "Schedule", "SparseLinear", "account", "draw_mask", "drop_fraction",
    "erdos_renyi", "exact_counts", "fits_two_four", "layer_densities", "layer_flops", "load_sparse", "maskable", "save_sparse",
    "scaled_interval", "sparsify",
    "uniform", "violations", "weight_modules",
]
