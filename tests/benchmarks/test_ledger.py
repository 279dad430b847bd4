"""The ledger: no cell twice, none lost, none trusted that is damaged; verdicts by the rule alone."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import ledger_toy
import pytest
import torch
from benchmarks.ledger import Arm, Claim, Contrast, Paper, Tuning, command, estimate, report, verdict
from benchmarks.ledger.cells import Cell, Damaged, Store
from benchmarks.ledger.claim import claims
from benchmarks.ledger.command import carry_out, main
from benchmarks.ledger.estimate import chance, quantile
from benchmarks.ledger.plan import Plan, Settings
from benchmarks.ledger.report import judge, markdown
from benchmarks.ledger.rule import Verdict, found
from benchmarks.ledger.runner import run_cells
from ledger_toy import until

from processes import ENVIRONMENT, ROOT

PAPER = Paper(authors="Nobody", year=2026, ref="arXiv 0000.00000", where="table 1")
PATHS = os.pathsep.join(map(str, (ROOT / "lib", ROOT, ROOT / "tests" / "benchmarks")))


def driver(home: Path, count: int, jobs: int, *options: str) -> subprocess.Popen[str]:
    script = ROOT / "tests" / "benchmarks" / "ledger_toy.py"
    command = [sys.executable, str(script), str(home), str(count), str(jobs), *options]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": PATHS})


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


# --------------------------------------------------------------------------------------------------------------------- cells
@pytest.mark.rotated(0, 4)
def test_a_killed_run_goes_on_and_runs_no_finished_cell_twice(tmp_path: Path) -> None:
    """The last three of six wait for what comes after the kill, so that it always meets some at work."""
    store, wanted = Store(tmp_path), ledger_toy.cells(6, held=3)
    process = driver(tmp_path, 6, 2, "held=3")
    until(lambda: sum(store.read(cell) is not None for cell in wanted) == 3)
    process.kill()
    process.communicate(timeout=60)
    until(lambda: not any(store.at_work(cell) for cell in wanted), 30)  # its cells end with it
    done = {cell.key for cell in wanted if store.read(cell) is not None}
    assert len(done) == 3
    (tmp_path / "go").touch()
    before = {key: (store.folder / f"{key}.json").read_bytes() for key in done}
    tally = run_cells(wanted, store, jobs=2, say=lambda text: None)
    assert (tally.ran, tally.failed, tally.left) == (6 - len(done), {}, 0)
    ended = lines(tmp_path / "ended.txt")
    assert all(ended.count(cell.key) >= 1 for cell in wanted) and all(ended.count(key) == 1 for key in done)
    assert before == {key: (store.folder / f"{key}.json").read_bytes() for key in done}
    assert run_cells(wanted, store, jobs=2).ran == 0


@pytest.mark.rotated(2, 4)
def test_two_runs_at_once_share_the_cells(tmp_path: Path) -> None:
    """None ends before both have begun one."""
    wanted = ledger_toy.cells(8, runs=2)
    process = driver(tmp_path, 8, 2, "runs=2")
    until(lambda: lines(tmp_path / "began.txt"))
    mine = run_cells(wanted, Store(tmp_path), jobs=2, say=lambda text: None)
    told = process.communicate(timeout=90)[0]
    assert process.returncode == 0, told
    began = [line.split()[0] for line in lines(tmp_path / "began.txt")]
    assert sorted(began) == sorted(cell.key for cell in wanted)
    theirs = int(told.rsplit("ran ", 1)[1].split(",")[0])
    assert mine.ran and theirs and mine.ran + theirs == 8 and mine.left == 0, told


def test_a_damaged_cell_is_found_and_run_again(tmp_path: Path) -> None:
    store, wanted = Store(tmp_path), ledger_toy.cells(4)
    run_cells(wanted, store, jobs=2, say=lambda text: None)
    cut, changed, other, good = (store.path(cell) for cell in wanted)
    cut.write_text(cut.read_text()[:80])
    changed.write_text(changed.read_text().replace('"accuracy": 0.0', '"accuracy": 0.9'))
    other.write_text(good.read_text())
    for cell, why in zip(wanted, ("not JSON", "checksum", "another cell"), strict=False):
        with pytest.raises(Damaged, match=why):
            store.read(cell)
    told: list[str] = []
    assert run_cells(wanted, store, jobs=2, say=told.append).ran == 3
    assert sum(text.startswith("damaged: ") for text in told) == 3
    assert all((store.read(cell) or {})["values"]["accuracy"] == 0.0 for cell in wanted)
    assert len(list(store.folder.glob("*.damaged"))) == 3


def test_a_failed_cell_is_told_with_its_cause_and_is_not_done(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ends = ("raise", "die", "diverge")
    wanted = [Cell(run="ledger_toy:toy", scale={}, options={"end": end}, seed=0, label=end) for end in ends]
    told: list[str] = []
    tally = run_cells(wanted, store, jobs=2, say=told.append)
    assert tally.ran == 1 and {cell.label for cell in tally.failed} == {"raise", "die"}
    assert "RuntimeError: the toy broke" in tally.failed[wanted[0]] and store.read(wanted[0]) is None
    assert "the toy's last words" in tally.failed[wanted[1]] and "killed by signal 9" in tally.failed[wanted[1]]
    assert (store.read(wanted[2]) or {})["values"]["accuracy"] is None
    assert any("failed: RuntimeError: the toy broke" in text for text in told)
    assert len(run_cells(wanted, store, jobs=1, say=told.append).failed) == 2  # tried again


def test_no_cell_is_started_after_the_time(tmp_path: Path) -> None:
    tally = run_cells(ledger_toy.cells(3), Store(tmp_path), jobs=1, end=time.monotonic() - 1)
    assert (tally.ran, tally.left) == (0, 3) and not lines(tmp_path / "began.txt")


def test_a_key_is_of_everything_that_decides_the_numbers() -> None:
    cell = Cell(run="a:b", scale={"epochs": 3}, options={"rho": 0.1}, seed=0, data="d", label="x")
    same = Cell(run="a:b", scale={"epochs": 3}, options={"rho": 0.1}, seed=0, data="d", label="y")
    assert cell.key == same.key and cell == same
    others = ({"run": "a:c"}, {"scale": {"epochs": 4}}, {"options": {"rho": 0.2}}, {"seed": 1}, {"data": "e"}, {"held_out": True})
    for other in others:
        kept = {"run": "a:b", "scale": {"epochs": 3}, "options": {"rho": 0.1}, "seed": 0, "data": "d"}
        assert Cell(**{**kept, **other}).key != cell.key  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------------ verdicts
def test_intervals_by_the_textbook() -> None:
    assert quantile(9) == pytest.approx(2.262157, abs=1e-6) and quantile(1) == pytest.approx(12.7062, abs=1e-4)
    values = [0.01, 0.02, -0.01, 0.04]
    told = estimate(values)
    std = (sum((d - 0.015) ** 2 for d in values) / 3) ** 0.5
    assert told.mean == pytest.approx(0.015) and told.std == pytest.approx(std) and told.error == pytest.approx(std / 2)
    assert told.low == pytest.approx(0.015 - 3.182446 * std / 2, abs=1e-7)
    assert told.high == pytest.approx(0.015 + 3.182446 * std / 2, abs=1e-7)
    assert told.sentence() == "+1.50 points, standard error 1.04 over 4 seeds: no difference beyond 2 standard errors"
    assert estimate([0.1, 0.11]).sentence().endswith("2 seeds: beyond 2 standard errors")
    assert "no statement" in estimate([0.1]).sentence() and estimate([0.1]).low is None
    with pytest.raises(ValueError):
        estimate([])
    for values, said in (([0.5, math.nan], "nan in place 1 of 2"), ([math.inf, 0.5], "inf in place 0"), ([-math.inf], "-inf in")):
        with pytest.raises(ValueError, match=f"estimate: {said} .*values, must be finite numbers; leave runs without"):
            estimate(values)


def test_chance_of_two_standard_errors() -> None:
    assert chance(3) == pytest.approx(1 - 2 / 6**0.5, abs=1e-5)  # two degrees of freedom: 1 - t / sqrt(2 + t^2)
    assert chance(2) == pytest.approx(1 - 2 / torch.pi * torch.atan(torch.tensor(2.0)).item(), abs=1e-5)


def judged(differences: list[float], **options: float) -> Verdict:
    """Of a - b with these paired differences."""
    values = {"a": dict(enumerate(differences)), "b": dict.fromkeys(range(len(differences)), 0.0)}
    part = found(Contrast(says="a minus b", weights={"a": 1, "b": -1}, **options), values, range(len(differences)))  # type: ignore[arg-type]
    return verdict([part], complete=True)


def test_verdicts_in_closed_form() -> None:
    # Three values m - d, m, m + d: standard error d / sqrt(3), quantile 4.302653; the interval is m +- 2.484 d.
    half = 4.302653 / 3**0.5
    assert judged([1.0, 2.0, 3.0]) is Verdict.UNDECIDED  # 2 - 2.484 < 0
    edge = half + 1e-4
    assert judged([edge - 1, edge, edge + 1]) is Verdict.SHOWS
    assert judged([edge - 1 - 2e-4, edge - 2e-4, edge + 1 - 2e-4]) is Verdict.UNDECIDED
    assert judged([-edge - 1, -edge, -edge + 1]) is Verdict.NOT_HERE
    assert judged([-0.1, 0.0, 0.1]) is Verdict.UNDECIDED
    assert judged([-0.1, 0.0, 0.1], least=0.3) is Verdict.NOT_HERE  # an effect of 0.3 is excluded
    assert judged([-0.1, 0.0, 0.1], above=-0.3) is Verdict.SHOWS  # no worse than by 0.3
    assert judged([0.3, 0.31, 0.29], least=0.5) is Verdict.NOT_HERE  # there, and too small to matter
    assert judged([0.5]) is Verdict.UNDECIDED  # one seed
    assert judged([0.0, 0.0, 0.0]) is Verdict.UNDECIDED


def test_every_judged_contrast_must_show() -> None:
    values = {"a": {0: 1.0, 1: 1.1, 2: 0.9}, "b": {0: 0.0, 1: 0.0, 2: 0.0}, "c": {0: 2.0, 1: 2.0, 2: None}}

    def of(decides: bool = True, **weights: float) -> object:
        return found(Contrast(says="x", weights=weights, decides=decides), values, range(3))

    shows, worse, diverged = of(a=1, b=-1), of(b=1, a=-1), of(c=1, b=-1)
    assert verdict([shows, shows], complete=True) is Verdict.SHOWS  # type: ignore[list-item]
    assert verdict([shows, worse], complete=True) is Verdict.NOT_HERE  # type: ignore[list-item]
    assert verdict([shows, of(False, b=1, a=-1)], complete=True) is Verdict.SHOWS  # type: ignore[list-item]
    assert diverged.missing == 1 and verdict([shows, diverged], complete=True) is Verdict.UNDECIDED  # type: ignore
    assert verdict([shows], complete=False) is Verdict.NOT_RUN and verdict([], complete=True) is Verdict.NOT_RUN  # type: ignore


def test_gaps_by_the_textbook() -> None:
    rows = {"lars/1": [0.7, 0.72, 0.71], "lars/2": [0.6, 0.61, 0.62],
            "conadv/1": [0.7, 0.71, 0.7], "conadv/2": [0.66, 0.68, 0.65],
            "sam/1": [0.7, 0.7, 0.7], "sam/2": [0.6, None, None]}
    values = {arm: dict(enumerate(row)) for arm, row in rows.items()}
    gap = found(Contrast(says="gap", weights={"lars/1": 1, "lars/2": -1}), values, range(3)).estimate
    assert gap is not None and gap.mean == pytest.approx(0.1)
    assert gap.error == pytest.approx((sum((x - 0.1) ** 2 for x in [0.10, 0.11, 0.09]) / 2 / 3) ** 0.5)
    each = [0.06, 0.08, 0.04]  # 0.10 - 0.04, 0.11 - 0.03, 0.09 - 0.05
    weights = {"lars/1": 1, "lars/2": -1, "conadv/1": -1, "conadv/2": 1}
    shrink = found(Contrast(says="shrinks", weights=weights), values, range(3))
    assert shrink.estimate is not None and shrink.estimate.mean == pytest.approx(0.06) and shrink.missing == 0
    assert shrink.estimate.error == pytest.approx((sum((x - 0.06) ** 2 for x in each) / 2 / 3) ** 0.5)
    sam = found(Contrast(says="sam", weights={"sam/1": 1, "sam/2": -1}), values, range(3))
    assert sam.missing == 2 and sam.estimate is not None and (sam.estimate.count, sam.estimate.error) == (1, None)
    assert sam.estimate.mean == pytest.approx(0.1)


# -------------------------------------------------------------------------------------------------------------------- claims
MISSION = {
    "LARS": "lars_large_batch", "LAMB": "lamb_large_batch", "SAM's accuracy": "sam_accuracy", "SAM's flatness": "sam_flatness",
    "ConAdv": "conadv_gap", "StaleSAM": "stale_sam", "IGNITE": "offline_optimisation", "warm start": "warm_start",
    "shrink and perturb": "shrink_perturb", "sparsity in streams": "sparse_isolation", "refresh": "refresh",
    "DER++ > ER > fine-tuning": "rehearsal", "MOS": "mos", "SAME": "same", "UnMix-TNS": "unmix_tns",
    "stability gap": "stability_gap", "two-phase": "two_phase"}


def test_list_tells_every_claim_of_the_mission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["list", f"results={tmp_path}"])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert ended.value.code == 0 and set(rows) == set(claims()) and set(MISSION.values()) <= set(rows)
    for name, row in rows.items():
        assert " not run" in row and claims()[name].paper.ref in row
        assert (f"needs {claims()[name].needs}" in row) == bool(claims()[name].needs)


def test_the_command_leaves_the_signals_of_its_caller(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for words in (["--help"], ["no such command"]):
        with pytest.raises(SystemExit):
            main(words)
        assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_claim_needs_is_not_there_yet() -> None:
    for name, claim in claims().items():
        if claim.needs:
            path, _, part = claim.needs.rpartition(".")
            there = hasattr(importlib.import_module(path), part) or importlib.util.find_spec(claim.needs)
            assert not there, f"{claim.needs} is there now: give {name} arms and a rule"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Nothing to say."""

    gain: float = 0.0


TOY = Claim(
    title="b is better than a", methods=("toy",), paper=PAPER, says="b exceeds a.", protocol="none", scaled="a toy",
    run=ledger_toy.toy, scale=Scale(), seeds=3,
    arms=lambda scale: {"a": Arm(options={"by_seed": [0.1, 0.2, 0.3]}),
                        "b": Arm(options={"by_seed": [0.11, 0.21, 0.3], "value": scale.gain})},
    rule=(Contrast(says="b minus a", weights={"b": 1, "a": -1}),))


def test_a_claim_from_cells_to_report(tmp_path: Path) -> None:
    store = Store(tmp_path)
    plan = Plan.of("toy", TOY, Settings.of(TOY), store)
    assert judge(plan).verdict is Verdict.NOT_RUN and "(0 of 6 cells)" in markdown(judge(plan))
    assert carry_out(plan, jobs=2).ran == 6
    result = json.loads((tmp_path / "toy" / "result.json").read_text())
    assert result["verdict"] == "undecided" and result["done"] == result["of"] == 6
    assert result["contrasts"][0]["estimate"]["mean"] == pytest.approx(0.02 / 3)
    record = result["cells"]["b"]["2"]
    assert record["values"]["accuracy"] == pytest.approx(0.3) and record["versions"]["torch"] and record["seconds"] >= 0
    text = (tmp_path / "toy" / "report.md").read_text()
    assert "**Verdict: undecided**" in text and "| b | 3 | 20.67 | -2.94 to 44.28 |" in text
    assert "| b minus a | 0.67 | 0.33 | -0.77 to 2.10 | 0.00 | 0.00 | undecided |" in text
    assert (tmp_path / "toy" / "figure.png").stat().st_size > 1000
    assert "Other than declared" not in text
    other_seeds = Plan.of("toy", TOY, Settings.of(TOY, {"gain": 0.5}, seeds=4), store)
    assert "- Other than declared: gain=0.5, seeds=4" in markdown(judge(other_seeds))
    assert report._shown(estimate([2.0, 4.0]), 1) == "3 (2 of 3)" and report._shown(estimate([2.0]), 0) == "2"
    better = Plan.of("toy", TOY, Settings.of(TOY, {"gain": 0.5}), store)
    assert carry_out(better, jobs=2).ran == 6  # another scale, other cells
    assert judge(better).verdict is Verdict.SHOWS and judge(plan).verdict is Verdict.UNDECIDED
    worse = replace(TOY, title="a is better than b", rule=(Contrast(says="a minus b", weights={"a": 1, "b": -1}),))
    other = Plan.of("other", worse, Settings.of(worse, {"gain": 0.5}), store)
    assert carry_out(other, jobs=2).ran == 0 and judge(other).verdict is Verdict.NOT_HERE  # another claim, the same cells
    part = Plan.of("toy", TOY, Settings.of(TOY, seeds=2), store)
    assert judge(part).done == 4 and judge(part).verdict is Verdict.NOT_RUN  # fewer seeds than declared
    saved = Plan.saved("toy", TOY, store)
    assert saved is not None and saved.settings == better.settings


LATER = Claim(title="A method that is not there", methods=("Later",), says="It would be better.", protocol="Theirs.",
              paper=Paper(authors="Nobody", year=2026, ref="arXiv 0000.00000", where="table 1"), needs="everbatch.train.Later")


def test_list_and_report_tell_what_was_run(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"new": LATER, "toy": TOY}
    monkeypatch.setattr(command, "claims", lambda: known)
    carry_out(Plan.of("toy", TOY, Settings.of(TOY, {"gain": 0.5}), Store(tmp_path)), jobs=2)
    capsys.readouterr()
    for words in (["list"], ["report"]):
        with pytest.raises(SystemExit) as ended:
            main([*words, f"results={tmp_path}"])
        assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "toy   shows" in told and " 6/6 " in told and "not run: needs everbatch.train.Later" in told
    whole = (tmp_path / "report.md").read_text()
    assert "| [toy](toy/report.md) | shows | b exceeds a. |" in whole
    assert "| new | not run: needs `everbatch.train.Later` |" in whole
    kept = json.loads((tmp_path / "toy" / "settings.json").read_text())
    (tmp_path / "toy" / "settings.json").write_text(json.dumps({**kept, "scale": {"gone": 1}}))
    with pytest.raises(SystemExit) as ended:
        main(["list", f"results={tmp_path}"])
    assert ended.value.code == 0 and "not run since: " in capsys.readouterr().out


def test_options_are_chosen_by_held_out_samples(tmp_path: Path) -> None:
    tuning = Tuning(arms=("b",), option="value", values=(0.5, 0.1, 0.9, 0.2), seeds=2)
    claim = replace(TOY, arms={"a": Arm(), "b": Arm()}, tuning=tuning)
    plan = Plan.of("tuned", claim, Settings.of(claim), Store(tmp_path))
    assert plan.compared() is None and "Tuning is not finished." in markdown(judge(plan))
    assert [cell.held_out for cell in plan.tuning()] == [True] * 8 and {cell.seed for cell in plan.tuning()} == {1000, 1001}
    assert carry_out(plan, jobs=2).ran == 8 + 6
    assert plan.chosen() == {"b": {"value": 0.9}}
    assert [cell.options for cell in plan.compared() or []] == [{}, {"value": 0.9}] * 3
    assert not any(cell.held_out for cell in plan.compared() or [])
    assert "| b | 0.1: 10.00, 0.2: 20.00, 0.5: 50.00, 0.9: 90.00 | 0.9 (an end of the grid) |" in markdown(judge(plan))
    equal = replace(claim, arms={"a": Arm(), "b": Arm(options={"end": "diverge"})})
    plan = Plan.of("equal", equal, Settings.of(equal), Store(tmp_path))
    run_cells(plan.tuning(), plan.store, jobs=2, say=lambda text: None)
    assert plan.chosen() == {"b": {"value": 0.1}}  # the smallest of equals


def test_bad_words_are_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    here, known = f"results={tmp_path}", {**claims(), "new": LATER}
    for module in ("claim", "command"):
        monkeypatch.setattr(f"benchmarks.ledger.{module}.claims", lambda: known)
    for words, said in (
            (["lst"], "did you mean 'list'?"), (["list", "warmstart", here], "mean 'warm_start'?"),
            (["run"], "name a claim"), (["run", "warmstart", here], "mean 'warm_start'?"),
            (["run", "new", here], "everbatch.train.Later"), (["run", "warm_start", "epoch=3", here], "epochs"),
            (["run", "warm_start", "jobs=0", here], "jobs=0"), (["run", "warm_start", "arms=cold", here], "arm 'cold'"),
            (["run", "warm_start", "data=/nowhere", here], "exist"), (["report", "jobs=2"], "option jobs")):
        with pytest.raises(SystemExit) as ended:
            main(words)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and said in error and error.count("\n") == 1, (words, error)


def test_a_claim_is_checked_when_it_is_declared() -> None:
    for change, said in (({"rule": (Contrast(says="x", weights={"c": 1}),)}, "arm 'c'"), ({"scaled": ""}, "smaller here"),
                         ({"rule": ()}, "decides"), ({"needs": "a method"}, "beside run"), ({"seeds": 1}, "seeds=1")):
        with pytest.raises(ValueError, match=said):
            replace(TOY, **change)
