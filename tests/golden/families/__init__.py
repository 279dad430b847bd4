"""The families of golden vectors, by the prefix of their file names. To add one: a module, and a line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable

from golden.comparison import Comparison, Vectors
from golden.families import (
    adapters,
    buffers,
    conadv,
    gtep,
    ignite,
    large_batch,
    metrics,
    mos,
    refresh,
    regularizers,
    replay,
    same,
    sparsity,
    stability,
    subspace,
    trust,
    unified,
    unmix,
    warm,
)

__all__ = ["FAMILIES", "Family", "family_of"]

Family = Callable[[Vectors, Comparison], None]
"""Runs the library on what a file holds and compares. Raises `FormatError`, or `NotYet` for what the library lacks."""

FAMILIES: dict[str, Family] = {
    "buffers": buffers.check,
    "cl_metrics": metrics.check,
    "continual_evaluation": stability.check,
    "dst_isolation": sparsity.check_isolation,
    "erk_densities": sparsity.check_densities,
    "gtep": gtep.check,
    "itop_mask_updates": sparsity.check_updates,
    "grip_analytic": subspace.check_grip,
    "lb_asam": large_batch.check,
    "lb_eq_conadv": conadv.check,
    "lb_eq_gnp": large_batch.check,
    "lb_eq_looksam": large_batch.check,
    "lb_esam": large_batch.check,
    "lb_gsam": large_batch.check,
    "lb_ignite": ignite.check,
    "lb_ignite2": ignite.check,
    "lb_lamb": trust.check,
    "lb_lars": trust.check,
    "lb_looksam": large_batch.check,
    "lb_sam": large_batch.check,
    "mos_adapter_forward": adapters.check_adapter,
    "mos_class_stats": mos.check_statistics,
    "mos_classifier_alignment": mos.check_alignment,
    "mos_inference_drift_releasedcode": mos.check_drift,
    "mos_merge": mos.check_merging,
    "mos_orth_loss": mos.check_contrast,
    "mos_retrieval": adapters.check_retrieval,
    "mos_vit_features": adapters.check_network,
    "osft_analytic": subspace.check_osft,
    "refresh_derpp": refresh.check,
    "regularizers": regularizers.check,
    "replay": replay.check,
    "rigl": sparsity.check_rigl,
    "same_activation_released": same.check_activation,
    "same_cov_sketch_released": same.check_sketch,
    "same_curvature_hook_released": same.check_curvature,
    "same_layer_forward_released": same.check_layer,
    "same_moelora_forward_analytic": same.check_forward,
    "same_paper_equations_analytic": subspace.check_same,
    "same_router_hook_released": same.check_router,
    "same_training_trace_released": same.check_trace,
    "shrink_perturb": warm.check,
    "si_path_integral": regularizers.check_path,
    "unified_objective": unified.check,
    "unmixtns_1d": unmix.check_vectors,
    "unmixtns_2d": unmix.check_layer,
    "unmixtns_dirichlet": unmix.check_order,
    "unmixtns_momentum_table": unmix.check_momentum,
    "unmixtns_tent_composition": unmix.check_tent,
}


def family_of(name: str) -> Family | None:
    """The family with the longest prefix of `name`, which ends there or goes on after an underscore or a dot."""
    fitting = [prefix for prefix in FAMILIES if name == prefix or name.startswith((f"{prefix}_", f"{prefix}."))]
    return FAMILIES[max(fitting, key=len)] if fitting else None
