"""Runs a function in several gloo processes and brings back the arrays each of them returned."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from golden.comparison import Array

__all__ = ["on_ranks"]

LIMIT_S = 180.0
"""For all of it; starting a process means importing torch."""


def on_ranks(target: Callable[[Path, int, int], dict[str, Array]], path: Path, world: int) -> list[dict[str, Array]]:
    """`target(path, rank, world)` of each rank, in rank order.

    Raises:
        RuntimeError: a rank raised, died, or had not finished after `LIMIT_S` seconds; no process is left then.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A server imports torch once and forks every rank; without effect where one runs already.
        multiprocessing.set_forkserver_preload(["torch", "golden.families"])
        context = start_processes(  # type: ignore[no-untyped-call]
            _join, args=(target, path, world, folder), nprocs=world, join=False, start_method="forkserver")
        assert context is not None
        try:
            deadline = time.monotonic() + LIMIT_S
            while not context.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{world} ranks had not finished after {LIMIT_S:g} s")
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise RuntimeError(f"rank {error.error_index}: {str(error).strip().splitlines()[-1]}") from error
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        results = []
        for rank in range(world):
            with np.load(f"{folder}/{rank}.npz", allow_pickle=False) as archive:
                results.append({key: archive[key] for key in archive.files})
        return results


def _join(
    rank: int, target: Callable[[Path, int, int], dict[str, Array]], path: Path, world: int, folder: str,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
                            timeout=timedelta(seconds=60))
    np.savez(f"{folder}/{rank}.npz", **target(path, rank, world))  # type: ignore[arg-type]
    dist.barrier()
    dist.destroy_process_group()
