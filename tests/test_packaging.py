"""The installation: what an import costs and pulls in, one version, and a complete package."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import everbatch
from everbatch.cli import main

ROOT = Path(__file__).parents[1]
EXTRAS = ("deepspeed", "ray", "timm", "torchvision", "sklearn", "matplotlib", "tensorboard")


FRESH = """
import json, os, sys, traceback, torch
for line in sys.stdin:
    out, into = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(into, 1)
        try:
            exec(json.loads(line), {"__name__": "__main__"})
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(into)
    with os.fdopen(out) as said:
        text = said.read()
    print(json.dumps([os.waitpid(pid, 0)[1], text]), flush=True)
"""
"""An interpreter with torch and nothing of ours in it, whose fork runs each line's code: torch takes seconds to import."""


@pytest.fixture(scope="module")
def python() -> Iterator[Callable[[str], str]]:
    """What a new interpreter prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", FRESH], text=True, env=environment, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as fresh:
        assert fresh.stdin is not None and fresh.stdout is not None

        def run(code: str) -> str:
            fresh.stdin.write(json.dumps(code) + "\n")
            fresh.stdin.flush()
            status, text = json.loads(fresh.stdout.readline())
            assert status == 0, code
            return str(text)

        yield run
        fresh.stdin.close()


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_import_pulls_in_no_extra(python: Callable[[str], str]) -> None:
    code = f"import sys; from everbatch import compose, Trainer; print([m for m in {EXTRAS} if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_import_is_cheap_beyond_torch(python: Callable[[str], str]) -> None:
    code = "import torch, time; start = time.process_time(); import everbatch; print(time.process_time() - start)"
    assert min(float(python(code)) for _ in range(3)) <= 0.3


def test_import_needs_nothing_that_only_posix_has(python: Callable[[str], str]) -> None:
    """There is no Windows here: these are the names that this package uses and Windows lacks."""
    code = """
        import os, signal, torch
        for name in ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP"):
            delattr(signal, name)
        for name in ("register_at_fork", "sched_setaffinity", "sched_getaffinity", "fork", "killpg", "getpgid", "O_DIRECTORY"):
            delattr(os, name)
        import everbatch, everbatch.data, everbatch.nn, everbatch.optim, everbatch.train
        from everbatch.train.signals import StopOnSignal
        print([int(s) for s in StopOnSignal.SIGNALS])
    """
    assert python(textwrap.dedent(code)) == "[15]\n"


def test_compose_is_the_function_whatever_was_imported_before(python: Callable[[str], str]) -> None:
    assert python("import everbatch.contract; from everbatch import compose; print(callable(compose))") == "True\n"
    assert python("from everbatch import compose; from everbatch.composition import compose as c; print(c is compose)") == (
        "True\n")


def test_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(everbatch, "nonsense")
    assert {"compose", "Trainer", "__version__"} <= set(dir(everbatch))


def test_one_version() -> None:
    assert setup()["metadata"]["version"] == everbatch.__version__
    assert f"## {everbatch.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_extras_are_complete() -> None:
    extras = setup()["options.extras_require"]
    assert {"vision", "plot", "deepspeed", "tune", "test", "all"} <= set(extras)
    everything = {line for line in extras["all"].split() if line}
    assert everything == {f"everbatch[{name}]" for name in extras if name != "all"}


def test_every_folder_of_the_package_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "lib" / "everbatch").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
    assert (ROOT / "lib" / "everbatch" / "py.typed").exists()


def test_console_script(capsys) -> None:  # type: ignore[no-untyped-def]
    assert main(["versions"]) == 0
    assert f"everbatch      {everbatch.__version__}" in capsys.readouterr().out
    assert setup()["options.entry_points"]["console_scripts"].strip() == "everbatch = everbatch.cli:main"


def test_scripts_are_valid_bash() -> None:
    scripts = [*sorted((ROOT / "launch").glob("*.s*")), ROOT / ".ci" / "run"]
    assert len(scripts) >= 6
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
