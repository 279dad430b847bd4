"""The strict loader: YAML 1.2 scalars, no duplicates, no objects, and a dumper that it reads back exactly."""

from __future__ import annotations

import math

import pytest

from everbatch.strict_yaml import dump_text, load_text


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
    ],
)
def test_refusals_are_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_text(text, "f.yaml")
    assert "\n" not in str(caught.value)
