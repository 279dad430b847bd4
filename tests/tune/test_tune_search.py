"""A small search on Ray, seen from all sides; what a trial does with a stream that fails or hangs; progress."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from everbatch.tune.drive import Resources, _check_nodes, _deaths, _list_death, cluster
from everbatch.tune.ledger import Ledger
from everbatch.tune.overdue import GRACE_S, Overdue
from everbatch.tune.plan import Plan, SearchOptions
from everbatch.tune.progress import Board
from everbatch.tune.record import read, verify
from everbatch.tune.seal import LeakageError, Seal
from everbatch.tune.search import settle
from everbatch.tune.stream import failure, unit
from everbatch.tune.trial import Trial, plain, run_trial, told
from processes import ROOT
from tuning import command, prepared

pytestmark = pytest.mark.distributed  # Ray's processes, started once for the file
SPACE = {"er": {"optimizer.lr": [0.05, 1e30], "replay.beta": [0.5, 1.0], "replay.replay_batch": [8]}}
WORDS = ("methods=[er]", "trials=5", "seed=3", "cpus=2", f"space={json.dumps(SPACE)}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def searched(run: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("ray")
    return command("search", f"data={run / 'tuning'}", *WORDS, SECRET_PLACE=str(run / "evaluation"))


of_the_search = pytest.mark.rotated(0, 2)
"""Ray is started in one of two rounds."""


def plan_of(run: Path, folder: Path, **options: Any) -> Plan:
    seal = Seal.read(run / "tuning" / "seal.json").body
    search = SearchOptions(**{"methods": ("er",), "trials": 5, "seed": 3, "space": SPACE, **options})
    data = str(run / "tuning" / "data.npz")
    return Plan(search, seal["scenario"], seal["increments"], seal["orders"], data, seal["data_sha256"], folder)


@of_the_search
def test_a_search_ends_by_freezing_a_record(searched: subprocess.CompletedProcess[str], run: Path) -> None:
    assert searched.returncode == 0, searched.stdout + searched.stderr
    record = read(run / "search" / "record.json")
    assert searched.stdout.rstrip().endswith(record["sha256"])  # to be published
    body = verify(record)
    er = body["methods"]["er"]
    rates = [row["values"]["optimizer.lr"] for row in er["configurations"]]
    assert {*rates} == {0.05, 1e30}
    states = ["complete" if rate == 0.05 else "failed" for rate in rates]
    assert [row["status"] for row in er["configurations"]] == states
    assert {row["failed"] for row in er["failures"]} == {"diverged"} and "finite" in er["failures"][0]["cause"]
    assert rates[er["chosen"]] == 0.05 and body["flags"] == []
    assert body["cost"]["streams"] == len(list((run / "search" / "units").iterdir()))
    assert not list((run / "search" / "work").iterdir())


@of_the_search
def test_its_progress_tells_done_running_failed_best_and_the_time_left(searched: subprocess.CompletedProcess[str]) -> None:
    lines = searched.stdout.splitlines()
    assert any(line.split()[:3] == ["method", "done", "running"] and line.endswith("best so far") for line in lines)
    last = [line for line in lines if line.startswith("er ")][-1].split()
    assert int(last[3]) >= 1 and last[2] == "0" and last[4].replace(".", "").isdigit()
    assert any("gone, about" in line and line.endswith("left") for line in lines)


@of_the_search
def test_a_reused_process_gives_the_bits_of_another(
    searched: subprocess.CompletedProcess[str], run: Path, tmp_path: Path,
) -> None:
    """Units of Ray's processes, each after another configuration ran there, and the same stream in this one."""
    plan = plan_of(run, run / "search")
    i = max(i for i, values in enumerate(plan.values["er"]) if values["optimizer.lr"] == 0.05)
    trial = plan.trial("er", i, plan.values["er"][i], plan.orders)
    order, key = trial.units[1]
    theirs = Ledger(run / "search").read(key)
    ours = unit(key, trial.options, trial.increments, order, trial.data, tmp_path / "work")
    assert theirs is not None and ours["accuracies"] == theirs["accuracies"] and ours["avg_acc"] == theirs["avg_acc"]


@of_the_search
def test_nothing_that_the_search_wrote_names_the_evaluation_data(searched: subprocess.CompletedProcess[str], run: Path) -> None:
    """Records, ledger, and Ray's own files: pickled parameters, states, logs of trials."""
    needle = str(run / "evaluation").encode()
    files = [path for path in (run / "search").rglob("*") if path.is_file()]
    assert any("experiment_state" in path.name for path in files) and any("pkl" in path.name for path in files)
    assert [path for path in files if needle in path.read_bytes() or needle.hex().encode() in path.read_bytes()] == []


@of_the_search
def test_the_same_command_does_nothing_twice_and_another_search_is_refused(
    searched: subprocess.CompletedProcess[str], run: Path,
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run / "search" / "units").iterdir()}
    again = command("search", f"data={run / 'tuning'}", *WORDS)
    assert again.returncode == 0 and read(run / "search" / "record.json")["sha256"] in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (run / "search" / "units").iterdir()}
    with pytest.raises(ValueError, match="^tune: seed=4 for a search that began in .* with seed=3, must be the same"):
        settle(run / "search", SearchOptions(methods=("er",), trials=5, seed=4, space=SPACE))


# -------------------------------------------------------------------------------------------------------- streams that fail
def test_a_failure_is_a_row_with_its_cause(run: Path, tmp_path: Path) -> None:
    plan = plan_of(run, tmp_path)
    options = plan.trial("er", 0, {"optimizer.lr": 1e30}, [0]).options
    row = unit("key", options, plan.increments, 0, plan.data, tmp_path / "work")
    assert row["failed"] == "diverged" and "not finite" in row["cause"] and "avg_acc" not in row
    Ledger(tmp_path).write(row)  # which JSON can hold
    assert failure(MemoryError())["failed"] == failure(RuntimeError("CUDA out of memory. Tried"))["failed"] == "out_of_memory"
    assert failure(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))["failed"] == "out_of_memory"
    assert failure(KeyError("x")) == {"failed": "error", "cause": "KeyError: 'x'"}


WATCHED = """
import sys, time
from everbatch.tune.ledger import Ledger
from everbatch.tune.trial import _watched
with _watched(Ledger(sys.argv[1]), {"key": "k", "failed": "time_limit", "cause": "over 0.2 s"}, 0.2):
    time.sleep(60)
"""


def test_a_stream_that_hangs_ends_with_its_process_and_is_listed(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", WATCHED, str(tmp_path)], timeout=50, capture_output=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT / "lib")})
    assert ended.returncode == 75
    assert Ledger(tmp_path).read("k") == {"key": "k", "failed": "time_limit", "cause": "over 0.2 s"}


def test_a_trial_that_stands_still_is_listed_and_killed_once(run: Path, tmp_path: Path) -> None:
    plan, now, killed = plan_of(run, tmp_path), [0.0], list[str]()
    trials = [plan.trial("er", i, plan.values["er"][i], [0, 1]) for i in range(2)]
    running = [SimpleNamespace(trial_id=str(i), config={"trial": plain(replace(trial, time_limit=100.0 * (i + 1)))},
                               temporary_state=SimpleNamespace(ray_actor=f"actor {i}")) for i, trial in enumerate(trials)]
    overdue = Overdue(killed.append, lambda: now[0])
    for one in running:
        overdue.start(one)
    done = {"order": 0, "avg_acc": 0.5, "acc": 0.5, "accuracies": [0.5], "seconds": 1.0, "cpu_seconds": 1.0}
    Ledger(tmp_path).write({"key": trials[0].units[0][1], **done})
    now[0] = 100.0 + GRACE_S
    overdue.look()
    assert killed == []
    for now[0] in (101.0 + GRACE_S, 102.0 + GRACE_S):
        overdue.look()
        assert killed == ["actor 0"]
    row = Ledger(tmp_path).read(trials[0].units[1][1])
    assert row is not None and (row["failed"], row["cause"], row["order"]) == ("time_limit", "over 100 s", 1)
    assert all(Ledger(tmp_path).read(key) is None for _, key in trials[1].units)
    overdue.start(running[0])  # what Tune does then, and what it finds
    reports: list[dict[str, Any]] = []
    run_trial(told(running[0].config), reports.append)
    assert reports[-1] == {"orders_done": 1, "failed": 1}
    overdue.end(running[1])
    now[0] = 1000.0
    overdue.look()
    assert killed == ["actor 0", "actor 0"]


DIED = """ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
The actor died because its node has died."""
FULL = """ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory."""


@pytest.mark.parametrize(("said", "kind"), [(DIED, "died"), (FULL, "out_of_memory"), ("", "died")])
def test_a_process_that_died_twice_is_listed_at_its_first_open_unit(said: str, kind: str, run: Path, tmp_path: Path) -> None:
    plan = plan_of(run, tmp_path)
    trial = plan.trial("er", 0, plan.values["er"][0], [0, 1])
    Ledger(tmp_path).write({"key": trial.units[0][1], "order": 0, "avg_acc": 0.5, "acc": 0.5, "accuracies": [0.5],
                            "seconds": 1.0, "cpu_seconds": 1.0})
    _list_death(trial, said)
    row = Ledger(tmp_path).read(trial.units[1][1])
    assert row is not None and row["failed"] == kind and row["order"] == 1 and row["cause"]
    rows, failures = plan.rows("er", [0, 1])
    assert rows[0]["status"] == "failed" and failures[0]["failed"] == kind


def test_a_trial_that_died_before_it_told_anything_is_known_by_its_folder() -> None:
    results = [SimpleNamespace(error=FULL, path="/somewhere/ray/run-1/dark_er_pp-3-e7d5b_00001", config={}),
               SimpleNamespace(error=None, path="/somewhere/ray/run-1/er-0-e7d5b_00000", config={})]
    assert _deaths(results) == {"dark_er_pp #3": FULL}


def test_evaluation_data_in_a_trial_ends_the_search(run: Path, tmp_path: Path) -> None:
    plan = plan_of(run, tmp_path)
    said = ("ray.exceptions.RayTaskError(LeakageError): ...\n"
            "everbatch.tune.seal.LeakageError: tune: 1 of 48 samples are evaluation data")
    with pytest.raises(LeakageError, match="^tune: 1 of 48 samples are evaluation data$"):
        _list_death(plan.trial("er", 0, plan.values["er"][0], [0]), said)


def test_failed_streams_are_tried_again_on_request_alone(run: Path, tmp_path: Path) -> None:
    plan = plan_of(run, tmp_path)
    key = plan.key("er", plan.values["er"][0], 0)
    row = {"key": key, "failed": "died", "cause": "?", "order": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    Ledger(tmp_path).write(row)
    plan.run(lambda trials: None)
    assert Ledger(tmp_path).read(key) == row
    plan.options = replace(plan.options, again=True)
    plan.run(lambda trials: None)
    assert Ledger(tmp_path).read(key) is None


# ------------------------------------------------------------------------------------------------------- resources, progress
def test_resources_that_no_node_has_are_refused_at_once() -> None:
    nodes = [{"CPU": 2.0}, {"CPU": 4.0, "GPU": 1.0}]
    _check_nodes(nodes, Resources(ranks=3, cpus=2))
    _check_nodes(nodes, Resources(ranks=2, cpus=2, spread=True))
    for wrong in (Resources(cpus=5), Resources(gpus=2.0), Resources(ranks=3, cpus=2, spread=True), Resources(ranks=4, cpus=2)):
        with pytest.raises(ValueError, match="fit on the nodes, which have 2 CPU, 0 GPU; 4 CPU, 1 GPU; lower ranks"):
            _check_nodes(nodes, wrong)


def test_the_board_counts_trials_and_streams(tmp_path: Path) -> None:
    out = io.StringIO()
    board = Board("search", out=out)

    def trial(method: str, i: int) -> Trial:
        units = [(order, f"{method}-{i}-{order}") for order in (0, 1)]
        return Trial(method=method, id=i, options=[], increments=[], units=units, data="", data_sha256="", seal=None,
                     ledger=str(tmp_path), time_limit=1.0)

    trials = [trial("er", i) for i in range(4)] + [trial("ewc", 0)]
    done = {"er-0-0": 0.5, "er-0-1": 0.7, "er-1-0": 0.9, "er-2-0": None}
    board.begin(trials)
    for key, score in done.items():
        outcome = {"failed": "died", "cause": ""} if score is None else {"avg_acc": score}
        Ledger(tmp_path).write({"key": key, "order": 0, **outcome})
    board.running = {"er-1-0"}
    lines = board.table().splitlines()
    assert lines[1].split() == ["er", "1/4", "1", "1", "60.00", "%", "(#0)"]  # the best of whole trials
    assert lines[2].split() == ["ewc", "0/1", "0", "0", "-"]
    assert lines[3].startswith("5/10 streams") and out.getvalue() == "search: 10 streams of 5 trials, 0 of them done before\n"


def test_the_last_table_ends_with_the_causes_of_what_failed(tmp_path: Path) -> None:
    def ended(count: int) -> list[str]:
        out = io.StringIO()
        trials = [Trial(method="er", id=i, options=[], increments=[], units=[(0, f"{i}-0"), (1, f"{i}-1")], data="",
                        data_sha256="", seal=None, ledger=str(tmp_path), time_limit=1.0) for i in range(count + 1)]
        board = Board("search", out=out)
        board.begin(trials)
        board.end()
        return out.getvalue().splitlines()

    for i in range(1, 8):
        Ledger(tmp_path).write({"key": f"{i}-0", "order": 0, "avg_acc": 0.5})
        cause = f"ValueError: loss {i} is\nnot finite" + " and so on" * 40
        Ledger(tmp_path).write({"key": f"{i}-1", "order": 1, "failed": "diverged", "cause": cause})
    lines = ended(7)
    told = [line for line in lines if line.startswith("failed: ")]
    assert [line[:66] for line in told] == [
        f"failed: er #{i}, order 1 (diverged): ValueError: loss {i} is not finit" for i in range(1, 6)]
    assert all(len(line) <= 250 and line.endswith("...") for line in told)
    assert lines[-1] == f"and 2 more: see `failures` in the record, or {tmp_path}/units" and lines[-7].startswith("14/16 streams")
    assert ended(2)[-1].startswith("failed: er #2") and ended(0)[-1].startswith("0/2 streams")  # and nothing where nothing failed


def test_without_ray_a_search_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"^tune: ray is not installed; pip install everbatch\[tune\]$"), \
            cluster(Resources(), tmp_path, []) as start:
        start()


@pytest.mark.slow
@pytest.mark.rotated(1, 2)
def test_the_recipe_runs_all_phases_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    output = tmp_path / "run"
    words = [sys.executable, str(ROOT / "recipes" / "two_phase.py"), f"output={output}", "search.trials=2",
             "pair.evaluation_orders=2", "pair.scenario.trainer.epochs=1", "search.methods=[er]"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "lib"), "RAY_AUTH_MODE": "disabled"}
    first = subprocess.run(words, env=env, text=True, capture_output=True, timeout=500, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    found = json.loads((output / "evaluation" / "comparison.json").read_text())["avg_acc"]
    assert {(row["protocol"], row["method"]) for row in found["choices"]} == {
        ("two-phase", "er"), ("two-phase", "finetune"), ("conventional", "er")}
    assert "er" in found["optimism"] and (output / "evaluation" / "figures" / "both_protocols.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/units/*")}
    again = subprocess.run(words, env=env, text=True, capture_output=True, timeout=500, cwd=tmp_path)
    assert again.returncode == 0 and before == {path: path.stat().st_mtime_ns for path in output.glob("*/units/*")}
