"""Modules that have moved keep their old names for the code that imports them, with a warning that says the new one."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "install"]

MOVED = {
    "strict_yaml": "config.strict_yaml", "zero_config": "config.deepspeed", "logging": "report.recorder",
    "plots": "report.plots", "objectives": "objective.bregman", "recipe": "experiment",
    "recipe_options": "experiment.options", "recipe_model": "experiment.model", "runs": "checkpoint.folder",
    "train.evaluate": "evaluate.evaluator", "train.replay": "train.memory.replay",
    "train.export": "evaluate.export", "train.weights": "evaluate.weights",
    "train.conadv": "train.adversarial.conadv", "train.craft": "train.adversarial.craft",
    "train.adversary": "train.adversarial", "train.engines": "train.launch", "optim.shards": "engines.shards",
    "optim.objective": "engines.passes", "optim.hosts.base": "engines.host", "optim.hosts.local": "engines.local",
    "optim.hosts.zero": "engines.zero", "optim.sam": "optim.sharpness.sam", "optim.looksam": "optim.sharpness.looksam",
    "optim.rules": "optim.layerwise.rules", "optim.fisher": "optim.memory.fisher",
}
"""Old name: new name, both below `everbatch`."""


class _Finder(MetaPathFinder, Loader):
    """Answers for the old names only; asked last, after the files of the package."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        old = name.removeprefix("everbatch.")
        if old == "optim.hosts":  # a package of old: its modules are asked for through it
            return ModuleSpec(name, self, is_package=True)
        return ModuleSpec(name, self) if name != old and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Old(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED.get(module.__name__.removeprefix("everbatch."))
        if new is None:
            return
        vars(module)["_moved_to"] = importlib.import_module(f"everbatch.{new}")
        warnings.warn(f"{module.__name__} is everbatch.{new} now; import it from there", DeprecationWarning, stacklevel=2)


class _Old(ModuleType):
    """A module under its old name: every name is looked up where it is now."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_moved_to" not in vars(self):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(vars(self)["_moved_to"], name)


def install() -> None:
    """Let the old names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
