"""MOS on every engine with three ranks: one engine in every second round, and all under the mark `slow`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from processes import Zygote
from rotation import When

JOBS = Path(__file__).parent / "mos_jobs.py"
HOSTS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
PLACES = [*((host, "merging") for host in HOSTS), ("zero1", "run")]
"""What runs by default, in half of the rounds: the jobs that take a few seconds of a processor."""
TURNS = [When(2 * place, 2 * len(PLACES)).param([host], (job,), id=f"{host}-{job}") for place, (host, job) in enumerate(PLACES)]
CHECKS = {"run": ("parity", "rows", "skipped", "visible", "archive", "retrieval", "resumed"), "merging": ("merging", "visible"),
          "grown": ("grown",), "half": ("half",)}
Results = dict[str, dict[str, Any]]


def known(host: str, job: str) -> bool:
    """Whether an engine has this job."""
    return job != "half" or host.startswith("zero")


@pytest.fixture(scope="module")
def launch(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Results]:
    """Results of a launch; where runs are compared with one process, that one comes first."""
    folder = tmp_path_factory.mktemp("mos")

    def found(hosts: list[str], jobs: tuple[str, ...]) -> Results:
        store, out = folder / "store", folder / "found.json"
        if "run" in jobs:
            alone: Results = zygote.found(JOBS, folder / "plain.json", str(store), "run:plain", ranks=1, limit=300)
            assert all(result["passed"] for result in alone.values()), alone
        names = [f"{job}:{host}" for job in jobs for host in hosts if known(host, job)]
        return zygote.found(JOBS, out, str(store), *names, ranks=3, limit=900)

    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("hosts", "jobs"), [*TURNS, pytest.param(list(HOSTS), tuple(CHECKS), id="all", marks=pytest.mark.slow)])
def test_engines(launch: Callable[..., Results], hosts: list[str], jobs: tuple[str, ...]) -> None:
    results = launch(hosts, jobs)
    for host in hosts:
        for check in {check for job in jobs if known(host, job) for check in CHECKS[job]}:
            mine = {key: result for key, result in results.items() if key.startswith(f"{check}/{host}")}
            assert mine, f"nothing was checked of {check} on {host}"
            for key, result in mine.items():
                assert result["passed"], f"{key}: error {result['error']:.3g}: {result['problem']}"
