"""A trainer that grows, on every engine with real ranks: one engine in each round, all there is of it under the mark `slow`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from processes import Zygote
from rotation import When

JOBS = Path(__file__).parent / "growth_jobs.py"
HOSTS = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
LONG = ("resumed", "recipe")
"""Of which one runs in a round; all else does on the engine that is due."""
TURNS = [(host, job) for job in LONG for host in HOSTS]
ENGINES = [When(place, len(TURNS)).param(host, (job,), id=f"{host}-{job}") for place, (host, job) in enumerate(TURNS)]
WHOLE = [When(place, len(HOSTS), slow=True).param(host, LONG, id=f"{host}-all") for place, host in enumerate(HOSTS)]
"""All that there is of an engine."""
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def launch(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Results]:
    """Results of a launch; that of plain torch runs before the first, on one rank."""
    folder, found = tmp_path_factory.mktemp("growth"), dict[str, Results]()

    def run(name: str, ranks: int, *jobs: str) -> Results:
        if name not in found:
            out, store = folder / f"{name}.json", folder / "store"
            found[name] = zygote.found(JOBS, out, str(store), *jobs, ranks=ranks, limit=900)
        return found[name]

    return run


PLAIN = ("nothing:plain", "widened:plain", "resumed:plain", "leak:plain/20", "refused:plain")


def passes(results: Results, *starts: str) -> None:
    """All checks whose names begin so passed, and there are some of each."""
    for start in starts:
        mine = {key: result for key, result in results.items() if key.startswith(start)}
        assert mine, f"nothing was checked of {start}"
        for key, result in mine.items():
            assert result["passed"], f"{key}: error {result['error']:.3g}: {result['problem']}"


@pytest.mark.distributed
def test_plain(launch: Callable[..., Results]) -> None:
    passes(launch("plain", 1, *PLAIN), "nothing/", "growth/", "resumed/", "leak/", "refused/")


@pytest.mark.distributed
@pytest.mark.parametrize(("host", "long"), [*ENGINES, *WHOLE])
def test_engines(launch: Callable[..., Results], host: str, long: tuple[str, ...]) -> None:
    launch("plain", 1, *PLAIN)
    mixed = ["mixed"] if host in ("zero1", "zero2", "zero3") else []
    jobs = [f"{job}:{host}" for job in ("nothing", "widened", "refused", *long, *mixed)]
    jobs += [f"leak:{host}/{20 if long == LONG else 6}"]
    results = launch("-".join([host, *long]), 2, *jobs)
    passes(results, *(f"{check}/{host}" for check in ("nothing", "growth", "refused", "leak", *long, *mixed)))
