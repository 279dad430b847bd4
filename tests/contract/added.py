"""What a method has by its line in the table alone, for jobs in a copy of the package that a method was added to."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import lives
from cases import BY_CASE
from record import Record

import everbatch
from everbatch import cli, config, methods
from everbatch.contract import parts_of
from everbatch.experiment import ClassIncremental, LargeBatch

ROOT = Path(__file__).parents[2]


def told(record: Record, store: Path, key: str) -> None:
    """The package's name, the option, the command, the search space, the search space's own values in a plain loop."""
    part: Any = methods.load(key)
    module, name = methods.TABLE[key].split(":")
    family = module.split(".")[1]
    strength = part.example["strength"]
    with record.check(f"told/{key}/package") as found:
        found.require(everbatch.__file__ == str(ROOT / "lib" / "everbatch" / "__init__.py"), everbatch.__file__)
        package = importlib.import_module(f"everbatch.{family}")
        found.require(getattr(package, name) is part and name in package.__all__, "no name of the package")
    with record.check(f"told/{key}/option") as found:
        path = f"optimizer.{key}" if family == "optim" else key
        for recipe in (ClassIncremental, LargeBatch):
            for words in ([], [f"{path}.strength={strength}"]):
                chosen = config.parse(recipe, words)
                composed = parts_of(chosen.optimizer.build().func) if family == "optim" else chosen.mixins()
                found.require((part in composed) == bool(words), f"{recipe.__name__} {words}: {composed}")
            found.require(f"--{path}.strength" in config.help_text(recipe), "not in the help")
    with record.check(f"told/{key}/command") as found, contextlib.redirect_stdout(io.StringIO()) as said:
        cli.main(["methods", "--json"])
        row = next(row for row in json.loads(said.getvalue()) if row["key"] == key)
        found.require(row["name"] == name and "arXiv" in row["source"] and row["cost"] and row["does"], f"{row}")
    with record.check(f"told/{key}/search") as found:
        space = methods.search_space([key])
        found.require(space == {f"{path}.strength": part.search["strength"]}, f"{space}")
    if family == "optim":
        with record.check(f"told/{key}/plain loop") as found:
            spec = importlib.util.spec_from_file_location("one_method", ROOT / "recipes" / "one_method.py")
            assert spec is not None and spec.loader is not None
            one_method = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(one_method)
            accuracy = one_method.main(name, f"strength={part.search['strength'][0]}")
            found.require(accuracy > 0.3, f"accuracy {accuracy}")


def case(record: Record, store: Path, argument: str) -> None:
    """NAME/HOST: the life of one optimizer mixin on one host, over each base it stands on."""
    name, host = argument.split("/")
    for base in BY_CASE[name].bases:
        lives.live(record, host, name, base, store)
