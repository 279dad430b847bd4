"""Modes of modules: what a user put into evaluation mode stays there, and a resumed run begins as the first did."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

__all__ = ["evaluation_roots", "in_evaluation", "put_into_evaluation", "warn_if_nothing_trains"]


def in_evaluation(model: nn.Module) -> list[str]:
    """Names of all modules in evaluation mode; the model itself is ''."""
    return [name for name, module in model.named_modules() if not module.training]


def evaluation_roots(model: nn.Module) -> list[str]:
    """Of those, the ones that lie in none that is in evaluation mode as a whole: a short list to tell a user."""
    whole = {name for name, module in model.named_modules() if not any(part.training for part in module.modules())}
    names = in_evaluation(model)
    return [name or "(the model)" for name in names if not any(parent in whole for parent in _parents(name))]


def put_into_evaluation(model: nn.Module, names: Iterable[str]) -> None:
    """Put the modules of these names into evaluation mode, and all others into training mode."""
    chosen = set(names)
    for name, module in model.named_modules():
        module.training = name not in chosen


def warn_if_nothing_trains(model: nn.Module) -> None:
    """Warn of a model that is in evaluation mode as a whole, which a user may have forgotten."""
    if not any(module.training for module in model.modules()):
        warnings.warn("Trainer: the whole model is in evaluation mode and stays in it, so dropout is off and running "
                      "statistics do not move; call model.train() before, if that is not meant", stacklevel=6)


def _parents(name: str) -> list[str]:
    """Names of all modules that hold one of this name, the model's first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))] if name else []
