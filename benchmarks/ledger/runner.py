"""Run the cells of a claim side by side, each in a process of its own; none twice, whoever else is at work."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.ledger.cells import Cell, Damaged, Store
from benchmarks.ledger.work import BUSY, FAILED, FOUND, work

__all__ = ["Tally", "cores", "run_cells"]

POLL = 0.5
"""Seconds between looks at cells that another process runs."""


@dataclass
class Tally:
    """How a run of cells ended."""

    ran: int = 0
    """Cells that this run finished."""
    failed: dict[Cell, str] = field(default_factory=dict)
    """Cells that were tried and failed, and why."""
    left: int = 0
    """Cells that the time did not suffice for."""

    def add(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(self.ran + other.ran, {**self.failed, **other.failed}, self.left + other.left)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_cells(cells: Sequence[Cell], store: Store, *, jobs: int, end: float = float("inf"),
              say: Callable[[str], None] = print) -> Tally:
    """Run what is not there yet, in order.

    Args:
        cells: those wanted; finished ones cost a look at their file.
        store: where they are kept.
        jobs: processes side by side, of one thread each.
        end: no cell is started after this time of `time.monotonic`.
        say: told a line for each cell that ends.
    """
    tally, queue = Tally(), deque(_wanted(cells, store, say))
    running: dict[BaseProcess, Cell] = {}
    commit = _commit()
    with _one_thread():
        context = multiprocessing.get_context("forkserver")  # a server imports torch once; a cell is a fork of it
        context.set_forkserver_preload(_preload(queue))
        try:
            while queue or running:
                _start(queue, running, store, context, jobs, end, commit)
                if not running and time.monotonic() >= end:
                    break
                _collect(queue, running, store, tally, say)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.join()
    tally.left = len(queue)
    return tally


def _preload(cells: Iterable[Cell]) -> list[str]:
    """Modules that the server imports: of the protocols, and what their package says that cells need."""
    modules = sorted({cell.run.partition(":")[0] for cell in cells})
    packages = sorted({f"{module.rpartition('.')[0]}.warm" for module in modules if "." in module})
    return [work.__module__, *modules, *packages]


def _wanted(cells: Sequence[Cell], store: Store, say: Callable[[str], None]) -> Iterator[Cell]:
    """Cells without a record; a damaged one is moved aside and counts as none."""
    for cell in dict.fromkeys(cells):
        try:
            record = store.read(cell)
        except Damaged as error:
            say(f"damaged: {error}; it is in {store.set_aside(cell).name} now, and its cell is run again")
            record = None
        if record is None:
            yield cell


def _start(queue: deque[Cell], running: dict[BaseProcess, Cell], store: Store, context: Any, jobs: int, end: float,
           commit: str | None) -> None:
    """Fill the free places; what another run has at work is passed over."""
    for _ in range(len(queue)):
        if len(running) >= jobs or time.monotonic() >= end:
            return
        cell = queue.popleft()
        if store.at_work(cell):
            queue.append(cell)
            continue
        process = context.Process(target=work, args=(cell, store.home, commit))
        process.start()
        running[process] = cell


def _collect(queue: deque[Cell], running: dict[BaseProcess, Cell], store: Store, tally: Tally,
             say: Callable[[str], None]) -> None:
    """Wait for an end, and say how it came."""
    wait([process.sentinel for process in running], timeout=POLL) if running else time.sleep(POLL)
    for process in [p for p in running if not p.is_alive()]:
        process.join()
        cell = running.pop(process)
        if process.exitcode == BUSY:
            queue.append(cell)
            continue
        if process.exitcode == FOUND:
            say(f"{cell.label}  finished by another run")
            continue
        record = store.read(cell) if process.exitcode == 0 else None
        if record is not None:
            tally.ran += 1
            say(f"{cell.label}  {_shown(record['values'])}  {record['seconds']:.0f} s")
            continue
        cause = _cause(process.exitcode, cell, store)
        tally.failed[cell] = cause
        say(f"{cell.label}  failed: {cause.strip().splitlines()[-1]}; see {store.path(cell, 'failed.json')}")


def _cause(code: int | None, cell: Cell, store: Store) -> str:
    """Why a cell failed: its exception, or how its process ended and what it said last."""
    if code != FAILED or store.failure(cell) is None:
        log = store.path(cell, "log")
        last = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        ended = f"killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        store.fail(cell, f"{last}\nits process was {ended}".strip())
    return store.failure(cell) or ""


def _shown(values: Mapping[str, float | None]) -> str:
    return "  ".join(f"{name} {'none' if value is None else f'{value:.4g}'}" for name, value in values.items())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Cells are processes of one thread; what they inherit says so before they load torch."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _commit() -> str | None:
    """Of the checkout, with a plus where files differ from it; None outside one."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"], cwd=folder,
                               capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None

