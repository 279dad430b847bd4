"""How the routing of earlier tasks' tokens has changed since they were learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from everbatch.distributed import World
from everbatch.nn.experts import leading

__all__ = ["drift_of", "gathered", "logits_of", "scalars_of", "told"]

Probes = dict[str, Tensor]
"""By "LAYER/TASK/inputs" (P, d) and "LAYER/TASK/logits" (P, E), those at the task's end, in float64."""


def gathered(inputs: Tensor, world: World) -> Tensor:
    """Tokens of all ranks, as many as one rank keeps, (P', d): those that are no padding. Collective: one all-reduce."""
    share = -(-len(inputs) // world.size)
    table = inputs.new_zeros((world.size, share, inputs.shape[1]))
    table[world.rank] = inputs[:share]
    rows = world.sum(table).flatten(0, 1)[: len(inputs)]
    return rows[rows[:, -1] > 0, :-1]


def drift_of(probes: Probes, routers: Mapping[str, Tensor], top_k: int | None) -> dict[int, dict[str, float]]:
    """By earlier task, means over layers and tokens, but for "logits":

        logits      largest |R x - R_then x| of all
        variation   total variation between the weights then and now
        overlap     share of the tokens whose first expert is the same
    """
    found: dict[int, list[tuple[float, float, float]]] = {}
    for key in [key for key in probes if key.endswith("/inputs")]:
        layer, task, _ = key.rsplit("/", 2)
        x, then = probes[key], probes[f"{layer}/{task}/logits"]
        if not len(x):  # no token of this task has reached the layer
            continue
        now = logits_of(x, routers[layer])
        old, new = (logits.softmax(-1) if top_k is None else leading(logits.softmax(-1), top_k) for logits in (then, now))
        values = torch.stack([(now - then).abs().max(), 0.5 * (new - old).abs().sum(-1).mean(),
                              (new.argmax(-1) == old.argmax(-1)).double().mean()])
        move, variation, overlap = values.tolist()
        found.setdefault(int(task), []).append((move, variation, overlap))
    return {task: {"logits": max(row[0] for row in rows), "variation": sum(row[1] for row in rows) / len(rows),
                   "overlap": sum(row[2] for row in rows) / len(rows)} for task, rows in sorted(found.items())}


def logits_of(x: Tensor, router: Tensor) -> Tensor:
    """(P, E), in float64 on the CPU: a difference of two is what the router moved, not rounding."""
    return x.double() @ router.detach().cpu().double().T


def scalars_of(row: Mapping[str, Any]) -> dict[str, float]:
    """What is written of a task's end: load of each expert, drift of each earlier task."""
    values = {f"same/load/{name}/{i}": share for name, shares in row["load"].items() for i, share in enumerate(shares)}
    return values | {f"same/{what}/task_{task}": value for task, found in row["drift"].items() for what, value in found.items()}


def told(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Lines of a run's end: each task's drift after the last, and which experts rested."""
    if not rows:
        return ()
    lines = [f"routing of task {int(task) + 1}, since then     overlap {100 * values['overlap']:.1f} %, total variation "
             f"{values['variation']:.4f}, logits by up to {values['logits']:.2g}" for task, values in rows[-1]["drift"].items()]
    resting = " ".join(str(sum(map(len, row["resting"].values()))) for row in rows)
    return (*lines, f"{'experts that rested by task':<30} {resting}")
