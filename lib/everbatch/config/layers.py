"""One typed configuration tree: dataclasses in, YAML files and `key=value` over it, an instance of the dataclass out.

A recipe declares a dataclass whose fields are plain values, dataclasses (often a mixin's `Config`) or `Optional`
dataclasses (a part that can be switched off). `parse` layers, later wins: the field defaults, the recipe's own YAML,
every `--config FILE` in order, then the overrides in order. jsonargparse converts and checks the values and writes
`--help` from the annotations and the text under each field; the tree, the layers and the messages are ours, so that a
wrong key names the nearest right one and nothing in a file can name code to run.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from everbatch.config.deepspeed import deepspeed_config
from everbatch.config.strict_yaml import dump_text, load_file, load_text
from everbatch.config.tree import ABSENT, ConfigError, Group, Leaf, grow, parser, speaks_text, tree
from everbatch.config.words import suggestion
from everbatch.ends import tell

__all__ = ["ConfigError", "build", "deepspeed_config", "dump", "fail", "help_text", "parse", "resolved"]

T = TypeVar("T")


def parse(
    recipe: type[T], argv: Sequence[str] | None = None, *, default_yaml: str | os.PathLike[str] | None = None,
    prog: str = "recipe",
) -> T:
    """The configuration that a command line asks for.

    Accepts, in any order, `key=value`, `--key=value`, `--key value`, `--flag` for a true/false option, `--config FILE`
    (YAML or JSON, repeatable), `--print-config` and `--help`; dashes in keys stand for underscores. Files are layered
    before overrides. On bad input one line goes to stderr, from the first process of each node only, and every process
    exits with code 2; there is no traceback.

    A recipe may have a method `unused()`: paths of options that have no effect beside the others, with the reason. One of them is
    an error on the command line, and in a file where it differs from the default (a dumped file holds every option).

    Args:
        recipe: the dataclass at the root of the tree.
        argv: the arguments after the program's name; `sys.argv[1:]` when None.
        default_yaml: a file of the recipe's own, below everything the user gives.
        prog: the name that begins every message.
    """
    try:
        base = build(recipe, *([] if default_yaml is None else [load_file(default_yaml)]))
        files, overrides, asked = _split(sys.argv[1:] if argv is None else argv, tree(recipe, base))
        if "help" in asked:
            _say(help_text(recipe, base, prog=prog), sys.stdout)
            raise SystemExit(0)
        layers = [_mapping(file) for file in files]
        words = getattr(recipe, "words", {}).keys()
        overrides.sort(key=lambda layer: not layer.keys() & words)  # options win over what a word stands for, wherever they stand
        config = build(recipe, *layers, *overrides, base=base, files=len(layers))
        _refuse_unused(config, tree(recipe, base), layers, overrides)
    except ValueError as error:  # ConfigError, and what the strict loader raises
        fail(prog, str(error))
    except RecursionError:
        fail(prog, "a key or a value is nested too deep")
    if "print_config" in asked:
        _say(dump_text(resolved(config)), sys.stdout)
        raise SystemExit(0)
    return config


def build(recipe: type[T], *layers: Mapping[str, Any], base: T | None = None, files: int = 0) -> T:
    """An instance of `recipe` from nested mappings, later ones over earlier ones, over `base` or the field defaults.

    A recipe may have `words`, names and their texts, that are no options but stand for some: `recipe.meaning(word, value)` gives
    them as nested mappings, which lie right below the layer that says the word. What a word turns off stays off, but for a file
    above it, which may be of another method.

    Args:
        files: how many of the layers, the first ones, are whole files.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range, an option of what a word turned off; one line with the
            key's path.
    """
    root = tree(recipe, base)
    merged: dict[str, Any] = {}
    off: dict[str, str] = {}
    for place, layer in enumerate(layers):
        own = dict(layer)
        if place < files:
            off = {}
        for word in getattr(recipe, "words", {}):
            said = own.pop(word, None)
            if said is not None:
                if not isinstance(said, str):
                    raise ConfigError(f"{word}={said!r}, must be text")
                meaning = recipe.meaning(word, said)  # type: ignore[attr-defined]
                off = {path: f"{word}={said}" for path, value in _paths(meaning) if value is None}
                _merge(root, merged, meaning, _Claims())
        _refuse_off(own, off)
        _merge(root, merged, own, _Claims())
    return grow(root, merged)  # type: ignore[no-any-return]


def _refuse_off(layer: Mapping[str, Any], off: Mapping[str, str]) -> None:
    """Refuse options of what a word left out: taken, they would be those of something else than the word says."""
    for path, value in _paths(layer):
        above = next((part for part in off if f"{path}.".startswith(f"{part}.")), None)
        if above is not None and value is not None:
            raise ConfigError(f"{path} beside {off[above]}, which has no {above}, must be left out; or join what has it, as in "
                              f"{off[above]}+NAME")


def _refuse_unused(config: Any, root: Group, files: Sequence[Mapping[str, Any]], overrides: Sequence[Mapping[str, Any]]) -> None:
    unused: Mapping[str, str] = config.unused() if hasattr(config, "unused") else {}
    typed = {path for layer in overrides for path, _ in _paths(layer)}
    filed = {path for layer in files for path, _ in _paths(layer)}
    now, default = dict(_paths(resolved(config))), {leaf.path: leaf.default for leaf in root.leaves()}
    for path in sorted(typed | filed):
        reason = next((why for name, why in unused.items() if f"{path}.".startswith(f"{name}.")), None)
        if reason is not None and (path in typed or now.get(path) != _plain(default.get(path))):
            raise ConfigError(f"{path} has no effect here, must be left out; {reason}")


def _paths(layer: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything in nested mappings."""
    for key, value in layer.items():
        path = f"{above}{str(key).replace('-', '_')}"
        if isinstance(value, Mapping) and value:
            yield from _paths(value, f"{path}.")
        else:
            yield path, value


def resolved(config: Any) -> dict[str, Any]:
    """The whole configuration as nested plain values (JSON and YAML can hold them), every default written out.

    A dataclass may have a method `written()` that gives it with those defaults filled in that depend on other options; what a
    field's metadata names as `idle` is left out, as it must be in a file.
    """
    if hasattr(config, "written"):
        config = config.written()
    result = {}
    for field in dataclasses.fields(config):
        if field.init:
            value = _plain(getattr(config, field.name))
            for name in field.metadata.get("idle", ()) if isinstance(value, dict) else ():
                value.pop(name)
            result[field.name] = value
    return result


def dump(config: Any, path: str | os.PathLike[str]) -> None:
    """Write `resolved(config)` as YAML, atomically; `--config path` then gives the same configuration again."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(f"# Every option of this run; repeat it with --config {path.name}\n" + dump_text(resolved(config)))
    os.replace(draft, path)


def fail(prog: str, message: str) -> NoReturn:
    """End the process with code 2 and one line on stderr: of one rank, where all make the same mistake."""
    tell(prog, message, name_first=False)
    raise SystemExit(2)


def help_text(recipe: type[T], base: T | None = None, *, prog: str = "recipe") -> str:
    """What `--help` prints: every option with its type, default and the text under its field."""
    return parser(tree(recipe, base), prog).format_help()


def _say(text: str, stream: Any) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text.rstrip("\n"), file=stream, flush=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return resolved(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"configuration: {value!r} of type {type(value).__name__}, must be a plain value or a dataclass")


def _split(argv: Sequence[str], root: Group) -> tuple[list[str], list[dict[str, Any]], set[str]]:
    """Configuration files, overrides as nested mappings, and which of help and print_config were asked for."""
    files: list[str] = []
    overrides: list[dict[str, Any]] = []
    asked: set[str] = set()
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        key, equals, text = word.partition("=")
        if not key.startswith("-") and not equals:
            raise ConfigError(f"unexpected argument {word!r}, must be key=value, --key value or --config FILE")
        key = key.lstrip("-").replace("-", "_")
        if word == "-h" or key == "help":
            asked.add("help")
            continue
        if key == "print_config":
            asked.add(key)
            continue
        node = None if key == "config" else _find(root, key)
        if not equals:
            if isinstance(node, Leaf) and node.hint is bool and queue[:1] not in (["true"], ["false"]):
                text = "true"
            elif queue:
                text = queue.pop(0)
            else:
                raise ConfigError(f"{key}: a value is missing, must be --{key} VALUE or {key}=VALUE")
        if node is None:
            files.append(text)
            continue
        raw = isinstance(node, Leaf) and not node.free and speaks_text(node.hint)
        value: Any = text if raw else _value_text(key, text)
        for part in reversed(key.split(".")):
            value = {part: value}
        overrides.append(value)
    return files, overrides, asked


def _value_text(key: str, text: str) -> Any:
    try:
        return load_text(text)
    except ValueError as error:
        raise ConfigError(f"{key}={text!r}: {error}") from None


def _opened(value: Any) -> Any:
    """The contents of the file that a text names, where a group or a free tree is due; anything else as it is."""
    return load_file(value) if isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")) else value


def _mapping(path: str) -> Mapping[str, Any]:
    value = load_file(path)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path!r}: holds {type(value).__name__}, must hold keys and values")
    return value


def _find(root: Group, key: str) -> Leaf | Group:
    """The node that a dotted key names; keys below a free tree belong to the tree."""
    node: Leaf | Group = root
    for part in key.split("."):
        if isinstance(node, Leaf):
            if node.free:
                return Leaf(key, Any, ABSENT, "", free=True)
            raise _unknown(root, key)
        if part not in node.children:
            raise _unknown(root, key)
        node = node.children[part]
    return node


def _unknown(root: Group, key: str, value: Any = ABSENT) -> ConfigError:
    above: Leaf | Group | None = root
    for part in key.split("."):
        cure = above.idle.get(part) if isinstance(above, Group) else None
        if cure is not None:
            shown = "" if value is ABSENT else f"={value!r}"
            raise ConfigError(f"{key}{shown}, must be left out; {cure}")
        above = above.children.get(part) if isinstance(above, Group) else None
    meant = suggestion(key, root.paths())
    hint = f"did you mean {meant!r}?" if meant else f"known here: {', '.join(root.children)}; --help lists all"
    return ConfigError(f"unknown key {key!r}, {hint}")


class _Claims:
    """The options that one layer gives, so that none is given in two spellings: dotted and nested, dash and underscore."""

    def __init__(self) -> None:
        self._leaves: set[str] = set()
        self._above: set[str] = set()

    def add(self, path: str) -> None:
        parts = path.split(".")
        above = {".".join(parts[:n]) for n in range(1, len(parts))}
        if path in self._leaves or path in self._above or above & self._leaves:
            raise ConfigError(f"duplicate key {path!r}: it is given in two spellings")
        self._leaves.add(path)
        self._above |= above

    def add_tree(self, path: str, value: Any) -> None:
        """Every option of a free tree."""
        if not isinstance(value, Mapping):
            self.add(path)
            return
        for key, item in value.items():
            self.add_tree(f"{path}.{key}", item)


def _merge(
    root: Group, target: dict[str, Any], layer: Mapping[str, Any], claims: _Claims, group: Group | None = None,
) -> None:
    """Lay one nested mapping over another in place, checking every key against the tree."""
    group = group or root
    for raw, value in layer.items():
        if not isinstance(raw, str):
            raise ConfigError(f"unknown key {raw!r} in {group.path or 'the configuration'}, must be a word")
        name, _, rest = raw.replace("-", "_").partition(".")
        if rest:
            value = {rest: value}  # a dotted key in a file means the same as nesting
        path = f"{group.path}.{name}" if group.path else name
        node = group.children.get(name)
        if node is None:
            raise _unknown(root, f"{path}.{rest}" if rest else path, value)
        if isinstance(node, Leaf):
            if node.free:
                value = _opened(value)
                claims.add_tree(path, value)
                target[name] = _overlay(target.get(name, node.default), value)
            else:
                claims.add(path)
                target[name] = value
            continue
        value = _opened(value)
        if value is None and node.optional:
            claims.add(path)
            target[name] = None
        elif isinstance(value, Mapping):
            if target.get(name) is None:
                target[name] = {}
            _merge(root, target[name], value, claims, node)
        else:
            kinds = "keys and values, the name of a file of them" + (", or null" if node.optional else "")
            raise ConfigError(f"{path}={value!r}, must be {kinds}; its keys: {', '.join(node.children)}")


def _overlay(old: Any, new: Any) -> Any:
    """A free tree (raw DeepSpeed options, say) with another laid over it; dotted keys nest."""
    if not isinstance(new, Mapping):
        return new
    result = dict(old) if isinstance(old, Mapping) else {}
    for raw, value in new.items():
        name, _, rest = str(raw).partition(".")
        result[name] = _overlay(result.get(name), {rest: value} if rest else value)
    return result
