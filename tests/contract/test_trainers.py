"""The contract of every trainer mixin of the table: in one process, and in turn on two ranks of each engine."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import trainers
from record import Record

import learning
from everbatch import methods
from processes import Zygote
from rotation import ROUND, When

HERE = Path(__file__).parent
KEYS = list(methods.trainer_mixins())
HOSTS = ("ddp", "fsdp2", "zero2", "zero3")
ALONE, TOGETHER = ("absent", "acts", "resume"), ("absent", "acts", "parity", "resume")
EVERY = ("ddp", "zero0", "fsdp2", "zero1", "zero2", "zero3")
"""Where those run that only look: on every engine the bits must be as without them."""


def hosts_of(key: str) -> tuple[str, ...]:
    return EVERY if methods.load(key).observes else HOSTS


WHEN = {(key, host): When(i + 2 * j, 2 * len(hosts_of(key)))
        for i, key in enumerate(KEYS) for j, host in enumerate(hosts_of(key))}
"""Each mixin runs in half of the rounds, on one host after the other; mostly another than its neighbours'."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainers")


@pytest.fixture(scope="module")
def alone(store: Path) -> Callable[[str], Record]:
    """What one process found of a mixin; once of each that is asked for."""

    @functools.cache
    def found(key: str) -> Record:
        record = Record()
        trainers.live(record, store, key, "plain")
        return record

    return found


@pytest.fixture(scope="module")
def launched(alone: Callable[[str], Record], store: Path, zygote: Zygote) -> Callable[[], dict[str, Any]]:
    """What two ranks found of what is due in this round; launched once."""
    found: dict[str, Any] = {}

    def results() -> dict[str, Any]:
        if not found:
            due = [(key, host) for (key, host), when in WHEN.items() if when.due(ROUND)]
            for key, _ in due:  # leaves what two ranks are compared with
                alone(key)
            jobs = [f"method:{key}/{host}" for key, host in due]
            found.update(zygote.found(HERE.parent / "distributed" / "jobs.py", store / "out.json", str(store), *jobs, limit=300))
        return found

    return results


def passes(found: dict[str, Any], key: str) -> None:
    assert found[key]["passed"], f"{key}: error {found[key]['error']:.3g}: {found[key]['problem']}"


@pytest.mark.parametrize("check", ALONE)
@pytest.mark.parametrize("key", KEYS)
def test_one_process(alone: Callable[[str], Record], key: str, check: str) -> None:
    passes(alone(key).results, f"{check}/plain/{key}")


SEEN = [key for key in KEYS if key != "evaluation"]


@pytest.mark.parametrize("key", [When(place, 4).param(key) for place, key in enumerate(SEEN)])
def test_continual_evaluation_leaves_each_as_it_is(key: str) -> None:
    """Also those that predict in a way of their own."""
    alone, watched = (trainers.run(key, "plain", watched=watch) for watch in (False, True))
    for what in (learning.whole, learning.buffers, learning.memory):
        one, other = what(watched), what(alone)
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one), what.__name__
    assert np.array_equal(alone.matrix, watched.matrix, equal_nan=True)
    assert watched.stability.ends == [row[: k + 1] for k, row in enumerate(alone.matrix)]


@pytest.mark.distributed
@pytest.mark.parametrize(("key", "host"), [when.param(*pair) for pair, when in WHEN.items()])
def test_two_ranks(launched: Callable[[], dict[str, Any]], key: str, host: str) -> None:
    for check in TOGETHER:
        passes(launched(), f"{check}/{host}/{key}")
