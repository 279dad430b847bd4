"""The trainer on every engine with real ranks: resumed, killed, moved to other numbers of ranks, divided differently.

Each launch is forked once and does many checks; the tests read what it found.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from processes import Zygote, torchrun

WORKER = Path(__file__).parent / "worker.py"
ENDS = (5, 9, 23)
SHARDED = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
ROUNDED = ("ddp", "fsdp2", "zero1", "zero3")
"""Engines for what is to rounding, or about the trainer more than the engine."""

LAUNCHES: dict[str, tuple[int, list[str]]] = {
    "one": (1, [f"resume:{h}" for h in ("plain", *SHARDED)] + ["leave:ddp", "leave:plain", "bad_numbers:plain"]
            + [f"invariance:{h}" for h in ROUNDED]),
    "two": (2, [f"resume:{h}" for h in SHARDED] + [f"invariance:{h}" for h in ROUNDED]
            + ["leave:ddp", "leave:zero2", "leave:zero3", "enter:1-ddp/ddp", "enter:1-plain/zero2", "enter:2-zero3/zero1"]
            + [f"evaluation:{h}" for h in ("ddp", "fsdp2", "zero3")] + [f"bad_numbers:{h}" for h in SHARDED]
            + [f"accumulation:{h}" for h in ROUNDED] + [f"half:{h}" for h in ("ddp", "fsdp2", "zero2-bf16")]
            + ["disagreement", "refused"]),
    "one again": (1, ["enter:2-zero2/plain", "enter:2-ddp/ddp"]),
    "three": (3, ["enter:2-zero2/zero3", "enter:2-ddp/fsdp2"]),
}
"""Ranks and jobs, in this order: later launches go on from what earlier ones left."""
NEEDS = {"two": ["one"], "one again": ["two"], "three": ["two"]}

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def launch(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Results]:
    """Results of a launch by name; runs it, and what it needs, the first time."""
    folder, found = tmp_path_factory.mktemp("runs"), {}

    def results(name: str) -> Results:
        if name not in found:
            for before in NEEDS.get(name, []):
                results(before)
            ranks, jobs = LAUNCHES[name]
            out = folder / f"{name}.json"
            job = zygote.run(WORKER, str(out), str(folder / "store"), *jobs, ranks=ranks, limit=900)
            assert job.codes == [0] * ranks, job.err[-5000:]
            found[name] = json.loads(out.read_text())
        return found[name]

    return results


def passes(results: Results, key: str) -> None:
    assert results[key]["passed"], f"{key}: error {results[key]['error']:.3g}: {results[key]['problem']}"


@pytest.mark.distributed
@pytest.mark.parametrize("after", ENDS)
@pytest.mark.parametrize(("name", "host"), [("one", h) for h in ("plain", *SHARDED)] + [("two", h) for h in SHARDED])
def test_resumed_equals_uninterrupted(launch: Callable[[str], Results], name: str, host: str, after: int) -> None:
    passes(launch(name), f"resume/{host}/{after}")


@pytest.mark.distributed
@pytest.mark.parametrize("key", [
    "one again: enter/2-zero2/plain-1", "one again: enter/2-ddp/ddp-1", "two: enter/1-ddp/ddp-2", "two: enter/1-plain/zero2-2",
    "two: enter/2-zero3/zero1-2", pytest.param("three: enter/2-zero2/zero3-3", marks=pytest.mark.slow),
    pytest.param("three: enter/2-ddp/fsdp2-3", marks=pytest.mark.slow)])
def test_another_number_of_ranks_or_stage(launch: Callable[[str], Results], key: str) -> None:
    name, _, check = key.partition(": ")
    passes(launch(name), check)


@pytest.mark.distributed
@pytest.mark.parametrize("host", ROUNDED)
@pytest.mark.parametrize("check", ["same_seed", "invariance", "accumulation"])
def test_division_of_the_batch_does_not_matter(launch: Callable[[str], Results], check: str, host: str) -> None:
    passes(launch("two"), f"{check}/{host}")


@pytest.mark.distributed
@pytest.mark.parametrize("host", ["ddp", "fsdp2", "zero3"])
@pytest.mark.parametrize("check", ["traces", "once"])
def test_evaluation(launch: Callable[[str], Results], host: str, check: str) -> None:
    passes(launch("two"), f"evaluation/{host}/{check}")


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "host"), [("one", "plain"), *(("two", h) for h in SHARDED)])
@pytest.mark.parametrize("check", ["skipped", "stop"])
def test_numbers_that_are_not_finite(launch: Callable[[str], Results], name: str, host: str, check: str) -> None:
    passes(launch(name), f"bad_numbers/{host}/{check}")


@pytest.mark.distributed
@pytest.mark.parametrize("host", ["ddp", "fsdp2", "zero2-bf16"])
def test_half_precision(launch: Callable[[str], Results], host: str) -> None:
    passes(launch("two"), f"half/{host}")


@pytest.mark.distributed
def test_batch_norm_in_bf16_under_deepspeed(launch: Callable[[str], Results]) -> None:
    passes(launch("two"), "refused/batch norm")


@pytest.mark.distributed
def test_ranks_that_disagree(launch: Callable[[str], Results]) -> None:
    results = {k: v for k, v in launch("two").items() if k.startswith("disagreement/")}
    assert len(results) == 9
    for key in results:
        passes(results, key)


@pytest.mark.distributed
@pytest.mark.parametrize("hosts", [("ddp", "zero1"), pytest.param(("fsdp2", "zero0", "zero2", "zero3"), marks=pytest.mark.slow)])
def test_kill_9_and_restart(zygote: Zygote, tmp_path: Path, hosts: tuple[str, ...]) -> None:
    """Rank 0 or 1 is killed in the middle of one run after the other; torchrun starts all ranks again, and each run ends as one
    that was never interrupted."""
    out = tmp_path / "out.json"
    jobs = [f"killed:{host}/{number}" for number, host in enumerate(hosts)]
    job = torchrun(2, WORKER, str(out), str(tmp_path / "store"), *jobs, limit=500, restarts=len(hosts))
    assert job.codes == [0], job.err[-5000:]
    results = json.loads(out.read_text())
    assert list(results) == [f"killed/{host}" for host in hosts]
    for key in results:
        passes(results, key)
