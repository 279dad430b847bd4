"""Jobs of the parity launch of dynamic sparsity: [HOST ...]; every method on every host. See worker.py.

OUT.json, by key: "weights/method/host" the largest difference of any weight from one process on the whole batch;
"masks/method/host" the mask entries that differ from there, summed over all steps; "zeros/method/host" the weights off the mask
that are not zero; "copies/host" what an altered mask on rank 1 raises. A text elsewhere is an error.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import hosts
import torch
from hosts import BY_NAME, Run
from record import Job, Record
from torch import Tensor

from everbatch.optim import EMA, SAM, ClipGradNorm, DynamicSparsity, ShrinkPerturb

STEPS = 8
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, eps=1e-4, weight_decay=0.1)


class Sharp(ClipGradNorm, EMA, DynamicSparsity, SAM, torch.optim.SGD): ...


class Adam(ClipGradNorm, DynamicSparsity, torch.optim.AdamW): ...


class Warm(DynamicSparsity, ShrinkPerturb, torch.optim.SGD): ...


BASE = {"density": 0.3, "update_every": 2}
CLIP = {**BASE, "max_norm": 0.8}
METHODS: dict[str, tuple[type, dict[str, Any], Any]] = {
    "rigl": (Sharp, {"rho": 0.5, **CLIP}, SGD),
    "rigl, mean of 2 gradients, adamw": (Adam, {**CLIP, "score_steps": 2, "update_every": 3, "total_steps": 20}, ADAMW),
    "set": (Sharp, {"rho": 0.5, "grow": "random", "prune": "set", **CLIP}, SGD),
    "snfs": (Sharp, {"rho": 0.5, "grow": "momentum", "redistribute": "momentum", **CLIP}, SGD),
    "unfired, taylor": (Sharp, {"rho": 0.5, "grow": "random_unfired", "prune": "taylor", **CLIP}, SGD),
    "global, soft": (Sharp, {"rho": 0.5, "global_threshold": True, "redistribute": "global", "prune": "soft", **CLIP}, SGD),
    "as released, adamw": (Adam, {**CLIP, "dense_moments": True, "topology_step": "after", "as_released": True}, ADAMW),
    "warm": (Warm, {**BASE, "noise": "gaussian", "sigma": 0.05}, SGD),
    "tasks, allow": (Adam, {**CLIP, "grow": "random", "update_every": 2}, ADAMW),
    "tasks, prefer": (Adam, {**CLIP, "grow_into_used": "prefer"}, ADAMW),
    "tasks, forbid": (Adam, {**CLIP, "density": 0.2, "distribution": "uniform", "grow_into_used": "forbid"}, ADAMW),
}
HOSTS = [h.name for h in hosts.HOSTS if not h.bf16 and h.kind != "plain"]
History = list[dict[str, Tensor]]


def live(host: str, method: str) -> tuple[dict[str, Tensor], History, int]:
    """Whole weights at the end, masks after each step, and the number of weights off the mask that are not zero."""
    cls, options, base = METHODS[method]
    run = hosts.start(BY_NAME[host], cls, options, base=base)
    opt, history, off = run.opt, [], 0
    for i, (x, y) in enumerate(hosts.batches(STEPS)):
        if method.startswith("tasks") and i in (0, 3, 6):
            if i:
                opt.end_task()
            opt.begin_task(i // 3 + 1)
        if method == "warm" and i in (2, 5):
            opt.shrink_perturb()
        run.step(x, y)
        history.append(opt.whole_masks())
        now = run.weights()
        off += sum(int((now[n][~m] != 0).sum()) for n, m in history[-1].items())
    if method.startswith("tasks"):
        opt.end_task()
        history.append({f"task {t}": outputs(run, t) for t in (1, 2, 3)})
    return run.weights(), history, off


def outputs(run: Run, task: int) -> Tensor:
    with run.opt.task(task):
        return run.outputs()


@functools.cache
def reference(method: str) -> tuple[dict[str, Tensor], History, int]:
    return live("plain", method)


def compare(host: str, method: str) -> dict[str, float]:
    """The three figures of a method on a host, and for tasks that of their predictions."""
    got, want = live(host, method), reference(method)
    masks = sum(int((a[n] != b[n]).sum()) for a, b in zip(got[1][:STEPS], want[1][:STEPS], strict=True) for n in b)
    more = {"tasks": hosts.difference(got[1][STEPS], want[1][STEPS])} if method.startswith("tasks") else {}
    return {"weights": hosts.difference(got[0], want[0]), "masks": masks, "zeros": got[2], **more}


def copies(host: str) -> str:
    """What a mask that differs between two whole copies of the model raises, on every rank."""
    run = hosts.start(BY_NAME[host], Sharp, {"rho": 0.0, **CLIP}, base=SGD)
    if run.rank == 1:
        mask = run.opt.states[DynamicSparsity].masks["0.weight"]
        mask[0] = ~mask[0]
    try:
        for x, y in hosts.batches(2):
            run.step(x, y)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def spread(record: Record, key: str, make: Callable[..., dict[str, Any]], *arguments: str) -> None:
    """Keep each figure under its kind, or the error."""
    record.note(f"error/{key}", make, *arguments)
    figures = record.results[f"error/{key}"]
    if isinstance(figures, dict):
        del record.results[f"error/{key}"]
        record.results |= {f"{kind}/{key}": value for kind, value in figures.items()}


def jobs(record: Record, *only: str) -> Iterator[Job]:
    wanted = only or HOSTS
    for host, method in itertools.product(wanted, METHODS):
        key = f"{method}/{host}"
        yield key, functools.partial(spread, record, key, compare, host, method)
    for host in ("ddp", "zero0"):
        yield record.noted(f"copies/{host}", copies, host)
