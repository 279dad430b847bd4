"""CONTRIBUTING's examples are true: added to a copy of the package, a file and a line are all that a method takes."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from processes import ROOT
from rotation import When

COPIED = ("lib", "launch", "recipes", "tests", "README.md")
TABLE = "lib/everbatch/methods.py"
WRITTEN = ["README.md", "lib/everbatch/optim/__init__.py", "lib/everbatch/train/__init__.py"]
"""By launch/methods.py."""
MOST = 40
"""Lines of an example, blank ones counted."""
FEW, ALL = ("ddp", "zero2"), ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")


def blocks() -> list[tuple[str, str]]:
    """The examples: (path or "a line ...", contents)."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.findall(r"^```python\n# (.*?)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert len(found) == 4
    assert all(body.count("\n") <= MOST for _, body in found), [(title, body.count("\n")) for title, body in found]
    return found


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout with both examples added, a file and a line each."""
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.npz", "assets"))
        else:
            shutil.copy(source, folder / name)
    before = contents(folder)
    lines = (folder / TABLE).read_text().splitlines()
    for title, body in blocks():
        if title.startswith("lib/"):
            (folder / title).write_text(body)
            continue
        assert body.count("\n") == 1 and title == f"a line of TABLE in {TABLE}"
        at = next(i for i, line in enumerate(lines) if line.startswith("TABLE"))
        lines.insert(at + 1, body.rstrip("\n"))
    (folder / TABLE).write_text("\n".join(lines) + "\n")
    touched = changed(before, contents(folder))
    print(f"\nfiles that two methods touch: {touched}")
    assert touched == sorted([TABLE, *(title for title, _ in blocks() if title.startswith("lib/"))])
    assert len((folder / TABLE).read_text().splitlines()) == len((ROOT / TABLE).read_text().splitlines()) + 2
    return folder


@pytest.fixture(scope="module")
def forked(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A process with the copy's package imported, from which the copy's own jobs are forked."""
    spec = importlib.util.spec_from_file_location("copied_processes", copy / "tests" / "processes.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["copied_processes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.Zygote(tmp_path_factory.mktemp("forked"))
    yield made
    made.close()


@pytest.mark.distributed
@pytest.mark.parametrize("hosts", [When(1, 4).param(FEW, id="few"), When(0, 2, slow=True).param(ALL, id="all")])
def test_a_file_and_a_line_are_all(copy: Path, forked: Any, tmp_path: Path, hosts: tuple[str, ...]) -> None:
    before = contents(copy)
    todo = copy / "tests" / "distributed" / "jobs.py"
    alone = ["told:gradient_noise", "told:confidence", "case:GradientNoise/plain", "method:confidence/plain"]
    two = [job.format(host) for job in ("case:GradientNoise/{}", "method:confidence/{}") for host in hosts]
    found = forked.found(todo, tmp_path / "1.json", str(tmp_path), *alone, ranks=1, limit=120)
    found |= forked.found(todo, tmp_path / "2.json", str(tmp_path), *two, ranks=2, limit=240)
    bad = {key: value["problem"] for key, value in found.items() if not value["passed"]}
    assert bad == {}
    asked = ("package", "option", "command", "search")
    told = {f"told/{key}/{what}" for key in ("gradient_noise", "confidence") for what in asked}
    assert {key for key in found if key.startswith("told/")} == {*told, "told/gradient_noise/plain loop"}
    assert len([key for key in found if "GradientNoise" in key]) == 4 * 2 * (1 + len(hosts))  # checks, bases, hosts
    assert len([key for key in found if key.endswith("/confidence")]) == 3 + 4 * len(hosts)
    assert changed(before, contents(copy)) == []


@pytest.mark.rotated(3, 4)
def test_the_written_blocks_are_all_that_a_command_changes(copy: Path) -> None:
    before = contents(copy)
    code = ("import sys; sys.path.insert(0, 'launch'); import methods\n"
            "print([methods.main(check) for check in (True, False, True)])")
    ended = subprocess.run([sys.executable, "-B", "-c", code], cwd=copy, timeout=100, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.splitlines()[-1] == "[1, 0, 0]", ended  # old, written, new
    assert changed(before, contents(copy)) == WRITTEN
    assert "| `GradientNoise` | optimizer mixin | Add noise to the gradient" in (copy / "README.md").read_text()
    line = "    from everbatch.train.confidence import ConfidencePenalty as ConfidencePenalty\n"
    assert line in (copy / WRITTEN[2]).read_text()
