"""What two ranks do with rows of unequal numbers of tokens, against what one rank did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import texts
import torch
from decoders import PerRank, result, steps_of, trained
from record import Job, Record


def apart(folder: Path, host: str, case: str, accumulation: int) -> dict[str, Any]:
    """How far two ranks are from one, in weights and scores."""
    problem = PerRank() if case == "trap" else None
    case = "bare" if case == "trap" else case
    t = trained(host, case, steps=steps_of(case), accumulation=accumulation, problem=problem)
    got, one = result(t), torch.load(folder / f"{case}.pt", weights_only=True)
    pairs = zip(got["scores"], one["scores"], strict=True)
    return {"far": texts.far(one["weights"], got["weights"]), "ranks": t.world.size, "steps": [got["steps"], one["steps"]],
            "scores": max(abs(a[name] - b[name]) for a, b in pairs for name in b), "names": list(got["scores"][0])}


def jobs(record: Record, folder: str, *names: str) -> Iterator[Job]:
    for name in names:
        host, case, accumulation = name.split("/")
        yield record.noted(name, apart, Path(folder), host, case, int(accumulation))
