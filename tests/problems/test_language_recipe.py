"""recipes/language.py, as its docstring says: on one process, and with the same perplexities on two ranks of every engine."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys

import pytest

from processes import ENVIRONMENT, ROOT, torchrun
from rotation import When

pytest.importorskip("transformers")

RECIPE = ROOT / "recipes" / "language.py"
SMALL = ("--epochs", "1", "--rows", "150")
Found = dict[tuple[str, str], list[float]]


def perplexities(out: str) -> Found:
    """Of every task so far, by method and the task after which."""
    lines = re.findall(r"^(\w+) +after (\w+) +perplexity(.*)$", out, flags=re.MULTILINE)
    return {(method, task): [float(x) for x in re.findall(r"\d+\.\d+", rest)] for method, task, rest in lines}


def on_one_process(*arguments: str) -> Found:
    done = subprocess.run([sys.executable, "-W", "error", str(RECIPE), *arguments], cwd=ROOT, timeout=300, text=True,
                          capture_output=True, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stderr[-3000:]
    return perplexities(done.stdout)


def test_it_learns_each_text_and_rehearsal_keeps_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["language.py", *SMALL])
    runpy.run_path(str(RECIPE))["main"]()
    found = perplexities(capsys.readouterr().out)
    assert [len(row) for row in found.values()] == [1, 2, 3] * 2
    for method in ("none", "er"):
        assert all(row[-1] < 128 for (name, _), row in found.items() if name == method)  # of 256 at the start
    assert found["er", "licences"][0] < found["none", "licences"][0] - 0.5


ENGINES = ("ddp", "zero2", "zero3", "fsdp2")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", [When(i, 4).param(engine) for i, engine in enumerate(ENGINES)])
def test_whole_runs_agree_on_every_engine(engine: str) -> None:
    one = on_one_process(*SMALL, "--methods", "er")
    job = torchrun(2, RECIPE, *SMALL, "--methods", "er", "--engine", engine, limit=300)
    assert job.codes == [0], job.err[-3000:]
    found = perplexities(job.out)
    assert found.keys() == one.keys() and len(one) == 3
    for key, row in one.items():
        assert found[key] == pytest.approx(row, abs=1e-3), (engine, key)
