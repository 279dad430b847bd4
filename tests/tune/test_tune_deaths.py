"""What is killed in a search, and what the ledger makes of it. Slow: real processes of Ray, minutes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from everbatch.tune.ledger import Ledger
from everbatch.tune.plan import Plan, SearchOptions
from everbatch.tune.record import read, verify
from everbatch.tune.seal import Seal
from everbatch.tune.stream import unit
from processes import ROOT
from tuning import command, prepared

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
pytest.importorskip("ray")
SPACE: dict[str, Any] = {"er": {"optimizer.lr": [0.05, 0.02], "replay.beta": [0.5, 1.0], "replay.replay_batch": [8]}}
LONG = {"replay.capacity": 8, "trainer.epochs": 150, "trainer.batch_size": 8, "engine.kind": "plain", "data.mean": 0.2}
ENV = {**os.environ, "PYTHONPATH": str(ROOT / "lib"), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def words(run: Path, output: Path, **more: Any) -> list[str]:
    options = {"methods": ["er"], "bounds": [], "trials": 3, "seed": 1, "space": SPACE, **more}
    return ["search", f"data={run / 'tuning'}", f"output={output}", *(f"{key}={json.dumps(v)}" for key, v in options.items())]


@contextmanager
def started(*command_words: str, mark: str = "") -> Iterator[subprocess.Popen[str]]:
    """A search in a session of its own, with a mark in the environment of all its processes."""
    process = subprocess.Popen([sys.executable, "-m", "everbatch.tune", *command_words], text=True, cwd=ROOT,
                               env={**ENV, "EVERBATCH_MARK": mark}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=60)


def until(good: Callable[[], Any], limit: float = 240.0) -> Any:
    """What `good` gives, once it is true."""
    end = time.monotonic() + limit
    while not (found := good()):
        assert time.monotonic() < end, "too late"
        time.sleep(0.05)
    return found


def units(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "units").glob("*.json")}


def at_work(folder: Path) -> list[int]:
    """Processes of streams that have a checkpoint."""
    found = []
    for owner in (folder / "work").glob("*/.owner"):
        with suppress(OSError, ValueError):
            if any((owner.parent / "checkpoints").glob("step-*")):
                found.append(int(json.loads(owner.read_text())["pid"]))
    return found


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def of_mark(mark: str) -> list[int]:
    """Processes of trials and their ranks that a marked search has started."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            name = (place / "cmdline").read_bytes()
            trial = name.startswith((b"ray::Worker", b"ray::ImplicitFunc"))
            if trial and f"EVERBATCH_MARK={mark}\0".encode() in (place / "environ").read_bytes():
                found.append(int(place.name))
    return found


def scores(folder: Path) -> dict[str, Any]:
    return {name: json.loads((folder / "units" / name).read_text())["accuracies"] for name in units(folder)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("deaths"), scenario=LONG)


@pytest.mark.rotated(0, 3)
def test_a_killed_driver_goes_on_and_runs_nothing_twice(run: Path, tmp_path: Path) -> None:
    """Killed within a second of a finished unit, others in mid-stream; a second driver is refused before."""
    with started(*words(run, tmp_path)) as driver:
        until(lambda: (tmp_path / "search.json").exists())
        second = command(*words(run, tmp_path))
        assert second.returncode == 1 and len(second.stderr.splitlines()) == 1, second.stderr
        assert "of a run that is under way" in second.stderr
        until(lambda: units(tmp_path) and at_work(tmp_path))
        before, workers = units(tmp_path), at_work(tmp_path)
        os.kill(driver.pid, signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in workers), 60)  # its trials end with it
    before = units(tmp_path) | before
    done = command(*words(run, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    after = units(tmp_path)
    assert before.items() <= after.items() and len(after) > len(before)
    _same_as_alone(run, tmp_path)


def _same_as_alone(run: Path, folder: Path) -> None:
    """Whatever was killed and resumed has the numbers, to the bit, of a stream that nobody disturbed."""
    seal = Seal.read(run / "tuning" / "seal.json").body
    search = SearchOptions(methods=("er",), bounds=(), trials=3, seed=1, space=SPACE)
    data = str(run / "tuning" / "data.npz")
    plan = Plan(search, seal["scenario"], seal["increments"], seal["orders"], data, seal["data_sha256"], folder)
    for i, values in enumerate(plan.values["er"]):
        trial = plan.trial("er", i, values, plan.orders)
        for order, key in trial.units:
            alone = unit(key, trial.options, trial.increments, order, trial.data, folder / "alone" / key[:12])
            kept = Ledger(folder).read(key)
            assert kept is not None and kept["accuracies"] == alone["accuracies"]


@pytest.mark.rotated(1, 3)
def test_a_killed_trial_is_started_again_and_goes_on(run: Path, tmp_path: Path) -> None:
    with started(*words(run, tmp_path)) as driver:
        pid = until(lambda: at_work(tmp_path))[0]
        os.kill(pid, signal.SIGKILL)
        said = driver.communicate(timeout=400)[0]
    assert driver.returncode == 0, said
    body = verify(read(tmp_path / "record.json"))
    assert {row["status"] for row in body["methods"]["er"]["configurations"]} == {"complete"}
    _same_as_alone(run, tmp_path)


@pytest.mark.rotated(2, 3)
def test_a_ctrl_c_is_one_line_and_blames_no_trial(run: Path, tmp_path: Path) -> None:
    with started(*words(run, tmp_path), mark=str(tmp_path)) as driver:
        until(lambda: at_work(tmp_path))
        driver.send_signal(signal.SIGINT)
        said = driver.communicate(timeout=100)[0].splitlines()
    assert driver.returncode == 130, said
    assert said[-1] == "search: stopped by Ctrl-C; the same command goes on with what the ledger lacks"
    assert not any("Traceback" in line for line in said)
    until(lambda: not of_mark(str(tmp_path)), 30)
    assert not any("failed" in json.loads((tmp_path / "units" / name).read_text()) for name in units(tmp_path))
    done = command(*words(run, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    _same_as_alone(run, tmp_path)


@pytest.mark.rotated(2, 3)
def test_a_hung_trial_ends_at_its_limit_and_its_neighbour_does_not(run: Path, tmp_path: Path) -> None:
    space = {"er": {**SPACE["er"], "trainer.epochs": [2, 1_000_000]}}
    began = time.monotonic()
    done = command(*words(run, tmp_path, space=space, trials=5, time_limit=25))
    assert done.returncode == 0, done.stdout + done.stderr
    er = verify(read(tmp_path / "record.json"))["methods"]["er"]
    for row in er["configurations"]:
        assert row["status"] == ("complete" if row["values"]["trainer.epochs"] == 2 else "failed"), row
    assert {(row["failed"], row["cause"]) for row in er["failures"]} == {("time_limit", "over 25 s")}
    assert time.monotonic() - began < 400


@pytest.mark.rotated(1, 3)
def test_a_stopped_trial_is_ended_from_outside_and_the_others_are_not(run: Path, tmp_path: Path) -> None:
    """Its process hears no exception, no signal but the last one, and no clock of its own."""
    with started(*words(run, tmp_path, time_limit=60)) as driver:
        pid = until(lambda: at_work(tmp_path))[0]
        os.kill(pid, signal.SIGSTOP)
        said = driver.communicate(timeout=400)[0]
    assert driver.returncode == 0, said
    assert not alive(pid)
    er = verify(read(tmp_path / "record.json"))["methods"]["er"]
    assert [(row["failed"], row["cause"]) for row in er["failures"]] == [("time_limit", "over 60 s")]
    assert sorted(row["status"] for row in er["configurations"]) == ["complete", "complete", "failed"]


@pytest.mark.rotated(0, 3)
def test_two_ranks_agree_with_one_and_a_killed_rank_is_started_again(run: Path, tmp_path: Path) -> None:
    two = prepared(tmp_path, scenario={**LONG, "engine.kind": "ddp", "trainer.epochs": 30})
    one = command(*words(two, tmp_path / "one", trials=1))
    assert one.returncode == 0, one.stdout + one.stderr
    with started(*words(two, tmp_path / "two", trials=1, ranks=2), mark=str(tmp_path)) as driver:
        pid = until(lambda: at_work(tmp_path / "two"))[0]
        others = [other for other in of_mark(str(tmp_path)) if other != pid]
        assert others  # the other rank, and the trial's own process
        os.kill(pid, signal.SIGKILL)
        said = driver.communicate(timeout=400)[0]
    assert driver.returncode == 0, said
    until(lambda: not of_mark(str(tmp_path)), 30)  # the other rank of the attempt, and those after it
    ours, theirs = scores(tmp_path / "one"), scores(tmp_path / "two")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert theirs[name] == pytest.approx(ours[name], abs=0.09)  # two of 24 samples: sums differ by rounding, and grow
    ranks_of = {json.loads((tmp_path / "two" / "units" / name).read_text())["ranks"] for name in theirs}
    assert ranks_of == {2}
