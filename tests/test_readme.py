"""The README is true: its blocks run, its commands parse, its files and names exist, its output is what a run prints."""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from benchmarks.ledger.claim import find
from benchmarks.ledger.command import split
from benchmarks.ledger.plan import Settings

import everbatch.optim
import everbatch.train
from everbatch import config
from processes import ENVIRONMENT, ROOT, Zygote, torchrun
from rotation import When

TEXT = (ROOT / "README.md").read_text()
SAID = {"opt.describe()": "SharpSGD = ClipGradNorm > SAM > SGD on plain, 1 rank", "samples kept after": "samples kept after"}
"""What a block that has this in it prints."""
ONE_AFTER_THE_OTHER = "import runpy, sys; [runpy.run_path(path, run_name='__main__') for path in sys.argv[1:]]"


def blocks(language: str) -> list[str]:
    """Contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


PYTHON = {ranks: [b for b in blocks("python") if b.startswith("# torchrun") == ranks] for ranks in (False, True)}
COMMANDS = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]


def recipe(path: Path) -> ModuleType:
    """A recipe as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # where dataclasses look annotations up
    spec.loader.exec_module(module)
    return module


def write(folder: Path, sources: list[str]) -> list[Path]:
    paths = [folder / f"block_{i}.py" for i in range(len(sources))]
    for path, source in zip(paths, sources, strict=True):
        path.write_text(source)
    return paths


@pytest.mark.parametrize("quarter", [When(i, 4).param(i) for i in range(4)])
def test_blocks_of_one_process_run(quarter: int, tmp_path: Path) -> None:
    sources = PYTHON[False][quarter::4]
    paths = write(tmp_path, sources)
    assert len(PYTHON[False]) >= 4
    ended = subprocess.run([sys.executable, "-W", "error", "-c", ONE_AFTER_THE_OTHER, *map(str, paths)], cwd=tmp_path,
                           env={**os.environ, **ENVIRONMENT}, text=True, capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for source in sources:
        for mark, said in SAID.items():
            assert mark not in source or said in ended.stdout
        assert "runs/own/model.safetensors" not in source or (tmp_path / "runs" / "own" / "model.safetensors").is_file()


def test_there_are_blocks_that_say_something() -> None:
    for mark in (*SAID, "runs/own/model.safetensors"):
        assert any(mark in source for source in PYTHON[False]), mark


@pytest.mark.distributed
def test_blocks_of_several_ranks_run(tmp_path: Path, zygote: Zygote) -> None:
    paths = write(tmp_path, PYTHON[True])
    assert paths
    for path in paths:
        job = zygote.run(path, ranks=2, limit=200.0)
        assert job.codes == [0, 0], job.err[-3000:]
        losses = [float(x) for x in re.findall(r"\[([\d., ]+)\]\n", job.out)[0].split(", ")]
        assert len(losses) == 5 and losses[-1] < losses[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists_and_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program = words[0]
    if program == "bash":
        assert subprocess.run(["bash", "-n", ROOT / words[1]]).returncode == 0
    elif words[:3] == ["python", "-m", "benchmarks"]:
        assert words[3] in ("list", "run", "report")
        asked = dict(word.split("=", 1) for word in words[4:] if "=" in word)
        for name in (word for word in words[4:] if "=" not in word):
            Settings.of(find(name), split(asked)[1])
    elif program == "python":
        assert (ROOT / words[1]).is_file()
    elif program == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        extras = words[-1].removeprefix(".[").removesuffix("]").split(",")
        assert set(extras) <= set(setup["options.extras_require"])
    else:
        assert program == "torchrun"
        at = next(i for i, word in enumerate(words) if word.startswith("recipes/"))
        path, options = ROOT / words[at], words[at + 1 :]
        with pytest.raises(SystemExit) as stop:
            config.parse(recipe(path).Recipe, [*options, "--print-config"], default_yaml=path.with_suffix(".yaml"))
        assert stop.value.code == 0, capsys.readouterr().err


def test_files_and_names_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    named = re.findall(r"`((?:launch|recipes|tests)/[\w./-]+)`", TEXT)
    missing = [path for path in links + named if not (ROOT / path).exists()]
    assert links and named and not missing
    for path in (ROOT / "recipes" / "assets").iterdir():
        assert path.relative_to(ROOT).as_posix() in links and path.stat().st_size < 60_000
    rows = re.findall(r"^\| `(\w+)` \| (optimizer|trainer) mixin", TEXT, flags=re.MULTILINE)
    home = {"optimizer": everbatch.optim, "trainer": everbatch.train}
    assert rows and all(name in home[kind].__all__ for name, kind in rows)


def test_kubernetes_job_speaks_the_launchers_language() -> None:
    """What the manifest sets is what launch/torchrun.sh reads; nothing here can run it."""
    import yaml

    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    container = job["spec"]["template"]["spec"]["containers"][0]
    read = (ROOT / "launch" / "torchrun.sh").read_text()
    assert all(f"${{{entry['name']}:-" in read for entry in container["env"]) and "${NODE_RANK:-" in read
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert values["NNODES"] == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])
    name, subdomain = job["metadata"]["name"], job["spec"]["template"]["spec"]["subdomain"]
    assert values["MASTER_ADDR"] == f"{name}-0.{subdomain}" and subdomain == service["metadata"]["name"]
    assert (ROOT / container["args"][0]).is_file()


@pytest.mark.slow
@pytest.mark.rotated(0, 2)
@pytest.mark.distributed
def test_main_job_prints_what_the_readme_shows(tmp_path: Path) -> None:
    """The same lines and, on another processor, whose sums round otherwise, the same figures within three points."""
    shown = re.search(r"<!-- output:class_incremental -->\n```text\n(.*?)```", TEXT, flags=re.DOTALL)
    assert shown is not None
    job = torchrun(2, ROOT / "recipes" / "class_incremental.py", f"output={tmp_path}", limit=400.0)
    assert job.codes == [0], job.err[-3000:]
    lines = [line for line in job.out.splitlines() if re.match(r"after task|[a-z ]+  +[-\d]", line)]
    wanted, figure = shown[1].splitlines(), r"-?\d+\.\d+"
    got, want = ([re.sub(figure, "#", line).split() for line in page] for page in (lines, wanted))
    assert got == want
    pairs = zip(re.findall(figure, "\n".join(lines[5:])), re.findall(figure, "\n".join(wanted[5:])), strict=True)
    assert all(abs(float(x) - float(y)) <= 3.0 for x, y in pairs)
