"""Outcomes of checks, agreed between the ranks, and other findings, as data."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from everbatch.distributed import World

Tensors = dict[str, Tensor]
Job = tuple[str, Callable[[], Any]]
"""What a launch does under a name."""


class Outcome:
    """What one check found on this rank."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.error = 0.0
        self.problem = ""
        self.measured = False

    def measure(self, error: float) -> None:
        """Take an error; the largest counts. NaN counts as infinite."""
        self.measured = True
        self.error = max(self.error, error if error == error else float("inf"))

    def require(self, good: bool, what: str) -> None:
        """Fail with `what` unless `good`."""
        self.measured = True
        if not good:
            raise AssertionError(what)

    def same_bits(self, got: Tensors, expected: Tensors, what: str, tolerance: float = 0.0) -> None:
        """Require the same names, and the same bits under each; or a difference of at most `tolerance`."""
        self.require(got.keys() == expected.keys(), f"{what}: names differ: {sorted(got.keys() ^ expected.keys())[:4]}")
        odd = [n for n in got if not equal_bits(got[n], expected[n])]
        for name in odd:
            if got[name].shape == expected[name].shape and got[name].is_floating_point():
                self.measure((got[name].double() - expected[name].double()).abs().max().item())
        self.require(not odd or self.error <= tolerance, f"{what}: bits of {odd[:4]} differ")


class Record:
    """Outcomes of checks by check/host/case; what else was found by its name."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}

    def note(self, key: str, make: Callable[..., Any], *arguments: Any) -> None:
        """Keep what `make` gives, or the text of the error that it raises."""
        try:
            self.results[key] = make(*arguments)
        except Exception as error:
            self.results[key] = f"{type(error).__name__}: {error}"

    def noted(self, key: str, make: Callable[..., Any], *arguments: Any) -> Job:
        """The job that does this."""
        return key, functools.partial(self.note, key, make, *arguments)

    @contextmanager
    def check(self, key: str, tolerance: float = 0.0) -> Iterator[Outcome]:
        """Run a check; an exception is its failure. Collective: the ranks agree on the outcome."""
        outcome = Outcome(tolerance)
        try:
            yield outcome
            assert outcome.measured, "the check measured nothing"
            assert outcome.error <= tolerance, f"error {outcome.error:.3g}, tolerance {tolerance:.3g}"
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            outcome.problem = f"{type(error).__name__}: {error} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"
        rows: list[Any] = World.current().gather((outcome.error, outcome.problem))
        problems = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(rows) if text]
        assert key not in self.results, key
        self.results[key] = {"error": max(error for error, _ in rows), "tolerance": tolerance, "passed": not problems,
                             "problem": "; ".join(problems)}


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Same shape, type and bits: tells -0.0 from 0.0, and takes NaN as equal to itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.detach().contiguous().flatten().view(torch.uint8), b.detach().contiguous().flatten().view(torch.uint8))
