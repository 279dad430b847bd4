"""Jobs of the parity launch of ShrinkPerturb, SubspaceProjection, OSFT, GRIP: [HOST ...]; every mix on every host. See worker.py.

OUT.json, by key: "mix/host" the largest difference from one process of any weight, average or output, after each step and after
each call. "collectives/mix/host" what the mix adds to its base's step, by name. Other keys are named where they are set. A text
is an error.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed  # noqa: F401  # before torch.distributed starts
import hosts
import torch
import torch.distributed as dist
from engines import issued
from hosts import BY_NAME, Run
from maps import MAPS, RIGHT, basis
from record import Job, Record
from task_ends import TaskEnd
from torch import Tensor, nn

from everbatch.nn import bn_recalibrate
from everbatch.optim import EMA, GRIP, OSFT, SAM, ClipGradNorm, Projection, SecondMoment, ShrinkPerturb, SubspaceProjection
from everbatch.optim.subspace.transforms import null_space

Found = dict[str, Any]
Lived = Callable[[str, str], list[dict[str, Tensor]]]
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


@functools.cache
def reference(run: Lived, mix: str) -> list[dict[str, Tensor]]:
    """The same in one process."""
    return run("plain", mix)


def apart(run: Lived, mix: str, name: str) -> float:
    """Largest difference of a host from one process."""
    return max(hosts.difference(a, b) for a, b in zip(run(name, mix), reference(run, mix), strict=True))


def collectives(name: str, maps: dict[str, Projection]) -> dict[str, int]:
    """What projections add to the base's step."""
    counts = []
    for options in ({"projections": maps}, {}):
        run = hosts.start(BY_NAME[name], Bare, options, base=SGD)
        for i in range(2):
            run.step(*hosts.batches(3)[i])
        counts.append(Counter(issued(lambda run=run: run.step(*hosts.batches(3)[2]))))  # type: ignore[misc]
    counts[0].subtract(counts[1])
    return {k: n for k, n in counts[0].items() if n}


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


class Kept(ClipGradNorm, EMA, OSFT, SAM, torch.optim.AdamW):
    pass


class Held(ClipGradNorm, EMA, GRIP, SAM, torch.optim.SGD):
    pass


FACTORY = functools.partial(hosts.build)
OWN: dict[str, tuple[type, Any, dict[str, Any]]] = {
    "kept": (Kept, ADAM, {"mrr": 0.2, "trr": 0.6, "factory": FACTORY}),
    "kept, factor": (Kept, ADAM, {"mrr": 0.2, "trr": 0.6, "form": "factor", "factory": FACTORY}),
    "held": (Held, SGD, {"routers": ("5.weight",), "eps_margin": 0.3, "factory": FACTORY})}
"""Parts that set projections by the data that ranks hold, unevenly."""


def own(name: str, mix: str) -> list[dict[str, Tensor]]:
    """Weights after every step, with two looks at the data and a move to a new optimizer between."""
    cls, base, options = OWN[mix]
    batches, seen = hosts.batches(6), []

    def look(run: Run, again: bool) -> None:
        rows = [TaskEnd._mine(run.opt, *batches[0])]
        if isinstance(run.opt, OSFT):
            run.opt.consolidate_osft(rows)
            return
        run.opt.refresh_routing(rows) if again else run.opt.retain_routing(rows)
        seen.append({"stability": torch.tensor(run.opt.routing_stability(rows))})

    first: Run = hosts.start(BY_NAME[name], cls, COMMON | options, base=base)
    for i in range(3):
        if i == 1:
            look(first, again=False)
        first.step(*batches[i])
        seen.append(first.weights())
    second = hosts.start(BY_NAME[name], cls, COMMON | options, base=base, model=hosts.net(7))
    second.opt.load_state_dict(first.opt.state_dict(weights=True))
    for i in (3, 4, 5):
        if i == 4:
            look(second, again=True)
        second.step(*batches[i])
        seen.append(second.weights())
    return [*seen, {"outputs": second.outputs().float()}]


def jobs(record: Record, *wanted: str) -> Iterator[Job]:
    names = wanted or [h.name for h in hosts.HOSTS if h.kind != "plain" and (not h.bf16 or h.name == "zero2-bf16")]
    for run, mixes in ((warm, WARM), (subspace, SUB), (own, OWN)):
        for mix, name in itertools.product(mixes, names):
            yield record.noted(f"{mix}/{name}", apart, run, mix, name)
    for name in names:
        if not BY_NAME[name].bf16:
            yield record.noted(f"collectives/right/{name}", collectives, name, RIGHT)
            yield record.noted(f"collectives/all/{name}", collectives, name, MAPS)
    yield "agreement", functools.partial(agreement, record.results)
