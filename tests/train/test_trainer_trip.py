"""How far a reader of one step of a Trainer walks: hops between the library's files, counted and printed."""

from __future__ import annotations

import functools

import torch

import learning
from everbatch import compose
from everbatch.data import Batch
from everbatch.optim import SAM
from everbatch.train import StepRecord
from trips import Trip, walk

HOPS = 130
"""Of one step with DER++ and SAM on one rank of plain torch."""
TURNS = 110
"""Of the same step: its calls into another file than the call before."""
WARM = 3
"""Steps in which everything sets itself up, and the memory gets what it draws from."""


def test_a_step_of_replay_and_sam_on_plain_torch() -> None:
    """Two passes over three parts of a batch, each augmented; two draws from a memory, and what it keeps."""
    optimizer = functools.partial(compose(SAM, base=torch.optim.SGD), lr=0.1, rho=0.05)
    t = learning.trainer("plain", optimizer=optimizer)
    step, trips, records = t.training_step, list[Trip](), list[StepRecord]()

    def counted(batch: Batch) -> StepRecord:
        if t.step == WARM:
            trips.append(walk(lambda: records.append(step(batch))))
            return records[0]
        return step(batch)  # type: ignore[no-any-return]

    t.training_step = counted
    t.fit(learning.stream())
    print(trips[0].text(most=12))
    assert t.optimizer.last_passes == 2 and records[0].applied
    assert set(records[0].outputs) == {"stream", "dark", "replay"}
    assert trips[0].hops <= HOPS, trips[0].text(most=40)
    assert trips[0].turns <= TURNS, trips[0].text(most=40)
