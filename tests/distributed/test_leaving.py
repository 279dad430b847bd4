"""What a rank does between its last step and the end of Python."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from everbatch.distributed import _settle

SET_NAME = 15
"""prctl's PR_SET_NAME."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_waits_for_threads_that_still_run() -> None:
    """Threads at work without the GIL: one under the name of gloo's is waited for, up to the limit; another is not."""
    stop = {name: threading.Event() for name in ("pt_gloo_runloop", "another")}
    started, ended = threading.Semaphore(0), set()

    def work(name: str) -> None:
        ctypes.CDLL(None).prctl(SET_NAME, name.encode())
        started.release()
        block = bytes(20_000_000)
        while not stop[name].is_set():
            hashlib.sha256(block)
        ended.add(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in stop]
    for thread in threads:
        thread.start()
        started.acquire()
    begin = time.monotonic()
    _settle(limit_s=0.1)
    assert time.monotonic() - begin >= 0.1 and not ended
    threading.Timer(0.2, stop["pt_gloo_runloop"].set).start()
    _settle(limit_s=20.0)
    assert ended == {"pt_gloo_runloop"}
    stop["another"].set()
    for thread in threads:
        thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.distributed
def test_every_rank_waits_whoever_made_its_group() -> None:
    script = """
        import atexit, ctypes, hashlib, threading, time
        import torch.distributed as dist
        from everbatch.distributed import World

        def work():
            ctypes.CDLL(None).prctl(15, b"pt_gloo_runloop")
            until, block = time.monotonic() + 0.5, bytes(20_000_000)
            while time.monotonic() < until:
                hashlib.sha256(block)
            ended.append(1)

        ended = []
        atexit.register(lambda: print("at rest" if ended else "still running"))
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        World.current()
        threading.Thread(target=work, daemon=True).start()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "at rest\n", done
