"""What one rank is given and the others are not: an error of one line on all of them within seconds, never a wait."""

from __future__ import annotations

from pathlib import Path

import pytest

from processes import ROOT, Zygote, torchrun
from rotation import When

pytestmark = pytest.mark.distributed
RECIPE = ROOT / "recipes" / "class_incremental.py"
SHORT = ("tasks=2", "trainer.epochs=1", "data.augment=none", "engine.kind=ddp")

WRAPPER = """
import os, runpy, sys
if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        {change}
    sys.argv[0] = {recipe!r}
    runpy.run_path({recipe!r}, run_name="__main__")
"""

ARGUMENTS = {
    "resume": (["resume=true"], "options: resume is False on rank 0 and True on rank [1], must be the same on every rank"),
    "dry run": (["dry_run=true"], "options: dry_run is False on rank 0 and True on rank [1]"),
    "folder": (["output=/tmp/elsewhere"], "options: output is "),
    "tasks": (["tasks=5"], "options: tasks is 2 on rank 0 and 5 on rank [1]"),
    "method": (["replay=null"], "options: replay is "),
    "optimizer": (["optimizer.sam={}"], "classes is "),
    "unknown option": (["trainer.epoch=2"], "rank 1: unknown key 'trainer.epoch'"),
}
FAST = ("resume", "unknown option")


@pytest.mark.parametrize("case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in ARGUMENTS])
def test_arguments(zygote: Zygote, tmp_path: Path, case: str) -> None:
    other, text = ARGUMENTS[case]
    job = zygote.run(RECIPE, *SHORT, f"output={tmp_path / 'run'}", rank_arguments={1: other}, limit=60)
    assert all(job.codes) and job.seconds < 30, job
    lines = [line for line in job.err.splitlines() if line.startswith("class_incremental:")]
    assert len(lines) == 1 and text in lines[0] and "Traceback" not in job.err, job.err
    assert not list((tmp_path / "run").glob("[!.]*")) and not Path("/tmp/elsewhere").exists()


ENVIRONMENTS = {
    "restart count": ("os.environ['TORCHELASTIC_RESTART_COUNT'] = '1'", "rank 0 was started again 0 times and rank 1 1 times"),
    "own disk": ("os.makedirs('own', exist_ok=True); os.chdir('own')", "does not find it there, must be one folder on a disk"),
}


@pytest.mark.parametrize("case", ["restart count", pytest.param("own disk", marks=pytest.mark.slow)])
def test_environment_and_disk(zygote: Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    change, text = ENVIRONMENTS[case]
    script = tmp_path / "wrapped.py"
    script.write_text(WRAPPER.format(change=f"os.chdir({str(tmp_path)!r}); {change}", recipe=str(RECIPE)))
    output = "run" if case == "own disk" else tmp_path / "run"
    try:
        job = zygote.run(script, *SHORT, f"output={output}", limit=60)
    finally:
        if case == "own disk" and (ROOT / "run").is_dir():
            (ROOT / "run" / ".owner").unlink(missing_ok=True)
            (ROOT / "run").rmdir()
    assert all(job.codes) and job.seconds < 40, job
    lines = [line for line in job.err.splitlines() if line.startswith("class_incremental:")]
    assert len(lines) == 1 and text in lines[0] and "Traceback" not in job.err, job.err


@pytest.mark.slow
def test_a_requeued_job_of_which_one_node_knows(tmp_path: Path) -> None:
    """All resume then, or begin anew together."""
    script = tmp_path / "wrapped.py"
    script.write_text(WRAPPER.format(change="os.environ['SLURM_RESTART_COUNT'] = '1'", recipe=str(RECIPE)))
    for said in ("nothing to resume", "this run has ended already"):
        job = torchrun(2, script, *SHORT, f"output={tmp_path / 'run'}", limit=120)
        assert job.codes == [0] and said in job.out, job


WRONG = ("--help", "trainer.epoch=2", "data.source=imagefolder:/nowhere", "resume=true")


@pytest.mark.slow
@pytest.mark.parametrize("words", [When(i, 4).param([word]) for i, word in enumerate(WRONG)])
def test_under_the_real_launcher(tmp_path: Path, words: list[str]) -> None:
    script = tmp_path / "wrapped.py"
    script.write_text(WRAPPER.format(change=f"sys.argv += {words!r}", recipe=str(RECIPE)))
    job = torchrun(2, script, *SHORT, f"output={tmp_path / 'run'}", limit=90)
    assert job.codes == [1] and job.seconds < 60, job
    said = [line for line in job.err.splitlines() if line.startswith("class_incremental:")]
    assert len(said) == 1, job.err
