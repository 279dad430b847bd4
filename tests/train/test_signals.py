"""Signals that end a run: the second one also where Python does not come to its handlers, and what is put back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import pytest

from everbatch.train.signals import StopFlag, StopOnSignal
from processes import ENVIRONMENT, ROOT


def script(text: str) -> subprocess.Popen[str]:
    """A process of its own that runs this."""
    paths = os.pathsep.join((ENVIRONMENT["PYTHONPATH"], str(ROOT / "tests")))
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(text)], text=True, stdout=subprocess.PIPE,
                            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": paths})


@pytest.mark.distributed
def test_the_second_one_ends_a_rank_that_waits_for_another() -> None:
    job = script("""
        import datetime, tempfile, time
        import torch.distributed as dist
        import learning
        from everbatch.train import Trainer
        from everbatch.train.signals import StopOnSignal

        class Waiting(Trainer):
            def after_step(self, record):
                super().after_step(record)
                print("begun", flush=True)
                while not self.run.stop.asked:
                    time.sleep(0.01)
                print("asked", flush=True)
                store.wait(["never"])  # in C++, as a collective is

        StopOnSignal.GRACE_S = 0.2
        store = dist.TCPStore("127.0.0.1", 0, 1, True, timeout=datetime.timedelta(seconds=120))
        learning.trainer("plain", cls=Waiting, folder=tempfile.mkdtemp()).fit(learning.stream())
    """)
    assert job.stdout is not None
    try:
        assert job.stdout.readline() == "begun\n"
        job.send_signal(signal.SIGTERM)
        assert job.stdout.readline() == "asked\n"
        end = time.monotonic() + 20
        while job.poll() is None and time.monotonic() < end:
            time.sleep(0.3)
            job.send_signal(signal.SIGTERM)
        assert job.poll() == -signal.SIGTERM
    finally:
        job.kill()
        job.communicate()


@pytest.mark.distributed
def test_those_of_a_forked_child_are_its_own() -> None:
    job = script("""
        import os, signal
        from everbatch.train.signals import StopFlag, StopOnSignal

        StopOnSignal.GRACE_S = 0.0
        run = StopFlag()
        with StopOnSignal(run):
            for _ in range(2):
                if not (child := os.fork()):
                    signal.raise_signal(signal.SIGTERM)
                    os._exit(0)
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), run.asked)
    """)
    assert job.communicate(timeout=120)[0] == "-15 False\n" * 2 and job.returncode == 0


def test_everything_is_put_back() -> None:
    def state() -> list[Any]:
        fd = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(fd)
        return [fd, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1), threading.active_count(),
                sorted(os.listdir("/proc/self/fd")) if sys.platform == "linux" else []]

    mine = os.pipe()
    os.set_blocking(mine[1], False)
    before = signal.set_wakeup_fd(mine[1])
    try:
        kept = state()
        outer, inner = StopFlag(), StopFlag()
        with StopOnSignal(outer):
            with StopOnSignal(inner):
                signal.raise_signal(signal.SIGUSR1)
            assert (inner.asked, outer.asked) == (True, False)
            signal.raise_signal(signal.SIGTERM)
            assert outer.asked
        assert state() == kept
    finally:
        signal.set_wakeup_fd(before)
        for end in mine:
            os.close(end)


def test_nothing_is_touched_outside_the_main_thread() -> None:
    found = []

    def run() -> None:
        with StopOnSignal(StopFlag()):
            found.append(StopOnSignal.innermost)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None]
