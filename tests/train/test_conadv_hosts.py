"""ConAdv on every host, with real ranks: same bits wherever crafting runs, same steps on every engine, resumed bitwise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from needs import needs
from processes import Zygote
from rotation import ROUND, Round, When

needs("deepspeed")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1500)]
WORKER = Path(__file__).parent / "conadv_worker.py"
COMPARED = ("tau 1", "tau 0", "two steps", "clean", "one forward", "accumulation", "Replay", "LARS", "SAM",
            "StaleSAM", "DynamicSparsity", "ClipGradNorm+SAM")
FEW = ("tau 1", "clean", "one forward", "SAM")
"""What is compared by default."""
HOSTS = ("ddp", "zero3", "fsdp2", "zero0", "zero1", "zero2")
"""The first two by default, in turn; all in the wide launch, two of them each time."""
DEFAULT, TURNS = HOSTS[:2], 4
Key = tuple[str, str, bool]
"""Host, check, whether it is the wide launch's."""


def planned() -> dict[Key, When]:
    """What runs when. A run has half of the checks, each on one of the two hosts."""
    found: dict[Key, When] = {}
    for place, check in enumerate(("placements", "resume", "one forward", "off")):
        found["plain", check, False] = When(place, TURNS)
    for (i, host), (place, check) in itertools.product(enumerate(DEFAULT), enumerate(
            ("placements", "resume", "one forward", "off", *(f"parity {name}" for name in FEW)))):
        found[host, check, False] = When(TURNS // 2 * i + place, TURNS)
    for i, host in enumerate(HOSTS):
        wide = When(i, len(HOSTS), slow=True)
        found |= {(host, f"parity {name}", True): wide for name in COMPARED}
        if host not in DEFAULT:
            found |= {(host, check, True): wide for check in ("placements", "resume", "one forward", "off")}
    return found


PLAN = planned()
Results = dict[str, dict[str, Any]]


LAUNCHES = {"plain": ("plain",), "plain wide": (), "default": DEFAULT, "wide": HOSTS}


def jobs(name: str, round: Round) -> list[str]:
    """What a launch does. Those of one process leave what the others are compared with."""
    compared = {"plain": FEW, "plain wide": [case for case in COMPARED if case not in FEW]}.get(name, ())
    return [f"plain/parity {case}" for case in compared] + [
        f"{host}/{check}" for (host, check, wide), when in PLAN.items()
        if host in LAUNCHES[name] and wide == (name == "wide") and when.due(round)]


@pytest.fixture(scope="module")
def found(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Results]:
    """Results of the launch that has a host in it."""
    folder, known = tmp_path_factory.mktemp("conadv"), dict[str, Results]()

    def launch(name: str, ranks: int, *more: str) -> Results:
        if name not in known:
            out = folder / f"{name}.json"
            words = [str(folder / "store"), *jobs(name, ROUND), *more]
            known[name] = zygote.found(WORKER, out, *words, ranks=ranks, limit=1200.0)
        return known[name]

    def get(host: str, wide: bool) -> Results:
        plain = launch("plain", 1)
        if wide:
            launch("plain wide", 1)
            return launch("wide", 2, "--wide")
        return plain if host == "plain" else launch("default", 2)

    return get


def passes(results: Results, key: str) -> None:
    assert results[key]["passed"], f"{key}: error {results[key]['error']:.3g}: {results[key]['problem']}"


def hosts(check: str) -> pytest.MarkDecorator:
    """The hosts of a check."""
    return pytest.mark.parametrize(("host", "wide"), [
        when.param(host, wide, id=host) for (host, name, wide), when in PLAN.items() if name == check])


@hosts("placements")
def test_every_placement_gives_the_same_bits(found: Callable[[str, bool], Results], host: str, wide: bool) -> None:
    passes(found(host, wide), f"placements/{host}")


@hosts("resume")
def test_resumed_with_a_full_queue(found: Callable[[str, bool], Results], host: str, wide: bool) -> None:
    passes(found(host, wide), f"resume inline/{host}")
    if host in DEFAULT:
        passes(found(host, wide), f"resume process/{host}")


@hosts("off")
def test_absent_at_weight_zero(found: Callable[[str, bool], Results], host: str, wide: bool) -> None:
    passes(found(host, wide), f"off/{host}")


@hosts("one forward")
def test_batch_norms_in_one_forward_are_those_of_two(found: Callable[[str, bool], Results], host: str, wide: bool) -> None:
    passes(found(host, wide), f"batch norm in one forward/{host}")


@pytest.mark.parametrize(("host", "check", "wide"), [when.param(*key) for key, when in PLAN.items() if "parity" in key[1]])
def test_steps_of_one_process(found: Callable[[str, bool], Results], host: str, check: str, wide: bool) -> None:
    passes(found(host, wide), f"{check}/{host}")
