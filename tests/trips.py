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
    """What one call walked through. A hop is a call, or a return, from one file of the library to another one of it."""

    hops: int = 0
    turns: int = 0
    """Calls into another file than the call before: how often a reader who follows the calls turns to another file."""
    files: set[str] = field(default_factory=set)
    functions: set[CodeType] = field(default_factory=set)
    ways: Counter[str] = field(default_factory=Counter)
    """Calls by the two functions between which they hop; each is a return later on as well."""

    def text(self, most: int = 0) -> str:
        """One line; and the `most` frequent calls between files."""
        first = (f"{self.hops} hops between {len(self.files)} files, {len(self.functions)} functions; calls in their order "
                 f"turn to another file {self.turns} times")
        return "\n".join([first, *(f"{count:>4} {way}" for way, count in self.ways.most_common(most))])


def walk(action: Callable[[], Any]) -> Trip:
    """Run `action` and count its hops, on this thread. Frames of other libraries in between are not hops."""
    trip, last = Trip(), ""

    def note(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal last
        if event not in ("call", "return") or not _is_ours(frame):
            return
        if event == "call":
            trip.turns += last not in ("", frame.f_code.co_filename)
            last = frame.f_code.co_filename
        trip.files.add(frame.f_code.co_filename)
        trip.functions.add(frame.f_code)
        caller = frame.f_back
        if caller is not None and _is_ours(caller) and caller.f_code.co_filename != frame.f_code.co_filename:
            trip.hops += 1
            if event == "call":
                trip.ways[f"{_place(caller)} -> {_place(frame)}"] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return trip


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(LIBRARY)


def _place(frame: FrameType) -> str:
    name = frame.f_code.co_filename.removeprefix(LIBRARY).lstrip("/").removesuffix(".py")
    function = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # from Python 3.11 on
    return f"{name}:{function}"
