"""What a cell's own process does: take the cell, run it, keep what it gave or why it failed."""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import sys
import threading
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.ledger.cells import Cell, Store
from everbatch.report.recorder import versions

__all__ = ["BUSY", "FAILED", "FOUND", "record", "work"]

BUSY = 75
"""Exit code: another process runs the cell."""
FOUND = 76
"""Exit code: another process has finished it."""
FAILED = 1
"""Exit code: it raised; the cause is kept."""


def work(cell: Cell, home: Path, commit: str | None) -> None:
    """Run one cell; ends the process with 0, BUSY, FOUND or FAILED."""
    store = Store(home)
    _end_with_parent()
    torch.set_num_threads(1)
    with store.claimed(cell) as mine:
        if not mine:
            sys.exit(BUSY)
        if store.read(cell) is not None:
            sys.exit(FOUND)
        _to_log(store.path(cell, "log"))
        try:
            store.write(cell, record(cell, home, commit))
        except Exception:
            traceback.print_exc()
            store.fail(cell, traceback.format_exc())
            sys.exit(FAILED)


def record(cell: Cell, home: Path, commit: str | None) -> dict[str, Any]:
    """Run the protocol; numbers that are not finite are None: the run diverged."""
    module, _, name = cell.run.partition(":")
    protocol = getattr(importlib.import_module(module), name)
    begun, busy = time.perf_counter(), time.process_time()
    values = protocol(cell, home)
    kept = {key: value if value is not None and math.isfinite(value) else None for key, value in values.items()}
    return {
        "values": kept, "seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - busy,
        "load_average": os.getloadavg()[0], "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit, "versions": versions()}


def _to_log(path: Path) -> None:
    """What the protocol prints, and what a library says as it dies, goes to a file that stays where the cell fails."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(path, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _end_with_parent() -> None:
    """A run that is killed leaves no cell at work behind."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(FAILED)

    threading.Thread(target=watch, daemon=True).start()
