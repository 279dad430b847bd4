"""A run as a function: in this process, twice with the same bits, stopped and resumed, and nothing left of it."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from everbatch.data import Stream, iid
from everbatch.errors import CheckpointMismatch
from everbatch.experiment import Experiment, Finished, run
from everbatch.train import StepRecord, Trainer, TrainerMixin
from experiment_worker import KINDS, digest, experiment, process_state, twice
from processes import ROOT, Zygote
from rotation import When

WORKER = ROOT / "tests" / "experiment_worker.py"


def test_twice_in_this_process(tmp_path: Path) -> None:
    twice("plain", tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "kind"), [
    When(2 * i + ranks - 1, 12).param(ranks, kind) for i, kind in enumerate(KINDS[1:]) for ranks in (1, 2)])
def test_twice_on_other_engines(zygote: Zygote, tmp_path: Path, ranks: int, kind: str) -> None:
    """On one rank without a launch, where a group is made and left; on two in a group that is the caller's."""
    job = zygote.run(WORKER, str(tmp_path), kind, ranks=ranks, limit=120)
    assert job.codes == [0] * ranks, job.err[-3000:]
    assert job.out.count("done 1") == ranks


class Stops(TrainerMixin):
    """Sends this process a signal, or raises, after a step."""

    at, what = -1, 0

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        if record.step == Stops.at:
            if not Stops.what:
                raise KeyError("a fault of the user's own")
            signal.raise_signal(Stops.what)


class Short(Experiment):
    """Digits as one task."""

    def stream(self) -> Stream:
        return iid(*self.data.open())

    def more_mixins(self, world: Any) -> dict[type, Any]:
        return {Stops: None}

    def finish(self, done: Finished) -> tuple[dict[str, Any], list[str]]:
        return {"accuracy": done.matrix[0][0]}, [f"accuracy {done.matrix[0][0]:.2f}"]


def short(folder: Path, **options: Any) -> Short:
    plain = experiment("plain", folder)
    return Short(engine=plain.engine, trainer=Trainer.Config(batch_size=128, epochs=2, checkpoint_every=5),
                 output=str(folder), **options)


def test_stopped_by_a_signal_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal is taken only where it is asked for; the resumed run ends with the bits of an uninterrupted one."""
    whole = run(short(tmp_path / "whole"))
    monkeypatch.setattr(Stops, "at", 8)
    monkeypatch.setattr(Stops, "what", signal.SIGTERM)
    heard: list[int] = []
    own = signal.signal(signal.SIGTERM, lambda sign, _: heard.append(sign))
    try:
        stopped = run(short(tmp_path / "cut"), signals=True)
        assert stopped.stop_sign == signal.SIGTERM and stopped.values == {} and stopped.steps == 9 and not heard
        run(short(tmp_path / "heard"))
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, own)
    resumed = run(short(tmp_path / "cut", resume=True))
    weights = [(r.folder / "model.safetensors").read_bytes() for r in (whole, resumed)]
    assert weights[0] == weights[1] and whole.values["accuracy"] == resumed.values["accuracy"]


def test_a_run_that_has_ended_gives_its_results_again(tmp_path: Path) -> None:
    first = run(short(tmp_path))
    again = run(short(tmp_path, resume=True))
    assert again.unchanged and not first.unchanged and again.steps == first.steps
    assert again.values == json.loads((tmp_path / "result.json").read_text())
    assert again.values["accuracy"] == first.values["accuracy"]


def test_an_error_is_raised_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is free again, and the checkpoints before the error are there."""
    run(short(tmp_path / "first"))  # what it imports registers exit handlers
    monkeypatch.setattr(Stops, "at", 7)
    before = process_state()
    with pytest.raises(KeyError, match="a fault"):
        run(short(tmp_path / "run"))
    after = process_state()
    assert after == before | {"engines": after["engines"]}  # the error's traceback holds the trainer until it is let go
    monkeypatch.setattr(Stops, "at", -1)
    resumed = run(short(tmp_path / "run", resume=True))
    assert resumed.steps == 20
    with pytest.raises(CheckpointMismatch):
        run(replace(short(tmp_path / "run", resume=True), trainer=Trainer.Config(batch_size=64, epochs=2)))


def test_a_dry_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(short(tmp_path / "none", dry_run=True))
    assert result.values == {} and result.steps == 0 and not (tmp_path / "none").exists()
    assert "Learner" in capsys.readouterr().out


def test_an_experiment_without_a_stream(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=r"Experiment.stream\(\) is not there"):
        run(Experiment(output=str(tmp_path)))


@pytest.mark.rotated(0, 3)
def test_weights_are_digested(tmp_path: Path) -> None:
    """The comparison of the tests above sees a difference."""
    first = run(experiment("plain", tmp_path / "a"))
    other = run(replace(experiment("plain", tmp_path / "b"), trainer=Trainer.Config(batch_size=128, epochs=1, seed=1)))
    assert digest(first) != digest(other)
