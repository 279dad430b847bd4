"""What a trial makes of ranks that fail, in the order in which Ray tells of them.

Which of two ranks is heard of first cannot be chosen with real ones: `test_tune_deaths` kills a real one. Ray is a stand-in here.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from everbatch.tune.ranks import _polled

FAILED = {"failed": "error", "cause": "RuntimeError: Connection reset by peer"}


class Told:
    """Ray, whose results are ready one after the other."""

    def __init__(self, dead: set[str]) -> None:
        self.dead = dead

    def wait(self, left: list[str], *, timeout: float, num_returns: int = 1) -> tuple[list[str], list[str]]:
        return left[:num_returns], left[num_returns:]

    def get(self, done: list[str]) -> list[dict[str, Any]]:
        if self.dead & set(done):
            raise RuntimeError("The actor died")
        return [FAILED for _ in done]


def test_a_rank_that_lost_a_killed_neighbour_did_not_fail() -> None:
    with pytest.raises(RuntimeError, match="actor died"):
        _polled(Told({"rank 1"}), ["rank 0", "rank 1"], time.monotonic() + 60)


def test_a_rank_that_failed_by_itself_did() -> None:
    assert _polled(Told(set()), ["rank 0", "rank 1"], time.monotonic() + 60) == FAILED
