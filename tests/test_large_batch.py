"""The large-batch recipe: what a run reports, how batches are divided, resuming, augmentation, and the published settings."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from everbatch import checkpoint, config
from everbatch.config.strict_yaml import load_file
from everbatch.data import Batch
from everbatch.distributed import World
from everbatch.experiment import Data, run
from everbatch.experiment.large_batch import micro_batches
from everbatch.optim.layerwise.rules import conadv_peak
from everbatch.report.recorder import read_scalars
from everbatch.train import Trainer, load_model, model_info
from needs import needs
from processes import ROOT, Job, Zygote, torchrun
from test_recipe import pictures

RECIPE = ROOT / "recipes" / "large_batch.py"
PUBLISHED = sorted((ROOT / "recipes" / "large_batch").glob("*.yaml"))
SHORT = ("trainer.epochs=4", "trainer.schedule.warmup_epochs=1", "trainer.checkpoint_every=3", "trainer.keep_last=3",
         "eval_every=2")

needs("timm", "sklearn")


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("large_batch", RECIPE)
    assert spec is not None and spec.loader is not None
    module = sys.modules["large_batch"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> tuple[Path, Job]:
    """A short run of the default configuration."""
    folder = tmp_path_factory.mktemp("large_batch") / "run"
    job = zygote.run(RECIPE, *SHORT, f"output={folder}", limit=400)
    assert job.codes == [0, 0], job.err[-5000:]
    return folder, job


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(), parse_constant=pytest.fail)  # type: ignore[no-any-return]


@pytest.mark.distributed
def test_what_a_run_leaves_behind(finished: tuple[Path, Job]) -> None:
    folder, job = finished
    kept = result(folder)
    assert kept["steps"] == 8 and kept["world_size"] == 2 and kept["accumulation"] == 2 and kept["skipped_steps"] == 0
    assert [epoch for epoch, _ in kept["accuracy_by_epoch"]] == [2, 4] and kept["accuracy_by_epoch"][-1][1] == kept["accuracy"]
    speed = kept["throughput"]
    assert speed["samples_per_s"] > 0 and speed["samples_per_s_per_device"] == speed["samples_per_s"] / speed["devices"]
    assert speed["devices"] == 2
    assert job.out.count("test accuracy    ") == job.out.count("samples/s, ") == job.out.count("epoch 2: test accuracy") == 1
    rows = read_scalars(folder / "scalars.jsonl")
    assert all(row["throughput/samples_per_s"] == 2 * row["throughput/samples_per_s_per_device"] > 0 for row in rows[1:])
    assert {"loss/cross_entropy", "loss/adversarial_cross_entropy", "lr"} <= rows[0].keys() and rows[0]["lr"] == 0.0
    assert (folder / "figures" / "accuracy_by_epoch.png").exists()
    assert model_info(folder / "model.safetensors")["classes"] == [str(k) for k in range(10)]
    load_model(folder / "model.safetensors")


@pytest.mark.distributed
def test_resumed_is_uninterrupted(finished: tuple[Path, Job], zygote: Zygote, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000008")  # as if killed in steps 7 and 8
    job = zygote.run(RECIPE, *SHORT, f"output={folder}", "resume=true", limit=300)
    assert job.codes == [0, 0], job.err[-3000:]
    found = [checkpoint.open(path / "checkpoints" / "step-00000008") for path in (folder, finished[0])]
    assert found[0].names() == found[1].names() and len(found[0].names()) > 10
    for name in found[0].names():
        assert torch.equal(found[0].whole(name), found[1].whole(name)), name
    assert result(folder)["accuracy_by_epoch"] == result(finished[0])["accuracy_by_epoch"]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.rotated(1, 2)
def test_the_default_run_prints_what_the_readme_shows(tmp_path: Path) -> None:
    shown = re.search(r"<!-- output:large_batch -->\n```text\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert shown is not None
    job = torchrun(2, RECIPE, f"output={tmp_path}", limit=900.0)
    assert job.codes == [0], job.err[-3000:]
    lines = [line for line in job.out.splitlines() if re.match(r"epoch|global batch|test accuracy", line)]
    figure = r"\d+\.\d+"
    want = shown[1].splitlines()
    assert [re.sub(figure, "#", x).split() for x in lines] == [re.sub(figure, "#", x).split() for x in want]
    assert float(re.findall(figure, lines[-1])[0]) == pytest.approx(float(re.findall(figure, want[-1])[0]), abs=3.0)


def test_micro_batches_add_up_to_the_same_steps(recipe: ModuleType, tmp_path: Path) -> None:
    """Without batch norm, on one rank: what accumulation changes is rounding."""
    ends = []
    for micro in (128, 32):
        folder = tmp_path / str(micro)
        options = config.build(recipe.Recipe, load_file(RECIPE.with_suffix(".yaml")), {
            "model": {"name": "small_conv"}, "data": {"image_size": 8}, "engine": {"kind": "plain"}, "conadv": None,
            "global_batch": 128, "micro_batch": micro, "output": str(folder), "eval_every": 0, "optimizer": {"ema": {}},
            "trainer": {"epochs": 1, "schedule": {"warmup_epochs": 0.3}}})
        run(options)
        assert result(folder)["accumulation"] == 128 // micro and result(folder)["accuracy_averaged"] is not None
        kept = checkpoint.latest(folder / "checkpoints", world=World())
        assert kept is not None
        ends.append({name: kept.whole(name) for name in kept.names() if name.startswith("master/")})
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-6)


def test_sizes_that_do_not_fit_name_those_that_do(recipe: ModuleType) -> None:
    assert micro_batches(98304, 96, 1024) == 1 and micro_batches(512, 128, 2) == 2
    with pytest.raises(ValueError, match=r"global_batch=100 in micro-batches of 24 on 2 ranks, must be a multiple of 48; "
                       r"nearest: global_batch=96 or 144, or micro_batch=10 or 25"):
        micro_batches(100, 24, 2)
    with pytest.raises(ValueError, match=r"global_batch=5 in .* on 3 ranks, must be a multiple of 12; nearest: global_batch=12$"):
        micro_batches(5, 4, 3)


@pytest.mark.parametrize(("given", "text"), [
    ({"trainer": {"batch_size": 32}}, "trainer.batch_size=32, must be left out; set global_batch"),
    ({"trainer": {"accumulation": 2}}, "trainer.accumulation=2, must be left out; set micro_batch"),
    ({"conadv": {"mean": [0.1]}}, "it follows data.mean"), ({"micro_batch": 0}, "micro_batch=0, must be >= 1"),
    ({"trainer": {"label_smoothing": 1.0}}, r"label_smoothing=1.0, must be in \[0, 1\)"),
    ({"data": {"std": [0.5, 0.0]}}, "must be > 0"), ({"data": {"mean": [1, 2], "std": [1, 1, 1]}}, "as many channels"),
    ({"data": {"augment": "rand", "policy": "original"}}, "must begin with rand"), ({"lr_rule": "cubic"}, "lr_rule"),
])
def test_bad_options(recipe: ModuleType, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        config.build(recipe.Recipe, given)


def test_rates_grow_with_the_batch(recipe: ModuleType) -> None:
    given = {"global_batch": 4096, "base_batch": 256, "optimizer": {"lr": 0.1}}
    rates = {rule: config.build(recipe.Recipe, {**given, "lr_rule": rule}).peak_lr for rule in ("none", "linear", "sqrt")}
    assert rates == {"none": 0.1, "linear": pytest.approx(1.6), "sqrt": pytest.approx(0.4)}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_settings(recipe: ModuleType, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = config.build(recipe.Recipe, load_file(path))
    peak = conadv_peak(options.global_batch)
    assert (options.peak_lr, options.trainer.schedule.warmup_epochs) == (peak.lr, peak.warmup_epochs)
    assert options.micro_batch * {16384: 128, 32768: 256, 98304: 1024}[options.global_batch] == options.global_batch
    with pytest.raises(ValueError, match="no folder 'PATH'"):
        run(config.build(recipe.Recipe, load_file(path), {"dry_run": True}))
    root = pictures(tmp_path / "pictures", per_class=4)
    # Weights in bf16 with batch norm are refused on CPUs, and the model is a small one here; the rest is the file's.
    run(config.build(recipe.Recipe, load_file(path), {
        "dry_run": True, "data": {"source": f"imagefolder:{root}", "image_size": 32}, "model": {"name": "test_resnet"},
        "engine": {"kind": "plain", "stage": None, "precision": None}}))
    shown = capsys.readouterr().out
    count = options.global_batch // options.micro_batch
    assert f"1 rank x {count} micro-batches x {options.micro_batch}; peak learning rate {peak.lr:g}" in shown
    assert "SGD = LARS > SGD" in shown.replace("LARSSGD", "SGD") and "ConAdv" in shown and f"lr: {peak.lr}" in shown


def test_adversaries_on_ranks_of_their_own_need_ranks(recipe: ModuleType) -> None:
    options = config.build(recipe.Recipe, {"conadv": {"placement": "ranks"}})
    with pytest.raises(ValueError, match="conadv.placement=ranks in one process, must be started by torchrun"):
        options.set_aside()


@pytest.mark.distributed
@pytest.mark.slow
def test_adversaries_on_ranks_of_their_own(finished: tuple[Path, Job], tmp_path: Path) -> None:
    job = torchrun(3, RECIPE, *SHORT, "engine.kind=ddp", "conadv.placement=ranks", f"output={tmp_path}", limit=400)
    assert job.codes == [0], job.err[-3000:]
    kept = result(tmp_path)
    assert kept["world_size"] == 2 and kept["throughput"]["devices"] == 3
    losses = [[row["loss/total"] for row in read_scalars(f / "scalars.jsonl")] for f in (tmp_path, finished[0])]
    assert losses[0][:4] == pytest.approx(losses[1][:4], rel=1e-3)


def test_label_smoothing_is_torchs() -> None:
    from functools import partial

    from everbatch import compose
    from everbatch.optim import ClipGradNorm

    outputs, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    batch = Batch(torch.zeros(6, 1), targets, torch.arange(6), torch.arange(6))
    for smoothing in (0.0, 0.1):
        trainer = Trainer(torch.nn.Linear(1, 4), partial(compose(ClipGradNorm, base=torch.optim.SGD), lr=0.1, max_norm=1.0),
                          config=Trainer.Config(label_smoothing=smoothing), device="cpu")
        rows = functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing)
        assert torch.equal(trainer.loss_terms(outputs, batch)["cross_entropy"], batch.mean(rows))


# --------------------------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize("augment", ["auto", "rand"])
@pytest.mark.parametrize(("source", "channels"), [("digits", 1), ("imagefolder:x", 3)])
def test_policies_follow_torchs_generator_alone(augment: Any, source: str, channels: int) -> None:
    data = Data(source=source, augment=augment, mean=(0.5,) * channels)
    change, top = data.augmentation(16), 16 if source == "digits" else 255
    assert change is not None
    image = torch.randint(0, top + 1, (channels, 16, 16), dtype=torch.uint8)
    ends = []
    for noise in range(2):
        random.seed(noise)
        np.random.seed(noise)  # noqa: NPY002
        before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        torch.manual_seed(7)
        ends.append(torch.stack([change(image) for _ in range(40)]))
        assert before == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert torch.equal(*ends) and ends[0].shape == (40, *image.shape) and len(ends[0].unique(dim=0)) > 20
    assert 0 <= ends[0].min() and ends[0].max() <= top and data.prepare(ends[0]).isfinite().all()


def test_policy_errors() -> None:
    for augment, policy in (("rand", "rand-q9"), ("auto", "originals")):
        with pytest.raises(ValueError, match=f"policy='{policy}', must be one that timm knows"):
            Data(augment=augment, policy=policy).augmentation(8)  # type: ignore[arg-type]
    change = Data(augment="rand", source="npz:x").augmentation(8)
    assert change is not None
    with pytest.raises(ValueError, match=r"image of torch.float32 .* must be uint8"):
        change(torch.rand(1, 8, 8))


def test_means_of_channels() -> None:
    image = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    data = Data(source="imagefolder:x", mean=(0.0, 0.5, 1.0), std=0.5)
    assert data.prepare(image)[0, :, 0, 0].tolist() == [2.0, 1.0, 0.0]


def test_a_dry_run_says_what_the_run_would_refuse(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    change = {"dry_run": True, "engine": {"kind": "plain"}, "global_batch": 2048, "micro_batch": 2048}
    run(config.build(recipe.Recipe, change))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("the run itself would be refused: Loader: global_batch=2048 and task 0 with"), said
