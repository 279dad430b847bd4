"""What two ranks do with rows of unequal numbers of tokens, against what one rank did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import texts
import torch
from decoders import REPLAY, PerRank, result, steps_of, trained
from record import Job, Record

import learning
from everbatch.optim import SAM
from everbatch.train import Replay, StepRecord, Trainer


def apart(folder: Path, host: str, case: str, accumulation: int) -> dict[str, Any]:
    """How far two ranks are from one, in weights and scores."""
    problem = PerRank() if case == "trap" else None
    case = "bare" if case == "trap" else case
    t = trained(host, case, steps=steps_of(case), accumulation=accumulation, problem=problem)
    got, one = result(t), torch.load(folder / f"{case}.pt", weights_only=True)
    pairs = zip(got["scores"], one["scores"], strict=True)
    return {"far": texts.far(one["weights"], got["weights"]), "ranks": t.world.size, "steps": [got["steps"], one["steps"]],
            "scores": max(abs(a[name] - b[name]) for a, b in pairs for name in b), "names": list(got["scores"][0])}


def resumed(folder: Path, host: str) -> dict[str, Any]:
    """A run with named inputs and stored logits in its memory that was left inside the second task, against one that was not."""
    found = []
    for name, leaves in (("whole", False), ("left", True), ("left", False)):
        options = {"folder": folder / f"{host}-{name}", **REPLAY}
        t = texts.trainer(host, (SAM,), (Replay,), more=options, cls=Leaves, checkpoint_every=2)
        t.leaves = leaves
        try:
            t.fit(texts.stream(named=True), resume=len(found) == 1)
        except InterruptedError:
            continue
        found.append({**learning.whole(t), **learning.memory(t)})
    same = all(torch.equal(found[0][name], value) for name, value in found[1].items())
    every = t.world.gather((same, sorted(name for name in found[1] if name.startswith("rows/raw"))))
    return {"same": [ok for ok, _ in every], "names": every[0][1], "step": t.step}


class Leaves(Trainer):
    """Ends after its seventh step, where asked."""

    leaves = False

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)
        if self.leaves and self.step == 7:
            raise InterruptedError


def jobs(record: Record, folder: str, *names: str) -> Iterator[Job]:
    for name in names:
        host, case, accumulation = name.split("/")
        if case == "resume":
            yield record.noted(name, resumed, Path(folder), host)
            continue
        yield record.noted(name, apart, Path(folder), host, case, int(accumulation))
