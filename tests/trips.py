"""How far a reader walks through the library in one call: its files, in the order in which Python enters and leaves them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import everbatch

LIBRARY = str(Path(everbatch.__file__).resolve().parent)


@dataclass
class Trip:
    """What one call walked through, as a reader does who follows every call, and goes on where it returns.

    A hop is a change of file between two events that follow each other, each the begin or the end of a function of the library.
    What other libraries run in between is not counted.
    """

    hops: int = 0
    turns: int = 0
    """The same of the begins alone: calls into another file than the call before."""
    files: set[str] = field(default_factory=set)
    functions: set[CodeType] = field(default_factory=set)
    ways: Counter[str] = field(default_factory=Counter)
    """Hops by the two functions between which they are."""

    def text(self, most: int = 0) -> str:
        """One line; and the `most` frequent hops."""
        first = (f"{self.hops} hops between {len(self.files)} files, {len(self.functions)} functions; calls in their order "
                 f"turn to another file {self.turns} times")
        return "\n".join([first, *(f"{count:>4} {way}" for way, count in self.ways.most_common(most))])


def walk(action: Callable[[], Any]) -> Trip:
    """Run `action` and count its hops, on this thread."""
    trip = Trip()
    last: CodeType | None = None
    called = ""

    def note(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal last, called
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(LIBRARY):
            return
        trip.files.add(code.co_filename)
        trip.functions.add(code)
        if last is not None and last.co_filename != code.co_filename:
            trip.hops += 1
            trip.ways[f"{_place(last)} -> {_place(code)}"] += 1
        last = code
        if event == "call":
            trip.turns += called not in ("", code.co_filename)
            called = code.co_filename

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return trip


def _place(code: CodeType) -> str:
    name = code.co_filename.removeprefix(LIBRARY).lstrip("/").removesuffix(".py")
    function = getattr(code, "co_qualname", code.co_name)  # from Python 3.11 on
    return f"{name}:{function}"
