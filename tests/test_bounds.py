"""Every number that is an option is bounded: infinity, NaN and absurd whole numbers are refused by name, in no time."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
import time
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from everbatch import experiment as recipe
from everbatch.train import Trainer
from processes import ROOT

INFINITE = {("ClipGradNorm.Config", "max_norm"), ("LAMB.Config", "max_ratio")}
"""Options whose text gives infinity a meaning."""

def classes() -> dict[str, type]:
    """Every dataclass of options, the recipes' own among them."""
    roots: list[type] = [part.Config for part in recipe.MIXINS.values()]  # type: ignore[attr-defined]
    roots += [Trainer.Config, *(part.Config for part in recipe.TRAINER_MIXINS.values())]  # type: ignore[attr-defined]
    for path in sorted((ROOT / "recipes").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"bounds_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        roots += [found for found in vars(module).values() if isinstance(found, type) and dataclasses.is_dataclass(found)
                  and found.__module__ == spec.name]
        roots += [inner for found in vars(module).values() if isinstance(found, type) and found.__module__ == spec.name
                  and isinstance(inner := getattr(found, "Config", None), type)]
    result: dict[str, type] = {}
    while roots:
        cls = roots.pop()
        name = f"{cls.__module__.removeprefix('bounds_')}.{cls.__qualname__}".removeprefix("everbatch.")
        if name not in result:
            result[name] = cls
            roots += [t for hint in typing.get_type_hints(cls).values() for t in flat(hint) if dataclasses.is_dataclass(t)]
    return result


def flat(hint: Any) -> list[Any]:
    inner = typing.get_args(hint)
    return [hint] if not inner or typing.get_origin(hint) is typing.Literal else [t for h in inner for t in flat(h)]


def fields(kind: type) -> Iterator[Any]:
    """(class, field, value as it is given) of every option that may hold a number of this kind."""
    for name, cls in sorted(classes().items()):
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            if item.init and kind in flat(hints[item.name]):
                hint = hints[item.name]
                alone = kind is hint or kind in typing.get_args(hint)
                alone = alone and typing.get_origin(hint) not in (tuple, list, Mapping, dict)
                origins = {typing.get_origin(h) for h in (hint, *typing.get_args(hint))}
                shapes = [lambda v: v] * alone + [lambda v: (v,)] * bool(origins & {tuple, list})
                shapes += [lambda v: {"layer": v}] * bool(origins & {Mapping, dict} and not alone)
                yield pytest.param(cls, item.name, shapes, id=f"{name}.{item.name}")


def refused(cls: type, name: str, value: Any) -> str:
    began = time.process_time()
    with pytest.raises(ValueError) as caught:
        cls(**{name: value})
    assert time.process_time() - began < 0.2 and name in str(caught.value), caught.value
    return str(caught.value)


@pytest.mark.parametrize(("cls", "name", "shapes"), list(fields(float)))
def test_no_infinity_and_no_nan(cls: type, name: str, shapes: Any) -> None:
    for value in (math.inf, -math.inf, math.nan):
        if value == math.inf and (cls.__qualname__, name) in INFINITE:
            continue
        assert shapes
        for shape in shapes:
            assert str(value) in refused(cls, name, shape(value))


@pytest.mark.parametrize(("cls", "name", "shapes"), list(fields(int)))
def test_whole_numbers_of_18_digits(cls: type, name: str, shapes: Any) -> None:
    for value in (123456789012345678, -123456789012345678):
        if name == "seed":
            continue
        assert shapes
        for shape in shapes:
            assert str(value) in refused(cls, name, shape(value))
