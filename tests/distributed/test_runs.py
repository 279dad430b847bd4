"""The trainer on every engine with real ranks: resumed, killed, moved to other numbers of ranks, divided differently.

Each launch is forked once and does what is due in the round; the tests read what it found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from processes import WORKER, Zygote, torchrun
from rotation import ROUND, Round, When

JOBS = Path(__file__).parent / "jobs.py"
SHARDED = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
ROUNDED = ("ddp", "fsdp2", "zero1", "zero3")
"""Engines for what is to rounding, or about the trainer more than the engine."""
ENDS = {9: When(0, 3), 5: When(1, 3), 23: When(2, 3)}
"""Steps after which a run is left, and the rounds in which that is done on an engine that does it in every round."""


def resumed(name: str, always: Sequence[str], others: Sequence[str]) -> dict[tuple[str, str, int], When]:
    """Runs that are left and resumed: launch, engine, step. Of the others one engine in each round, after every step."""
    found = {(name, host, after): when for host in always for after, when in ENDS.items()}
    return found | {(name, host, after): When(i, len(others)) for i, host in enumerate(others) for after in ENDS}


def in_turn(name: str, hosts: Sequence[str]) -> dict[tuple[str, str], When]:
    """One engine of these in each round: launch, engine."""
    return {(name, host): When(place, len(hosts)) for place, host in enumerate(hosts)}


RESUMED = resumed("one", ("plain",), SHARDED) | resumed("two", ("ddp", "zero3"), ("fsdp2", "zero0", "zero1", "zero2"))
DIVIDED = in_turn("two", ROUNDED)
EVALUATED = in_turn("two", ("ddp", "fsdp2", "zero3", "zero0", "zero1", "zero2"))
HALF = in_turn("two", ("ddp", "fsdp2", "zero2-bf16"))
AHEAD = in_turn("two", ("ddp", "zero3"))
OWN = {("one", "plain"): When(), **in_turn("two", ("ddp", "zero2"))}
SPOILT = {("one", "plain"): When(), **in_turn("two", SHARDED)}
MOVED = {("one again", "2-zero2", "plain-1"): When(0, 3), ("two", "1-plain", "zero2-2"): When(0, 3),
         ("one again", "2-ddp", "ddp-1"): When(1, 3), ("two", "1-ddp", "ddp-2"): When(1, 3),
         ("two", "2-zero3", "zero1-2"): When(2, 3),
         ("three", "2-zero2", "zero3-3"): When(0, 3, slow=True), ("three", "2-ddp", "fsdp2-3"): When(1, 3, slow=True)}
"""Launch, what it goes on from, where; those that go on from one thing are due together."""
FORKED = ("ddp", "zero1")
KILLED = {host: When(i, 2) for i, host in enumerate(FORKED)} | {
    host: When(i, 4, slow=True) for i, host in enumerate(("fsdp2", "zero0", "zero2", "zero3"))}
"""Engines with a rank that is killed; those that are not FORKED under torchrun itself."""

RANKS = {"one": 1, "two": 2, "one again": 1, "three": 3}
NEEDS = {"two": ["one"], "one again": ["two"], "three": ["two"]}
"""Later launches go on from what earlier ones left."""


def jobs(name: str, round: Round) -> list[str]:
    """What a launch does in a round."""
    def due(table: dict[Any, When]) -> list[Any]:
        return [key[1:] for key, when in table.items() if key[0] == name and when.due(round)]

    ends: dict[str, list[int]] = {}
    for host, after in due(RESUMED):
        ends.setdefault(host, []).append(after)
    left = {source: when for (_, source, _), when in MOVED.items() if source.startswith(f"{RANKS[name]}-")}
    found = [f"resume:{host}/{','.join(map(str, steps))}" for host, steps in ends.items()]
    if name in ("one", "two"):
        found += [f"invariance:{host}" for (_, host), when in DIVIDED.items() if when.due(round)]
        found += [f"leave:{source.partition('-')[2]}" for source, when in left.items() if when.due(round)]
    found += [f"enter:{source}/{target.rpartition('-')[0]}" for source, target in due(MOVED)]
    found += [f"evaluation:{host}" for host, in due(EVALUATED)]
    found += [f"bad_numbers:{host}" for host, in due(SPOILT)]
    found += [f"accumulation:{host}" for host, in due(DIVIDED)]
    found += [f"half:{host}" for host, in due(HALF)]
    found += [f"ahead:{host}" for host, in due(AHEAD)]
    found += [f"own_memory:{host}" for host, in due(OWN)]
    return found + (["disagreement", "refused", "foreign"] if name == "two" else [])


Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def launch(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Results]:
    """Results of a launch by name; runs it, and what it needs, the first time."""
    folder, found = tmp_path_factory.mktemp("runs"), {}

    def results(name: str) -> Results:
        if name not in found:
            for before in NEEDS.get(name, []):
                results(before)
            out = folder / f"{name}.json"
            found[name] = zygote.found(JOBS, out, str(folder / "store"), *jobs(name, ROUND), ranks=RANKS[name], limit=900)
        return found[name]

    return results


def passes(results: Results, key: str) -> None:
    assert results[key]["passed"], f"{key}: error {results[key]['error']:.3g}: {results[key]['problem']}"


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "host", "after"), [when.param(*key) for key, when in RESUMED.items()])
def test_resumed_equals_uninterrupted(launch: Callable[[str], Results], name: str, host: str, after: int) -> None:
    passes(launch(name), f"resume/{host}/{after}")


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "source", "target"), [when.param(*key) for key, when in MOVED.items()])
def test_another_number_of_ranks_or_stage(launch: Callable[[str], Results], name: str, source: str, target: str) -> None:
    passes(launch(name), f"enter/{source}/{target}")


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "host"), [when.param(*key) for key, when in DIVIDED.items()])
@pytest.mark.parametrize("check", ["same_seed", "invariance", "accumulation"])
def test_division_of_the_batch_does_not_matter(launch: Callable[[str], Results], check: str, name: str, host: str) -> None:
    passes(launch(name), f"{check}/{host}")


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "host"), [when.param(*key) for key, when in EVALUATED.items()])
@pytest.mark.parametrize("check", ["traces", "once"])
def test_evaluation(launch: Callable[[str], Results], name: str, host: str, check: str) -> None:
    passes(launch(name), f"evaluation/{host}/{check}")


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "host"), [when.param(*key) for key, when in SPOILT.items()])
@pytest.mark.parametrize("check", ["skipped", "stop"])
def test_numbers_that_are_not_finite(launch: Callable[[str], Results], name: str, host: str, check: str) -> None:
    passes(launch(name), f"bad_numbers/{host}/{check}")


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "host"), [when.param(*key) for key, when in AHEAD.items()])
def test_draws_made_during_the_step_before(launch: Callable[[str], Results], name: str, host: str) -> None:
    passes(launch(name), f"ahead/{host}")


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "host"), [when.param(*key) for key, when in HALF.items()])
def test_half_precision(launch: Callable[[str], Results], name: str, host: str) -> None:
    passes(launch(name), f"half/{host}")


@pytest.mark.distributed
@pytest.mark.parametrize("check", ["own memory", "own memory resumed"])
@pytest.mark.parametrize(("name", "host"), [when.param(*key) for key, when in OWN.items()])
def test_a_memory_of_ones_own(launch: Callable[[str], Results], name: str, host: str, check: str) -> None:
    passes(launch(name), f"{check}/{host}")


@pytest.mark.distributed
def test_batch_norm_in_bf16_under_deepspeed(launch: Callable[[str], Results]) -> None:
    passes(launch("two"), "refused/batch norm")


@pytest.mark.distributed
def test_a_group_that_takes_no_cpu_tensors(launch: Callable[[str], Results]) -> None:
    passes(launch("two"), "foreign group")


@pytest.mark.distributed
def test_ranks_that_disagree(launch: Callable[[str], Results]) -> None:
    results = {k: v for k, v in launch("two").items() if k.startswith("disagreement/")}
    assert len(results) == 9
    for key in results:
        passes(results, key)


@pytest.mark.distributed
@pytest.mark.parametrize(("host", "rank"), [when.param(host, i % 2) for i, (host, when) in enumerate(KILLED.items())])
def test_kill_9_and_restart(zygote: Zygote, tmp_path: Path, host: str, rank: int) -> None:
    """Rank 0 or 1 is killed in the middle of a run; torchrun starts all ranks again, and it ends as one that was never
    interrupted."""
    out = tmp_path / "out.json"
    launch = zygote.torchrun if host in FORKED else torchrun  # the slow ones pay the imports of every attempt
    words = (str(JOBS), str(out), str(tmp_path / "store"), f"killed:{host}/0/{rank}")
    job = launch(2, WORKER, *words, limit=300, restarts=1)
    assert job.codes == [0], job.err[-5000:]
    results = json.loads(out.read_text())
    assert list(results) == [f"killed/{host}"]
    passes(results, f"killed/{host}")


# ------------------------------------------------------------------------------------------------------- the rotation
@pytest.mark.parametrize("round", [None, *range(60)])
def test_what_a_launch_goes_on_from_was_left_before(round: int | None) -> None:
    left: set[str] = set()
    for name in RANKS:
        todo = jobs(name, round)
        for job in todo:
            kind, _, argument = job.partition(":")
            if kind == "leave":
                left.add(f"{RANKS[name]}-{argument}")
            if kind == "enter":
                assert argument.partition("/")[0] in left, (name, job)
        if name == "two":
            assert [j for j in todo if j.startswith("inv")] == [j for j in jobs("one", round) if j.startswith("inv")] != []
