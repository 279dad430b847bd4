"""Typed options of methods, made from the table, and how to build from them."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import operator
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from everbatch import methods
from everbatch.composition import compose
from everbatch.contract import Contract
from everbatch.errors import check, check_real
from everbatch.experiment.data import Data
from everbatch.experiment.engine import Engine
from everbatch.experiment.model import Factory, Model
from everbatch.train import Trainer

__all__ = ["MEMORY", "MIXINS", "TRAINER_MIXINS", "Data", "Engine", "Factory", "Optimizer", "Parts", "check_together", "learner",
           "unused_together"]


MIXINS: dict[str, type[Contract]] = {key: part for key, part in methods.optimizer_mixins().items() if not part.in_code}
"""Key of each optimizer mixin that options can describe, leftmost first."""
TRAINER_MIXINS: dict[str, type[Contract]] = {key: part for key, part in methods.trainer_mixins().items() if not part.in_code}
"""Key of each trainer mixin, leftmost first."""
MEMORY = tuple(key for key, part in MIXINS.items() if part.called_by == "consolidate")
"""Those that want `everbatch.train.Consolidate` in the trainer."""


def _without_code(config: type) -> type:
    """A mixin's `Config` without what would take a function: no file and no command line may name code."""
    changed: list[Any] = []
    for name, hint in typing.get_type_hints(config).items():
        members = typing.get_args(hint) if not _is_code(hint) else (hint,)
        if any(_is_code(member) for member in members):
            rest = [member for member in members if not _is_code(member) and member is not type(None)]
            default = next(f.default for f in fields(config) if f.name == name)
            changed.append((name, functools.reduce(operator.or_, rest) if rest else Any, field(default=default, init=bool(rest))))
    return make_dataclass("Config", changed, bases=(config,), frozen=True, kw_only=True) if changed else config


def _is_code(hint: Any) -> bool:
    return typing.get_origin(hint) is collections.abc.Callable


def _summary(part: type) -> str:
    return (inspect.getdoc(part) or "").split("\n\n")[0]


@dataclass(frozen=True, kw_only=True)
class _Base:
    base: Literal["sgd", "adamw"] = "sgd"
    """torch.optim.SGD or torch.optim.AdamW."""
    lr: float = 0.03
    """Peak learning rate; > 0."""
    momentum: float | None = None
    """Of SGD alone; in [0, 1); null: 0."""
    weight_decay: float = 0.0
    """>= 0."""

    def __post_init__(self) -> None:
        check(0 < self.lr < math.inf, "optimizer", f"lr={self.lr}", "be > 0, and finite")
        check(0 <= self.weight_decay < math.inf, "optimizer", f"weight_decay={self.weight_decay}", "be >= 0, and finite")
        if self.momentum is not None:
            check_real("optimizer", "momentum", self.momentum, 0.0, 1.0, open_high=True)
            check(self.base == "sgd", "optimizer", f"momentum={self.momentum} with base={self.base}", "be null",
                  "it is SGD's; AdamW has betas of its own: optimizer.momentum=null")


_Options: Any = make_dataclass(
    "_Options", [(key, _without_code(part.Config) | None, field(default=None, metadata={"help": _summary(part)}))  # type: ignore[attr-defined]
                 for key, part in MIXINS.items()], bases=(_Base,), frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Optimizer(_Options):  # type: ignore[misc]
    """The base optimizer and the mixins over it; a mixin that is null is not composed."""

    def used(self) -> dict[str, Any]:
        """Options of each mixin that is composed, by key, leftmost first."""
        return {key: config for key in MIXINS if (config := getattr(self, key)) is not None}

    @property
    def calls(self) -> set[str]:
        """Keys of the trainer mixins that parts of the optimizer want to be called by."""
        return {MIXINS[key].called_by for key in self.used()} - {""}

    @property
    def remembers(self) -> bool:
        """Whether a part wants to be called at a task's end, as `everbatch.train.Consolidate` does."""
        return "consolidate" in self.calls

    def between_tasks(self) -> list[str]:
        """Keys of the parts that do nothing beside a single task."""
        return [key for key in self.used() if MIXINS[key].between_tasks]

    def build(self, factory: Callable[[], nn.Module] | None = None) -> functools.partial[Any]:
        """The composed class with its options, for `Trainer`.

        Args:
            factory: builds the bare model on the CPU, for the mixins that take one (`Factory`).
        """
        base = torch.optim.SGD if self.base == "sgd" else torch.optim.AdamW
        used = {MIXINS[key]: config for key, config in self.used().items()}
        options = _prefixed(used, factory)
        if self.base == "sgd":
            options["momentum"] = self.momentum or 0.0
        return functools.partial(compose(*used, base=base), lr=self.lr, weight_decay=self.weight_decay, **options)


@dataclass(frozen=True, kw_only=True)
class _Parts:
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    engine: Engine = field(default_factory=Engine)
    trainer: Trainer.Config = field(default_factory=Trainer.Config)


def _trainer_field(part: Any) -> Any:
    """A mixin that is asked for is off by default; one that only calls what the optimizer has is
    always there, and composed where a part is called by it."""
    config = _without_code(part.Config)
    follow: dict[str, str] = {}
    for name, source in part.from_data.items():
        follow[name] = f"it follows data.{source.removesuffix('s')}" if source else "the trainer knows"
    about = {"help": _summary(part), "idle": follow}
    if part.asked(part.Config()):
        return config | None, field(default=None, metadata=about)
    return config, field(default_factory=config, metadata=about)


_Asked: Any = make_dataclass(
    "_Asked", [(key, *_trainer_field(part)) for key, part in TRAINER_MIXINS.items()],
    bases=(_Parts,), frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Parts(_Asked):  # type: ignore[misc]
    """What a recipe begins with: options of data, model, optimizer, engine and trainer, and of every
    trainer mixin by its key.

    A recipe that has a mixin on by default declares the field anew:
    `replay: Replay.Config | None = field(default_factory=Replay.Config)`.
    """

    def mixins(self) -> dict[type, Any]:
        """Trainer mixins that are asked for, or that parts of the optimizer are called by, leftmost
        first, and the options of each. For `Trainer`: see `learner`."""
        chosen: dict[type, Any] = {}
        for key, part in TRAINER_MIXINS.items():
            config = getattr(self, key)
            if config is None or not (part.asked(config) or key in self.optimizer.calls):
                continue
            follow = {n: getattr(self.data, source) for n, source in part.from_data.items() if source}
            chosen[part] = replace(config, **follow)
        return chosen


def learner(
    mixins: Mapping[type, Any], base: type = Trainer, factory: Callable[[], nn.Module] | None = None,
) -> functools.partial[Any]:
    """The class of a trainer with these mixins, leftmost first, and its options.

    Args:
        mixins: each with an instance of its Config, or None where it has none.
        factory: builds the bare model on the CPU, for the mixins that take one and were given none.
    """
    return functools.partial(type("Learner", (*mixins, base), {}), **_prefixed(mixins, factory))


def _prefixed(mixins: Mapping[type, Any], factory: Callable[[], nn.Module] | None) -> dict[str, Any]:
    """The options of mixins as a composed class takes them; those that take a factory and were given none get this one."""
    options: dict[str, Any] = {}
    for part, config in mixins.items():
        # Not vars(): what no file may name is a field that no instance has set.
        values = {} if config is None else {f.name: getattr(config, f.name) for f in fields(config)}
        if values.get("factory", ...) is None:
            values["factory"] = factory
        options |= {f"{part.__name__.lower()}_{name}": value for name, value in values.items()}
    return options


def check_together(recipe: Any) -> None:
    """Refuse options of a recipe's parts that cannot have an effect beside each other.

    Raises:
        ValueError: naming both, and the option to use instead.
    """
    engine, trainer = recipe.engine, recipe.trainer
    check(0 <= trainer.seed < 2**32, "trainer", f"seed={trainer.seed}", "be in [0, 2^32)", "numpy's generators take no other")
    check(engine.kind != "deepspeed" or trainer.precision == "fp32", "trainer", f"precision={trainer.precision} on DeepSpeed",
          "be left out", "set engine.precision=bf16")


def unused_together(recipe: Any) -> dict[str, str]:
    """Options of a recipe's parts that have no effect beside the others, by path, and why: what `config.parse` refuses where a
    user gives them, but not where a recipe's own file does."""
    found: dict[str, str] = {}
    schedule, kind = "trainer.schedule", recipe.trainer.schedule.kind
    if kind != "polynomial":
        found[f"{schedule}.power"] = f"it is of {schedule}.kind=polynomial"
    if kind != "steps":
        found |= dict.fromkeys((f"{schedule}.milestones", f"{schedule}.factor"), f"they are of {schedule}.kind=steps")
    optimizer: Any = getattr(recipe, "optimizer", None) or Optimizer()
    for key, config in optimizer.used().items():
        found |= {f"optimizer.{key}.{name}": why for name, why in MIXINS[key].idle(config).items()}
    for key, part in TRAINER_MIXINS.items():
        config = getattr(recipe, key, None)
        if config is None:
            continue
        if part.asked(config):
            found |= {f"{key}.{name}": why for name, why in part.idle(config).items()}
        elif key not in optimizer.calls:
            callers = [name for name, other in MIXINS.items() if other.called_by == key]
            given = "and none is given" if len(callers) > 1 else "which is not given"
            found[key] = f"it calls optimizer.{', optimizer.'.join(callers)}, {given}"
    return found
