"""Several runs of one script at once, each a process of its own with a log of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from everbatch.config.layers import dump
from everbatch.errors import check
from everbatch.processes import end_with_parent

__all__ = ["FOLLOWS", "follow", "side_by_side"]

LAUNCHED = re.compile(r"(LOCAL_)?(RANK|WORLD_SIZE)|(GROUP|ROLE|MASTER|TORCHELASTIC)_.*")
"""Names of what a launcher sets for its ranks."""
FOLLOWS = "EVERBATCH_FOLLOWS"
"""Process that a run which was started here ends with."""
POLL_S = 0.1
STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}
"""How a run ends on a signal, with a checkpoint or before there was anything to keep."""


def side_by_side(
    waiting: Mapping[int, Any], at_once: int, script: Path, say: Callable[[str], None], *, signals: bool,
) -> int:
    """Run `script` for each seed, so many at a time, and wait for all.

    A seed that fails does not stop the others. A signal is passed on to all; each writes a checkpoint then. When this process
    is killed, the runs get SIGTERM.

    Args:
        waiting: options of each seed's run; they are written to a file beside its folder, which the script is given.
        at_once: processes; each has its share of the cores and, of several GPUs, one.
        script: makes a run of `--config FILE`.
        say: told a line for each seed that ends.
        signals: whether a signal to this process is taken.

    Returns:
        The signal that stopped it; 0 for none.

    Raises:
        RuntimeError: seeds that failed, each with the last line of its log.
    """
    queue, places = list(waiting), list(range(at_once))
    running: dict[int, tuple[subprocess.Popen[bytes], int]] = {}
    failed: dict[int, str] = {}
    with _passed_on(running, active=signals) as heard:
        try:
            while running or (queue and not heard):
                while queue and places and not heard:
                    seed, place = queue.pop(0), places.pop(0)
                    running[seed] = _start(waiting[seed], seed, place, at_once, script), place
                    say(f"seed {seed} begins: its log is {_log(waiting[seed])}")
                time.sleep(POLL_S)
                for seed in [s for s, (process, _) in running.items() if process.poll() is not None]:
                    process, place = running.pop(seed)
                    places.append(place)
                    _end(process.returncode, seed, waiting[seed], failed, bool(heard), say)
        finally:
            _end_all(running)
    if heard:
        say("stopped by a signal; go on with resume=true")
        return heard[-1]
    told = "; ".join(f"seed {seed}: {cause}" for seed, cause in failed.items())
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(waiting)} seeds failed ({told}); resume=true goes on with them")
    return 0


def follow() -> None:
    """In a run that was started here: end with who started it."""
    parent = os.environ.pop(FOLLOWS, None)
    if parent is not None:
        end_with_parent(signal.SIGTERM)
        check(os.getppid() == int(parent), "seeds", "whoever started this run is gone", "be there until it ends")


def _start(options: Any, seed: int, place: int, at_once: int, script: Path) -> subprocess.Popen[bytes]:
    """A run with its options in a file and what it prints in another."""
    log = _log(options)
    file = log.with_suffix(".yaml")
    dump(options, file)
    with open(log, "ab") as out:
        # A session of its own: a terminal's Ctrl-C comes once, passed on from here.
        return subprocess.Popen([sys.executable, str(script), "--config", str(file)], stdin=subprocess.DEVNULL, stdout=out,
                                stderr=subprocess.STDOUT, env=_environment(place, at_once), start_new_session=True)


def _environment(place: int, at_once: int) -> dict[str, str]:
    """A share of the cores, and one of the GPUs; nothing of a launcher, for each seed is one rank of its own."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = {name: value for name, value in os.environ.items() if not LAUNCHED.fullmatch(name)}
    found = {"OMP_NUM_THREADS": str(max(1, cores // at_once)), **given, FOLLOWS: str(os.getpid())}
    devices = torch.cuda.device_count()
    if devices > 1:
        visible = found.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
        found["CUDA_VISIBLE_DEVICES"] = visible[place % devices]
    return found


def _log(options: Any) -> Path:
    return Path(f"{options.output}.log")


def _end(code: int, seed: int, options: Any, failed: dict[int, str], stopping: bool, say: Callable[[str], None]) -> None:
    """Tell how a seed's run ended."""
    if code == 0:
        say(f"seed {seed} has ended: see {options.output}/result.json")
        return
    if stopping and code in STOPPED:
        say(f"seed {seed} was stopped")
        return
    lines = _log(options).read_text(errors="replace").strip().splitlines()
    failed[seed] = f"exit code {code}, {lines[-1] if lines else 'without a word'}"
    say(f"seed {seed} failed: {failed[seed]}; see {_log(options)}")


def _end_all(running: Mapping[int, tuple[subprocess.Popen[bytes], int]]) -> None:
    """Where this process is on its way out: ask the runs to end, and wait for their checkpoints."""
    for process, _ in running.values():
        process.terminate()
    for process, _ in running.values():
        process.wait()


@contextmanager
def _passed_on(running: Mapping[int, tuple[subprocess.Popen[bytes], int]], *, active: bool) -> Iterator[list[int]]:
    """Pass signals on to the runs inside the block; gives those that came."""
    heard: list[int] = []

    def take(sign: int, _frame: object) -> None:
        heard.append(sign)
        for process, _ in list(running.values()):
            process.send_signal(sign)

    names = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows has no SIGUSR1
    main = threading.current_thread() is threading.main_thread()
    signs = [getattr(signal, name) for name in names if hasattr(signal, name)]
    taken = [sign for sign in signs if active and main and signal.getsignal(sign) != signal.SIG_IGN]
    before = {sign: signal.signal(sign, take) for sign in taken}
    try:
        yield heard
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
