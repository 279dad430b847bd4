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
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")} | {None}
"""Tags that may be written; None is what PyYAML does with all others, an error."""
_ESCAPED = re.compile("[^\t\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd]")
"""Characters that a plain or single-quoted scalar folds, loses or cannot hold."""


_MOST_VALUES = 10_000
"""Values that a text with aliases may hold when they are written out; a configuration has some hundreds."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    yaml_constructors = {tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _PLAIN}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose, and count what an alias stands for: a text of 400 bytes can denote 10^9 values."""
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        if node is None:
            return node
        counts = self.__dict__.setdefault("_counts", {})
        if alias is None:
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            pairs = [n for child in children for n in (child if isinstance(child, tuple) else (child,))]
            counts[id(node)] = 1 + sum(counts[id(child)] for child in pairs)
        elif id(node) not in counts:  # not composed to its end: the alias stands inside of what it names
            raise yaml.composer.ComposerError(None, None, f"alias {alias.anchor!r} stands for itself", alias.start_mark)
        self.__dict__["_shared"] = self.__dict__.get("_shared", False) or alias is not None
        if self.__dict__["_shared"] and counts[id(node)] > _MOST_VALUES:
            problem = f"aliases stand for more than {_MOST_VALUES} values"
            raise yaml.composer.ComposerError(None, None, problem, (alias or node).start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            key = self.construct_object(key_node)
            name = str(key)  # 1 and "1" name one option
            if key in seen or name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen |= {key, name}
        return super().construct_mapping(node, deep=deep)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))  # decimal: PyYAML's own reads a leading 0 as octal


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


_LINE = 2**31
"""One line for each scalar: folding loses what stands at a fold."""


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True  # anchors would be noise in a file meant for reading


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if _ESCAPED.search(text) or "\t" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_str)

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
    except Exception as error:  # whatever the parser meets in a text: KeyError for "!!bool x", recursion for "[[[[..."
        mark = getattr(error, "problem_mark", None)
        place = f"{where or 'YAML'}" + (f", line {mark.line + 1}" if mark is not None and where else "")
        problem = next(iter(str(getattr(error, "problem", None) or error).splitlines()), type(error).__name__)
        if isinstance(error, RecursionError):
            problem = "nested too deep"
        elif not isinstance(error, yaml.YAMLError):
            problem = f"a value that cannot be read ({problem})"
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
        text = Path(path).read_text(encoding="utf-8-sig")
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
    except RecursionError:
        raise ValueError(f"{where}: nested too deep") from None
    except ValueError as error:  # a duplicate, or a number of more digits than Python reads
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: a value that cannot be read ({text})") from None


def dump_text(value: Mapping[str, Any]) -> str:
    """YAML text that `load_text` reads back as the same value, keys in the given order."""
    return str(yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_LINE))
