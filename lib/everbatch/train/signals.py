"""Signals that ask a run to end."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from everbatch.train.trainer import Trainer

__all__ = ["StopOnSignal"]


class StopOnSignal:
    """SIGTERM and SIGUSR1 ask for a checkpoint within ten steps and an end after it; one that comes `GRACE_S` later or more ends
    the process at once. Not one that comes sooner: schedulers signal ranks and launcher, which passes its own on to the ranks.

    A handler of Python's waits until the main thread is back from C, which a rank whose peer is gone never is. Hence a thread
    that looks at the time: Python writes the numbers of signals to it as they come. Windows has no SIGUSR1.
    """

    GRACE_S = 5.0
    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
    innermost: ClassVar[StopOnSignal | None] = None
    """The one that signals come to."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        if self.trainer.folder is None or threading.current_thread() is not threading.main_thread():
            return
        self.trainer._signals = True
        self.ends = socket.socketpair()
        self.ends[0].settimeout(None)  # whatever socket.setdefaulttimeout says
        self.ends[1].setblocking(False)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        self.outer, StopOnSignal.innermost = StopOnSignal.innermost, self
        self.wakeup = signal.set_wakeup_fd(self.ends[1].fileno(), warn_on_full_buffer=False)
        self.before = {sign: signal.signal(sign, self._ask) for sign in self.SIGNALS}

    def _ask(self, sign: int, _frame: object) -> None:
        self.trainer._stop_asked = True

    def _watch(self) -> None:
        first = math.inf
        while sign := self.ends[0].recv(1)[0]:
            if sign in self.SIGNALS and time.monotonic() - first >= self.GRACE_S:
                ctypes.pythonapi.PyOS_setsig(sign, None)  # SIG_DFL; signal.signal() is for the main thread
                signal.raise_signal(sign)
            elif sign in self.SIGNALS:
                first = min(first, time.monotonic())

    def __exit__(self, *error: object) -> None:
        if StopOnSignal.innermost is self:
            self._put_back()
            self.ends[1].send(b"\0")
            self.thread.join()
            for end in self.ends:
                end.close()

    def _put_back(self) -> None:
        for sign, handler in self.before.items():
            signal.signal(sign, handler)
        signal.set_wakeup_fd(self.wakeup)
        StopOnSignal.innermost = self.outer

    @classmethod
    def _forked(cls) -> None:
        """In a forked child, such as one that loads data: Python would write its signals to the parent's thread."""
        while cls.innermost is not None:
            cls.innermost._put_back()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=StopOnSignal._forked)
