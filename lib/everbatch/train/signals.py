"""Signals that ask a run to end."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from everbatch.distributed import World
from everbatch.processes import end

__all__ = ["Interrupted", "StopFlag", "StopOnSignal"]


class Interrupted(KeyboardInterrupt, SystemExit):
    """`Trainer.fit` was stopped by a Ctrl-C and has written a checkpoint.

    A KeyboardInterrupt for whoever catches one; for a script that does not, an exit with code 130 and no traceback; in a
    notebook the cell ends, and the trainer is as the checkpoint is.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = 128 + signal.SIGINT

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class StopFlag:
    """Whether a run was asked to end: set by `StopOnSignal` on one rank, agreed on by all between two steps."""

    asked: bool = False
    """A signal came to this rank."""
    sign: int = 0
    """The signal; SIGINT on every rank, once they agreed, where it came to any."""
    stopped: bool = False
    """All ranks know that one was asked."""
    watched: bool = False
    """Signals come here at all."""
    slow: bool = False
    """A step takes a second or more."""
    asked_at: tuple[int, float] = (0, 0.0)
    """Step and time at which the ranks talked last."""

    def agree(self, world: World, step: int, *, now: bool = False) -> bool:
        """Whether a signal reached any rank. The answer is a collective, so it is asked for `now`, at every tenth step, and at
        every step where one takes a second or more: launchers wait half a minute."""
        due = now or world.size == 1 or self.slow or step % 10 == 0
        if self.watched and due:
            (begun, since), self.asked_at = self.asked_at, (step, time.monotonic())
            spent = time.monotonic() - since
            told = [self.asked, self.sign == signal.SIGINT, spent >= max(1, step - begun)]
            some, ctrl_c, self.slow = (bool(n) for n in world.sum(torch.tensor([float(t) for t in told])))
            self.stopped = some
            self.sign = signal.SIGINT if ctrl_c else self.sign
        return self.stopped


class StopOnSignal:
    """SIGTERM, SIGUSR1 and Ctrl-C (SIGINT) ask for a checkpoint within ten steps and an end after it.

    A second SIGTERM or SIGUSR1 that comes `GRACE_S` later or more ends the process at once. Not one that comes sooner: schedulers
    signal ranks and launcher, which passes its own on to the ranks.

    A second Ctrl-C, `TWICE_S` later or more, ends it at once with exit code 130; in an interactive session it raises
    KeyboardInterrupt. torchrun passes its second Ctrl-C on as SIGTERM, so that counts as one after a first. SIGINT is left
    alone where it was ignored, as in background jobs.

    A handler of Python's waits until the main thread is back from C, which a rank whose peer is gone never is. Hence a thread
    that looks at the time: Python writes the numbers of signals to it as they come. Windows has no SIGUSR1.
    """

    GRACE_S = 5.0
    TWICE_S = 0.25
    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
    innermost: ClassVar[StopOnSignal | None] = None
    """The one that signals come to."""

    def __init__(self, flag: StopFlag, *, active: bool = True, rank: int = 0) -> None:
        """Args: flag: what a signal sets. active: False leaves signals alone, for runs without a folder. rank: 0 says so."""
        self.flag, self.active, self.rank = flag, active, rank

    def __enter__(self) -> None:
        main = threading.current_thread() is threading.main_thread()
        quiet = getattr(signal.getsignal(signal.SIGINT), "__module__", "") == "everbatch.quiet"
        if quiet and main and not self.active:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the imports are over
        if not (main and self.active):
            return
        self.flag.watched = True
        self.ends = socket.socketpair()
        self.ends[0].settimeout(None)  # whatever socket.setdefaulttimeout says
        self.ends[1].setblocking(False)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        self.outer, StopOnSignal.innermost = StopOnSignal.innermost, self
        self.wakeup = signal.set_wakeup_fd(self.ends[1].fileno(), warn_on_full_buffer=False)
        taken = [*self.SIGNALS, *([signal.SIGINT] if signal.getsignal(signal.SIGINT) != signal.SIG_IGN else [])]
        self.before = {sign: signal.signal(sign, self._ask) for sign in taken}

    def _ask(self, sign: int, _frame: object) -> None:
        again = self.flag.asked and sign == signal.SIGINT
        if not self.flag.asked:
            self.flag.sign = sign
        self.flag.asked = True
        if again and hasattr(sys, "ps1"):
            raise KeyboardInterrupt

    def _watch(self) -> None:
        first, ctrl_c = math.inf, False
        while sign := self.ends[0].recv(1)[0]:
            since = time.monotonic() - first
            again = sign == signal.SIGINT or (sign in self.SIGNALS and ctrl_c)
            if again and since >= self.TWICE_S and not hasattr(sys, "ps1"):
                self._say("stopped at once, without a checkpoint")
                end(128 + signal.SIGINT)
            if sign == signal.SIGINT and math.isinf(since):
                self._say("stopping: a checkpoint comes within ten steps; a second Ctrl-C ends at once, without one")
            if sign in self.SIGNALS and since >= self.GRACE_S:
                ctypes.pythonapi.PyOS_setsig(sign, None)  # SIG_DFL; signal.signal() is for the main thread
                signal.raise_signal(sign)
            elif sign in (*self.SIGNALS, signal.SIGINT):
                first, ctrl_c = min(first, time.monotonic()), ctrl_c or sign == signal.SIGINT

    def _say(self, text: str) -> None:
        """A line from rank 0, whatever the main thread is at; a reader that is gone misses it."""
        if self.rank == 0:
            with contextlib.suppress(OSError):
                os.write(2, f"{text}\n".encode())

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
        asked = cls.innermost is not None and signal.SIGINT in cls.innermost.before
        while cls.innermost is not None:
            cls.innermost._put_back()
        if asked:  # a Ctrl-C reaches every process of a terminal's group; the trainer decides, and its loaders follow it
            signal.signal(signal.SIGINT, signal.SIG_IGN)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=StopOnSignal._forked)
