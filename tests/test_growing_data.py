"""The growing-data recipe runs as documented, and says no more than its numbers do."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from everbatch import config
from everbatch.data import TensorSource, growing
from everbatch.distributed import World
from everbatch.experiment import Engine, growing_data, growing_report
from everbatch.train import load_model, model_info
from processes import ENVIRONMENT, ROOT, Zygote

RECIPE = ROOT / "recipes" / "growing_data.py"
SHORT = ("trainer.epochs=1", "trainer.batch_size=32", "optimizer.lr=0.01", "width=4", "seeds=2", "rounds=3")


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("growing_data", RECIPE)
    assert spec is not None and spec.loader is not None
    module = sys.modules["growing_data"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.rotated(1, 4)
def test_a_short_run_alone(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    ended = subprocess.run([sys.executable, "-W", "error", str(RECIPE), *SHORT, f"output={tmp_path}"], text=True, timeout=200,
                           capture_output=True, env={**os.environ, **ENVIRONMENT})
    assert ended.returncode == 0, ended.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["sizes"] == [674, 337, 336] and (tmp_path / "figures" / "accuracy_by_round.png").exists()
    info = model_info(tmp_path / "model.safetensors")
    assert info["model"] == "small_conv" and len(info["classes"]) == 10 and load_model(tmp_path / "model.safetensors")
    rows = result["accuracy"]
    assert {arm: [len(r) for r in found] for arm, found in rows.items()} == dict.fromkeys(
        ("fresh", "warm", "shrink_perturb"), [3, 3])
    assert all(rows["warm"][s][0] == rows["shrink_perturb"][s][0] == rows["fresh"][s][0] for s in range(2))  # a common round
    assert rows["warm"][0][1:] != rows["shrink_perturb"][0][1:] != rows["fresh"][0][1:]
    assert ended.stdout.count(", standard error ") == 3 and "start over minus warm start" in ended.stdout


@pytest.mark.distributed
@pytest.mark.rotated(3, 4)
def test_a_short_run_on_two_ranks(zygote: Zygote, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    job = zygote.run(RECIPE, *SHORT, f"output={tmp_path}", limit=200.0)
    assert job.codes == [0, 0], job.err[-3000:]
    assert json.loads((tmp_path / "result.json").read_text())["world_size"] == 2


def test_a_difference_within_its_error_is_called_none(recipe: ModuleType) -> None:
    same = growing_report.gap([0.70, 0.72, 0.69], [0.71, 0.70, 0.70])
    assert same["mean"] == pytest.approx(0.0) and same["error"] == pytest.approx(0.01)
    assert growing_report.verdict("fresh_minus_warm", same, 3).endswith("no difference beyond 2 standard errors")
    clear = growing_report.gap([0.75, 0.76, 0.77], [0.70, 0.70, 0.70])
    assert growing_report.verdict("fresh_minus_warm", clear, 3).endswith("more than 2 standard errors from zero")
    assert "no statement" in growing_report.verdict("fresh_minus_warm", growing_report.gap([0.7], [0.6]), 1)


@pytest.mark.parametrize("option", [{"stage": 2}, {"precision": "bf16"}])
def test_options_of_deepspeed_are_refused_without_it(recipe: ModuleType, option: dict[str, Any]) -> None:
    """Also on one process, where ddp is plain torch."""
    sources = [TensorSource(torch.zeros(n, 1, 8, 8), torch.arange(n) % 2, name=str(n)) for n in (8, 4)]
    options = recipe.Recipe(engine=Engine(kind="ddp", **option))
    with pytest.raises(ValueError, match=r"engine: .* with kind=ddp, must be left out, they are DeepSpeed's"):
        growing_data.one_run(options, growing(*sources, sizes=[4, 4], seed=0), "warm", 0, World())


def test_sizes_and_bad_options(recipe: ModuleType) -> None:
    assert growing_data.round_sizes(10, 3, 0.5) == [5, 3, 2]
    with pytest.raises(ValueError, match="growing_data: 3 samples in 9 rounds, must be at least one new sample in each"):
        growing_data.round_sizes(3, 9, 0.5)
    for name, value in (("rounds", 1), ("first", 1.0), ("seeds", 0), ("pixel_noise", -0.1), ("width", 0), ("arms", ())):
        with pytest.raises(ValueError, match=f"growing_data: {name}="):
            recipe.Recipe(**{name: value})


def test_trainer_mixins_are_options_by_key(recipe: ModuleType) -> None:
    sources = [TensorSource(torch.rand(n, 1, 8, 8), torch.arange(n) % 2, name=str(n)) for n in (32, 8)]
    stream = growing(*sources, sizes=[16, 16], seed=0)
    words = ["engine.kind=ddp", "trainer.epochs=1", "trainer.batch_size=8", "replay.capacity=4", "replay.replay_batch=4",
             "conadv.radius=2", "optimizer.ewc.strength=0.1", "width=4"]
    options = config.parse(recipe.Recipe, words)
    assert [part.__name__ for part in options.mixins()] == ["ConAdv", "Replay", "Consolidate"]
    for arm in ("warm", "shrink_perturb"):
        row, price, steps = growing_data.one_run(options, stream, arm, 0, World.current())
        assert len(row) == len(price) == 2 and steps == 6
    with pytest.raises(SystemExit):
        config.parse(recipe.Recipe, ["conadv.placement=ranks"])
