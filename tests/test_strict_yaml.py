"""The strict loader: YAML 1.2 scalars, no duplicates, no objects, and a dumper that it reads back exactly."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any

import pytest

from everbatch.config.strict_yaml import dump_text, load_file, load_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1.", 1.0), (".5", 0.5), ("-.5", -0.5), ("1_000", 1000), ("010", 10), ("-3", -3),
        ("1e5", 1e5), (".inf", math.inf), ("true", True), ("False", False), ("~", None), ("null", None), ("", None),
        ("no", "no"), ("on", "on"), ("2024-01-01", "2024-01-01"), ("1:30", "1:30"),
        ("0x10", "0x10"), ("'1e-3'", "1e-3"), ("-", "-"),
        ("[1, a]", [1, "a"]), ("{a: {b: 1}}", {"a": {"b": 1}}), ("<<", "<<"),
    ],
)
def test_scalars(text: str, value: object) -> None:
    if text == "-":
        text = '"-"'
    loaded = load_text(text)
    assert loaded == value and type(loaded) is type(value)
    assert load_text(dump_text({"key": value})) == {"key": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"f.yaml, line 3: duplicate key 'a'"),
        ("x: {a: 1, a: 2}", r"f.yaml, line 1: duplicate key 'a'"),
        ("a: !!python/name:os.system", r"the tag '!!python/name:os.system' is refused"),
        ("a: !custom 1", r"the tag '!custom' is refused"),
        ("? [1, 2]\n: 3", r"a key must be a plain word"),
        ("a: 1\n b: 2", r"f.yaml, line 2: "),
        ("{1: a, '1': b}", r"duplicate key '1'"),
        ("{1: a, 01: b}", r"duplicate key 1"),
        ("{1: a, 1.0: b}", r"duplicate key 1.0"),
        ("a: &a [*a]", r"f.yaml, line 1: alias 'a' stands for itself"),
        ("a: &a {b: {c: *a}}", r"alias 'a' stands for itself"),
        ("a: *b", r"undefined alias 'b'"),
        ("[" * 5000, r"f.yaml: nested too deep"),
        ("a: !!bool maybe", r"cannot be read \('maybe'\)"),
        ("a: !!int x", r"cannot be read"),
        ("a: !!float ''", r"cannot be read"),
        ("a: !!map [b]", r"cannot be read"),
        ("a: !!timestamp 2001-99-99", r"the tag '!!timestamp' is refused"),
        ("a: !!binary aaa", r"the tag '!!binary' is refused"),
        ("a: !!set {b}", r"the tag '!!set' is refused"),
        ("a: " + "9" * 5000, r"cannot be read"),
        ("a: \x01", r"unacceptable character"),
        ("a: \ud800", r"unacceptable character"),
    ],
)
def test_refusals_are_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_text(text, "f.yaml")
    assert "\n" not in str(caught.value)


def bomb(levels: int) -> str:
    """Nine aliases at each level of the level before: 9 ** levels values in some fifty bytes a level."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for k in range(1, levels):
        lines.append(f"{chr(97 + k)}: &{chr(97 + k)} [{', '.join(['*' + chr(96 + k)] * 9)}]")
    return "\n".join(lines)


def test_aliases_are_counted_not_walked() -> None:
    assert load_text(bomb(3))["c"][8][8][8] == "x"
    assert load_text("a: &x {b: 1}\nc: *x") == {"a": {"b": 1}, "c": {"b": 1}}
    began = time.process_time()
    with pytest.raises(ValueError, match=r"f.yaml, line 5: aliases stand for more than 10000 values"):
        load_text(bomb(9), "f.yaml")
    assert time.process_time() - began < 0.5
    assert len(load_text("a: [" + "1, " * 20_000 + "]")["a"]) == 20_000  # as many that are written out are read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', r"c.json: duplicate key 'a'"), ("{", r"c.json, line 1: "),
        ('{"a": ' + "[" * 200_000, r"c.json: nested too deep"), ('{"a": ' + "9" * 5000 + "}", r"c.json: a value that cannot"),
    ],
)
def test_json_refusals_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_file(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["c.json", "c.yaml"])
def test_a_byte_order_mark_is_skipped(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert load_file(tmp_path / name) == {"a": 1}


LETTERS = [*"aB \t\n\r:#-?'\"\\{}[],&*!|>%@`01_.e~x+<=", "\0", "\x1b", "\x7f", "\x85", "\xa0", "\xad", "\u2028",
           "\u2029", "\ufeff", "\ud800", "\ue000", "\ufffe", "\uffff", "\U0001f600"]
WORDS = ["on", "off", "yes", "no", "null", "~", "true", "1_000", "1e3", "0x10", "010", ".inf", ".nan", "-", ".", "", "=", "<<",
         "---", "...", "? a", "a: b", "# c", " lead", "trail ", "x" * 5000, "a " * 3000, "k" * 200]


def tree(r: random.Random, depth: int = 0) -> Any:
    kind = r.random()
    if depth < 4 and kind < 0.25:
        return {text(r): tree(r, depth + 1) for _ in range(r.randrange(4))}
    if depth < 4 and kind < 0.45:
        return [tree(r, depth + 1) for _ in range(r.randrange(4))]
    number = r.random() * 10 ** r.randrange(-300, 300)
    return r.choice([text(r), text(r), r.randrange(-(10**20), 10**20), number, True, None, math.inf, -math.inf, -0.0, 1e16])


def text(r: random.Random) -> str:
    return r.choice(WORDS) if r.random() < 0.3 else "".join(r.choice(LETTERS) for _ in range(r.randrange(12)))


def test_what_is_dumped_loads_as_the_same_value() -> None:
    for seed in range(400):
        r = random.Random(seed)
        value = {text(r): tree(r) for _ in range(1 + r.randrange(4))}
        assert repr(load_text(dump_text(value))) == repr(value), seed  # repr tells 1 from 1.0 and True
