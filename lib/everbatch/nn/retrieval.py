"""Which adapter a sample wants, found by asking again what the answer under the last one says: MOS's self-refined retrieval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from everbatch.distributed import World
from everbatch.errors import check

__all__ = ["MOST", "Retrieved", "Trunk", "retrieve"]

MOST = 4
"""Evaluations of the head for a sample, as released."""
OnCycle = Literal["cap", "max_confidence"]


class Trunk(Protocol):
    """What computes features, such as `everbatch.nn.AdapterTrunk`."""

    def first(self, inputs: Tensor) -> tuple[Tensor, Any]:
        """Features (n, d) under adapter 0, and something that rows (an int64 tensor) can be taken of."""

    def again(self, start: Any, tasks: Tensor) -> Tensor:
        """Features of rows of it, each under the adapter of its task."""


@dataclass(frozen=True)
class Retrieved:
    """What came of a batch."""

    scores: Tensor
    """(n, seen): softmax of the logits plus that of T times the cosines; or the logits."""
    logits: Tensor
    """(n, seen), of the last adapter evaluated."""
    cosines: Tensor
    """(n, seen), to the prototypes, under adapter 0."""
    path: Tensor
    """(n, 4) int64: the tasks whose adapters were evaluated, in order; -1 behind the last."""
    rounds: int
    """Passes after the first."""


def retrieve(
    trunk: Trunk, inputs: Tensor, head: Callable[[Tensor], Tensor], prototypes: Tensor, cls2task: Tensor, tasks: int, *,
    ensemble: bool = True, on_cycle: OnCycle = "cap", sharded: World | None = None,
) -> Retrieved:
    """Scores of a batch, each sample under the adapter that it finds for itself.

        i = task of argmax cos(f_0, prototypes)
        up to 4 times: z = head(f_i); j = task of argmax z; stop if j = i, else i = j

    All rows go through the trunk once, under adapter 0; then each round takes, in one pass, the rows that need an adapter which
    they have not been under yet. What a row knows is not computed again, so a sample that goes to and fro costs two rows.
    Where the fourth evaluation still names another task, the logits are its own ("cap", as released) or those of the row's
    evaluations whose softmax has the highest maximum ("max_confidence").

    Args:
        head: features (n, d) to logits (n, >= seen); the first `seen` count.
        prototypes: (seen, d), of adapter 0's features.
        cls2task: (>= seen,) int64.
        tasks: T, the adapters there are; the cosines are sharpened by it.
        ensemble: whether scores are the two-stage sum.
        sharded: the ranks that share the trunk's weights (FSDP2, ZeRO-3): each of its passes is one on every rank. One bit is
            reduced for each round, and a rank without a row that needs it runs one for nothing. None: no collective.

    Returns:
        `Retrieved`; the same as each sample alone, up to rounding.

    Raises:
        ValueError: an unknown `on_cycle`, a task that has no adapter.

    Cost: 1 + rounds passes, rounds <= 4 whatever T is, each round of the rows that need it; a few host syncs per round.
    Source: MOS, arXiv 2412.09441; the released code runs T + 1 passes of all rows and a Python loop over samples.
    """
    check(on_cycle in ("cap", "max_confidence"), "retrieve", f"on_cycle={on_cycle!r}", "be cap or max_confidence")
    seen = len(prototypes)
    of_class = cls2task[:seen].to(inputs.device)
    check(int(of_class.max()) < tasks, "retrieve", f"a class of task {int(of_class.max())} and {tasks} adapters",
          "have an adapter for each task")
    features, start = trunk.first(inputs)
    cosines = F.normalize(features, dim=1) @ F.normalize(prototypes.to(features), dim=1).T
    walk = _Walk(head(features)[:, :seen], of_class, of_class[cosines.argmax(1)])
    rounds = 0
    while True:
        walk.advance()
        rows = torch.nonzero(walk.active).flatten()
        idle = len(rows) == 0
        if idle if sharded is None else sharded.all(idle, inputs.device):
            break
        rounds += 1
        taken = rows if not idle else rows.new_zeros(1)  # a row for the others' sake, of which nothing is kept
        fresh = head(trunk.again(start[taken], walk.task[taken]))[:, :seen]
        if not idle:
            walk.learn(rows, fresh, rounds)
    logits = walk.surest() if on_cycle == "max_confidence" else walk.logits
    scores = logits.softmax(1) + (tasks * cosines).softmax(1) if ensemble else logits
    return Retrieved(scores, logits, cosines, walk.path, rounds)


class _Walk:
    """Where each sample is on its way.

    Args:
        logits: of all rows under adapter 0.
        of_class: task of each class.
        task: where each row begins.
    """

    def __init__(self, logits: Tensor, of_class: Tensor, task: Tensor) -> None:
        n = len(logits)
        self.of_class, self.task = of_class, task
        self.active = torch.ones_like(task, dtype=torch.bool)
        """Rows that go on; after `advance`, those that need an adapter which they do not know."""
        self.count = torch.zeros_like(task)
        self.path = task.new_full((n, MOST), -1)
        self.table = torch.cat([logits.unsqueeze(1), logits.new_zeros(n, MOST, logits.shape[1])], 1)
        """(n, 1 + MOST, seen): logits under the adapters that a row has been under."""
        self.known = torch.cat([torch.zeros_like(task).unsqueeze(1), self.path], 1)
        """(n, 1 + MOST): whose they are; -1 for nobody's."""
        self.logits = logits
        self.capped = torch.zeros_like(self.active)

    def advance(self) -> None:
        """Let rows go on as long as they know the logits that they come to."""
        while True:
            match = self.known == self.task.unsqueeze(1)
            rows = torch.nonzero(self.active & match.any(1)).flatten()
            if len(rows) == 0:
                return
            z = self.table[rows, match[rows].int().argmax(1)]
            self.path[rows, self.count[rows]] = self.task[rows]
            self.count[rows] += 1
            self.logits = self.logits.index_copy(0, rows, z)
            following = self.of_class[z.argmax(1)]
            stable = following == self.task[rows]
            last = self.count[rows] == MOST
            self.capped[rows] = last & ~stable
            self.active[rows] = ~(stable | last)
            self.task = self.task.index_copy(0, rows, torch.where(stable | last, self.task[rows], following))

    def learn(self, rows: Tensor, logits: Tensor, place: int) -> None:
        """Logits of rows under the adapters of their tasks."""
        self.table[rows, place] = logits
        self.known[rows, place] = self.task[rows]

    def surest(self) -> Tensor:
        """The logits, but where the cap was met, those of the evaluations that are surest of one class."""
        confidence = self.table.softmax(2).amax(2)
        evaluated = (self.known.unsqueeze(2) == self.path.unsqueeze(1)).any(2) & (self.known >= 0)
        best = confidence.masked_fill(~evaluated, -1.0).argmax(1)
        rows = torch.arange(len(best), device=best.device)
        return torch.where(self.capped.unsqueeze(1), self.table[rows, best], self.logits)
