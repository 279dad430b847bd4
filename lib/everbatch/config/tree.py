"""The tree of options behind a dataclass: keys, types, defaults and texts, and how values become instances again."""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import enum
import functools
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from everbatch.config.words import close_word, plain_numbers, respelled

__all__ = ["ABSENT", "ConfigError", "Group", "Leaf", "grow", "parser", "speaks_text", "tree"]

ABSENT = dataclasses.MISSING
"""A field without a default, or a value that no layer gives."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line with the key, its value and what is allowed."""


@dataclass(frozen=True)
class Leaf:
    """One option: dotted path, annotation, default and the text under the field; `free`: a tree of unchecked keys; `spellings`:
    what a choice is called elsewhere; `word`: it stands for others, and is no field."""

    path: str
    hint: Any
    default: Any
    text: str
    free: bool = False
    spellings: Mapping[str, str] = field(default_factory=dict)
    word: bool = False


@dataclass(frozen=True)
class Group:
    """One dataclass in the tree; `default` is an instance, None (an optional part that is off) or ABSENT; `idle`: its fields
    that are no options here, and what to set instead or why."""

    path: str
    cls: type
    default: Any
    text: str
    optional: bool
    children: dict[str, Leaf | Group] = field(default_factory=dict)
    idle: Mapping[str, str] = field(default_factory=dict)

    def leaves(self) -> Iterator[Leaf]:
        """Every option below, in declaration order."""
        for child in self.children.values():
            if isinstance(child, Group):
                yield from child.leaves()
            else:
                yield child

    def paths(self) -> Iterator[str]:
        """The dotted path of every option and group below."""
        for child in self.children.values():
            yield child.path
            if isinstance(child, Group):
                yield from child.paths()


def tree(cls: type, default: Any = None, path: str = "", text: str = "", is_optional: bool = False) -> Group:
    """The tree of `cls`, with defaults from the instance `default` where there is one.

    Raises:
        TypeError: `cls` is not a dataclass, or a field could be one of several dataclasses.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"configuration: {cls!r}, must be a dataclass")
    hints, texts = typing.get_type_hints(cls), _field_texts(cls)
    group = Group(path, cls, default, text, is_optional)
    words: Mapping[str, str] = {} if path else getattr(cls, "words", {})
    group.children.update({name: Leaf(name, str | None, None, about, word=True) for name, about in words.items()})
    for item in dataclasses.fields(cls):
        if not item.init:
            continue
        here = f"{path}.{item.name}" if path else item.name
        if isinstance(default, cls):
            value = getattr(default, item.name)
        else:
            value = item.default_factory() if item.default_factory is not ABSENT else item.default
        hint, note = hints[item.name], item.metadata.get("help") or texts.get(item.name, "")
        members = [member for member in _members(hint) if member is not type(None)]
        nested = [member for member in members if dataclasses.is_dataclass(member)]
        if len(nested) == 1 and len(members) == 1:
            inner, optional = typing.cast(type, nested[0]), type(None) in _members(hint)
            below = tree(inner, value, here, note, optional)
            idle = item.metadata.get("idle", {})
            left = {name: child for name, child in below.children.items() if name not in idle}
            group.children[item.name] = dataclasses.replace(below, children=left, idle=idle)
        elif nested:
            raise TypeError(f"configuration: {here} is {hint}, must be one dataclass, optional or not, or plain values")
        else:
            free = any(issubclass(_origin(member), Mapping) for member in members)
            group.children[item.name] = Leaf(here, hint, value, note, free, item.metadata.get("spellings", {}))
    return group


def grow(group: Group, values: Mapping[str, Any]) -> Any:
    """The instance of `group.cls` that merged `values` describe; what they leave out keeps its default.

    Raises:
        ConfigError: with the key's path, its value and what is allowed.
    """
    return _grow(group, values, _convert(group, values))


def _grow(group: Group, values: Any, converted: Mapping[str, Any]) -> Any:
    if values is ABSENT and group.default is not ABSENT:
        return group.default
    if values is None:
        return None
    arguments = {name: getattr(group.default, name) for name in group.idle if isinstance(group.default, group.cls)}
    for name, child in group.children.items():
        if isinstance(child, Leaf) and child.word:
            continue
        value = ABSENT if values is ABSENT else values.get(name, ABSENT)
        if isinstance(child, Group):
            arguments[name] = _grow(child, value, converted)
        elif child.path in converted:
            arguments[name] = converted[child.path]
        elif child.default is ABSENT:
            raise ConfigError(f"{child.path}: is missing, must be {allowed(child.hint)}; give {child.path}=VALUE")
        else:
            arguments[name] = child.default
    try:
        return group.cls(**arguments)
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{_blame(group, str(error))}: {error}") from None


def _blame(group: Group, text: str) -> str:
    """The path of the one option that a validation message names, else of its group."""
    named = [name for name in re.findall(r"\b(\w+)=", text) if name in group.children]
    return group.children[named[0]].path if len(set(named)) == 1 else group.path or "configuration"


def _convert(root: Group, values: Mapping[str, Any]) -> dict[str, Any]:
    """The given options by path, as the types their fields ask for."""
    given: dict[str, tuple[Leaf, Any]] = {}

    def collect(group: Group, mapping: Mapping[str, Any]) -> None:
        for name, value in mapping.items():
            child = group.children[name]
            if isinstance(child, Leaf):
                given[child.path] = child, value
            elif value is not None:
                collect(child, value)

    collect(root, values)
    result: dict[str, Any] = {}
    checked: dict[str, Any] = {}
    for path, (leaf, value) in given.items():
        if not leaf.free and not speaks_text(leaf.hint):
            value = plain_numbers(value)
        value = respelled(value, _choices(leaf.hint), leaf.spellings)
        if _has_nan(value):
            raise ConfigError(f"{path}: holds NaN, must be {allowed(leaf.hint)}")
        # jsonargparse would take null for any type, parse texts inside free trees, and read "yes" as true.
        if value is None and type(None) not in _members(leaf.hint) and leaf.hint is not Any:
            raise _wrong(leaf, value)
        if isinstance(value, Mapping) and leaf.free or value is None or (leaf.hint is str and isinstance(value, str)):
            result[path] = value
        elif isinstance(value, str) and not speaks_text(leaf.hint):
            raise _wrong(leaf, value)
        else:
            checked[path] = value
    if checked:
        typed = parser(root, paths=checked)
        for path, value in checked.items():
            try:
                result[path] = typed.parse_object(_nest(path, value), defaults=False)[path]
            except ArgumentError:
                raise _wrong(given[path][0], value) from None
    return result


def _nest(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def _wrong(leaf: Leaf, value: Any) -> ConfigError:
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    words = allowed(leaf.hint)
    bare = words.startswith("a list, each") and isinstance(value, (str, int, float)) and not isinstance(value, bool)
    cure = f"; in brackets: {leaf.path}=[{value}]" if bare else close_word(value, _choices(leaf.hint))
    return ConfigError(f"{leaf.path}={shown}, must be {words}{cure}")


def parser(root: Group, prog: str = "recipe", paths: Collection[str] | None = None) -> ArgumentParser:
    """A jsonargparse parser over the tree's leaves (or some of them): converts values and writes the help."""
    made = ArgumentParser(
        prog=prog, exit_on_error=False, usage="%(prog)s [--config FILE ...] [KEY=VALUE | --KEY VALUE | --FLAG ...]",
        description=(inspect.getdoc(root.cls) or "").split("\n\n")[0],
    )
    hidden = argparse.SUPPRESS
    text = "YAML or JSON over the defaults; repeatable, later files win; overrides win over files"
    made.add_argument("--config", metavar="FILE", default=hidden, help=text)
    text = "print every option as YAML and exit"
    made.add_argument("--print-config", action="store_true", default=hidden, help=text)

    def add(group: Group) -> None:
        title = group.path or "run"
        about = [group.text or (inspect.getdoc(group.cls) or "").split("\n\n")[0] if group.path else ""]
        if group.optional:
            state = "Off" if group.default is None else "On"
            about.append(f"{state} by default: {title}={{}} or any of its options turns it on, {title}=null off.")
        box = made.add_argument_group(title, " ".join(" ".join(about).split()))
        for child in group.children.values():
            if isinstance(child, Leaf) and (paths is None or child.path in paths):
                extra = {} if child.default is ABSENT else {"default": child.default}
                text = " ".join(child.text.split()) or None
                action = box.add_argument(f"--{child.path}", type=child.hint, help=text, **extra)
                # jsonargparse adds "--key+" for lists; the command line here does not have it.
                action.option_strings = [flag for flag in action.option_strings if not flag.endswith("+")]
        for child in group.children.values():
            if isinstance(child, Group):
                add(child)

    add(root)
    return made


def allowed(hint: Any) -> str:
    """What an annotation lets through, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    words = {
        bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null",
        Any: "any value",
    }
    if hint in words:
        return words[hint]
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(choice) if isinstance(choice, str) else str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(allowed(member) for member in arguments)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(hint.__members__)
    if isinstance(hint, type) and issubclass(hint, os.PathLike):
        return "a path"
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}: " + ", ".join(allowed(member) for member in arguments)
    if origin in (list, tuple, collections.abc.Sequence):
        return f"a list, each {allowed(arguments[0])}"
    if issubclass(_origin(hint), Mapping):
        return "keys and values"
    return str(hint)


def speaks_text(hint: Any) -> bool:
    """Whether a plain text can be a value of the annotation, so that the command line hands it over unread."""
    for member in _members(hint):
        if typing.get_origin(member) is typing.Literal:
            if any(isinstance(choice, str) for choice in typing.get_args(member)):
                return True
        elif issubclass(_origin(member), (str, os.PathLike, enum.Enum)):
            return True
    return False


def _choices(hint: Any) -> tuple[Any, ...]:
    """What an annotation spells out, where text is a choice among words."""
    members = _members(hint)
    if any(issubclass(_origin(member), (str, os.PathLike)) for member in members):
        return ()
    return tuple(c for m in members if typing.get_origin(m) is typing.Literal for c in typing.get_args(m))


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _origin(hint: Any) -> type:
    origin = typing.get_origin(hint) or hint
    return origin if isinstance(origin, type) else object


def _has_nan(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, Mapping):
        return any(_has_nan(item) for item in value.values())
    return isinstance(value, (list, tuple)) and any(_has_nan(item) for item in value)


@functools.cache
def _field_texts(cls: type) -> dict[str, str]:
    """The text under each field of a dataclass and of those it inherits from."""
    from docstring_parser import parse_from_object

    result: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            try:
                texts = parse_from_object(owner).params
            except (TypeError, SyntaxError):  # made at run time: no source to read
                continue
            result.update({item.arg_name: item.description or "" for item in texts})
    return result
