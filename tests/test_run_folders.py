"""The folder of a run has one owner, is moved away whole, and is tried for writing before anything is trained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

import learning
from everbatch.checkpoint import folder as runs
from everbatch.checkpoint.folder import Claim, claimed, set_aside, try_writing
from everbatch.distributed import World
from learning import stream
from processes import ENVIRONMENT

HOLD = """
    import sys, time
    from pathlib import Path
    from everbatch.distributed import World
    from everbatch.checkpoint.folder import claimed
    with claimed(Path(sys.argv[1]), World()):
        print("owned", flush=True)
        time.sleep(120)
"""


@pytest.mark.distributed
def test_a_live_run_refuses_another_and_a_killed_one_does_not(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path)], text=True, stdout=subprocess.PIPE,
                             env={**os.environ, **ENVIRONMENT})
    with owner:
        try:
            assert owner.stdout is not None and owner.stdout.readline() == "owned\n"
            for _ in range(2):  # refusing changes nothing
                with pytest.raises(ValueError, match=rf"{tmp_path}.*process {owner.pid}, since 20.*one run at a time"), \
                        claimed(tmp_path, World()):
                    raise AssertionError("two owners")
            with pytest.raises(ValueError, match=f"process {owner.pid}"):
                learning.trainer("plain", folder=tmp_path).fit(stream())
        finally:
            owner.send_signal(signal.SIGKILL)
    assert (tmp_path / ".owner").stat().st_size > 0
    with claimed(tmp_path, World()):
        assert json.loads((tmp_path / ".owner").read_text())["pid"] == os.getpid()
        (tmp_path / ".owner").read_bytes()  # reading it does not give it up
        with claimed(tmp_path, World()), claimed(tmp_path / "checkpoints", World()):
            assert len(Claim.held) == 1
        assert len(Claim.held) == 1 and not (tmp_path / "checkpoints").exists()
        if not (child := os.fork()):
            os._exit(len(Claim.held))
        assert os.waitpid(child, 0)[1] == 0
    assert not Claim.held and (tmp_path / ".owner").read_text() == ""


@pytest.mark.parametrize("alive", [True, False])
def test_an_owner_on_another_host_lives_while_its_file_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                  capsys: pytest.CaptureFixture[str], alive: bool) -> None:
    monkeypatch.setattr(runs, "WATCH_S", 0.3)
    beats = iter(range(1000))
    monkeypatch.setattr(runs, "_beat_of", lambda folder: next(beats) if alive else 0)
    (tmp_path / ".owner").write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "yesterday", "token": "x"}))
    if alive:
        with pytest.raises(ValueError, match="host elsewhere, process 1, since yesterday"), claimed(tmp_path, World()):
            raise AssertionError("two owners")
    else:
        with claimed(tmp_path, World()):
            pass
    assert "looking for 0.3 s whether it lives" in capsys.readouterr().err and not Claim.held


@pytest.mark.parametrize("ticks", ["own", "another"])
def test_without_locks_the_process_of_the_record_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ticks: str) -> None:
    monkeypatch.setattr(runs, "_lock", lambda file: None)
    began = runs._ticks(os.getpid()) if ticks == "own" else "1"
    record: dict[str, Any] = {"host": runs.socket.gethostname(), "pid": os.getpid(), "ticks": began, "start": "now", "token": "x"}
    (tmp_path / ".owner").write_text(json.dumps(record))
    if ticks == "own":
        with pytest.raises(ValueError, match=f"process {os.getpid()}"), claimed(tmp_path, World()):
            raise AssertionError("two owners")
    else:
        with claimed(tmp_path, World()):  # a number that was given out again
            pass


def test_the_owner_touches_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "BEAT_S", 0.01)
    with claimed(tmp_path, World()):
        first, end = runs._beat_of(tmp_path), time.monotonic() + 10
        while runs._beat_of(tmp_path) == first:
            assert time.monotonic() < end
            time.sleep(0.01)


def used(folder: Path) -> None:
    for name in runs.FOLDERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "part").write_text(name)
    for name in (*runs.FILES, "notes of mine.txt"):
        (folder / name).write_text(name)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_everything_of_an_earlier_run_is_moved_and_nothing_else(tmp_path: Path) -> None:
    assert set_aside(tmp_path) is None
    used(tmp_path)
    assert set_aside(tmp_path) == tmp_path / "previous" / "1"
    assert names(tmp_path) == ["notes of mine.txt", "previous"] and names(tmp_path / "previous" / "1") == sorted(runs.PARTS)
    (tmp_path / "result.json").write_text("2")
    assert set_aside(tmp_path) == tmp_path / "previous" / "2" and set_aside(tmp_path) is None
    assert names(tmp_path / "previous") == ["1", "2"]


@pytest.mark.parametrize("kill_at", range(1, len(runs.PARTS) + 2))
def test_a_kill_while_moving_leaves_nothing_in_two_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int) -> None:
    used(tmp_path)
    moves, rename = iter(range(1, 100)), Path.rename

    def dying(self: Path, target: Path) -> Path:
        if next(moves) == kill_at:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dying)
    with pytest.raises(KeyboardInterrupt):
        set_aside(tmp_path)
    monkeypatch.setattr(Path, "rename", rename)
    assert runs.half_moved(tmp_path)
    assert set_aside(tmp_path) == tmp_path / "previous" / "1" and not runs.half_moved(tmp_path)
    assert names(tmp_path / "previous") == ["1"] and names(tmp_path / "previous" / "1") == sorted(runs.PARTS)


@pytest.mark.parametrize("name", runs.PARTS)
def test_what_cannot_be_written_is_found_before_training(tmp_path: Path, name: str) -> None:
    try_writing(tmp_path, World())
    assert names(tmp_path) == ["checkpoints"]
    if name in runs.FOLDERS:
        (tmp_path / "checkpoints").rmdir()
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name}' is a (file|folder)"):
        try_writing(tmp_path, World())


@pytest.mark.parametrize("path", ["/proc/nowhere", "{tmp}/file/below"])
def test_a_folder_that_cannot_be_made_is_an_error_of_one_line(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output: .*must be a folder that can be written"), \
            claimed(path.replace("{tmp}", str(tmp_path)), World()):
        raise AssertionError("owned")
