"""A stream on several ranks: actors in the trial's placement group, new ones for each attempt; none outlives its stream."""

from __future__ import annotations

import importlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["unit_on_ranks"]

START_S, POLL_S, DEATH_S, TRIES = 120.0, 0.2, 10.0, 3
CLASH = ("EADDRINUSE", "address already in use", "Address already in use")


class Worker:
    """One rank. Nothing heavy is imported before it runs."""

    def address(self) -> tuple[str, int]:
        """Of rank 0: a port that is free on its own node."""
        ray: Any = importlib.import_module("ray")
        with socket.socket() as found:
            found.bind(("", 0))
            port: int = found.getsockname()[1]
            return ray.util.get_node_ip_address(), port

    def node(self) -> str:
        """Where it is."""
        ray: Any = importlib.import_module("ray")
        found: str = ray.get_runtime_context().get_node_id()
        return found

    def check(self, data: str, data_sha256: str, seal: str | None) -> None:
        """As a trial's own process does."""
        from everbatch.tune.check import check_npz

        check_npz(Path(data), data_sha256, seal)

    def run(self, env: Mapping[str, str], cpus: int, job: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of the stream; every rank returns its unit."""
        os.environ.update(env)
        import torch

        torch.set_num_threads(cpus)
        from everbatch.tune.stream import unit

        return unit(**{**job, "folder": Path(job["folder"])})


def unit_on_ranks(trial: Any, key: str, order: int, folder: Path, seconds: float, late: dict[str, Any]) -> dict[str, Any]:
    """The unit of a stream that `trial.ranks` actors train.

    Args:
        trial: an `everbatch.tune.trial.Trial`. seconds: that are left of its time. late: the unit of a stream that takes longer.

    Raises:
        RuntimeError: a rank died; Tune then starts the trial again.
    """
    end = time.monotonic() + seconds
    for attempt in range(TRIES):
        row = _attempt(trial, key, order, folder, end)
        if row is None:
            return late
        clash = any(word in row.get("cause", "") for word in CLASH)
        if not clash or attempt + 1 == TRIES:
            return row
    raise AssertionError("not reached")


def _attempt(trial: Any, key: str, order: int, folder: Path, end: float) -> dict[str, Any] | None:
    ray: Any = importlib.import_module("ray")
    groups: Any = importlib.import_module("ray.util.placement_group")
    strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
    group = groups.get_current_placement_group()
    places = [strategies.PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(trial.ranks)]
    actor = ray.remote(Worker)
    workers = [actor.options(num_cpus=trial.cpus, num_gpus=trial.gpus, max_restarts=0, scheduling_strategy=place).remote()
               for place in places]
    try:
        host, port = ray.get(workers[0].address.remote(), timeout=START_S)
        nodes = ray.get([worker.node.remote() for worker in workers], timeout=START_S)
        ray.get([worker.check.remote(trial.data, trial.data_sha256, trial.seal) for worker in workers], timeout=START_S)
        job = {"key": key, "options": trial.options, "increments": trial.increments, "order": order, "data": trial.data,
               "folder": str(folder), "ranks": trial.ranks}
        left = [worker.run.remote(_env(rank, nodes, host, port), trial.cpus, job) for rank, worker in enumerate(workers)]
        return _polled(ray, left, end)
    finally:
        for worker in workers:
            ray.kill(worker)


def _env(rank: int, nodes: list[str], host: str, port: int) -> dict[str, str]:
    """What torchrun would set; local ranks count on each node by itself."""
    local = [other for other in range(len(nodes)) if nodes[other] == nodes[rank]]
    found = {"RANK": rank, "WORLD_SIZE": len(nodes), "LOCAL_RANK": local.index(rank), "LOCAL_WORLD_SIZE": len(local),
             "MASTER_ADDR": host, "MASTER_PORT": port}
    return {name: str(value) for name, value in found.items()}


def _polled(ray: Any, left: list[Any], end: float) -> dict[str, Any] | None:
    """Units of all ranks as they come: the first that failed ends it, as the others may wait for it forever; None: too late."""
    rows: list[dict[str, Any]] = []
    while left:
        done, left = ray.wait(left, timeout=POLL_S)
        rows += ray.get(done)  # raises where a rank died
        failed = next((row for row in rows if "failed" in row), None)
        if failed is not None:
            if failed["failed"] == "error":  # maybe of a connection to a rank that was killed, which Ray tells a moment later
                ray.get(ray.wait(left, num_returns=len(left), timeout=DEATH_S)[0] if left else [])
            return failed
        if left and time.monotonic() > end:
            return None
    first = rows[0]
    return {**first, "cpu_seconds": round(sum(row["cpu_seconds"] for row in rows), 3)}
