"""What scripts say to --help and to wrong words: one line, and nothing is installed or trained."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from processes import ENVIRONMENT, ROOT


def said(*command: str | Path, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], cwd=cwd, env={**os.environ, **ENVIRONMENT, **more}, text=True,
                          capture_output=True, timeout=120)


@pytest.mark.parametrize("name", ["test.sh", "quickstart.sh", "torchrun.sh", "slurm.sbatch"])
def test_help_of_a_launch_script_does_nothing_else(name: str, tmp_path: Path) -> None:
    """With an interpreter that would leave a mark wherever it is called."""
    for tool in ("python", "python3"):
        (tmp_path / tool).write_text(f"#!/bin/sh\ntouch {tmp_path}/called\nexit 1\n")
        (tmp_path / tool).chmod(0o755)
    done = said("bash", ROOT / "launch" / name, "--help", cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}",
                VIRTUAL_ENV=str(tmp_path))
    assert done.returncode == 0 and done.stderr == "" and not (tmp_path / "called").exists()
    assert len(done.stdout.splitlines()) <= 12 and done.stdout[0] != "#"


STUB = """#!/bin/sh
case "$*" in
    *"import torch, everbatch"*) [ "{has}" ] || { echo Traceback >&2; echo "ModuleNotFoundError: torch" >&2; exit 1; } ;;
    *device_count*) echo 2 ;;
    *launch/start.py*) echo "started by $0" ;;
esac
"""


def stub(path: Path, has: bool) -> None:
    """A python that says whether it has what a run needs, and nothing else."""
    path.parent.mkdir(parents=True)
    path.write_text(STUB.replace("{has}", "yes" if has else ""))
    path.chmod(0o755)


@pytest.mark.parametrize(("own", "on_path", "active"), [
    (None, True, False), (False, True, False), (True, False, False), (None, False, False), (False, False, False),
    (True, False, True)], ids=["path", "empty-venv", "venv", "none", "none-venv", "active-without"])
def test_a_script_that_starts_runs_finds_python_and_makes_none(
        tmp_path: Path, own: bool | None, on_path: bool, active: bool) -> None:
    root, elsewhere = tmp_path / "checkout", tmp_path / "bin" / "python"
    venv = root / ".venv" / "bin" / "python"
    shutil.copytree(ROOT / "launch", root / "launch")
    stub(elsewhere, on_path)
    (elsewhere.parent / "python3").symlink_to(elsewhere)
    if own is not None:
        stub(venv, own)
    done = said("bash", root / "launch" / "torchrun.sh", "recipe.py", cwd=tmp_path, PATH=f"{elsewhere.parent}:/usr/bin:/bin",
                VIRTUAL_ENV=str(tmp_path) if active else "", CONDA_DEFAULT_ENV="", PYTHON3="")
    if on_path or (own and not active):
        assert (done.returncode, done.stdout, done.stderr) == (0, f"started by {elsewhere if on_path else venv}\n", "")
    else:
        named = elsewhere if own is None or active else venv
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "(ModuleNotFoundError: torch)" in done.stderr
        assert f"run {named} -m pip install -e '{root}[vision,plot,deepspeed]'" in done.stderr
    assert venv.exists() == (own is not None)


@pytest.mark.parametrize(("words", "text"), [
    (["SAMM"], "did you mean 'SAM'?"), (["SAM", "base=sgdd"], "known: ASGD"), (["SAM", "rhoo=1"], "did you mean 'rho'?"),
    (["SAM", "lr=x"], "given: lr='x'"), (["SAM", "rho=-1"], "rho=-1, must be a finite number >= 0"),
    (["SAM", "rho=__import__('os')"], "must be a finite number")])
def test_wrong_words_for_one_method_are_one_line(words: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sys.path.insert(0, str(ROOT / "recipes"))
    try:
        import one_method  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(ROOT / "recipes"))
    with pytest.raises(ValueError) as caught:
        one_method.main(*words)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert "python recipes/one_method.py SAM rho=0.1" in one_method.usage() and "mixins: AGEM, ASAM" in one_method.usage()


@pytest.mark.rotated(1, 4)
def test_one_method_explains_itself(tmp_path: Path) -> None:
    done = said(sys.executable, ROOT / "recipes" / "one_method.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and "mixins: AGEM, ASAM, ClipGradNorm" in done.stdout


def test_an_error_of_another_library_is_one_line(tmp_path: Path) -> None:
    package = tmp_path / "site-packages"
    package.mkdir()
    (package / "another.py").write_text("def use(x):\n    assert x > 0, 'x was\\nnegative'\n")
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom everbatch.ends import guard\nfrom another import use\n"
                      "with guard('demo'):\n    use(-1) if len(sys.argv) < 2 else {}[sys.argv[1]]\n")
    done = said(sys.executable, script, cwd=tmp_path, PYTHONPATH=f"{ROOT / 'lib'}:{package}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("demo: rank 0: AssertionError: x was (in ")
    assert "another.py:2; EVERBATCH_TRACEBACK=1" in done.stderr
    (package / "another.py").write_text("def use(x):\n    raise ValueError('1 error for Config\\nsize\\n  no integer\\n')\n")
    many = said(sys.executable, script, cwd=tmp_path, PYTHONPATH=f"{ROOT / 'lib'}:{package}")
    assert many.returncode == 1 and many.stderr == "demo: rank 0: 1 error for Config; size; no integer\n"
    ours = said(sys.executable, script, "mine", cwd=tmp_path, PYTHONPATH=f"{ROOT / 'lib'}:{package}")
    assert ours.returncode == 1 and "Traceback" in ours.stderr and "KeyError: 'mine'" in ours.stderr
