"""How a model grows between tasks: what it has grown by, and how it is built anew."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from everbatch import seeds
from everbatch.contract import parts_of, route
from everbatch.engines.host import plain_name
from everbatch.errors import check

__all__ = ["Build", "Growth", "check_growable", "following", "wanted_growths"]

Build: TypeAlias = Callable[[Sequence[Any]], nn.Module]
"""Makes the bare model, on the CPU, as it is after these growths: plain values, in their order. Fresh
weights follow torch's global generator."""


@dataclass
class Growth:
    """Of one trainer."""

    build: Build | None = None
    done: list[Any] = field(default_factory=list)
    """The growths so far."""
    born: list[list[str]] = field(default_factory=list)
    """Names of the parameters that came, or began to be trained, with each launch: the one that the
    trainer was built with, then each growth. A launch that brought none has an empty list."""

    def model(self, growths: Sequence[Any], seed: int) -> nn.Module:
        """A new bare model after these growths: the same bits on every rank, if `build` keeps its
        word."""
        assert self.build is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive(seed, "growth", len(growths)))
            return self.build(tuple(growths))

    def born_in(self, old: nn.Module, new: nn.Module) -> list[list[str]]:
        """`born` of the model that follows this one."""
        trained = {plain_name(n): p.requires_grad for n, p in old.named_parameters()}
        late = []
        for name, p in ((plain_name(n), p) for n, p in new.named_parameters()):
            if name not in trained or (p.requires_grad and not trained[name]):
                late.append(name)
        return [[name for name in names if name not in late] for names in self.born] + [late]


class _AsGrown:
    """`build` for the parts of an optimizer that want a factory of the bare model: as the model is by
    then. A value: its text is the factory's, also in a resumed run."""

    def __init__(self, growth: Growth) -> None:
        self._growth = growth

    def __call__(self) -> nn.Module:
        assert self._growth.build is not None
        return self._growth.build(tuple(self._growth.done))

    def __repr__(self) -> str:
        build = self._growth.build
        name = getattr(build, "__qualname__", None)  # a function's own text has its address
        return repr(build) if name is None else f"{build.__module__}.{name}"


def following(optimizer: functools.partial[Any], growth: Growth) -> functools.partial[Any]:
    """The optimizer with every option that is the trainer's own `grown` following the growths."""
    if growth.build is None:
        return optimizer
    own = _AsGrown(growth)
    options = {k: own if v is growth.build else v for k, v in optimizer.keywords.items()}
    return functools.partial(optimizer.func, **options)


def check_growable(trainer: Any, optimizer: functools.partial[Any], growth: Growth) -> None:
    """Refuse, by name, a part of the trainer or the optimizer that cannot be beside a model that
    grows."""
    build = growth.build
    if build is None:
        return
    check(callable(build), "Trainer", f"grown={build!r}", "be a function of the growths so far",
          "grown=lambda growths: make_model(growths)")
    configs: dict[Any, Any] = dict(getattr(trainer, "configs", {}))
    cls: Any = optimizer.func
    for part, values in route(cls, dict(optimizer.keywords))[0].items():
        config = getattr(part, "Config", None)
        configs[part] = config(**values) if config is not None else None
    for part in (*parts_of(type(trainer)), *parts_of(cls)):
        why = part.fixed(configs.get(part))  # type: ignore[attr-defined]
        check(not why, "Trainer", f"grown= with {part.__name__}", "be without it", why)
        factory = getattr(configs.get(part), "factory", None)
        check(factory is None or isinstance(factory, _AsGrown), "Trainer",
              f"grown= and another factory in {part.__name__}",
              "be one function: the other would go on building the model as it was at first",
              "pass to both the same f(growths=())")


def wanted_growths(kept: Mapping[str, Any], path: Any) -> tuple[list[Any], list[list[str]]]:
    """What a checkpoint's meta says of growths; none where it says nothing.

    Raises:
        ValueError: entries of another kind.
    """
    told = kept.get("growths", {"done": [], "born": []})
    done, born = told["done"], told["born"]
    good = isinstance(done, list) and isinstance(born, list) and all(
        isinstance(names, list) and all(isinstance(n, str) for n in names) for names in born)
    if not good or (done and len(born) != len(done) + 1):
        raise ValueError(f"growths is {repr(told)[:80]}, must be a list, and the names of each launch")
    return done, born
