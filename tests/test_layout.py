"""The house: imports go one way, typing and lazy ones too, and no file is long."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

from processes import ROOT

PACKAGE = ROOT / "lib" / "everbatch"
MOST_LINES = 400
FLOORS = (
    ("errors", "version", "quiet", "moved", "seeds", "processes", "rows"), ("distributed",), ("ends",), ("config",),
    ("declared", "contract", "methods"), ("checkpoint", "report", "nn", "problems"), ("engines",), ("objective",), ("optim",),
    ("data", "metrics"), ("evaluate",), ("train",), ("composition",), ("integrations",), ("experiment",), ("tune",), ("cli",))
"""Rooms from the ground up: each imports from below, and from its own floor."""


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imports() -> dict[str, set[str]]:
    """What each module imports of the package, wherever in the file it does."""
    known, graph = modules(), defaultdict(set)
    for name, tree in known.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in known}
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{name}: a relative import, which this test does not follow"
                for alias in node.names:
                    below = f"{node.module}.{alias.name}"
                    graph[name] |= {below} if below in known else {node.module} & known.keys()
    return {name: targets - {name} for name, targets in graph.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other, by taking away what imports nothing that is left."""
    left = {name: set(targets) for name, targets in graph.items()}
    for target in [t for targets in graph.values() for t in targets]:
        left.setdefault(target, set())
    reach = {name: _reached(left, name) for name in left}
    found = {frozenset({name, *(other for other in reach[name] if name in reach[other])})
             for name in left if name in reach[name]}
    return sorted(sorted(group) for group in found)


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        name = ahead.pop()
        if name not in seen:
            seen.add(name)
            ahead += graph[name]
    return seen


def floor(name: str) -> int:
    """Of a module; the package itself, which imports lazily what users ask for, stands on top."""
    room = name.split(".")[1] if "." in name else ""
    found = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert found or not room, f"{name}: its room is on no floor, must be in FLOORS"
    return found[0] if found else len(FLOORS)


def test_circles_are_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}, "d": {"a"}}) == []


def test_no_circle_of_imports() -> None:
    graph = imports()
    assert len(graph) > 100 and sum(map(len, graph.values())) > 400
    assert circles(graph) == []


def test_rooms_import_from_below() -> None:
    up = [f"{name} imports {target}" for name, targets in imports().items() for target in targets
          if floor(target) > floor(name)]
    assert up == []


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in Path(PACKAGE).rglob("*.py")}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}
