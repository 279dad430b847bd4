"""One process of the parity launch of ShrinkPerturb and SubspaceProjection: runs every mix on every host.

    torchrun --nproc-per-node 2 warm_worker.py OUT.json [HOST ...]

OUT.json, by key: "mix/host" the largest difference from one process of any weight, average or output, after each step and after
each call. "collectives/mix/host" what the mix adds to its base's step, by name. Other keys are named where they are set. A text
is an error.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

import deepspeed  # noqa: F401  # before torch.distributed starts
import hosts
import torch
import torch.distributed as dist
from engines import issued
from hosts import BY_NAME, Run
from maps import MAPS, RIGHT, basis
from torch import Tensor, nn

from everbatch.nn import bn_recalibrate
from everbatch.optim import EMA, SAM, ClipGradNorm, Projection, SecondMoment, ShrinkPerturb, SubspaceProjection
from everbatch.optim.subspace.transforms import null_space

Found = dict[str, Any]
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
ADAM = functools.partial(torch.optim.AdamW, lr=0.01, eps=1e-4)


class Warm(ClipGradNorm, EMA, ShrinkPerturb, SAM, torch.optim.SGD):
    pass


class Sub(ClipGradNorm, EMA, SubspaceProjection, SAM, torch.optim.SGD):
    pass


class SubAdam(ClipGradNorm, EMA, SubspaceProjection, SAM, torch.optim.AdamW):
    pass


class Bare(SubspaceProjection, torch.optim.SGD):
    pass


def build() -> nn.Module:
    """Like the suite's net, with a normalisation and no module that cannot draw anew."""
    return nn.Sequential(nn.Linear(20, 31), nn.LayerNorm(31), nn.Tanh(), nn.Linear(31, 17), nn.Tanh(), nn.Linear(17, 5))


def net() -> nn.Module:
    torch.manual_seed(0)
    return build()


COMMON = {"rho": 0.5, "max_norm": 0.8, "ema_decay": 0.5}
WARM: dict[str, dict[str, Any]] = {
    "factory": {"factory": build, "perturb": 0.3}, "modules": {"perturb": 0.3, "norm_params": "reset"},
    "weights, kept": {"factory": build, "perturb": 0.3, "tensors": "weights", "moments": "keep"},
    "gaussian, scaled": {"noise": "gaussian", "sigma": 0.1, "moments": "scale", "norm_params": "skip"}}
SUB: dict[str, tuple[type, Any, dict[str, Any], int]] = {
    "right": (Sub, SGD, {"projections": RIGHT}, 1), "all": (Sub, SGD, {"projections": MAPS}, 1),
    "accumulated": (Sub, SGD, {"projections": MAPS, "strength": 0.5}, 2),
    "update right": (SubAdam, ADAM, {"projections": RIGHT, "space": "update"}, 1),
    "update all": (SubAdam, ADAM, {"projections": MAPS, "space": "update"}, 1)}


def warm(name: str, mix: str) -> list[dict[str, Tensor]]:
    """Weights, averages and outputs of the working weights after every call and step."""
    run = hosts.start(BY_NAME[name], Warm, COMMON | WARM[mix], model=net(), base=SGD)
    seen = []
    for i, (x, y) in enumerate(hosts.batches(5)):
        if i in (2, 4):
            run.opt.shrink_perturb()
            kept = run.opt.state_dict(weights=True)["everbatch"]["tensors"]
            seen += [run.weights(), {n: t for n, t in kept.items() if n.startswith("EMA")}, {"outputs": run.outputs().float()}]
        run.step(x, y)
        seen.append(run.weights())
    return seen


def subspace(name: str, mix: str) -> list[dict[str, Tensor]]:
    """Weights after every step, with a skipped one and a move to a new optimizer between."""
    cls, base, options, parts = SUB[mix]
    first: Run = hosts.start(BY_NAME[name], cls, COMMON | options, base=base, accumulation=parts)
    bare = {k: v for k, v in options.items() if k != "projections"}
    batches, seen = hosts.batches(6), []
    for i in range(3):
        first.step(*batches[i], parts)
        seen.append(first.weights())
    second = hosts.start(BY_NAME[name], cls, COMMON | bare, base=base, accumulation=parts, model=hosts.net(7))
    second.opt.load_state_dict(first.opt.state_dict(weights=True))
    second.step(*batches[5], parts, spoil=second.rank == second.world - 1)
    for i in (3, 4):
        second.step(*batches[i], parts)
        seen.append(second.weights())
    return [*seen, {"outputs": second.outputs().float()}]


def measure(found: Found, names: list[str], run: Callable[[str, str], list[dict[str, Tensor]]], mixes: Any) -> None:
    for mix in mixes:
        wanted = run("plain", mix)
        for name in names:
            key = f"{mix}/{name}"
            try:
                found[key] = max(hosts.difference(a, b) for a, b in zip(run(name, mix), wanted, strict=True))
            except Exception as error:  # it is the result
                found[key] = f"{type(error).__name__}: {error}"
        gc.collect()


def collectives(found: Found, names: list[str]) -> None:
    for name in names:
        for mix, maps in (("right", RIGHT), ("all", MAPS)):
            counts = []
            for options in ({"projections": maps}, {}):
                run = hosts.start(BY_NAME[name], Bare, options, base=SGD)
                for i in range(2):
                    run.step(*hosts.batches(3)[i])
                counts.append(Counter(issued(lambda run=run: run.step(*hosts.batches(3)[2]))))  # type: ignore[misc]
            counts[0].subtract(counts[1])
            found[f"collectives/{mix}/{name}"] = {k: n for k, n in counts[0].items() if n}


def agreement(found: Found) -> None:
    """What ranks must agree on."""
    rank = dist.get_rank()
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for centred in (False, True):
        moment, away = SecondMoment(6, centred=centred, dtype=torch.float64), x - x.mean(0) if centred else x
        for rows in x.split([10, 30])[rank].split(7):  # unequal shares
            moment.update(rows)
        moment.reduce()
        moment.reduce()  # nothing twice
        found[f"second moment/{centred}"] = float((moment.matrix - away.T @ away / 40).abs().max()) + abs(moment.count - 40)
    spec = BY_NAME["ddp"]
    run = hosts.start(spec, Bare, {"projections": {"0.weight": Projection(right=null_space(basis(20, 3 + rank)))}}, base=SGD)
    found["rank 0's projections"] = torch.equal(run.opt.projections["0.weight"].right.basis, basis(20, 3))

    def differing() -> nn.Module:
        model = build()
        with torch.no_grad():
            model[0].weight[0, 0] += rank
        return model

    for key, options, shift in (("fresh", {"factory": differing}, 0.0), ("weights", {"factory": build}, float(rank))):
        run = hosts.start(spec, Warm, COMMON | options, model=net(), base=SGD)
        run.opt.host.shards[0].data[0, 0] += shift
        try:
            run.opt.shrink_perturb()
            found[f"differing {key}"] = "went through"
        except ValueError as error:
            found[f"differing {key}"] = str(error)
    model = nn.Sequential(nn.BatchNorm1d(6).double(), nn.BatchNorm1d(6).double(), nn.BatchNorm1d(6).double())
    for layer in model[1:]:
        layer.running_mean.fill_(7.0 + rank)
    bn_recalibrate(model, x.split(10)[rank::2], forward=lambda rows: model[: 2 - rank](rows))
    found["where one rank's forwards came"] = float(model[1].running_mean.abs().max())
    found["where none came"] = model[2].running_mean.tolist() == [7.0 + rank] * 6
    means = torch.stack([b.mean(0) for b in x.split(10)]).mean(0)
    found["recalibrated"] = float((model[0].running_mean - means).abs().max())  # summed in float32


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    names = sys.argv[2:] or [h.name for h in hosts.HOSTS if h.kind != "plain" and (not h.bf16 or h.name == "zero2-bf16")]
    found: Found = {}
    measure(found, names, warm, WARM)
    measure(found, names, subspace, SUB)
    collectives(found, [n for n in names if not BY_NAME[n].bf16])
    agreement(found)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
