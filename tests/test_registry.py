"""One table of methods: complete, read by everything that lists methods, and the only place that knows them all."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import everbatch.optim
import everbatch.train
from everbatch import cli, config, methods
from everbatch.contract import Made, Range
from everbatch.experiment.data import Data
from everbatch.experiment.options import Parts
from everbatch.optim import OptimizerMixin
from everbatch.train import TrainerMixin
from rotation import When

ROOT = Path(__file__).parents[1]
LIB = ROOT / "lib" / "everbatch"


def generator() -> Any:
    """The command that writes what is made of the table."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "launch" / "methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("key", methods.TABLE)
def test_every_method_declares_what_is_made_of_it(key: str) -> None:
    part: Any = methods.load(key)
    lacking = [name for name in ("Config", "example", "off", "search") if name not in vars(part)]
    assert not lacking, f"{part.__name__} declares no {' and no '.join(lacking)}"
    fact = methods.facts(key)
    assert fact.does and fact.cost and fact.source, f"{part.__name__}'s docstring lacks a first line, Cost: or Source:: {fact}"
    assert part.called_by in ("", *methods.trainer_mixins()), part.called_by
    assert all(hasattr(Data(), source) for source in part.from_data.values() if source)
    known = {item.name for item in dataclasses.fields(part.Config)}
    assert set(part.from_data) | set(part.search) <= known
    for name, values in part.search.items():
        assert isinstance(values, Range) or values, name
        for value in (values.low, values.high) if isinstance(values, Range) else values:
            part.Config(**{name: value})
    for declared in (part.example, part.off):
        if not isinstance(declared, Made):
            part.Config(**declared)


def test_the_table_is_complete() -> None:
    """Every part of the package is in it, but for those of an experiment, which measure and change nothing, and the head that
    `model.head=growing` grows: no method of its own, and nothing without a model in parts."""
    found = {name for path in LIB.rglob("*.py") if "experiment" not in path.parts
             for name in re.findall(r"^class (\w+)\((?:OptimizerMixin|TrainerMixin)\)", path.read_text(), flags=re.MULTILINE)}
    found.remove("GrowingHead")
    assert found == {path.split(":")[1] for path in methods.TABLE.values()} and len(found) == len(methods.TABLE)
    for family, root in ((methods.optimizer_mixins(), OptimizerMixin), (methods.trainer_mixins(), TrainerMixin)):
        assert family and all(issubclass(part, root) for part in family.values())
    assert {*methods.optimizer_mixins(), *methods.trainer_mixins()} == set(methods.TABLE)
    with pytest.raises(ValueError, match=r"methods: 'lok_sam', must be a key of the table; did you mean 'look_sam'\?"):
        methods.load("lok_sam")


def test_what_is_written_from_the_table_is_new(capsys: pytest.CaptureFixture[str]) -> None:
    assert generator().main(check=True) == 0, capsys.readouterr().out


def test_the_check_sees_a_block_that_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    made = generator()
    monkeypatch.setitem(methods.TABLE, "again", methods.TABLE["sam"])
    text = (ROOT / "README.md").read_text()
    assert made.written("README.md", text).count("| `SAM` |") == 2 and text.count("| `SAM` |") == 1


@pytest.mark.parametrize("package", [everbatch.optim, everbatch.train])
def test_a_package_gives_its_methods_when_asked(package: Any) -> None:
    for name, key in methods.names(package.__name__).items():
        assert getattr(package, name) is methods.load(key) and name in package.__all__ and name in dir(package)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'Nothing'"):
        _ = package.Nothing


def test_a_method_is_imported_when_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "__init__.py").write_text("from everbatch import methods\n__getattr__ = methods.lazily(__name__)\n")
    (tmp_path / "room" / "chair.py").write_text("class Chair: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(methods.TABLE, "chair", "room.chair:Chair")
    room: Any = importlib.import_module("room")
    assert "room.chair" not in sys.modules
    assert room.Chair is sys.modules["room.chair"].Chair and "Chair" in vars(room)
    for name in ("room", "room.chair"):
        monkeypatch.delitem(sys.modules, name)
    for package in ("optim", "train"):  # and nothing else in the package's own file imports one
        text = unwritten(LIB / package / "__init__.py")
        assert [path for path in methods.TABLE.values() if re.search(rf"\b{path.split(':')[1]}\b", text)] == []


@functools.cache
def unwritten(path: Path) -> str:
    """A file without the block that launch/methods.py writes."""
    return re.sub(r"# <methods>.*?# </methods>", "", path.read_text(), flags=re.DOTALL)


def places(key: str) -> Iterator[str]:
    """Lines of the package, outside a method's own file, the table and generated blocks, with its class or its key in quotes."""
    module, name = methods.TABLE[key].split(":")
    own = LIB.joinpath(*module.split(".")[1:]).with_suffix(".py")
    word = re.compile(rf"\b{name}\b|[\"']{key}[\"']")
    for path in sorted(LIB.rglob("*.py")):
        if path in (own, LIB / "methods.py"):
            continue
        text = unwritten(path)
        for line in text.splitlines() if name in text or key in text else ():
            if (name in line or key in line) and word.search(line):
                yield f"{path.relative_to(LIB)}: {line.strip()}"


def test_a_method_is_named_in_its_file_and_in_the_table_alone() -> None:
    counts = {key: len(list(places(key))) for key in methods.TABLE}
    print("\nlines of lib that name a method outside its file and the table:")
    print(" ".join(f"{key}={count}" for key, count in counts.items()))
    assert [place for key in ("look_sam", "stale_sam", "asam", "gsam", "wsam") for place in places(key)] == []


def test_the_command_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["key", *methods.TABLE]
    assert cli.main(["methods", "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(methods.TABLE)
    row = rows["look_sam"]
    assert (row["name"], row["family"], row["cost"]) == ("LookSAM", "optimizer", "1 + 1/k passes")
    assert row["source"] == "Liu et al. 2022, arXiv 2203.02714" and row["search"]["optimizer.look_sam.every"] == [5, 2, 10]


def test_a_search_space_speaks_a_recipes_language() -> None:
    assert methods.search_space([]) == {}
    space = methods.search_space(["sam", "replay", "consolidate"])
    assert list(space) == ["optimizer.sam.rho", "replay.replay_batch", "replay.alpha", "replay.beta"]
    assert space["optimizer.sam.rho"] == (0.05, 0.02, 0.1, 0.2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Parts):
    """Every method by its key."""


NAMED = [key for key in methods.TABLE if not methods.load(key).in_code]


@pytest.mark.parametrize("key", [When(place, 4).param(key) for place, key in enumerate(NAMED)])
def test_a_recipe_takes_every_value_of_a_search_space(key: str) -> None:
    space = methods.search_space([key])
    for turn in range(max((len(v) for v in space.values() if isinstance(v, tuple)), default=0)):
        words = {path: values[turn % len(values)] for path, values in space.items() if isinstance(values, tuple)}
        chosen = config.parse(Recipe, [f"{path}={value}" for path, value in words.items()])
        for path, value in words.items():
            found: Any = chosen
            for name in path.split("."):
                found = getattr(found, name)
            assert found == value, path
