"""The example recipes, run as their docstrings say; what they print is what they claim."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest

from processes import ENVIRONMENT, ROOT, Zygote

RECIPES = ROOT / "recipes"


def python(name: str) -> str:
    """What a recipe prints in one process, where warnings are errors."""
    ended = subprocess.run([sys.executable, "-W", "error", str(RECIPES / name)], cwd=ROOT, timeout=300, text=True,
                           capture_output=True, env={**os.environ, **ENVIRONMENT})
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def ranks(zygote: Zygote, name: str) -> str:
    """What a recipe prints on two ranks."""
    job = zygote.run(RECIPES / name, ranks=2, limit=300.0)
    assert job.codes == [0, 0], job.err[-3000:]
    return job.out


def losses(out: str) -> list[float]:
    return [float(x) for x in re.findall(r"^epoch \d+: loss ([\d.]+), norm", out, flags=re.MULTILINE)]


def accuracy(out: str) -> float:
    found = re.search(r"^test accuracy ([\d.]+) %", out, flags=re.MULTILINE)
    assert found is not None, out
    return float(found[1])


@pytest.fixture(scope="module")
def plain() -> str:
    return python("own_loop.py")


@pytest.mark.rotated(0, 4)
def test_own_loop_learns_the_digits(plain: str) -> None:
    assert "SharpSGD = ClipGradNorm > SAM > SGD on plain, 1 rank" in plain and "passes per step    2" in plain
    assert len(losses(plain)) == 4 and accuracy(plain) > 90.0


def test_own_loop_is_short() -> None:
    tree = ast.parse((RECIPES / "own_loop.py").read_text())
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    statements = [node for node in ast.walk(main) if isinstance(node, ast.stmt) and node is not main]
    assert len(statements) - 1 <= 15  # without the docstring


@pytest.mark.distributed
@pytest.mark.rotated(1, 4)
@pytest.mark.parametrize(("name", "host"), [("own_loop.py", "DDP, 2 ranks"),
                                            ("own_deepspeed.py", "ZeRO stage 2 (fp32), 2 ranks")])
def test_other_engines_take_the_same_steps(plain: str, zygote: Zygote, name: str, host: str) -> None:
    """Same weights, same global batches, so the same losses: to rounding, which twenty steps of SAM have let grow."""
    test_own_loop_learns_the_digits(plain)  # in this round it is not run alone
    out = ranks(zygote, name)
    assert f"on {host}" in out
    assert abs(losses(out)[0] - losses(plain)[0]) <= 1e-3  # at a loss of 2.1, printed with four digits
    assert len(losses(out)) == 4 and accuracy(out) > 90.0


@pytest.mark.rotated(2, 4)
def test_replay_in_a_trainer_of_ones_own() -> None:
    """Fine-tuning forgets the first task, the same trainer with replay does not."""
    matrix: dict[str, list[list[float]]] = {"MyTrainer": [], "Mine": []}
    for name, row in re.findall(r"^(\w+) +accuracy by task, %: +(.*)$", python("own_trainer.py"), flags=re.MULTILINE):
        matrix[name].append(list(map(float, row.split())))
    assert [len(row) for row in matrix["Mine"]] == [len(row) for row in matrix["MyTrainer"]] == [1, 2, 3]
    assert matrix["MyTrainer"][0][0] > 90.0 and matrix["Mine"][0][0] > 90.0
    assert matrix["Mine"][2][0] > matrix["MyTrainer"][2][0] + 50.0
    assert sum(matrix["Mine"][2]) / 3 > sum(matrix["MyTrainer"][2]) / 3 + 25.0


@pytest.mark.slow
def test_osft_keeps_more_of_the_first_task_at_an_equal_loss_of_the_second() -> None:
    """Measured with seeds 0, 1 and 2: plain 44.4, 68.9, 40.9 %; weight 71.1, 88.9, 79.1 %; factor 80.4, 77.8, 84.9 %."""
    lines = re.findall(r"^(\S.*?)  +second task: loss ([\d.]+), ([\d.]+) %; first task: ([\d.]+) %$",
                       python("fine_tuning.py"), flags=re.MULTILINE)
    found = {name: tuple(map(float, numbers)) for name, *numbers in lines}
    assert found.keys() == {"plain", "OSFT, weight", "OSFT, factor"}
    for loss, second, _ in found.values():
        assert loss <= 0.1 and second > 85.0
    assert min(found["OSFT, weight"][2], found["OSFT, factor"][2]) > found["plain"][2] + 5.0


@pytest.mark.slow
def test_grip_leaves_routing_unchanged_through_two_requests_to_forget() -> None:
    """Measured with seeds 0, 1 and 2, both requests: plain 87 to 94 % unchanged, GRIP 97.6 to 98.5 %."""
    lines = re.findall(r"^ *(\w+), class \d forgotten: routing unchanged ([\d.]+) %, accuracy of .*?\] ([\d.]+) %, of the others "
                       r"([\d.]+) %$", python("unlearning.py"), flags=re.MULTILINE)
    found = [(name, *map(float, numbers)) for name, *numbers in lines]
    assert [name for name, *_ in found] == ["plain", "plain", "GRIP", "GRIP"]
    assert all(forgotten < 15.0 for _, _, forgotten, _ in found)
    plain, held = ([row for row in found if row[0] == name] for name in ("plain", "GRIP"))
    assert min(row[1] for row in held) > 95.0 > min(row[1] for row in plain)
    assert held[-1][3] > 70.0
