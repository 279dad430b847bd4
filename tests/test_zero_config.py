"""DeepSpeed options: everything written out, contradictions refused, defaults equal to the installed DeepSpeed's."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from everbatch.config import deepspeed as zero_config
from everbatch.config import deepspeed_config


def test_what_numbers_and_memory_hang_on_is_written() -> None:
    config = deepspeed_config(micro_batch=4, accumulation=2, world_size=3, stage=3, persistence_threshold=10)
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 24
    assert config["gradient_clipping"] == 0.0
    assert config["zero_allow_untested_optimizer"] is True
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert config["communication_data_type"] == "fp32"
    assert config["bf16"]["enabled"] is False and config["fp16"]["enabled"] is False
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["stage3_param_persistence_threshold"]) == (3, True, 10)
    assert json.loads(json.dumps(config)) == config


def test_defaults_without_options() -> None:
    config = deepspeed_config(micro_batch=1)
    assert config["zero_optimization"]["stage"] == 1 and config["zero_optimization"]["overlap_comm"] is False
    assert "train_batch_size" not in config


def test_the_users_tree_lies_over_ours_and_stays_his() -> None:
    user = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 7, "overlap_comm": True}, "bf16": {"enabled": "auto"},
        "train_batch_size": "auto", "wall_clock_breakdown": True, "data_types": {"keep_in_fp32_modules": "auto"},
    }
    before = json.dumps(user)
    config = deepspeed_config(user, micro_batch=4, precision="bf16")
    assert json.dumps(user) == before
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["overlap_comm"]) == (2, 7, True)
    assert zero["allgather_bucket_size"] == 500_000_000
    assert config["bf16"]["enabled"] is True and config["communication_data_type"] == "bf16"
    assert config["wall_clock_breakdown"] is True and config["data_types"]["keep_in_fp32_modules"] == "auto"
    config["zero_optimization"]["stage"] = 9
    assert deepspeed_config(micro_batch=1)["zero_optimization"]["stage"] == 1


def test_a_file_and_options_left_open(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"bfloat16": {"enabled": true},\n\t"zero_optimization": {"stage": 0}}')
    config = deepspeed_config(path, micro_batch=2)
    assert config["bf16"]["enabled"] is True and config["zero_optimization"]["stage"] == 0 and "bfloat16" not in config
    path.write_text('{"bf16": {}, "bf16": {}}')
    with pytest.raises(ValueError, match="duplicate key 'bf16'"):
        deepspeed_config(path, micro_batch=2)


def test_offload_is_written_out() -> None:
    block = deepspeed_config(micro_batch=1, offload_optimizer=True)["zero_optimization"]["offload_optimizer"]
    assert block["device"] == "cpu" and block["pin_memory"] is True and block["ratio"] == 1.0
    user = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}
    block = deepspeed_config(user, micro_batch=1)["zero_optimization"]["offload_optimizer"]
    assert block["pin_memory"] is False and block["ratio"] == 1.0


@pytest.mark.parametrize(
    ("user", "options", "message"),
    [
        ({"gradient_clipping": 1.0}, {}, "gradient_clipping=1.0, must be 0; set .*: 0, add ClipGradNorm"),
        ({"fp16": {"enabled": True}}, {}, "fp16=.*must not be enabled; use bf16 or fp32"),
        ({"optimizer": {"type": "Adam"}}, {}, "optimizer=.*must be left out; remove the block"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "scheduler=.*must be left out"),
        ({"gradient_cliping": 0}, {}, "unknown key 'gradient_cliping'.*did you mean 'gradient_clipping'"),
        ({"zero_optimization": {"stages": 1}}, {}, "'zero_optimization.stages'.*did you mean 'stage'"),
        ({"zero_optimization": True}, {}, "zero_optimization=True, must be a block"),
        ({"zero_optimization": {"stage": 4}}, {}, "zero_optimization.stage=4, must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2}}, {"stage": 1}, "zero_optimization.stage=2, must be 1 as the recipe"),
        ({"bf16": {"enabled": True}}, {"precision": "fp32"}, "bf16.enabled=True, must be False as the recipe"),
        ({"train_micro_batch_size_per_gpu": 8}, {}, "train_micro_batch_size_per_gpu=8, must be 4 as the recipe"),
        ({"gradient_accumulation_steps": 3}, {}, "gradient_accumulation_steps=3, must be 1"),
        ({"train_batch_size": 9}, {"world_size": 2}, "train_batch_size=9, must be 8"),
        ({"train_batch_size": 9}, {}, "train_batch_size=9, must be a multiple of 4"),
        ({"elasticity": {}}, {}, "key 'elasticity' is given, must be left out; DeepSpeed has removed"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, {}, "zero_hpz_partition_size=8, must be 1"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, {}, "nvme', must be 'cpu' or 'none'"),
        ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, {"offload_optimizer": True}, "agree with"),
        ({"pipeline": {"stages": 2}}, {}, "pipeline=.*must be left out"),
        ({"expert_parallel": {"enabled": True}}, {}, "expert_parallel=.*must be left out"),
        ({"managed_gradient_accumulation": False}, {}, "managed_gradient_accumulation=False, must be true"),
        ({}, {"stage": 0, "precision": "bf16", "accumulation_dtype": "fp32"}, "stage 0, must be left out"),
        ({}, {"stage": 0, "offload_optimizer": True}, "offload_optimizer at stage 0"),
        ([1], {}, "must be a mapping or the path"),
    ],
)
def test_contradictions_and_unsupported_modes_name_the_key(user: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^deepspeed: .*{message}"):
        deepspeed_config(user, micro_batch=4, **options)


COMPARE = """
import json, os, sys
from pathlib import Path
from everbatch.config import deepspeed as zero_config
from everbatch.config import deepspeed_config
assert "deepspeed" not in sys.modules
import deepspeed
from deepspeed.runtime import config as ds
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

def seen(config):
    result = {}
    for key, value in vars(ds.DeepSpeedConfig(config)).items():
        if key not in ("_param_dict", "timers_config"):
            result[key] = value.model_dump(mode="json") if hasattr(value, "model_dump") else \\
                vars(value) if hasattr(value, "__dict__") else value
    return result

differs = {}
for stage in range(4):
    for bf16 in (False, True):
        plain = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3,
                 "zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}}
        ours = seen(deepspeed_config(micro_batch=2, accumulation=3, stage=stage, precision="bf16" if bf16 else "fp32"))
        for key, value in seen(plain).items():
            if str(ours[key]) != str(value):
                differs[key] = str(ours[key])
fields = {f.alias or name for name, f in DeepSpeedZeroConfig.model_fields.items()
          if not (f.json_schema_extra or {}).get("deprecated")}
source = "".join(p.read_text() for p in Path(deepspeed.__file__).parent.rglob("*.py"))
absent = [key for key in zero_config._TOP if f'"{key}"' not in source and f"'{key}'" not in source]
removed = set(getattr(ds, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {}))
removed = sorted(removed - zero_config._REMOVED)
print("RESULT" + json.dumps([differs, sorted(fields ^ zero_config._ZERO), absent, removed]))
"""


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra `deepspeed`")
@pytest.mark.rotated(3, 4)
def test_our_defaults_are_deepspeeds_but_for_the_named_ones() -> None:
    run = subprocess.run(
        [sys.executable, "-c", COMPARE], capture_output=True, text=True, timeout=300,
        env={
            **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[1] / "lib"),
        },
    )
    assert run.returncode == 0, run.stderr
    differs, fields, absent, removed = json.loads(run.stdout.split("RESULT")[1])
    assert set(differs) == {
        "gradient_clipping", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type",
    }
    assert fields == [] and absent == [] and removed == []
    assert zero_config._DEFAULTS["gradient_clipping"] == 0.0
