"""Protocols for the ledger's tests, and a run of them that can be killed: ledger_toy.py HOME CELLS JOBS [OPTION=NUMBER]."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.ledger.cells import Cell, Store
from benchmarks.ledger.runner import run_cells


def toy(cell: Cell, home: Path) -> dict[str, float | None]:
    """Tells a file that it ran, waits for what its options name, and ends as they say."""
    with open(home / "began.txt", "a") as file:
        file.write(f"{cell.key} {os.getppid()}\n")
    if cell.seed >= cell.options.get("held", cell.seed + 1):
        until((home / "go").exists)
    until(lambda: len(runs(home)) >= cell.options.get("runs", 1))
    end = cell.options.get("end")
    if end == "raise":
        raise RuntimeError("the toy broke")
    if end == "die":
        print("the toy's last words", flush=True)
        os.kill(os.getpid(), 9)
    with open(home / "ended.txt", "a") as file:
        file.write(f"{cell.key}\n")
    by_seed = cell.options.get("by_seed", [0.0])
    value = cell.options.get("value", 0.0) + by_seed[cell.seed % len(by_seed)]
    return {"accuracy": float("nan") if end == "diverge" else value, "held_out": float(cell.held_out)}


def runs(home: Path) -> set[str]:
    """The processes that cells were started by."""
    return {line.split()[1] for line in (home / "began.txt").read_text().splitlines()}


def until(good: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not good():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.02)


def cells(count: int, **options: int) -> list[Cell]:
    """One arm under so many seeds. Options: `held`, the first seed that waits until there is a file "go"; `runs`, of which each
    must have begun a cell before one ends."""
    return [Cell(run="ledger_toy:toy", scale={}, options=options, seed=seed, label=f"toy {seed}") for seed in range(count)]


if __name__ == "__main__":
    home, count, jobs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    options = {name: int(value) for name, value in (word.split("=") for word in sys.argv[4:])}
    tally = run_cells(cells(count, **options), Store(home), jobs=jobs)
    print(f"ran {tally.ran}, failed {len(tally.failed)}, left {tally.left}")
