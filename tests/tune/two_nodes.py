"""Two Ray nodes on this machine, as two machines would have them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import ENVIRONMENT, free_port


@dataclass
class Nodes:
    """The two and their address."""

    address: str
    head: subprocess.Popen[bytes]
    other: subprocess.Popen[bytes]

    def kill_other(self) -> None:
        """As a machine that loses its power: all of the second node's processes at once."""
        os.killpg(self.other.pid, signal.SIGKILL)
        self.other.wait(timeout=20)


@contextmanager
def two_nodes(cpus: int = 1) -> Iterator[Nodes]:
    """A head and one more node, each a session of its own; both are ended by their process ids, never by `ray stop`."""
    ray = str(Path(sys.executable).with_name("ray"))
    environment = {**os.environ, **ENVIRONMENT, "RAY_AUTH_MODE": "disabled"}
    with tempfile.TemporaryDirectory(prefix="rn") as short:  # sockets live in it, whose paths must be short
        port = free_port()
        log = Path(short) / "log"
        common = ["--block", f"--num-cpus={cpus}", "--object-store-memory=80000000", "--disable-usage-stats"]

        def start(*words: str) -> subprocess.Popen[bytes]:
            with open(log, "ab") as out:
                return subprocess.Popen([ray, "start", *words, *common], env=environment, stdin=subprocess.DEVNULL, stdout=out,
                                        stderr=subprocess.STDOUT, start_new_session=True)

        begun = [start("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={short}")]
        try:
            _until(log, "Ray runtime started", 1, begun[0])
            begun.append(start(f"--address=127.0.0.1:{port}"))
            _until(log, "Ray runtime started", 2, begun[1])
            yield Nodes(f"127.0.0.1:{port}", *begun)
        finally:
            for process in reversed(begun):
                process.terminate()
            for process in reversed(begun):
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _until(log: Path, text: str, count: int, process: subprocess.Popen[bytes], limit_s: float = 90.0) -> None:
    end = time.monotonic() + limit_s
    while log.read_text(errors="replace").count(text) < count:
        assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")[-3000:]
        time.sleep(0.1)
