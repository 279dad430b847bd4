"""The forms whose speed is compared give the same scores, and what is counted is right."""

from __future__ import annotations

import sys

import torch

from processes import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "speed"))
import mos


def test_all_forms_agree() -> None:
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
    setting = mos.made(3, size, steps=1, each=3, rank=2)
    for head in ("trained", "random"):
        if head == "random":
            setting.weight = torch.randn(setting.weight.shape, generator=torch.Generator().manual_seed(0))
        for tasks in (1, 3):
            some = setting.first(tasks, 12)
            assert len(some.images) == 12 and int(some.labels.max()) == 2 * tasks - 1
            row = {"head": head, "limits": True, "load": 0.0, **mos.measured(some, 1)}
            assert row["passes"] == 1 + row["rounds"] <= 1 + min(4, tasks - 1) and 1 <= row["evaluations"] <= 4
            assert 1 <= row["rows_per_sample"] <= row["passes"]
            assert f"T = {tasks}" in mos.told(row) and "released form" in mos.told(row)
