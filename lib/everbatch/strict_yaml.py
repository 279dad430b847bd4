"""YAML and JSON without surprises: no Python objects, no duplicate keys, no YAML 1.1 booleans, and 1e-3 is a number."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ["dump_text", "load_file", "load_text"]

_RESOLVERS = [
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$"), "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), "~nN\0"),
]
"""The YAML 1.2 core schema, in order of trial. PyYAML's own (YAML 1.1) reads `no` as false, 1e-3 as text, 010 as 8."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))  # decimal: PyYAML's own reads a leading 0 as octal


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True  # anchors would be noise in a file meant for reading


for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        # The empty text has no first character; PyYAML files it under "".
        _class.add_implicit_resolver(_tag, _pattern, [c if c != "\0" else "" for c in _first])


def load_text(text: str, where: str = "") -> Any:
    """The value that a YAML or JSON text denotes, in plain Python types.

    Raises:
        ValueError: with one line that names `where`, the line and the fault.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: tags such as !!python/object are errors
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where or 'YAML'}" + (f", line {mark.line + 1}" if mark is not None and where else "")
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        if "could not determine a constructor for the tag" in problem:
            tag = problem.split("'")[1].replace("tag:yaml.org,2002:", "!!")
            problem = f"the tag {tag!r} is refused: only plain values are read, never objects"
        raise ValueError(f"{place}: {problem}") from None


def load_file(path: str | os.PathLike[str]) -> Any:
    """The value in a YAML file, or in a JSON file (name ending in .json).

    Raises:
        ValueError: the file is missing, unreadable or malformed; one line that names it.
    """
    where = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"cannot read {where!r}: {reason}") from None
    if not where.endswith(".json"):
        return load_text(text, where)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"{where}: duplicate key {key!r}")
            result[key] = value
        return result

    try:
        return json.loads(text, object_pairs_hook=unique)  # not YAML: JSON may be indented with tabs
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, line {error.lineno}: {error.msg}") from None


def dump_text(value: Mapping[str, Any]) -> str:
    """YAML text that `load_text` reads back as the same value, keys in the given order."""
    return str(yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))
