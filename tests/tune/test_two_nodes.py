"""A search on two Ray nodes: refused where it cannot work, spread over both, and one of them killed. Slow: minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from two_nodes import Nodes, two_nodes

from processes import ENVIRONMENT

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
pytest.importorskip("ray")
ONE = ("methods=[er]", "bounds=[]")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "everbatch.tune", *words]


def environment() -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, "RAY_AUTH_MODE": "disabled"}


def tune(*words: str, limit: float = 400.0, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), env=environment(), text=True, capture_output=True, timeout=limit, cwd=folder)


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tuning side of a small pair; streams of several seconds."""
    folder = tmp_path_factory.mktemp("pair")
    done = tune("prepare", f"output={folder}", 'scenario={"engine.kind": "ddp", "trainer.epochs": 12}', "evaluation_orders=2")
    assert done.returncode == 0, done.stderr
    return folder / "tuning"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with two_nodes() as found:
        yield found


def record(folder: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / "record.json").read_text())["body"]
    return body


def units(folder: Path) -> dict[str, int]:
    """Files of the ledger that are filled, and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "units").glob("*.json")}


@pytest.mark.rotated(0, 3)
def test_what_cannot_work_is_one_line_before_the_first_trial(nodes: Nodes, tuning: Path, tmp_path: Path) -> None:
    """A folder that each process sees as another, as a disk of its own would be; and resources that no node has."""
    for words, said in (
            (("output=/proc/self/cwd/out",), "does not see what is written to '/proc/self/cwd/out' (No such file or directory)"),
            ((f"output={tmp_path / 'a'}", "cpus=64"), "1 rank of 64 CPU, must fit on the nodes, which have 1 CPU"),
            ((f"output={tmp_path / 'b'}", "ranks=3", "spread=true"), "3 ranks of 1 CPU each on a node of its own")):
        begin = time.monotonic()
        done = tune("search", f"data={tuning}", f"address={nodes.address}", *ONE, *words, folder=tmp_path, limit=120)
        lines = [line for line in done.stderr.splitlines() if line.startswith("search:")]
        assert done.returncode == 1 and len(lines) == 1 and said in lines[0] and "Traceback" not in done.stderr, done.stderr
        assert time.monotonic() - begin < 60
    assert not any(units(folder) for folder in (tmp_path / "out", tmp_path / "a", tmp_path / "b"))


@pytest.mark.rotated(1, 3)
def test_two_ranks_on_two_nodes(nodes: Nodes, tuning: Path, tmp_path: Path) -> None:
    """Each node has one core: both take part."""
    done = tune("search", f"data={tuning}", f"address={nodes.address}", *ONE, "ranks=2", "spread=true", "trials=2",
                f"output={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    kept = record(tmp_path)["methods"]["er"]
    assert [row["status"] for row in kept["configurations"]] == ["complete"] * 2 and kept["failures"] == []
    ranks = {json.loads((tmp_path / "units" / name).read_text())["ranks"] for name in units(tmp_path)}
    assert ranks == {2}


@pytest.mark.rotated(2, 3)
def test_a_node_that_is_killed_loses_no_trial(nodes: Nodes, tuning: Path, tmp_path: Path) -> None:
    """Its trial runs on the other node; what had ended is not run again. Last: one node is left."""
    words = [f"data={tuning}", f"address={nodes.address}", *ONE, "trials=4", f"output={tmp_path}"]
    process = subprocess.Popen(command("search", *words),
                               env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 200
    while not units(tmp_path) or len(_at_work(tmp_path)) < 2:
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=20)[0][-3000:]
        time.sleep(0.1)
    before = units(tmp_path)
    nodes.kill_other()
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said[-4000:]
    kept = record(tmp_path)["methods"]["er"]
    assert [row["status"] for row in kept["configurations"]] == ["complete"] * 4 and kept["failures"] == []
    assert before.items() <= units(tmp_path).items() and len(before) < len(units(tmp_path))


def _at_work(folder: Path) -> list[Path]:
    """Streams that are under way: one on each node, which has one core."""
    return [path for path in (folder / "work").glob("*") if path.is_dir()]
