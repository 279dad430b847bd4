"""Ctrl-C, a launcher that dies, and what is left of a run that ended by an error: nothing but its checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from everbatch import checkpoint
from everbatch.distributed import World
from processes import ENVIRONMENT, ROOT, Zygote, free_port
from rotation import When

RECIPE = ROOT / "recipes" / "class_incremental.py"
SHORT = ("tasks=2", "trainer.epochs=8", "trainer.checkpoint_every=10", "data.augment=none", "trainer.schedule.kind=constant")
START = ROOT / "launch" / "start.py"
TORCHRUN = ["-m", "torch.distributed.run"]
LAUNCHERS: dict[str, list[str]] = {"alone": [], "start.py": [str(START)], "torchrun": TORCHRUN}

pytestmark = pytest.mark.distributed


def begin(*words: object, launcher: Sequence[str] = (), ranks: int = 2) -> subprocess.Popen[str]:
    """A recipe under a launcher, or without one."""
    options = ["--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = [sys.executable, *launcher, *(options if launcher else []), *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)


def finish(job: subprocess.Popen[str], limit: float = 60.0) -> tuple[int, str, str]:
    try:
        out, err = job.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        job.kill()
        raise AssertionError(job.communicate(timeout=limit)) from None
    return job.returncode, out, err


def wait_for(folder: Path, job: subprocess.Popen[str] | None = None) -> None:
    """Until there is a checkpoint."""
    end = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("step-*")):
        assert time.monotonic() < end and (job is None or job.poll() is None), job and finish(job)
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except FileNotFoundError:
            continue
    found, grown = {pid}, True
    while grown:
        more = {p for p, parent in parents.items() if parent in found} - found
        grown, found = bool(more), found | more
    return sorted(found - {pid})


def gone(pids: Sequence[int], limit: float = 20.0) -> list[int]:
    """Those that still live after so many seconds."""
    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    end = time.monotonic() + limit
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def last_step(folder: Path) -> int:
    kept = checkpoint.latest(folder / "checkpoints", world=World())
    assert kept is not None
    return kept.step


def test_ctrl_c_writes_a_checkpoint_and_ends_with_130(zygote: Zygote, tmp_path: Path) -> None:
    """With processes that load data, which a terminal's Ctrl-C reaches as well."""
    job = zygote.start(RECIPE, *SHORT, "engine.kind=plain", "trainer.workers=2", f"output={tmp_path}", ranks=1, limit=120)
    wait_for(tmp_path)
    pid = int((job / "pids").read_text())
    workers = descendants(pid)
    for each in [*workers, pid]:
        os.kill(each, signal.SIGINT)
    ended = zygote.finish(job)
    assert ended.codes == [130] and "a second Ctrl-C ends at once" in ended.err, ended
    assert f"stopped by Ctrl-C after step {last_step(tmp_path)}; " in ended.out and "resume=true" in ended.out
    assert len(workers) >= 2 and gone(workers) == []


@pytest.mark.parametrize("launcher", [[], [str(START)]], ids=["alone", "start.py"])
def test_ctrl_c_during_the_imports(tmp_path: Path, launcher: list[str]) -> None:
    job = begin(RECIPE, *SHORT, f"output={tmp_path / 'run'}", launcher=launcher)
    end = time.monotonic() + 60
    while "libtorch" not in Path(f"/proc/{job.pid}/maps").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    said = "" if launcher else "stopped by Ctrl-C before anything was begun\n"
    assert finish(job) == (130, "", said) and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "launcher"), [
    When(i + j, 3).param(kind, words, id=f"{kind}-{name}")
    for i, (name, words) in enumerate(LAUNCHERS.items()) for j, kind in enumerate(("deepspeed", "ddp"))])
def test_ctrl_c_under_launchers(tmp_path: Path, launcher: list[str], kind: str) -> None:
    if kind == "ddp" and not launcher:
        kind = "plain"
    job = begin(RECIPE, *SHORT, f"engine.kind={kind}", f"output={tmp_path}", launcher=launcher)
    wait_for(tmp_path, job)
    ranks = descendants(job.pid)
    job.send_signal(signal.SIGINT)
    code, out, err = finish(job)
    assert code == (1 if launcher == TORCHRUN else 130), err
    assert out.count("stopped by Ctrl-C after step ") == 1 and gone(ranks) == []
    if launcher != TORCHRUN:
        assert "Traceback" not in err and "Error" not in err, err
    assert last_step(tmp_path) % 10 == 0 or not launcher
    again = begin(RECIPE, *SHORT, f"engine.kind={kind}", f"output={tmp_path}", "resume=true", launcher=launcher)
    code, out, err = finish(again, 200)
    assert code == 0 and "final average accuracy" in out, err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [When(i, 3).param(words, id=name) for i, (name, words) in enumerate(LAUNCHERS.items())])
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, launcher: list[str]) -> None:
    """A step that takes a minute is under way, and a rank that waits for another."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(recipe=str(RECIPE)))
    job = begin(script, *SHORT, f"engine.kind={'ddp' if launcher else 'plain'}", f"output={tmp_path / 'run'}", launcher=launcher)
    wait_for(tmp_path / "run", job)
    ranks = descendants(job.pid)
    time.sleep(1.0)
    job.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert job.poll() is None
    job.send_signal(signal.SIGINT)
    start = time.monotonic()
    code, _, err = finish(job, 30)
    assert time.monotonic() - start < 10 and code == (1 if launcher == TORCHRUN else 130), err
    assert gone(ranks, 5) == []


SLOW = """
import os, runpy, sys, time
if __name__ == "__main__":
    from everbatch.train import Trainer
    after = Trainer.after_step
    def slow(self, record):
        after(self, record)
        if self.step >= 10 and self.world.rank == 0:
            time.sleep(60)
    Trainer.after_step = slow
    sys.argv[0] = {recipe!r}
    runpy.run_path({recipe!r}, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [When(0, 2).param([str(START)], id="start.py"), When(1, 2).param(TORCHRUN, id="torchrun")])
def test_a_launcher_that_is_killed_takes_its_ranks_along(tmp_path: Path, launcher: list[str]) -> None:
    job = begin(RECIPE, *SHORT, "engine.kind=ddp", "trainer.workers=1", f"output={tmp_path}", launcher=launcher)
    wait_for(tmp_path, job)
    ranks = descendants(job.pid)
    assert len(ranks) >= 4
    job.kill()
    assert gone(ranks, 60.0) == []  # after the step, and its checkpoint
    _, out, err = finish(job)
    assert "stopped by a signal after step" in out and "Traceback" not in err, err


@pytest.mark.slow
@pytest.mark.parametrize("way", [When(0, 2).param("stop"), When(1, 2).param("kill")])
def test_no_process_outlives_a_run_that_fails(tmp_path: Path, way: str) -> None:
    """Stopped adversaries, processes that load data, and their trackers: after an error of the run, and when it is killed.

    Before the error, processes that load data go on: a run waits for its data as long as it takes."""
    options = ["engine.kind=plain", "global_batch=32", "micro_batch=32", "model.name=small_conv", "data.image_size=8",
               "conadv.placement=process", "conadv.on_failure=stop", "conadv.patience_s=10", "trainer.workers=2",
               "trainer.epochs=500", "trainer.schedule.warmup_epochs=0", "trainer.checkpoint_every=10", f"output={tmp_path}"]
    job = begin(ROOT / "recipes" / "large_batch.py", *options)
    wait_for(tmp_path, job)
    children = descendants(job.pid)
    assert len(children) >= 4, children
    lines = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    tracker = [child for child, line in lines.items() if b"resource_tracker" in line]
    for child, line in lines.items():
        if way == "kill" or b"large_batch" not in line:
            os.kill(child, signal.SIGSTOP)
    if way == "kill":
        job.kill()
        for pid in tracker:  # nobody is left to wake it; asleep, it holds the pipes that are read here
            os.kill(pid, signal.SIGCONT)
    code, _, err = finish(job)
    if way == "stop":
        assert code == 1 and err.count("is lost") == 1 and "Traceback" not in err, err
    assert gone(children) == []


@pytest.mark.parametrize("words", [["--help"], pytest.param([*SHORT, "trainer.epochs=1", "engine.kind=plain", "output={tmp}"],
                                                           marks=pytest.mark.slow)], ids=["help", "run"])
def test_a_reader_that_leaves_ends_a_recipe_quietly(tmp_path: Path, words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    given = [w.replace("{tmp}", str(tmp_path)) for w in words]
    job = subprocess.Popen([sys.executable, str(RECIPE), *given], cwd=ROOT, text=True,
                           env={**os.environ, **ENVIRONMENT}, stdout=write, stderr=subprocess.PIPE, start_new_session=True)
    os.close(write)
    code, _, err = finish(job)
    assert (code, err) == (141, "")
