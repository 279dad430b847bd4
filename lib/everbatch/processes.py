"""How a process ends: with what it started, and with the one that started it."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["at_end", "end", "end_children", "end_with_parent", "follow_trainer"]

PR_SET_PDEATHSIG = 1
_last: list[Callable[[], Any]] = []


def at_end(action: Callable[[], Any]) -> None:
    """Call `action` when the process ends by itself, also by `end`, which runs no exit handler of Python's."""
    _last.append(action)
    atexit.register(action)


def end(code: int) -> NoReturn:
    """End this process at once, and what it started. Not `sys.exit`: tearing down a process group may wait for ranks that never
    come, and multiprocessing for a child that was stopped."""
    for action in _last:
        with contextlib.suppress(Exception):  # the store may be gone already; what is told is told
            action()
    end_children()
    with contextlib.suppress(OSError, ValueError):  # a reader that is gone
        sys.stdout.flush()
    os._exit(code)


def end_children() -> None:
    """Kill everything that this process started, down to the last grandchild and stopped ones too; needs Linux's /proc.

    Only multiprocessing's tracker of shared memory is let go on instead: it clears up and ends when the others have."""
    from multiprocessing import resource_tracker

    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):  # it has ended since
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, grown = {os.getpid()}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        grown, found = bool(more), found | more
    for pid in found - {os.getpid()}:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGCONT if pid == tracker else signal.SIGKILL)


def end_with_parent(sign: int | None = None) -> None:
    """Have the kernel send this process `sign` (SIGKILL) when the thread that started it ends, however that comes about; on
    Linux only."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL if sign is None else sign)


def follow_trainer(_worker: int = 0) -> None:
    """In a process that works for a trainer: it ends with the trainer, and a Ctrl-C is the trainer's to hear."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
