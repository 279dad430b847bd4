"""Which values are searched, and which of them a configuration gets."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from importlib import resources
from typing import Any

from everbatch import methods
from everbatch.config.strict_yaml import load_text
from everbatch.contract import option_names
from everbatch.declared import Range
from everbatch.errors import check, nearest
from everbatch.experiment import named
from everbatch.tune.stream import flat

__all__ = ["BASE", "CAPACITY", "Method", "Values", "check_scenario", "draw", "draw_all", "gtep", "is_rule", "method_of",
           "plain_space", "space_from"]

Values = tuple[Any, ...] | Range | Mapping[str, Any]
"""Of one option: a list, an interval, or a rule: {"coin": true}, {"milestones": counts, "of": path of the epochs},
{"count_of": path of other milestones, "of": path of the epochs}."""
RULES = ({"coin"}, {"milestones", "of"}, {"count_of", "of"})
BASE: dict[str, tuple[Any, ...]] = {"optimizer.lr": (0.01, 0.02, 0.05, 0.1)}
"""What is searched of every method."""
CAPACITY = "replay.capacity"
"""Belongs to the scenario: both phases, and all methods, have memories of one size."""
MEASURES = ("evaluation", "plasticity")
"""Parts that change nothing of what is trained."""
UNUSED = "-"
"""The path of what a published search draws and does not use."""


class Method:
    """A method by its name, as recipes take it: "er", "dark_er_pp", "finetune", "ewc", or several, "er+refresh".

    Attributes:
        name: as given.
        options: what makes it this method, by the path of an option.
        space: what its parts declare to be worth searching and the method leaves open, and `BASE`.
        capacities: paths of the capacities of memories that it has in place of a replay memory.

    Raises:
        ValueError: a name that is none, with the nearest.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        tree = named.layer(name)
        given = {path: value for path, value in flat(tree).items() if value is not None}
        memory = {} if tree.get("replay") is not None else {"replay": None}  # which a class-incremental run has by itself
        self.options: dict[str, Any] = {**memory, **given}
        self.space: dict[str, Values] = dict(BASE)
        self.capacities: list[str] = []
        callers = {methods.load(key).called_by for key in methods.TABLE if _at(tree, methods.path_of(key)) is not None}
        for key in methods.TABLE:
            part: Any = methods.load(key)
            own = _at(tree, methods.path_of(key))
            if key != "replay" and (own is not None or key in callers) and "capacity" in option_names(part):
                self.capacities.append(f"{methods.path_of(key)}.capacity")
            if own is not None and not part.in_code:
                idle, declared = part.idle(part.Config(**own)), methods.search_space([key])
                self.space |= {option: values for option, values in declared.items()
                               if option not in self.options and option.rpartition(".")[2] not in idle}

    def within(self, scenario: Mapping[str, Any]) -> dict[str, Any]:
        """`options` in a scenario: each memory holds as many samples as the replay memory of the other methods does."""
        capacity = scenario.get("replay.capacity")
        shared = {} if capacity is None else {path: capacity for path in self.capacities if path not in scenario}
        return {**shared, **self.options}


@functools.lru_cache(maxsize=256)
def method_of(name: str) -> Method:
    """`Method(name)`, put together once."""
    return Method(name)


def check_scenario(scenario: Mapping[str, Any]) -> None:
    """Refuse options by path that would make every method another one: of a part that methods are made of, and `method` itself.

    Parts that only measure are no method's, nor are those that act where a method's part calls them.

    Raises:
        ValueError: naming the option and the part.
    """
    for path, value in scenario.items():
        given = f"{path}={value!r} in the scenario"
        check(path != "method", "tune", given, "be left out", "`search` names the methods")
        part = next((part for part in _parts() if f"{path}.".startswith(f"{part}.")), "")
        but = f", but for {CAPACITY}" if part == "replay" else ""
        check(not part or path == CAPACITY, "tune", given, "be left out",
              f"{part} is a method's{but}: join it to the methods that are to have it (er+ewc), or search it")


@functools.cache
def _parts() -> tuple[str, ...]:
    """Paths of the parts that options turn on, but for those that measure."""
    found = []
    for key in methods.TABLE:
        part: Any = methods.load(key)
        if key not in MEASURES and (methods.path_of(key) != key or part.in_code or part.asked(part.Config())):
            found.append(methods.path_of(key))
    return tuple(found)


def _at(tree: Mapping[str, Any], path: str) -> dict[str, Any] | None:
    """What stands at a dotted path; None where nothing does."""
    found: Any = tree
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found  # type: ignore[no-any-return]


def draw(space: Mapping[str, Values], seed: int, i: int) -> dict[str, Any]:
    """Values of configuration `i`: each option on its own, in the order of `space`, by a generator that is seeded with both.

    With seed 0 it is the generator of the published search, so a published list draws the published configurations.
    """
    generator, values = random.Random(seed * 2**32 + i), {}
    for path, choices in space.items():
        if isinstance(choices, Range):
            values[path] = _between(choices, generator)
        elif isinstance(choices, Mapping):
            values[path] = _by_rule(choices, values, generator)
        else:
            values[path] = generator.choice(list(choices))
    return {path: value for path, value in values.items() if path != UNUSED}


def draw_all(space: Mapping[str, Values], seed: int, count: int) -> list[dict[str, Any]]:
    """The configurations of a search, by id; known before the first of them runs."""
    return [draw(space, seed, i) for i in range(count)]


def _between(choices: Range, generator: random.Random) -> float:
    share = generator.random()
    value = (choices.low * (choices.high / choices.low) ** share if choices.log
             else choices.low + (choices.high - choices.low) * share)
    return min(max(float(f"{value:.6g}"), choices.low), choices.high)


def _by_rule(rule: Mapping[str, Any], values: Mapping[str, Any], generator: random.Random) -> Any:
    """True or false; or milestones int(epochs * (2 i / (2 m + 1))), i = 1 .. m."""
    if "coin" in rule:
        return generator.random() > 0.5
    count = generator.choice(list(rule["milestones"])) if "milestones" in rule else len(values[rule["count_of"]])
    return [int(values[rule["of"]] * (2 * i / (2 * count + 1))) for i in range(1, count + 1)]


def is_rule(value: Mapping[str, Any]) -> bool:
    """Whether a mapping says what values an option takes, rather than holding options."""
    return not value or bool({"low", "high", "coin", "milestones", "count_of"} & value.keys())


def space_from(given: Mapping[str, Any], who: str) -> dict[str, Values]:
    """A space as a file says it, by the path of an option: lists of values, or {low, high, log}, or a rule of `Values`.

    Raises:
        ValueError: an empty list, something else, or a rule about what is not drawn before.
    """
    space: dict[str, Values] = {}
    for path, values in given.items():
        if isinstance(values, Mapping) and {"low", "high"} <= values.keys() <= {"low", "high", "log"}:
            space[path] = Range(**values)
        elif isinstance(values, Mapping):
            check(set(values) in RULES, who, f"{path}={dict(values)}", "be a list of values, or low and high")
            for other in (values[key] for key in ("of", "count_of") if key in values):
                check(other in space, who, f"{path}, which follows {other!r}", "come after it")
            space[path] = dict(values)
        else:
            check(isinstance(values, list | tuple) and len(values) > 0, who, f"{path}={values!r}",
                  "be a list of values, or low and high")
            space[path] = tuple(values)
    return space


def plain_space(space: Mapping[str, Values]) -> dict[str, Any]:
    """A space as JSON has it; `space_from` reads it."""
    return {path: {"low": v.low, "high": v.high, "log": v.log} if isinstance(v, Range)
            else dict(v) if isinstance(v, Mapping) else list(v) for path, v in space.items()}


@functools.cache
def _published() -> dict[str, Any]:
    text = resources.files("everbatch.tune").joinpath("gtep.yaml").read_text()
    found: dict[str, Any] = load_text(text)
    return found


def gtep(algorithm: str) -> dict[str, Values]:
    """The published lists of GTEP's search of an algorithm ("replay", "icarl", "der" ...), in the order in which it draws.

    Options that exist here stand under their paths; those of methods that do not, under their published names.

    Raises:
        ValueError: no such algorithm, with the nearest.
    """
    known = _published()["algorithms"]
    check(algorithm in known, "tune", f"gtep={algorithm!r}", f"be one of {', '.join(known)}", nearest(algorithm, known))
    family = known[algorithm] or {}
    common = _published()["families"][family.get("family", "scratch")]
    before = {UNUSED: [0]} if family.get("draws_its_seed") else {}
    return space_from({**before, **common, **family.get("lists", {})}, f"gtep {algorithm}")
