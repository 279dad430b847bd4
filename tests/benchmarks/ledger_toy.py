"""Protocols for the ledger's tests, and a run of them that can be killed: python ledger_toy.py HOME CELLS JOBS SECONDS."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from benchmarks.ledger.cells import Cell, Store
from benchmarks.ledger.runner import run_cells


def toy(cell: Cell, home: Path) -> dict[str, float | None]:
    """Tells a file that it ran, takes its time, and ends as its options say."""
    with open(home / "began.txt", "a") as file:
        file.write(f"{cell.key} {os.getpid()}\n")
    time.sleep(cell.options.get("seconds", 0.0))
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


def cells(count: int, seconds: float = 0.0) -> list[Cell]:
    """One arm under so many seeds."""
    options = {"seconds": seconds}
    return [Cell(run="ledger_toy:toy", scale={}, options=options, seed=seed, label=f"toy {seed}") for seed in range(count)]


if __name__ == "__main__":
    home, count, jobs, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    tally = run_cells(cells(count, seconds), Store(home), jobs=jobs)
    print(f"ran {tally.ran}, failed {len(tally.failed)}, left {tally.left}")
