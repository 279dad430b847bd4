"""Methods of the literature by name: `method=dark_er_pp`, and the options of a recipe that each stands for.

What a method is made of is declared by the part that makes it (`Contract.makes`), so that a new one is known here by its
line in `everbatch.methods`.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from everbatch import methods
from everbatch.config.words import respelled
from everbatch.errors import check, nearest

__all__ = ["NOTHING", "layer", "made_by", "names"]

NOTHING = "finetune"
"""The stream alone, without any method: the lower bound."""
ROOM = ".memory."
"""Where the parts live that remember, and make a continual method what it is."""
SPELLINGS = {
    "der_pp": "dark_er_pp", "derpp": "dark_er_pp", "der++": "dark_er_pp", "dark_er++": "dark_er_pp",
    "experience_replay": "er", "fine_tune": NOTHING, "fine_tuning": NOTHING, "sgd": NOTHING, "a_gem": "agem",
    "i_carl": "icarl", "ewc_on": "online_ewc", "joint_training": "joint"}
"""What methods are called elsewhere."""


def names() -> dict[str, dict[str, Any]]:
    """Every method by name, and its options by path ("replay.method"), beside those that parts have anyway.

    In the order of the table of methods; `NOTHING` comes first. A part whose options stay at their defaults is `{path: {}}`.
    """
    return {name: dict(options) for name, options in _names().items()}


@functools.cache
def _names() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {NOTHING: {}}
    for key in methods.TABLE:
        path, makes = methods.path_of(key), methods.load(key).makes
        for name in made_by(key):
            options = {} if makes is None else makes[name]
            check(name not in found, "methods", f"two parts that make {name!r}", "make methods of different names")
            inner = {option if "." in option else f"{path}.{option}": value for option, value in options.items()}
            own = any(option.startswith(f"{path}.") for option in inner)
            found[name] = inner if own else {path: {}, **inner}
    return found


def made_by(key: str) -> tuple[str, ...]:
    """Names of the methods that a part makes, by its key in the table."""
    part = methods.load(key)
    if part.makes is not None:
        return tuple(part.makes)
    return (key,) if not part.in_code and _alone(key) else ()


def _alone(key: str) -> bool:
    """Whether a part is more than the one that calls others."""
    part: Any = methods.load(key)
    return bool(methods.TABLE[key].startswith("everbatch.optim.") or part.asked(part.Config()))


def layer(text: str) -> dict[str, Any]:
    """The options of a method, or of several joined by "+", as nested keys and values; parts that make other methods are off.

    >>> layer("er")["replay"], layer("er")["optimizer"]["ewc"]
    ({'method': 'er'}, None)

    Raises:
        ValueError: a name that is none, with the nearest; "der", which names two methods; two that ask for different values.
    """
    known = _names()
    result: dict[str, Any] = {}
    for path in _remembering():
        _put(result, path, None)
    given: dict[str, Any] = {}
    for word in re.split(r"\+(?=\w)", text):
        check(word.casefold() != "der", "method", repr(word), "be dark_er or dark_er_pp",
              "DER names two methods: dark experience replay, and dynamically expandable representation")
        name = respelled(word, known, SPELLINGS)
        check(name in known, "method", repr(word), "be one that `everbatch methods` lists", nearest(word, known))
        for path, value in known[name].items():
            check(given.get(path, value) == value, "method", f"{text!r}, which asks for {path}={given.get(path)!r} and "
                  f"{path}={value!r}", "join methods that agree")
            given[path] = value
    for path, value in given.items():
        _put(result, path, value)
    return result


def _remembering() -> list[str]:
    """Paths of the parts that continual methods are made of, and that may be off."""
    parts = {methods.path_of(key): key for key in methods.TABLE if _alone(key)}
    names = [name for key, place in methods.TABLE.items() if ROOM in place for name in made_by(key)]
    used = {path for name in names for path in _names()[name]}
    return [part for part in parts if any(f"{path}.".startswith(f"{part}.") for path in used)]


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path; what was off is on again where something below it is set."""
    *above, last = path.split(".")
    for name in above:
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
    if value != {}:
        tree[last] = value
    elif tree.get(last) is None:
        tree[last] = {}
