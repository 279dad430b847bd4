"""Crafted batches that wait for their step: part of a checkpoint, so that a resumed run repeats an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everbatch.distributed import World

__all__ = ["Fifo", "Waiting"]


@dataclass(frozen=True)
class Waiting:
    """One crafted batch."""

    payload: Tensor
    """(n, ...) for `Attack.finish`."""
    version: int
    """Step before whose update the weights were read."""
    ids: Tensor
    """(n,) sample ids, to be sure that it meets its own batch."""


class Fifo:
    """Crafted batches by step. Saved in global sample order: any number of ranks can split them again.

    Attributes:
        world: this rank's place.
        drain: called before saving, to bring in what is still being crafted elsewhere.
    """

    def __init__(self) -> None:
        self.world = World()
        self.drain: Callable[[], None] | None = None
        self.waiting: dict[int, Waiting] = {}

    def state_dict(self) -> dict[str, Any]:
        """Rows of this rank, by batch, and where they start in the global batch; every rank has as many. Batches that not every
        rank has are left out. One small gather."""
        if self.drain is not None:
            self.drain()
        steps = sorted(self.waiting)
        if self.world.size > 1:  # a rank that lost its adversary has fewer than others
            everywhere: list[Any] = self.world.gather(steps)
            steps = [step for step in steps if all(step in theirs for theirs in everywhere)]
        share = len(self.waiting[steps[0]].ids) if steps else 0
        rows = {f"{kind}{i}": getattr(self.waiting[step], kind) for i, step in enumerate(steps) for kind in ("payload", "ids")}
        index = {"slots": np.arange(share * self.world.size), "steps": np.array(steps, dtype=np.int64),
                 "versions": np.array([self.waiting[s].version for s in steps], dtype=np.int64)}
        return {"index": index, "start": self.world.rank * share, "rows": rows}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take this rank's rows of batches saved whole, by any number of ranks."""
        index, rows = saved["index"], saved["rows"]
        total = len(index["slots"])
        share = total // self.world.size
        mine = slice(self.world.rank * share, (self.world.rank + 1) * share)
        self.waiting = {int(step): Waiting(rows[f"payload{i}"][mine].clone(), int(version), rows[f"ids{i}"][mine].clone())
                        for i, (step, version) in enumerate(zip(index["steps"], index["versions"], strict=True))}

    def take(self, step: int, ids: Tensor) -> Waiting | None:
        """The batch that waits for `step`; None if there is none.

        Raises:
            RuntimeError: it was crafted for other samples: the look-ahead and the stream disagree.
        """
        found = self.waiting.pop(step, None)
        if found is not None and found.ids is not ids and not torch.equal(found.ids.to(ids.device), ids):
            raise RuntimeError(f"ConAdv: the batch crafted for step {step} has other samples than the one to be trained on, must "
                               "have the same; peek(k) must give what training will see k steps later")
        return found
