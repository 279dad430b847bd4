"""What of DeepSpeed's engines is supported, and which of its internals the host stands on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from everbatch.contract import Contract
from everbatch.engines.habits import habits_of
from everbatch.engines.shards import Shard
from everbatch.errors import UnsupportedHost

__all__ = ["GROUPS", "NEEDED", "TESTED", "check_internals", "check_optimizer", "clear_stale", "in_leaf", "places_of",
           "refuse_modes", "refuse_moe", "refuse_scalars"]

TESTED = "0.19.8"
PARTITIONS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
"""Stage 3: this rank's part of each gradient, which a pass that does not reach the parameter leaves as an earlier one left it."""
NEEDED = {
    "engine": ("optimizer", "basic_optimizer", "module", "backward", "step", "zero_grad", "zero_optimization_stage",
               "set_gradient_accumulation_boundary", "gradient_accumulation_steps",
               "gradient_clipping", "bfloat16_enabled", "fp16_enabled"),
    "DeepSpeedZeroOptimizer": ("averaged_gradients", "all_grad_tensors", "micro_step_id", "update_lp_params", "zero_grad",
                               "single_partition_of_fp32_groups", "bit16_groups", "clear_backward_seen_flag", "cpu_offload",
                               "reset_cpu_buffers", "process_gradients", "reduce_gradients", "get_gradient_for_reduction",
                               "overlapping_partition_gradients_reduce_epilogue"),
    "BF16_Optimizer": ("fp32_groups_flat_partition", "update_lp_params", "clear_lp_grads", "clear_hp_grads", "bf16_groups"),
    "FP16_UnfusedOptimizer": ("fp16_groups", "fp32_groups", "zero_grad"),
    "DeepSpeedZeroOptimizer_Stage3": ("fp16_groups", "fp32_partitioned_groups_flat", "grad_position", "get_param_id",
                                      "averaged_gradients", "sub_group_to_group_id", "persistent_parameters",
                                      "_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters",
                                      "clear_backward_seen_flag", PARTITIONS),
}
GROUPS = {"DeepSpeedZeroOptimizer": "bit16_groups", "BF16_Optimizer": "bf16_groups"}
"""Where an engine's optimizer has the parameters of its groups, if not in `fp16_groups`."""
PER_TENSOR = {"lars", "larc", "lamb", "adafactor", "adafactorbigvision", "muon", "novograd", "nvnovograd", "shampoo", "kron",
              "adamp", "sgdp", "fromage"}
"""Base optimizers whose update of an element depends on its whole tensor, wrong on slices, also where none can be tried out."""


def in_leaf(p: Any) -> bool:
    """Whether DeepSpeed treats the module that holds this parameter as one, at stage 3."""
    return getattr(p, "ds_z3_leaf_module", None) is not None


def clear_stale(zero: Any, late: Mapping[str, Any], shards: Sequence[Shard]) -> None:
    """At stage 3: zero what an earlier pass left in the gradients of these parameters, which the last one has not reached.

    Args:
        shards: after the last backward of a pass, where their gradients are to be zeroed as well.
    """
    # In DeepSpeed's leaf modules ranks may differ: the engine fills in zeros there, and other ranks' part is no leftover.
    late = {n: p for n, p in late.items() if not in_leaf(p)}
    for p in late.values():
        getattr(zero, PARTITIONS)[p.ds_id].zero_()
    if not (late and shards and zero.offload_optimizer):
        return
    for p in late.values():  # a norm that was not finite would have the engine skip this step
        zero.norm_for_param_grads.pop(zero.get_param_id(p), None)
    for shard in shards:
        if shard.name in late and shard.grad is not None:
            shard.grad.zero_()


def places_of(
    zero: Any, kind: str, stage: int, groups: Sequence[Mapping[str, Any]], named: Sequence[tuple[str, Any]],
) -> dict[str, int]:
    """Parameter group of every trained parameter, by name."""
    sets: Any = [g["params"] for g in groups] if kind == "torch" else getattr(zero, GROUPS.get(kind, "fp16_groups"))
    place = {id(p): i for i, params in enumerate(sets) for p in params}
    if stage == 3:
        place = {k: zero.sub_group_to_group_id[i] for k, i in place.items()}
    return {name: place[id(p)] for name, p in named}


def refuse_moe(who: str, model: nn.Module) -> None:
    """Refuse layers of DeepSpeed's own mixture of experts, by name, before there is an engine: a name means another expert on
    every rank, and all state here is kept by name."""
    for name, layer in model.named_modules():
        kind = type(layer)
        if kind.__module__.startswith("deepspeed.moe"):
            raise UnsupportedHost(f"{who}: {name!r}, a {kind.__name__} of DeepSpeed's mixture of experts, is not supported: its "
                                  "experts differ by rank; leave it out, or put experts into linear layers with "
                                  "everbatch.train.SAME")


def refuse_scalars(who: str, model: nn.Module) -> None:
    """Refuse parameters without dimensions, by name: DeepSpeed (0.19) hands out every parameter's bytes, which torch cannot view
    of such a one."""
    for name, p in model.named_parameters():
        if p.dim() == 0:
            raise UnsupportedHost(f"{who}: parameter {name!r} has no dimension, which its first broadcast cannot take; give it "
                                  "one, torch.nn.Parameter(value.reshape(1)), or use engine ddp")


def refuse_modes(engine: Any) -> None:
    """Refuse the modes of an engine in which methods were not shown to be exact."""
    zero = engine.zero_config if hasattr(engine, "zero_config") else engine._config.zero_config
    stage = int(engine.zero_optimization_stage())
    offload = getattr(zero, "offload_optimizer", None)
    offload_device = str(getattr(getattr(offload, "device", None), "value", getattr(offload, "device", "none")))
    params = getattr(zero, "offload_param", None)
    params_device = str(getattr(getattr(params, "device", None), "value", getattr(params, "device", "none")))
    accumulation = str(getattr(getattr(engine._config, "data_types_config", None), "grad_accum_dtype", None) or
                       getattr(engine._config, "grad_accum_dtype", None))
    modes = {
        "pipeline parallelism": "Pipeline" in type(engine).__name__,
        "fp16 (use bf16)": engine.fp16_enabled(),
        f"gradient_clipping={engine.gradient_clipping()} in the engine (set gradient_clipping: 0, add ClipGradNorm)":
            engine.gradient_clipping() != 0.0,
        "NVMe offload": "nvme" in (offload_device, params_device),
        "parameter offload": params_device not in ("none", "None"),
        "hpZ (zero_hpz_partition_size > 1)": getattr(zero, "zero_hpz_partition_size", 1) > 1,
        "MoE groups": bool(getattr(engine, "has_moe_layers", False)),
        "ZenFlow": bool(getattr(engine, "zenflow", False)),
        "partial optimizer offload (ratio < 1)": getattr(offload, "ratio", 1.0) < 1.0,
        "SuperOffload": bool(getattr(offload, "super_offload", False)),
        "round_robin_gradients": bool(getattr(zero, "round_robin_gradients", False)),
        "unmanaged gradient accumulation": not engine.managed_gradient_accumulation(),
        "torch_autocast": bool(engine.torch_autocast_enabled()) if hasattr(engine, "torch_autocast_enabled") else False,
        "stage 0 in bf16 with fp32 accumulation": stage == 0 and engine.bfloat16_enabled() and accumulation == "fp32",
        "model or sequence parallelism": any(f() > 1 for f in (getattr(engine, n, None) for n in (
            "mp_world_size", "sequence_parallel_size")) if callable(f)) or getattr(engine, "mpu", None) is not None,
        "DeepCompile": bool(engine.is_deepcompile_enabled()) if hasattr(engine, "is_deepcompile_enabled") else False,
        "1-bit or compressed communication": getattr(zero, "zero_quantized_gradients", False)
            or getattr(zero, "zero_quantized_weights", False),
    }
    for mode, present in modes.items():
        if present:
            raise UnsupportedHost(f"DeepSpeed: {mode} is not supported; tested: stages 0-3, fp32 and bf16, CPU optimizer "
                                  f"offload, deepspeed {TESTED}")


def check_internals(engine: Any, zero: Any, kind: str) -> None:
    """Refuse a version of DeepSpeed that lacks what the host stands on."""
    for owner, names in NEEDED.items():
        target = engine if owner == "engine" else zero if owner == kind else None
        for name in names if target is not None else ():
            if not hasattr(target, name):
                raise UnsupportedHost(f"DeepSpeed: {type(target).__name__}.{name} is missing in this version; "
                                      f"tested: {TESTED}; install deepspeed=={TESTED} or report this")
    if kind not in (*NEEDED, "torch"):
        raise UnsupportedHost(f"DeepSpeed: optimizer wrapper {kind} is not supported; use a torch.optim optimizer")


def check_optimizer(inner: Any, base: type, stage: int, parts: Sequence[Any] = ()) -> None:
    """Refuse an engine whose optimizer is of another class, or looks at whole tensors where it is shown slices.

    Args:
        parts: at stage 3, what the engine has it step for one by one.
    """
    if isinstance(inner, Contract):
        raise UnsupportedHost(f"DeepSpeed: the engine's optimizer is {type(inner).__name__}, a composed class; initialise the "
                              f"engine with a plain {base.__name__}, and give the mixins' options to on()")
    if not isinstance(inner, base):
        raise UnsupportedHost(f"DeepSpeed: the engine's optimizer is {type(inner).__name__}, the class is built on "
                              f"{base.__name__}; initialise the engine with a {base.__name__}")
    if not stage:
        return
    habits = habits_of(type(inner), inner.param_groups)  # type: ignore[attr-defined]
    if not habits.by_element or any(kind.__name__.lower() in PER_TENSOR for kind in type(inner).__mro__):
        raise UnsupportedHost(f"DeepSpeed: {type(inner).__name__}, with these options, updates an element by what else is in its "
                              f"tensor, and stage {stage} shows it slices; use the LARS or LAMB mixin over torch.optim.SGD or "
                              "AdamW, or stage 0")
    if stage == 3 and habits.counts_in_groups and len(parts) > 1:
        raise UnsupportedHost(f"DeepSpeed: {type(inner).__name__} counts its steps in its groups, and stage 3 has it step "
                              f"{len(parts)} times, once for each group or part of it; use one parameter group, or stage 2")
