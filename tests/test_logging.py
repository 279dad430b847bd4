"""The run recorder: what lands on disk, who writes, resuming, and the figures."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from everbatch.report.recorder import Recorder, read_scalars, versions, write_json


def test_scalars_are_merged_by_step_and_exact(tmp_path: Path) -> None:
    with Recorder(tmp_path, tensorboard=False, every_steps=2) as recorder:
        loss = torch.tensor(0.1, dtype=torch.float64)
        for step in range(1, 6):
            recorder.scalars(step, {"loss": loss, "lr": 0.5})
            recorder.scalars(step, {"count": torch.tensor([step])})
            loss.mul_(2)  # what was recorded must not move with it
    rows = read_scalars(tmp_path / "scalars.jsonl")
    assert rows == [{"step": s, "loss": 0.1 * 2 ** (s - 1), "lr": 0.5, "count": float(s)} for s in range(1, 6)]


def test_scalars_after_a_flush_join_their_step(tmp_path: Path) -> None:
    with Recorder(tmp_path, tensorboard=False) as recorder:
        recorder.scalars(3, {"loss": 1.0})
        recorder.flush()
        recorder.scalars(3, {"accuracy": 0.5})
    assert read_scalars(tmp_path / "scalars.jsonl") == [{"step": 3, "loss": 1.0, "accuracy": 0.5}]


def test_nothing_is_read_from_the_device_between_flushes(tmp_path: Path) -> None:
    class Watched(torch.Tensor):
        read = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.cpu):
                Watched.read += 1
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    with Recorder(tmp_path, tensorboard=False, every_steps=100) as recorder:
        for step in range(10):
            recorder.scalars(step, {"a": torch.tensor(1.0).as_subclass(Watched), "b": torch.tensor(2.0)})
        assert Watched.read == 0 and (tmp_path / "scalars.jsonl").read_text() == ""
        recorder.flush()
        assert Watched.read == 1  # one transfer for all
    assert len(read_scalars(tmp_path / "scalars.jsonl")) == 10


def test_lines_are_json_even_when_numbers_are_not_finite(tmp_path: Path) -> None:
    with Recorder(tmp_path, tensorboard=False) as recorder:
        recorder.scalars(1, {"a": math.nan, "b": torch.tensor(-math.inf)})
    line = (tmp_path / "scalars.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "a": "nan", "b": "-inf"}
    (row,) = read_scalars(tmp_path / "scalars.jsonl")
    assert math.isnan(row["a"]) and row["b"] == -math.inf


def record(folder: Path, steps: range, resume: int | None) -> None:
    with Recorder(folder, every_steps=3, resume=resume) as recorder:
        for step in steps:
            recorder.scalars(step, {"loss": step / 7})


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    record(tmp_path / "whole", range(1, 11), None)
    record(tmp_path / "cut", range(1, 9), None)
    with open(tmp_path / "cut" / "scalars.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a kill in mid-line
    record(tmp_path / "cut", range(6, 11), 5)
    whole, cut = ((tmp_path / name / "scalars.jsonl").read_text() for name in ("whole", "cut"))
    assert whole == cut
    events = [tensorboard_scalars(tmp_path / name / "tensorboard") for name in ("whole", "cut")]
    assert events[0] == events[1] and [step for step, _ in events[0]] == list(range(1, 11))


def tensorboard_scalars(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars("loss")]


def test_a_fresh_run_drops_the_old_scalars(tmp_path: Path) -> None:
    for _ in range(2):
        with Recorder(tmp_path, tensorboard=False) as recorder:
            recorder.scalars(0, {"a": 1.0})
    assert read_scalars(tmp_path / "scalars.jsonl") == [{"step": 0, "a": 1.0}]


def test_a_run_that_records_nothing_keeps_the_old_scalars(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.scalars(0, {"loss": 1.0})
    with Recorder(tmp_path) as recorder:
        recorder.flush()
        recorder.result({"accuracy": 0.5})
    assert read_scalars(tmp_path / "scalars.jsonl") == [{"step": 0, "loss": 1.0}]
    assert tensorboard_scalars(tmp_path / "tensorboard") == [(0, 1.0)]


def test_other_ranks_do_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    with Recorder(folder, rank=1) as recorder:
        recorder.scalars(1, {"a": 1.0})
        recorder.bar(3, "task")
        recorder.advance()
        recorder.say("hello")
        assert recorder.result({"x": 1}) is None and recorder.figure("f", None, 0) is None  # type: ignore[arg-type]
        recorder.flush()
    assert not folder.exists() and capsys.readouterr() == ("", "")


def test_the_bar_is_quiet_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Recorder(tmp_path, tensorboard=False) as recorder:
        recorder.bar(3, "task 1")
        recorder.advance()
        recorder.say("hello")
    assert capsys.readouterr() == ("hello\n", "")


@pytest.mark.parametrize(("ci", "shown"), [("", True), ("1", False)])
def test_the_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ci: str, shown: bool) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("CI", ci)
    with Recorder(tmp_path, tensorboard=False) as recorder:
        recorder.bar(4, "task 1", done=1, show=("loss",))
        recorder.scalars(2, {"loss": 0.25, "other": 1.0})
        recorder.flush()
        recorder.advance(3)
    text = terminal.getvalue()
    assert ("task 1" in text and "4/4" in text and "loss=0.25" in text and "other" not in text) == shown
    assert bool(text) == shown


def test_result_is_atomic_and_plain_json(tmp_path: Path) -> None:
    with Recorder(tmp_path, tensorboard=False) as recorder:
        path = recorder.result({"matrix": torch.tensor([[0.5, math.nan]]), "seed": 3, "folder": tmp_path, "t": (1, 2)})
    assert path is not None
    text = path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "matrix": [[0.5, None]], "seed": 3, "folder": str(tmp_path), "t": [1, 2]}
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert path.read_text() == text
    write_json(path, {"a": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result.json"]


def test_versions_imports_nothing() -> None:
    before = set(sys.modules)
    found = versions()
    assert found["torch"] is not None and found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"deepspeed", "timm", "ray"} & (set(sys.modules) - before) == set()


def test_bad_interval(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Recorder: every_steps=0, must be a whole number >= 1"):
        Recorder(tmp_path, every_steps=0)
