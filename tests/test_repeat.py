"""Several seeds of a run: none twice, a half-done one goes on, and all of them summed up."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from everbatch.data import Stream, iid
from everbatch.distributed import World
from everbatch.experiment import Experiment, Finished, GrowingData, LargeBatch, repeat, run
from everbatch.experiment.base import Result
from everbatch.experiment.repeat import sum_up, told
from everbatch.experiment.side_by_side import _environment, side_by_side
from everbatch.train import ContinualEvaluation, Plasticity, StepRecord, Trainer, TrainerMixin
from experiment_worker import experiment
from processes import ENVIRONMENT, ROOT, Zygote

RECIPE = ROOT / "recipes" / "class_incremental.py"
QUICK = ("tasks=2", "trainer.epochs=1", "trainer.batch_size=128", "optimizer.lr=0.05", "seeds=2")


class Stops(TrainerMixin):
    """Sends this process a signal after a step of a seed's run."""

    at: tuple[int, int] = (-1, -1)

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        if (self.config.seed, record.step) == Stops.at:  # type: ignore[attr-defined]
            signal.raise_signal(signal.SIGTERM)


class Short(Experiment):
    """Digits as one task, in one epoch."""

    def stream(self) -> Stream:
        return iid(*self.data.open())

    def more_mixins(self, world: Any) -> dict[type, Any]:
        return {Stops: None}

    def finish(self, done: Finished) -> tuple[dict[str, Any], list[str]]:
        return {"accuracy": done.matrix[0][0]}, []


def short(folder: Path, seeds: int = 3, seed: int = 5, **options: Any) -> Short:
    trainer = Trainer.Config(batch_size=256, epochs=2, seed=seed)
    return Short(engine=experiment("plain", folder).engine, trainer=trainer, output=str(folder), seeds=seeds, **options)


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("[!.]*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Three seeds, uninterrupted."""
    return run(short(tmp_path_factory.mktemp("seeds") / "whole"))


def test_seeds_are_summed_up_and_each_is_the_run_with_that_seed(whole: Result, tmp_path: Path) -> None:
    kept = json.loads((whole.folder / "result.json").read_text())
    assert kept == json.loads(json.dumps(whole.values)) and kept["seeds"] == [5, 6, 7] and "torch" in kept["versions"]
    accuracy = [kept["runs"][seed]["headlines"]["accuracy"] for seed in ("5", "6", "7")]
    assert len(set(accuracy)) == 3 and "best" not in json.dumps(kept)
    found, std = kept["estimates"]["accuracy"], statistics.stdev(accuracy)
    assert found["mean"] == pytest.approx(statistics.fmean(accuracy)) and found["std"] == pytest.approx(std)
    half = 4.302652729911275 * std / math.sqrt(3)  # Student's t with 2 degrees of freedom at 97.5 %
    assert (found["low"], found["high"]) == pytest.approx((found["mean"] - half, found["mean"] + half))
    alone = run(short(tmp_path, seeds=1, seed=6))
    assert alone.values["accuracy"] == accuracy[1]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (alone.folder, whole.folder / "seeds" / "6")]
    assert weights[0] == weights[1] and not (whole.folder / "model.safetensors").exists()


def test_what_mixins_report_is_summed_up_too(tmp_path: Path) -> None:
    more: dict[str, Any] = {"evaluation": ContinualEvaluation.Config(every=4, dense=0), "plasticity": Plasticity.Config()}
    options = replace(experiment("plain", tmp_path), seeds=2, **more)
    kept = run(options).values
    alone = [json.loads((tmp_path / "seeds" / seed / "result.json").read_text()) for seed in "01"]
    found = kept["estimates"]
    for name in ("evaluation.min_accuracy", "evaluation.points", "plasticity.final_effective_rank"):
        part, _, key = name.partition(".")
        values = [run[part][key] for run in alone]
        assert found[name]["count"] == 2 and found[name]["mean"] == pytest.approx(statistics.fmean(values))
    assert [run["plasticity"]["final_effective_rank"] == run["plasticity"]["effective_rank"][-1] for run in alone] == [True] * 2
    assert not any(name.startswith(("versions", "configuration")) or name == "evaluation.weights" for name in found)
    lines = {line.split("  ")[0]: line for line in told(kept, options.unit_of)[1:]}
    for name, unit in (("evaluation.min accuracy", "%"), ("evaluation.evaluation seconds", "s"),
                       ("plasticity.final dormant units", "%"), ("final average accuracy", "%")):
        assert lines[name].endswith(f" {unit}"), lines[name]
    for name in ("evaluation.points", "evaluation.evaluated samples", "plasticity.final effective rank"):
        assert lines[name][-1].isdigit(), lines[name]
    large = LargeBatch(evaluation=ContinualEvaluation.Config(), seeds=2)
    kept = {"accuracy": 0.5, "throughput": {"samples_per_s": 3.0}, "seconds": 1.0,
            "evaluation": {"accuracy": 0.5, "weights": "raw"}}
    assert large.headlines(kept) == {"accuracy": 0.5, "samples_per_s": 3.0, "evaluation.accuracy": 0.5, "seconds": 1.0}


def test_what_has_ended_is_not_run_again(whole: Result, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(whole.folder / "seeds") | {whole.folder / "result.json": (whole.folder / "result.json").stat().st_mtime_ns}
    again = run(replace(short(whole.folder), resume=True))
    assert again.unchanged and again.values["estimates"] == json.loads(json.dumps(whole.values["estimates"]))
    after = files(whole.folder / "seeds") | {whole.folder / "result.json": (whole.folder / "result.json").stat().st_mtime_ns}
    assert before == after and capsys.readouterr().out.count("has ended already") == 3


def test_stopped_in_the_second_seed_and_resumed(whole: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stops, "at", (6, 5))
    stopped = run(short(tmp_path), signals=True)
    assert stopped.stop_sign == signal.SIGTERM and not (tmp_path / "result.json").exists()
    first = files(tmp_path / "seeds" / "5")
    assert first and not (tmp_path / "seeds" / "7").exists() and not (tmp_path / "seeds" / "6" / "result.json").exists()
    monkeypatch.setattr(Stops, "at", (-1, -1))
    steps: list[tuple[int, int]] = []
    after_step = Stops.after_step
    monkeypatch.setattr(Stops, "after_step", lambda self, record: (
        steps.append((self.config.seed, record.step)), after_step(self, record))[1])
    resumed = run(short(tmp_path, resume=True))
    assert files(tmp_path / "seeds" / "5") == first
    assert resumed.values["estimates"]["accuracy"] == whole.values["estimates"]["accuracy"]
    assert steps == [*((6, step) for step in range(6, 10)), *((7, step) for step in range(10))]


def test_what_does_not_go_together_is_refused(whole: Result, tmp_path: Path) -> None:
    for name, value in (("seeds", 0), ("seeds", True), ("seeds_at_once", 0)):
        with pytest.raises(ValueError, match=f"{name}={value}, must be"):
            short(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="must end below 2\\^32"):
        short(tmp_path, seed=2**32 - 2)
    before = files(whole.folder)
    with pytest.raises(ValueError, match="seeds=4 from trainer.seed=5 resumes 3 seeds from 5, must be the same"):
        run(short(whole.folder, seeds=4, resume=True))
    with pytest.raises(ValueError, match="seeds=1 resumes the folder .* of several seeds"):
        run(short(whole.folder, seeds=1, resume=True))
    assert files(whole.folder) == before
    with pytest.raises(ValueError, match="seeds_at_once=2 in a process without a script, must be 1"):
        run(short(tmp_path, seeds_at_once=2))
    assert not list(tmp_path.iterdir())
    assert short(tmp_path, seeds=1).unused()["seeds_at_once"] == "there is one seed"


def test_a_new_group_moves_an_old_one_away(whole: Result, tmp_path: Path) -> None:
    (tmp_path / "seeds" / "9").mkdir(parents=True)
    (tmp_path / "seeds" / "9" / "result.json").write_text("{}")
    run(replace(short(tmp_path, seeds=1), trainer=Trainer.Config(batch_size=512, epochs=1)))
    assert (tmp_path / "previous" / "1" / "seeds" / "9" / "result.json").exists() and not (tmp_path / "seeds").exists()


def test_what_rank_0_finds_wrong_with_the_results_every_rank_raises(whole: Result) -> None:
    class Two(World):
        """Rank 0 of two, of which the other agrees."""

        heard: list[Any] = []

        def gather(self, value: Any) -> list[Any]:
            self.heard.append(value)
            return [value, value]

    seen = SimpleNamespace(say=lambda text: None)
    job: Any = SimpleNamespace(world=Two(0, 2), folder=whole.folder, options=short(whole.folder), recorder=seen, results=dict)
    members = [repeat.Member(seed, short(whole.folder / "seeds" / str(seed), seeds=1, seed=seed)) for seed in (5, 6, 9)]
    with pytest.raises(ValueError, match=r"the results of seeds \[9\] are of other options"):
        repeat._all(members, job, lambda options: Result({}, whole.folder, 0), None, False)
    assert "seeds [9]" in Two.heard[-1][1]  # told to the other before it is raised, which else would wait


def test_numbers_that_some_seeds_lack_are_told() -> None:
    found = sum_up({0: {"a": 0.5, "b": None}, 1: {"a": 0.7, "b": None}, 2: {"a": math.nan, "b": None}})
    assert found["a"]["count"] == 2 and found["a"]["without"] == [2] and found["a"]["mean"] == pytest.approx(0.6)
    assert found["b"] == {"count": 0, "without": [0, 1, 2]}
    lines = told({"seeds": [0, 1, 2], "estimates": found}, lambda name: "%")
    assert lines[1].split()[:3] == ["a", "60.00", "14.14"] and lines[1].endswith("over 2 of 3 seeds")
    assert lines[2].split() == ["b", "-"]


# --------------------------------------------------------------------------------------------------------------- side by side
@dataclass(frozen=True)
class Toy:
    """What a script without torch is given."""

    output: str
    code: int = 0
    seconds: float = 0.0


TOY = """
import os, sys, time, signal
from pathlib import Path
text = dict(line.split(": ") for line in Path(sys.argv[2]).read_text().splitlines() if not line.startswith("#"))
signal.signal(signal.SIGTERM, lambda *_: (print("checkpoint", flush=True), os._exit(143)))
print("began", os.environ["OMP_NUM_THREADS"], flush=True)
Path(text["output"] + ".began").touch()
time.sleep(float(text["seconds"]))
print("no luck", flush=True)
sys.exit(int(text["code"]))
"""


def test_side_by_side_a_failure_does_not_stop_the_others(tmp_path: Path) -> None:
    script, said = tmp_path / "toy.py", []
    script.write_text(TOY)
    waiting = {seed: Toy(str(tmp_path / str(seed)), code=3 if seed == 0 else 0) for seed in range(3)}
    with pytest.raises(RuntimeError, match=r"1 of 3 seeds failed \(seed 0: exit code 3, no luck\); resume=true"):
        side_by_side(waiting, 2, script, said.append, signals=True)
    assert sum("has ended" in line for line in said) == 2 and (tmp_path / "2.log").read_text().startswith("began")


def test_side_by_side_a_signal_reaches_all_and_no_more_begin(tmp_path: Path) -> None:
    script, before = tmp_path / "toy.py", signal.getsignal(signal.SIGTERM)
    script.write_text(TOY)
    waiting = {seed: Toy(str(tmp_path / str(seed)), seconds=60) for seed in range(3)}
    signaller = subprocess.Popen([sys.executable, "-c", f"""
import os, signal, time
end = time.monotonic() + 30
while time.monotonic() < end and not all(os.path.exists({str(tmp_path)!r} + f"/{{n}}.began") for n in (0, 1)):
    time.sleep(0.02)
os.kill({os.getpid()}, signal.SIGTERM)
"""])
    begin = time.monotonic()
    assert side_by_side(waiting, 2, script, lambda text: None, signals=True) == signal.SIGTERM
    assert signaller.wait(10) == 0 and time.monotonic() - begin < 40
    assert [("checkpoint" in (tmp_path / f"{n}.log").read_text()) for n in (0, 1)] == [True, True]
    assert not (tmp_path / "2.log").exists() and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.rotated(0, 2)
def test_growing_data_side_by_side_gives_the_numbers_of_seeds_in_turn(tmp_path: Path) -> None:
    words = ["seeds=2", "trainer.epochs=1", "trainer.batch_size=32", "optimizer.lr=0.01", "width=4", "arms=[warm,fresh]"]
    found = []
    for name, more in (("side", ["seeds_at_once=2"]), ("turn", [])):
        command = [sys.executable, str(ROOT / "recipes" / "growing_data.py"), *words, *more, f"output={tmp_path / name}"]
        ended = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, text=True, capture_output=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
        kept = json.loads((tmp_path / name / "result.json").read_text())
        found.append((kept["accuracy"], kept["estimates"], kept["epochs_to_99_percent"]))
    assert found[0] == found[1] and found[0][1]["warm"]["count"] == 2
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("side", "turn")]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.rotated(1, 2)
def test_the_recipe_side_by_side_killed_and_resumed(tmp_path: Path) -> None:
    """Its runs end with it; what had ended stays, and the numbers are those of seeds in turn."""
    words = [*QUICK, "trainer.epochs=6", "trainer.checkpoint_every=5", "engine.kind=plain"]
    command = [sys.executable, str(RECIPE), *words, "seeds_at_once=2", f"output={tmp_path / 'side'}"]
    environment = {**os.environ, **ENVIRONMENT}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not all(any((tmp_path / "side" / "seeds" / s / "checkpoints").glob("step-*")) for s in "01"):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait()
    while _alive(tmp_path / "side"):
        assert time.monotonic() < end, "runs outlive who started them"
        time.sleep(0.1)
    again = subprocess.run([*command, "resume=true"], env=environment, text=True, capture_output=True, timeout=200)
    assert again.returncode == 0, again.stderr
    turn = subprocess.run([sys.executable, str(RECIPE), *words, f"output={tmp_path / 'turn'}"], env=environment, text=True,
                          capture_output=True, timeout=200)
    assert turn.returncode == 0, turn.stderr
    found = [json.loads((tmp_path / name / "result.json").read_text())["estimates"] for name in ("side", "turn")]
    for name in found[0]:
        assert name == "seconds" or found[0][name] == found[1][name], name


def _alive(folder: Path) -> bool:
    """Whether a process works in a folder."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in command.read_bytes():
                return True
        except OSError:  # it has ended since
            continue
    return False


# -------------------------------------------------------------------------------------------------------------- other recipes
@pytest.mark.distributed
@pytest.mark.rotated(0, 2)
def test_seeds_under_torchrun_run_in_turn(zygote: Zygote, tmp_path: Path) -> None:
    job = zygote.run(RECIPE, *QUICK, "engine.kind=ddp", f"output={tmp_path}", limit=120)
    assert job.codes == [0, 0], job.err[-3000:]
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept["seeds"] == [0, 1] and [run["world_size"] for run in kept["runs"].values()] == [2, 2]
    assert job.out.count("2 seeds, from 0 to 1") == 1 and kept["estimates"]["final_average_accuracy"]["count"] == 2
    refused = zygote.run(RECIPE, *QUICK, "seeds_at_once=2", f"output={tmp_path / 'other'}", limit=60)
    assert all(refused.codes) and refused.err.count("seeds_at_once=2 on 2 ranks, must be 1") == 1, refused.err
    for name, other in (("resume", "resume=true"), ("seeds", "seeds=1")):
        differ = zygote.run(RECIPE, *QUICK, f"output={tmp_path}", limit=60, rank_arguments={1: [other]})
        assert all(differ.codes) and f"{name} is" in differ.err and "be the same on every rank" in differ.err, differ.err


@pytest.mark.rotated(1, 2)
def test_an_arm_of_growing_data_that_has_ended_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from everbatch.experiment import Engine, growing_data

    options = GrowingData(engine=Engine(kind="ddp"), trainer=Trainer.Config(batch_size=512, epochs=1), width=2, seeds=2,
                          arms=("fresh", "warm"), output=str(tmp_path))
    made, ran = growing_data.one_run, []

    def one_run(given: Any, stream: Any, arm: str, seed: int, *rest: Any) -> Any:
        ran.append((seed, arm))
        if ran == [(0, "fresh"), (0, "warm"), (1, "fresh")]:
            raise KeyboardInterrupt
        return made(given, stream, arm, seed, *rest)

    monkeypatch.setattr(growing_data, "one_run", one_run)
    with pytest.raises(KeyboardInterrupt):
        run(options)
    kept = files(tmp_path / "seeds")
    ran.clear()
    with pytest.raises(ValueError, match="growing_data: resume=true with another seeds than in"):
        run(replace(options, seeds=3, resume=True))
    found = run(replace(options, resume=True)).values
    assert ran == [(1, "fresh"), (1, "warm")] and len(kept) == 2 and kept.items() <= files(tmp_path / "seeds").items()
    assert found["seeds"] == [0, 1] and found["estimates"]["warm"]["count"] == 2
    assert found["gaps"]["fresh_minus_warm"]["low"] < found["gaps"]["fresh_minus_warm"]["mean"]


def test_seeds_beside_each_other_are_ranks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the command was started by torchrun, as its only rank: its seeds must not meet in its store."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "GROUP_RANK", "ROLE_WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("RANKING", "mine")
    found = _environment(0, 2)
    assert "RANK" not in found and not {n for n in found if n.startswith(("MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_"))}
    assert found["RANKING"] == "mine"
