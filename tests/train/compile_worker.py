"""Runs with compile=true, on two ranks: OUT.json HOST...; see test_compile.py."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from test_compile import BARE, SAMS, counted, difference, net

import learning
from everbatch.distributed import init


def found(host: str) -> dict[str, Any]:
    """Graphs of a bare optimizer's run and of SAM's, and how far weights are from those of a run without graphs."""
    result: dict[str, Any] = {}
    for name, optimizer in (("bare", BARE), ("sam", SAMS)):
        runs = []
        with counted() as graphs:
            for compiled in (True, False):
                t = learning.trainer(host, model=net(), cls=learning.Trainer, optimizer=optimizer, compile=compiled)
                t.fit(learning.stream())
                runs.append(t)
                result[f"{name}/{compiled}"] = len(graphs)
        result[f"{name}/difference"] = difference(*runs)
    return result


def refused(host: str) -> str:
    try:
        learning.trainer(host, model=net(), cls=learning.Trainer, optimizer=BARE, compile=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    warnings.simplefilter("ignore")  # of DeepSpeed's
    logging.disable(logging.WARNING)
    world = init("cpu")
    results = {host: refused(host) if host == "zero3" else found(host) for host in sys.argv[2:]}
    if world.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    world.barrier()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's threads outlive the group


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
