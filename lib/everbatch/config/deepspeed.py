"""DeepSpeed options: the user's raw tree over ours, with every default that changes numbers or memory written out.

Names and defaults are those of DeepSpeed 0.19.8 (`runtime/config.py`, `runtime/precision_config.py`,
`runtime/zero/config.py`); a test compares them with the installed version. DeepSpeed itself is not imported.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from everbatch.config.strict_yaml import load_file
from everbatch.errors import check, nearest

__all__ = ["deepspeed_config"]

_DEFAULTS: dict[str, Any] = {
    "managed_gradient_accumulation": True,
    "gradient_clipping": 0.0,  # DeepSpeed's own default is 1.0: it clips unless told otherwise
    "zero_allow_untested_optimizer": True,  # every composed optimizer is "untested" to DeepSpeed
    "zero_force_ds_cpu_optimizer": False,  # True would replace the composed optimizer under CPU offload
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
    "disable_allgather": False,
    "steps_per_print": None,
    "wall_clock_breakdown": False,
    "memory_breakdown": False,
    "timers": {"throughput": {"enabled": False}},  # on, it would synchronise the device in every step
    "fp16": {"enabled": False},
    "bf16": {
        "enabled": False,
        "immediate_grad_update": False,
        "check_grad_overflow": True,
        "bf16_master_weights_and_grads": False,
        "bf16_optimizer_states": False,
    },
    "torch_autocast": {"enabled": False},
    "data_types": {
        "grad_accum_dtype": None,
        "param_dtype": None,
        "buffer_dtype": None,
        "keep_in_fp32_modules": "auto",
    },
    "zero_optimization": {
        "stage": 1,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 500_000_000,
        "use_multi_rank_bucket_allreduce": True,
        "allgather_partitions": True,
        "allgather_bucket_size": 500_000_000,
        "overlap_comm": False,
        "compute_grad_norm": True,
        "load_from_fp32_weights": True,
        "round_robin_gradients": False,
        "parameter_alignment": False,
        "ignore_unused_parameters": True,
        "legacy_stage1": False,
        "elastic_checkpoint": False,
        "sub_group_size": 1_000_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_model_persistence_threshold": 9_223_372_036_854_775_807,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "stage3_gather_16bit_weights_on_model_save": False,
        "stage3_module_granularity_threshold": 0,
        "stage3_use_all_reduce_for_fetch_params": False,
        "stage3_allgather_sequential": False,
        "memory_efficient_linear": True,
        "override_module_apply": True,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
        "offload_param": None,
        "offload_optimizer": None,
    },
}

_OFFLOAD_OPTIMIZER = {
    "device": "cpu", "pin_memory": True, "ratio": 1.0, "fast_init": False, "super_offload": False,
    "pipeline_read": False, "pipeline_write": False, "cpuadam_cores_perc": 0.8,
}

_TOP = {
    *_DEFAULTS, "activation_checkpointing", "aio", "autotuning", "bfloat16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_efficiency", "data_parallel_size",
    "dataloader_drop_last", "datastates_ckpt", "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler",
    "gradient_accumulation_steps", "hybrid_engine", "log_level", "optimizer", "pipeline", "scheduler",
    "seq_parallel_communication_data_type", "sequence_parallel_size", "tensor_parallel", "tensorboard",
    "train_batch_size", "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size",
    "wandb", "weight_quantization",
}
"""Every key that DeepSpeed 0.19.8 reads at the top of its configuration."""

_ZERO = {
    *_DEFAULTS["zero_optimization"], "enable_sanity_checks", "leaf_module", "log_trace_cache_warnings",
    "pipeline_loading_checkpoint", "save_muon_momentum_buffer_in_memory", "zenflow",
}

_REMOVED = {
    "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula",
    "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
}


def _on(value: Any) -> bool:
    return bool(value.get("enabled", False)) if isinstance(value, Mapping) else bool(value)


_CLIENT = (
    "the base under the mixins, torch.optim.SGD or AdamW (in a recipe optimizer.base=sgd or adamw, optimizer.lr, "
    "optimizer.weight_decay); an engine of your own may have DeepSpeed build it with torch_adam: true, else it is an Adam that "
    "no mixin stands on"
)
_UNTESTED = "it has not been shown exact here"
_REFUSED: list[tuple[str, Callable[[Any], bool], str, str]] = [
    # key, when a value is refused, what it must be, what to do or why
    ("gradient_clipping", lambda v: v != 0, "be 0", "set gradient_clipping: 0, add ClipGradNorm (in a "
     "recipe optimizer.clip.max_norm=1.0)"),
    ("optimizer", lambda v: v is not None, "be left out", f"remove the block: the client optimizer is {_CLIENT}"),
    ("scheduler", lambda v: v is not None, "be left out", "remove the block: the schedule of the trainer sets the rates "
     "(trainer.schedule.kind=... in a recipe), or torch's schedulers on an optimizer of your own"),
    ("fp16", _on, "not be enabled", "use bf16 or fp32: fp16 under DeepSpeed is not proven here"),
    ("torch_autocast", _on, "not be enabled", f"use bf16: {_UNTESTED}"),
    ("pipeline", lambda v: True, "be left out", f"pipeline parallelism is not supported: {_UNTESTED}"),
    ("expert_parallel", _on, "be left out", f"expert (MoE) groups are not supported: {_UNTESTED}"),
    ("tensor_parallel", lambda v: bool(v), "be left out", f"tensor parallelism is not supported: {_UNTESTED}"),
    ("sequence_parallel_size", lambda v: v != 1, "be 1", f"sequence parallelism is not supported: {_UNTESTED}"),
    ("hybrid_engine", _on, "not be enabled", _UNTESTED),
    ("compile.deepcompile", bool, "be false", _UNTESTED),
    ("managed_gradient_accumulation", lambda v: v is not True, "be true", "else no gradient is reduced before step()"),
    ("gradient_allreduce_op", lambda v: v != "mean", "be 'mean'", "losses are means over the global batch"),
    ("zero_optimization.zero_hpz_partition_size", lambda v: v not in (0, 1), "be 1", f"hpZ: {_UNTESTED}"),
    ("zero_optimization.zenflow", lambda v: v is not None, "be null", _UNTESTED),
    ("zero_optimization.offload_optimizer.super_offload", bool, "be false", _UNTESTED),
    ("zero_optimization.offload_optimizer.device", lambda v: v == "nvme", "be 'cpu' or 'none'", f"NVMe: {_UNTESTED}"),
    ("zero_optimization.offload_param.device", lambda v: v == "nvme", "be 'cpu' or 'none'", f"NVMe: {_UNTESTED}"),
]


def deepspeed_config(
    user: Mapping[str, Any] | str | os.PathLike[str] | None = None, *, micro_batch: int | None = None, accumulation: int = 1,
    world_size: int | None = None, stage: int | None = None, precision: Literal["fp32", "bf16"] | None = None,
    accumulation_dtype: Literal["fp32"] | None = None, offload_optimizer: bool | None = None,
    persistence_threshold: int | None = None,
) -> dict[str, Any]:
    """A complete DeepSpeed configuration: our defaults, the user's raw tree over them, our options checked against it.

    An option left at None takes what the user's tree says, else the default (stage 1, fp32, no offload). "auto", as
    other trainers write it, counts as left out.

    Args:
        user: raw DeepSpeed options, as a mapping or as the path of a JSON or YAML file; not modified.
        micro_batch: samples per rank and forward pass; None leaves out all batch sizes, which `deepspeed.initialize` asks for.
        accumulation: micro-batches per step.
        world_size: data-parallel ranks; with it, `train_batch_size` is checked and written.
        stage: ZeRO stage, 0 to 3.
        precision: working precision of weights and activations; masters are fp32.
        accumulation_dtype: "fp32" accumulates and reduces bf16 gradients in fp32 (stages 1 to 3).
        offload_optimizer: keep masters and moments in CPU memory.
        persistence_threshold: parameters with fewer elements stay whole on every rank at stage 3.

    Returns:
        A dictionary for `deepspeed.initialize(config=...)`; the caller owns it.

    Raises:
        ValueError: an unknown or removed key, a mode that is not supported, or a value that contradicts an option; the
            message names the key.
    """
    raw = load_file(user) if isinstance(user, (str, os.PathLike)) else user
    check(raw is None or isinstance(raw, Mapping), "deepspeed", f"{raw!r}", "be a mapping or the path of a JSON file")
    mine = _without_auto(dict(raw or {}))
    if "bfloat16" in mine:
        check("bf16" not in mine, "deepspeed", "both bf16 and bfloat16 are given", "be one of them")
        mine["bf16"] = mine.pop("bfloat16")
    _check_keys(mine)
    for key, refuses, must, cure in _REFUSED:
        value = _look(mine, key)
        check(value is _NOTHING or not refuses(value), "deepspeed", f"{key}={value!r}", must, cure)

    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": None if micro_batch is None else accumulation,
        "train_batch_size": None if world_size is None or micro_batch is None else micro_batch * accumulation * world_size,
        "zero_optimization.stage": stage,
        "bf16.enabled": None if precision is None else precision == "bf16",
        "data_types.grad_accum_dtype": accumulation_dtype,
        "zero_optimization.stage3_param_persistence_threshold": persistence_threshold,
    }
    result = _over(_DEFAULTS, mine)
    for key, value in options.items():
        given = _look(mine, key)
        if value is not None:
            same = given is _NOTHING or given is None or given == value
            check(same, "deepspeed", f"{key}={given!r}", f"be {value!r} as the recipe's options say, or be left out")
            _put(result, key, value)
    zero, bf16 = result["zero_optimization"], result["bf16"]["enabled"]
    check(zero["stage"] in (0, 1, 2, 3), "deepspeed", f"zero_optimization.stage={zero['stage']!r}", "be 0, 1, 2 or 3")
    _settle_offload(zero, offload_optimizer)
    if world_size is None and result.get("train_batch_size") is None:
        result.pop("train_batch_size", None)
    if micro_batch is not None:
        per_rank = micro_batch * accumulation
        total = result.get("train_batch_size", per_rank)
        fits = isinstance(total, int) and total > 0 and total % per_rank == 0
        check(fits, "deepspeed", f"train_batch_size={total!r}", f"be a multiple of {per_rank}, one rank's share")
    # What follows depends on other options in DeepSpeed; written out, it does not.
    if _look(mine, "zero_optimization.overlap_comm") in (_NOTHING, None):
        zero["overlap_comm"] = zero["stage"] == 3
    if result.get("communication_data_type") is None:
        result["communication_data_type"] = "bf16" if bf16 else "fp32"
    wide = result["data_types"]["grad_accum_dtype"] in ("fp32", "float32", "float")
    check(
        not (bf16 and wide and zero["stage"] == 0), "deepspeed", "data_types.grad_accum_dtype='fp32' at stage 0",
        "be left out", "DeepSpeed has no stage 0 with fp32 accumulation of bf16; use stage 1",
    )
    return result


_NOTHING = object()


def _look(mapping: Mapping[str, Any], key: str) -> Any:
    value: Any = mapping
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _NOTHING
        value = value[part]
    return value


def _put(mapping: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        mapping = mapping[part]
    mapping[last] = value


def _over(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(base))
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _over(result[key], value) if both else copy.deepcopy(value)
    return result


def _without_auto(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out every "auto" that DeepSpeed has no meaning of its own for."""
    result = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            result[key] = _without_auto(value)
        elif value != "auto" or key == "keep_in_fp32_modules":
            result[key] = value
    return result


def _check_keys(mine: Mapping[str, Any]) -> None:
    for key in mine:
        gone = key in _REMOVED
        check(not gone, "deepspeed", f"key {key!r} is given", "be left out", "DeepSpeed has removed this feature")
        check(key in _TOP, "deepspeed", f"unknown key {key!r}", "be a DeepSpeed option", nearest(key, _TOP))
    blocks = {"zero_optimization": _ZERO, "bf16": _DEFAULTS["bf16"], "data_types": _DEFAULTS["data_types"]}
    for block, known in blocks.items():
        value = mine.get(block, {})
        check(isinstance(value, Mapping), "deepspeed", f"{block}={value!r}", "be a block of keys and values")
        for key in value:
            got = f"unknown key '{block}.{key}'"
            check(key in known, "deepspeed", got, "be a DeepSpeed option", nearest(key, known))


def _settle_offload(zero: dict[str, Any], wanted: bool | None) -> None:
    """Write every default of CPU optimizer offload where it is on."""
    given = zero["offload_optimizer"]
    device = given.get("device", "none") if isinstance(given, Mapping) else "none"
    if wanted is not None and given is not None:
        same = wanted == (device == "cpu")
        got = f"zero_optimization.offload_optimizer.device={device!r}"
        check(same, "deepspeed", got, f"agree with offload_optimizer={wanted}")
    if wanted or device == "cpu":
        check(zero["stage"] > 0, "deepspeed", "zero_optimization.offload_optimizer at stage 0", "be at stage 1, 2 or 3")
        zero["offload_optimizer"] = {**_OFFLOAD_OPTIMIZER, **(given or {})}
