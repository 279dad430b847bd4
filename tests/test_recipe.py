"""The recipe as a user runs it: what it leaves behind, stopped, killed, resumed, and given what cannot work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everbatch import checkpoint
from everbatch.data import class_incremental, load
from everbatch.distributed import World
from everbatch.report.recorder import read_scalars
from everbatch.train import load_model, model_info
from processes import ROOT, Job, Zygote, torchrun
from rotation import When, due

RECIPE = ROOT / "recipes" / "class_incremental.py"
SHORT = ("tasks=3", "trainer.epochs=3", "trainer.checkpoint_every=20", "optimizer.lr=0.05", "data.augment=none")
STEPS = 120

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def finished(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Job]:
    """One uninterrupted run under torchrun's agent, in one round of four under torchrun itself, whose ranks import all anew;
    after the zygote, which has DeepSpeed compile what it wants to."""
    folder = tmp_path_factory.mktemp("recipe") / "run"
    launch = torchrun if due(3, 4) else zygote.torchrun
    job = launch(2, RECIPE, *SHORT, f"output={folder}", limit=300)
    assert job.codes == [0], job.err[-5000:]
    return folder, job


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(), parse_constant=pytest.fail)  # type: ignore[no-any-return]


def same_end(folder: Path, other: Path) -> None:
    """Equal weights, moments, buffers and memory, matrix and log."""
    found = [checkpoint.open(path / "checkpoints" / f"step-{STEPS:08d}") for path in (folder, other)]
    assert found[0].names() == found[1].names() and len(found[0].names()) > 10
    for name in found[0].names():
        assert torch.equal(found[0].whole(name), found[1].whole(name)), name
    assert found[0].meta["trainer"] == found[1].meta["trainer"]
    assert result(folder)["accuracy_matrix"] == result(other)["accuracy_matrix"]
    assert (folder / "scalars.jsonl").read_bytes() == (other / "scalars.jsonl").read_bytes()


def test_what_a_run_leaves_behind(finished: tuple[Path, Job]) -> None:
    folder, job = finished
    kept = result(folder)
    assert {"accuracy_matrix", "final_average_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer",
            "configuration", "versions", "seed", "stream", "steps", "skipped_steps", "world_size", "describe"} <= kept.keys()
    assert kept["steps"] == STEPS and kept["world_size"] == 2 and kept["skipped_steps"] == 0
    matrix = kept["accuracy_matrix"]
    assert [[a is None for a in row] for row in matrix] == [[False, True, True], [False, False, True], [False] * 3]
    counts = kept["test_samples"]
    assert all(abs(a * n - round(a * n)) < 1e-9 for row in matrix for a, n in zip(row, counts, strict=True) if a is not None)
    weighted = sum(a * n for a, n in zip(matrix[2], counts, strict=True)) / sum(counts)
    assert kept["last_accuracy"] == pytest.approx(weighted, abs=1e-12) and weighted != pytest.approx(sum(matrix[2]) / 3, abs=1e-9)
    assert kept["final_average_accuracy"] == pytest.approx(sum(matrix[2]) / 3, abs=1e-12)
    for line in ("final average accuracy", "last accuracy", "average incremental accuracy", "forgetting", "backward transfer",
                 "after task 3/3"):
        assert job.out.count(line) == 1  # rank 0 alone
    assert kept["configuration"]["replay"]["method"] == "dark_er_pp" and torch.__version__.startswith(kept["versions"]["torch"])
    rows = read_scalars(folder / "scalars.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert {"loss/total", "loss/cross_entropy", "loss/replay_dark", "loss/replay_label", "lr"} <= rows[1].keys()
    for row in rows[1:]:
        terms = [v for k, v in row.items() if k.startswith("loss/") and k != "loss/total"]
        assert row["loss/total"] == pytest.approx(sum(terms), rel=1e-5)
    assert rows[-1]["accuracy/task_0"] == matrix[2][0]


def test_the_weights_it_ends_with_are_those_it_reports_on(finished: tuple[Path, Job]) -> None:
    path, kept = finished[0] / "model.safetensors", result(finished[0])
    model, info = load_model(path), model_info(path)
    assert info["classes"] == kept["classes"] and info["input_size"] == [1, 8, 8] and info["model"] == "small_conv"
    stream, found = class_incremental(load("digits", train=True), load("digits", train=False), tasks=3), []
    for task in stream.tasks:
        inputs = (stream.fetch(task.test_ids).float() / info["scale"] - info["mean"][0]) / info["std"][0]
        with torch.no_grad():
            guesses = model(inputs).argmax(1)
        found.append((guesses == stream.targets(task.test_ids)).double().mean().item())
    assert found == pytest.approx(kept["accuracy_matrix"][-1], abs=1e-12)


def test_figure_and_tensorboard(finished: tuple[Path, Job]) -> None:
    from matplotlib import image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = finished[0]
    pixels = image.imread(folder / "figures" / "accuracy_matrix.png")
    assert pixels.shape[0] >= 200 and pixels.shape[1] >= 200 and len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    rows = read_scalars(folder / "scalars.jsonl")
    shown = events.Scalars("loss/total")
    assert [(e.step, e.value) for e in shown] == [(r["step"], pytest.approx(r["loss/total"])) for r in rows]
    assert events.Tags()["images"] == ["accuracy_matrix"]


def test_the_written_configuration_repeats_itself(finished: tuple[Path, Job], zygote: Zygote) -> None:
    folder = finished[0]
    job = zygote.run(RECIPE, "--config", str(folder / "config.yaml"), "--print-config", ranks=1)
    assert job.codes == [0]
    text = (folder / "config.yaml").read_text()
    assert job.out == text.partition("\n")[2]  # after the comment
    assert "epochs: 3" in text and f"output: {folder}" in text


def test_dry_run(zygote: Zygote, tmp_path: Path) -> None:
    job = zygote.run(RECIPE, "dry_run=true", "optimizer.sam={}", f"output={tmp_path / 'never'}")
    assert job.codes == [0, 0], job.err
    assert job.out.count("capacity: 200") == 1 and "passes per step    2" in job.out and "ZeRO stage 1" in job.out
    assert not (tmp_path / "never").exists()


@pytest.mark.rotated(0, 2)
def test_without_replay_the_first_task_is_forgotten(finished: tuple[Path, Job], zygote: Zygote, tmp_path: Path) -> None:
    job = zygote.run(RECIPE, *SHORT, "replay=null", "trainer.eval_future=true", f"output={tmp_path}", limit=200)
    assert job.codes == [0, 0], job.err
    assert result(finished[0])["forward_transfer"] is None and -1 < result(tmp_path)["forward_transfer"] < 1
    plain, replay = (result(folder)["accuracy_matrix"] for folder in (tmp_path, finished[0]))
    assert plain[2][0] < 0.2 and replay[2][0] > plain[2][0] + 0.4


def wait_for_step(folder: Path, step: int, job: Path) -> None:
    """Until the checkpoint of `step` is there."""
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / f"step-{step:08d}").exists():
        assert time.monotonic() < deadline, (job / "0.err").read_text()
        time.sleep(0.02)


@pytest.mark.rotated(0, 2)
def test_sigterm_writes_a_checkpoint_and_ends_with_143(finished: tuple[Path, Job], zygote: Zygote, tmp_path: Path) -> None:
    job = zygote.start(RECIPE, *SHORT, f"output={tmp_path}", limit=200)
    wait_for_step(tmp_path, 60, job)
    for pid in (job / "pids").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    begin = time.monotonic()
    ended = zygote.finish(job)
    assert ended.codes == [143, 143] and time.monotonic() - begin < 30
    assert "stopped by a signal" in ended.out and "Traceback" not in ended.err
    last = checkpoint.latest(tmp_path / "checkpoints", world=World())
    assert last is not None and last.step % 10 == 0 and 60 <= last.step < STEPS
    assert [r["step"] for r in read_scalars(tmp_path / "scalars.jsonl")] == list(range(last.step))
    again = zygote.run(RECIPE, *SHORT, f"output={tmp_path}", "resume=true", limit=200)
    assert again.codes == [0, 0], again.err
    same_end(tmp_path, finished[0])
    assert result(tmp_path)["seconds"] > last.meta["seconds"] > 0  # of both together
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*") if path.is_file()}
    once_more = zygote.run(RECIPE, *SHORT, f"output={tmp_path}", "resume=true", limit=200)
    assert once_more.codes == [0, 0] and once_more.out.count("this run has ended already: nothing was done") == 1, once_more
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*") if path.is_file()}


@pytest.mark.rotated(1, 2)
def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on(finished: tuple[Path, Job], zygote: Zygote, tmp_path: Path) -> None:
    job = zygote.start(RECIPE, *SHORT, f"output={tmp_path}", limit=200)
    wait_for_step(tmp_path, 20, job)
    os.kill(int((job / "pids").read_text().split()[1]), signal.SIGKILL)
    begin = time.monotonic()
    ended = zygote.finish(job)
    assert ended.codes == [1, -9] and ended.killed == [], ended  # rank 0 noticed by itself
    assert time.monotonic() - begin < 30
    one_message(ended, "another rank ended without a word")
    again = zygote.run(RECIPE, *SHORT, f"output={tmp_path}", "resume=true", limit=200)
    assert again.codes == [0, 0], again.err
    same_end(tmp_path, finished[0])


@pytest.mark.rotated(1, 2)
def test_a_run_in_the_folder_of_another_begins_afresh(finished: tuple[Path, Job], zygote: Zygote, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    job = zygote.run(RECIPE, "tasks=5", "trainer.epochs=1", f"output={folder}", limit=200)
    assert job.codes == [0, 0], job.err
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000032", "step-00000040"]
    moved = [folder / "previous" / "1", finished[0]]
    files = [{path.relative_to(top): path.read_bytes() for path in top.rglob("*") if path.is_file() and path.name != ".owner"}
             for top in moved]
    assert files[0] == files[1] and len(files[0]) > 8  # all of it, to the byte
    assert [r["step"] for r in read_scalars(folder / "scalars.jsonl")] == list(range(40))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/total")] == list(range(40))


def pictures(root: Path, classes: int = 4, per_class: int = 12, *, empty: bool = False) -> Path:
    """A folder of small PNGs, one colour per class with noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(classes):
            folder = root / split / f"class-{label}"
            folder.mkdir(parents=True)
            for number in range(0 if empty and label == 1 else per_class):
                pixels = rng.integers(0, 60, (20, 24, 3)) + np.array([60 * label, 200 - 50 * label, 90])
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.mark.rotated(1, 2)
def test_own_images_and_a_timm_model(zygote: Zygote, tmp_path: Path) -> None:
    root = pictures(tmp_path / "pictures")
    job = zygote.run(RECIPE, f"data.source=imagefolder:{root}", "data.image_size=16", "model.name=resnet10t", "tasks=2",
                     "trainer.batch_size=8", "trainer.epochs=2", "replay.capacity=8", "data.augment=crop_flip", "engine.kind=ddp",
                     f"output={tmp_path / 'run'}", limit=200)
    assert job.codes == [0, 0], job.err
    kept = result(tmp_path / "run")
    order = np.random.RandomState(kept["seed"]).permutation(4)
    assert kept["classes"] == [f"class-{c}" for c in order] and kept["steps"] == 12 and kept["test_samples"] == [24, 24]


# ------------------------------------------------------------------------------------------------------------ bad input
def one_message(job: Job, *texts: str) -> None:
    """Every rank failed, soon, with one line of ours and no traceback."""
    assert all(job.codes), job
    assert "Traceback" not in job.err, job.err
    lines = [line for line in job.err.splitlines() if line.startswith("class_incremental:")]
    assert len(lines) == 1, job.err
    for text in texts:
        assert text in lines[0], lines[0]


BAD: dict[str, tuple[list[str], list[str]]] = {
    "unknown model": (["model.name=resnet181"], ["name='resnet181'", "did you mean 'resnet18'?"]),
    "no data": (["data.source=imagefolder:/nowhere/at/all"], ["/nowhere/at/all"]),
    "unknown data": (["data.source=digit"], ["'digit'", "digits"]),
    "more tasks than classes": (["tasks=11"], ["11 tasks of 10 classes", "at least one class per task"]),
    "no task": (["tasks=0"], ["0 tasks of 10 classes"]),
    "batch larger than a task": (["trainer.batch_size=4000"], ["global_batch=4000", "be no larger than the task"]),
    "ranks do not divide the batch": (["trainer.batch_size=33"], ["batch_size=33", "divisible by 2 ranks"]),
    "accumulation does not divide it": (["trainer.accumulation=5", "engine.kind=ddp"], ["batch_size=32", "5 micro-batches"]),
    "wrong key": (["trainer.epoch=2"], ["unknown key 'trainer.epoch'", "did you mean 'trainer.epochs'?"]),
    "wrong type": (["trainer.epochs=two"], ["trainer.epochs='two', must be a whole number"]),
    "out of range": (["optimizer.lr=-1"], ["lr=-1.0", "must be > 0"]),
    "not a number": (["optimizer.lr=nan"], ["optimizer.lr='nan', must be a number"]),
    "out of range in a mixin": (["replay.alpha=-0.1"], ["alpha=-0.1", ">= 0"]),
    "no such scenario": (["scenario=tusk"], ["scenario", "'tusk'", "class", "task"]),
    "plain on two ranks": (["engine.kind=plain"], ["engine='plain' on 2 ranks", "must run on one rank"]),
    "engine clips": (["engine.deepspeed={gradient_clipping: 1.0}"], ["gradient_clipping"]),
    "no file": (["--config", "/nowhere.yaml"], ["/nowhere.yaml"]),
    "code in a file": (["--config", "{folder}/code.yaml"], ["code.yaml"]),
    "empty class": (["data.source=imagefolder:{folder}/empty", "tasks=2"], ["class-1"]),
    "NaN in the data": (["data.source=npz:{folder}/nan.npz", "trainer.epochs=5", "tasks=2", "trainer.max_bad_steps=3"],
                        ["3 consecutive steps up to step 2", "not finite"]),
    "another configuration": (["{same}", "resume=true", "trainer.seed=1"], ["made with", "trainer.seed=0, this run has 1"]),
    "another optimizer option": (["{same}", "resume=true", "optimizer.momentum=0.5"], ["optimizer.momentum=[0.0]", "[0.5]"]),
    "another memory": (["{same}", "resume=true", "replay.capacity=100"], ["mixins.Replay", "capacity=100"]),
}


@pytest.fixture(scope="module")
def bad_inputs(finished: tuple[Path, Job], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    pictures(folder / "empty", empty=True)
    (folder / "code.yaml").write_text("trainer: !!python/object/apply:os.system ['touch /tmp/executed']\n")
    images = np.full((80, 1, 8, 8), np.nan, dtype=np.float32)
    np.savez(folder / "nan.npz", x_train=images, y_train=np.arange(80) % 4, x_test=images[:20], y_test=np.arange(20) % 4)
    return folder


@pytest.mark.parametrize("case", [When(i, 4).param(case) for i, case in enumerate(BAD)])
def test_bad_input(zygote: Zygote, bad_inputs: Path, finished: tuple[Path, Job], tmp_path: Path, case: str) -> None:
    given, texts = BAD[case]
    arguments: Sequence[str] = [a.replace("{folder}", str(bad_inputs)) for a in given]
    output = tmp_path / "run"
    if "{same}" in arguments:
        shutil.copytree(finished[0], output)
        arguments = [*SHORT, *(a for a in arguments if a != "{same}")]
    job = zygote.run(RECIPE, *arguments, f"output={output}", limit=120)
    one_message(job, *texts)
    assert job.killed == [] and job.seconds < 60, job


DIFFERENT = [
    (["trainer.seed=5"], ["trainer.seed is 0 on rank 0 and 5 on rank [1]"]),
    (["engine.stage=2"], ["engine is "]),
    (["model.name=resnet10t"], ["model is "]),
    (["optimizer.lr=0.1"], ["lr is [0.03] on rank 0 and [0.1]"]),
    (["data.source=npz:{folder}/other.npz"], ["stream is "]),
]


@pytest.mark.parametrize(("extra", "texts"), [When(i, 5).param(*given) for i, given in enumerate(DIFFERENT)])
def test_ranks_that_were_given_different_things(
    zygote: Zygote, bad_inputs: Path, tmp_path: Path, extra: list[str], texts: list[str],
) -> None:
    rng = np.random.default_rng(1)
    images = rng.random((800, 1, 8, 8), dtype=np.float32)
    np.savez(bad_inputs / "other.npz", x_train=images, y_train=np.arange(800) % 10, x_test=images, y_test=np.arange(800) % 10)
    other = [e.replace("{folder}", str(bad_inputs)) for e in extra]
    job = zygote.run(RECIPE, f"output={tmp_path}", rank_arguments={1: other}, limit=120)
    one_message(job, *texts, "must be the same on every rank")
    assert job.seconds < 60


def test_an_error_on_one_rank_alone(zygote: Zygote, tmp_path: Path) -> None:
    job = zygote.run(RECIPE, f"output={tmp_path}", rank_arguments={1: ["data.source=imagefolder:/nowhere"]}, limit=120)
    one_message(job, "rank 1: ", "/nowhere")
    assert job.seconds < 60
