"""Jobs of the launch about layers that are frozen after the engine was built: [HOST ...]. See worker.py.

OUT.json, by "mix/host": the largest difference of any weight from one process, at any step, and how far the frozen layer moved.
"resumed/host": see `resumed`. "fsdp1/whole": what an optimizer says of torch's older FSDP.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import deepspeed  # noqa: F401  # before torch.distributed starts
import hosts
import torch
from hosts import BY_NAME
from record import Job, Record
from task_ends import TaskEnd
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from everbatch import compose
from everbatch.optim import EMA, EWC, MAS, NCL, SAM, SI, VCL, ClipGradNorm, DynamicSparsity, MeanTeacher, ShrinkPerturb, StaleSAM

LAYER = ("3.weight", "3.bias")
MIXES: dict[str, tuple[tuple[type, ...], dict[str, Any], str]] = {
    "ewc": ((EWC, ClipGradNorm), {"strength": 1.0, "factory": hosts.net}, "consolidate_ewc"),
    "mas": ((MAS,), {"strength": 0.1, "factory": hosts.net}, "consolidate_mas"),
    "ncl": ((NCL,), {"prior": 0.05, "factory": hosts.net}, "consolidate_ncl"),
    "si": ((SI,), {"strength": 0.5}, "consolidate_si"),
    "vcl": ((VCL,), {"sigma": 0.05, "samples": 40}, "consolidate_vcl"),
    "masks": ((SAM, EMA, DynamicSparsity), {"rho": 0.1, "density": 0.5, "update_every": 2}, ""),
    "teacher": ((MeanTeacher,), {"decay": 0.9, "restore": 0.2}, ""),
    "stale": ((StaleSAM,), {"rho": 0.3}, ""),
    "shrink": ((ShrinkPerturb,), {"noise": "gaussian", "sigma": 0.05, "shrink": 0.8}, "shrink_perturb"),
}
"""Parts, their options, and what is called between steps: while the layer is trained, and while it is frozen."""
ALONE = ("consolidate_si", "consolidate_vcl", "shrink_perturb")
FROZEN = range(3, 5)
"""Steps."""


def lived(name: str, mix: str) -> tuple[list[dict[str, Tensor]], float]:
    """Weights after every step, and how far the frozen layer moved in those steps."""
    parts, options, call = MIXES[mix]
    base = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
    run = hosts.start(BY_NAME[name], compose(*parts, base=base.func), options, base=base)
    layer = dict(run.bare.named_modules())["3"]
    seen, moved = [], 0.0
    for i, (x, y) in enumerate(hosts.batches(7)):
        if i in (FROZEN.start, FROZEN.stop):
            layer.requires_grad_(i == FROZEN.stop)
        if call and i in (2, FROZEN.stop - 1):
            act = getattr(run.opt, call)
            act() if call in ALONE else act([TaskEnd._mine(run.opt, x, y)])
        run.step(x, y)
        with run.opt.host.frozen_too():
            seen.append(run.weights())
        if i in FROZEN:
            moved = max(moved, *(float((seen[-1][n] - seen[-2][n]).abs().max()) for n in LAYER))
    return seen, moved


@functools.cache
def reference(mix: str) -> tuple[list[dict[str, Tensor]], float]:
    """The same in one process."""
    return lived("plain", mix)


def apart(mix: str, name: str) -> tuple[float, float]:
    """From one process; and how far the frozen layer moved there and here."""
    (ours, moved), (theirs, alone) = lived(name, mix), reference(mix)
    return max(hosts.difference(a, b) for a, b in zip(ours, theirs, strict=True)), moved + alone


def resumed(name: str) -> float:
    """How far a run that goes on in another engine, from a state that was taken while the layer was frozen, is from the first."""
    base = functools.partial(torch.optim.AdamW, lr=0.01)
    cls, batches = compose(EMA, SAM, base=base.func), hosts.batches(6)
    runs = [hosts.start(BY_NAME[name], cls, {"rho": 0.1}, base=base, model=hosts.net(seed)) for seed in (0, 7)]
    layers = [dict(run.bare.named_modules())["3"] for run in runs]
    for i in range(4):
        layers[0].requires_grad_(i < 2)
        runs[0].step(*batches[i])
    layers[1].requires_grad_(False)
    runs[1].opt.load_state_dict(runs[0].opt.state_dict(weights=True))
    apart = 0.0
    for i in (4, 5):
        found = []
        for run, layer in zip(runs, layers, strict=True):
            layer.requires_grad_(i == 5)
            run.step(*batches[i])
            with run.opt.host.frozen_too():
                found.append(run.weights() | {"outputs": run.outputs()})
        apart = max(apart, hosts.difference(*found))
    return apart


def older(whole: bool) -> str:
    """What FSDP1 is told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is the older one
        model = FullyShardedDataParallel(hosts.net(), use_orig_params=whole, device_id=torch.device("cpu"))
    compose(SAM, base=torch.optim.SGD)(model, lr=0.1)
    return "taken"


def jobs(record: Record, *names: str) -> Iterator[Job]:
    for mix, name in itertools.product(MIXES, names):
        yield record.noted(f"{mix}/{name}", apart, mix, name)
    for name in names:
        if name.startswith("zero"):
            yield record.noted(f"resumed/{name}", resumed, name)
    for whole in (False, True):
        yield record.noted(f"fsdp1/{whole}", older, whole)
