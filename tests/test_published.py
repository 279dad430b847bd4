"""The published settings of two recipes, class-incremental and MOS: every line says where it is from, and every file runs dry."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from everbatch import config
from everbatch.config.strict_yaml import load_file
from everbatch.experiment import AdaptedTasks, ClassIncremental, Experts, named, run, timm_cache
from needs import needs
from rotation import When

FOLDER = Path(__file__).parents[1] / "recipes" / "class_incremental"
FILES = sorted(FOLDER.glob("*.yaml"))
MOS = sorted((FOLDER.parent / "mos").glob("*.yaml"))

needs("timm", "deepspeed")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 classes of random pictures: two for each of 20 tasks, whose samples fill a batch."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("pictures") / "all.npz"
    labels = np.arange(40 * 20) % 40
    pixels = {part: rng.integers(0, 256, (len(labels), 3, 16, 16), dtype=np.uint8) for part in ("train", "test")}
    np.savez(path, x_train=pixels["train"], y_train=labels, x_test=pixels["test"], y_test=labels)
    return path


def test_the_settings_asked_for_are_there() -> None:
    found = {(options["data"]["source"].split(":")[1], options["tasks"], options["method"], options["replay"]["capacity"])
             for options in map(load_file, FILES) if "replay" in options}
    for data, tasks in (("CIFAR10", (5,)), ("CIFAR100", (10,)), ("PATH", (10,))):
        assert {(data, t, "dark_er_pp", size) for t in tasks for size in (200, 500, 5120)} <= found
    assert {("CIFAR100", t, "dark_er_pp", 500) for t in (5, 10, 20)} <= found
    values = load_file(FOLDER / "cifar10_5tasks_buffer500.yaml")  # those of Mammoth's list
    assert (values["optimizer"]["lr"], values["replay"]["alpha"], values["replay"]["beta"]) == (0.03, 0.2, 0.5)


def every_line_says_where_it_is_from(path: Path) -> None:
    for line in path.read_text().splitlines():
        group = re.fullmatch(r" *\w+:", line)
        assert line.startswith("#") or group or re.search(r"\S  +# (published|ours|yours)\b", line), line


@pytest.mark.parametrize("path", [When(place, 4).param(path, id=path.stem) for place, path in enumerate(FILES)])
def test_published_settings(path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every_line_says_where_it_is_from(path)
    said = load_file(path)
    assert said["output"] == f"runs/{path.stem}" and said["model"]["name"] == "resnet18"
    options = config.build(ClassIncremental, said)
    for part, value in named.layer(said["method"]).items():  # nothing in the file takes its method back
        assert value is None or getattr(options, part) is not None
    # The model is a small one here, and the pictures are others; the rest is the file's.
    run(config.build(ClassIncremental, said, {
        "dry_run": True, "data": {"source": str(pictures), "image_size": 16}, "model": {"name": "small_conv"},
        "engine": {"kind": "plain", "stage": None}}))
    shown = capsys.readouterr().out
    assert "the run itself would be refused" not in shown and f"tasks: {said['tasks']}" in shown
    assert f"lr: {said['optimizer']['lr']}" in shown and "global batch 32" in shown


@pytest.mark.parametrize("path", [When(place, 7).param(path, id=path.stem) for place, path in enumerate(MOS)])
def test_published_settings_of_mos(path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every_line_says_where_it_is_from(path)
    said = load_file(path)
    assert said["output"] == f"runs/{path.stem}" and said["model"]["pretrained"] is True and len(MOS) == 7
    options = config.build(AdaptedTasks, said)
    assert options.mos is not None and options.mos.alpha == 0.1 and not options.trained_here
    assert options.mos.covariance == ("diagonal" if "imagenet_a" in path.stem else "full")
    # As above, with weights that would be given; 40 classes in place of theirs.
    run(config.build(AdaptedTasks, said, {
        "dry_run": True, "data": {"source": str(pictures), "image_size": 16}, "split": {"class_order": None},
        "model": {"name": "vit_tiny_patch16_224", "pretrained": False,
                  "options": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}},
        "pretraining": {"weights": "none.safetensors"}, "engine": {"kind": "plain", "stage": None}}))
    shown = capsys.readouterr().out
    assert "the run itself would be refused" not in shown and f"increment: {said['split']['increment']}" in shown
    assert f"lr: {said['optimizer']['lr']}" in shown and "Learner: MOS" in shown


@pytest.mark.rotated(5, 12)
def test_published_settings_of_same(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They need timm's weights, which are not downloaded."""
    recipe, path = FOLDER.parent / "same.yaml", FOLDER.parent / "same" / "vit_b16.yaml"
    every_line_says_where_it_is_from(path)
    words = ["--config", str(path), f"data.source={pictures}", "data.image_size=16"]
    options = config.parse(Experts, [*words, "dry_run=true", "engine.kind=plain", "trainer.precision=fp32"], default_yaml=recipe)
    assert options.same.experts == options.same.rank == 8 and options.optimizer.base == "adamw"
    monkeypatch.setattr(timm_cache, "cached_weights", lambda name: None)
    with pytest.raises(ValueError, match="the weights of 'vit_base_patch16_224.augreg_in21k' are not on this machine"):
        run(options)
