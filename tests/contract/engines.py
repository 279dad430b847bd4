"""Checks that are about the host rather than about one method; the mix of all mixins stands for the methods."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import hosts
import lives
import torch
from cases import BASES, MIX, SAVE_AFTER, STEPS
from hosts import BY_NAME, Interrupted, Run
from lives import BATCHES, advance, fresh, snapshot
from record import Outcome, Record, Tensors
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from everbatch.composition import compose
from everbatch.distributed import World
from everbatch.engines.shards import Vector
from everbatch.errors import UnsupportedHost
from everbatch.optim import SAM

SCALAR = {"allreduce": 1}
"""The norm of the gradient, where weights are sharded."""
LAYERS, TENSORS = 3, 7
"""Of the net. FSDP2 shards the linear layers and the root, which keeps its weights from forward to backward."""


def extra(host: str) -> Counter[str]:
    """Collectives of one more SAM pass, as the hosts' docstrings tell them, for this net on more than one rank."""
    spec = BY_NAME[host]
    if spec.replicate:  # shard groups of one rank need no gathers
        return Counter({"allreduce": LAYERS + 1}) + Counter(SCALAR)
    if spec.kind == "fsdp2":
        return Counter({"allgather_base": LAYERS + 1 + LAYERS, "reduce_scatter_base": LAYERS + 1}) + Counter(SCALAR)
    if spec.kind == "plain":
        return Counter()
    if spec.kind == "ddp" or spec.stage == 0:
        return Counter({"allreduce": 1})
    if spec.stage < 3:
        return Counter({"allreduce": 1, "allgather_base": 1}) + Counter(SCALAR)
    # The net is small enough that stage 3 gathers it at once, and keeps it from forward to backward.
    return Counter({"reduce_scatter_base": 1, "allgather_base": TENSORS if spec.persist else 1}) + Counter(SCALAR)


def examine(record: Record, host: str) -> None:
    """Every host check. At stage 3 DeepSpeed itself finds that ranks take different ways, on one rank: the other waits."""
    for check in (restore, residue, interrupted, collectives, accumulation, dropout, statistics, skipped_buffers, tiny,
                  forks):
        if check is forks and BY_NAME[host].stage == 3:
            continue
        rounds = check in (accumulation, tiny, forks)
        tolerance = lives.rounding(host) if check is dropout else lives.tolerance(host) if rounds else 0.0
        with record.check(f"{check.__name__}/{host}/{MIX}-sgd", tolerance) as found:
            check(found, host)
    if BY_NAME[host].kind == "zero":
        with record.check(f"self_check/{host}/SAM-sgd") as found:
            self_check(found, host)


def sharp(host: str, rho: float, lr: float = 0.1, **net: Any) -> Run:
    """SAM alone over SGD."""
    base = functools.partial(torch.optim.SGD, lr=lr, momentum=0.9)
    return hosts.start(BY_NAME[host], compose(SAM, base=torch.optim.SGD), {"rho": rho}, model=hosts.net(0, **net), base=base)


def buffers(run: Run) -> Tensors:
    return {n: b.clone() for n, b in run.model.named_buffers()}


def restore(found: Outcome, host: str) -> None:
    """A displacement is seen by the model, and leaves no bit changed; persistent parameters included (after one step)."""
    run = fresh(host, MIX, "sgd")
    advance(run, MIX, 0, 1)
    before, outputs = snapshot(run)[0], run.outputs()
    engine = run.opt.host
    with torch.no_grad():
        direction = Vector(engine, engine.shards, [torch.full_like(s.data, 0.1) for s in engine.shards])
        with run.opt.displaced(direction):
            engine.publish_if_dirty()
            moved = run.outputs()
        engine.publish_if_dirty()
    found.require(not torch.equal(moved, outputs), "the model does not compute with displaced weights")
    found.same_bits(snapshot(run)[0], before, "after displaced()")
    found.same_bits({"outputs": run.outputs()}, {"outputs": outputs}, "working weights after displaced()")


def residue(found: Outcome, host: str) -> None:
    """A step leaves storages, training modes, flags and hooks as they were."""
    run = fresh(host, MIX, "sgd", norm=True)
    list(run.model.modules())[-1].eval()
    advance(run, MIX, 0, 2)  # engines set themselves up in the first steps
    before = traces(run)
    advance(run, MIX, 2, 3)
    after = traces(run)
    odd = [k for k in before if before[k] != after.get(k)]
    found.require(before.keys() == after.keys() and not odd, f"changed by a step: {odd[:5]}")


def traces(run: Run) -> dict[str, Any]:
    """Everything about the modules that a step must not change."""
    seen: dict[str, Any] = {"global hooks": len(nn.modules.module._global_forward_pre_hooks)}
    for name, module in [*run.model.named_modules(), ("outer", run.forward)]:
        if isinstance(module, nn.Module):
            seen[f"{name} flags"] = [(k, v) for k, v in sorted(vars(module).items()) if isinstance(v, bool)]
            seen[f"{name} hooks"] = [len(getattr(module, k)) for k in vars(module) if k.endswith("_hooks")]
            seen[f"{name} buffers"] = [(k, b.data_ptr()) for k, b in module._buffers.items() if b is not None]
    for name, p in run.model.named_parameters():
        tensor = getattr(p, "ds_tensor", p)
        seen[f"{name} storage"] = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data_ptr()
        seen[f"{name} trained"] = p.requires_grad
        seen[f"{name} identity"] = id(p)
    for shard in run.opt.host.shards:
        seen[f"{shard.name} master"] = shard.data.data_ptr()
    return seen


def interrupted(found: Outcome, host: str) -> None:
    """An exception in the second pass leaves the masters' bits, and the run can go on as if the step had not been tried."""
    run, smooth = fresh(host, MIX, "sgd"), fresh(host, MIX, "sgd")
    for r in (run, smooth):
        advance(r, MIX, 0, SAVE_AFTER)
    before = snapshot(run)[0]
    try:
        run.step(*BATCHES[SAVE_AFTER], fail_in_pass=2)
        found.require(False, "the exception did not come through")
    except Interrupted:
        found.same_bits(snapshot(run)[0], before, "after the exception")
    for r in (run, smooth):
        advance(r, MIX, SAVE_AFTER, SAVE_AFTER + 2)
    found.same_bits(snapshot(run)[0], snapshot(smooth)[0], "steps after the exception")


def issued(action: Callable[[], Any]) -> list[str]:
    """Collectives that `action` makes this rank issue, in order. Torch's profiler sees those of its C++ reducers as well."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    events = sorted((e for e in profile.events() if e.name.startswith("c10d::")), key=lambda e: e.time_range.start)
    return [e.name.removeprefix("c10d::").strip("_") for e in events]


def collectives(found: Outcome, host: str) -> None:
    """The ranks issue the same collectives, and one more pass costs what the host's docstring says."""
    counts = []
    for rho in (0.5, 0.0):
        run = sharp(host, rho)
        advance(run, "", 0, 2)
        calls = issued(lambda run=run: advance(run, "", 2, 3))  # type: ignore[misc]
        everyone = World.current().gather(calls)
        found.require(all(other == calls for other in everyone), f"ranks differ: {everyone}")
        counts.append(Counter(calls))
    counts[0].subtract(counts[1])
    costs = {k: n for k, n in counts[0].items() if n}
    expected = dict(extra(host)) if World.current().size > 1 else {}
    found.require(costs == expected, f"one more pass costs {costs}, documented {expected}")


def accumulation(found: Outcome, host: str) -> None:
    """Two micro-batches are one batch, also after a step that raised between its two backwards."""
    spec, model = BY_NAME[host], hosts.net()
    run = hosts.start(spec, lives.composed(MIX, "sgd"), lives.BY_CASE[MIX].options, model=model, base=BASES["sgd"],
                      accumulation=2)
    for i, (x, y) in enumerate(BATCHES[:STEPS]):
        if i == 1:
            with contextlib.suppress(Interrupted):
                run.step(x, y, 2, fail_in_pass=2)
        run.step(x, y, 2)
    found.require(run.opt.step_count == STEPS, f"{run.opt.step_count} steps")
    found.measure(hosts.difference(run.weights(), lives.reference(MIX, "sgd")))


def dropout(found: Outcome, host: str) -> None:
    """The second pass repeats the masks of the first: a displacement below rounding changes nothing, bit for bit."""
    runs = [sharp(host, rho, dropout=0.5) for rho in (1e-30, 0.0)]
    for run in runs:
        torch.manual_seed(77 + run.rank)
        for i in range(3):  # not seeded in between: the stream must also go on as after one pass
            run.step(*BATCHES[i])
    found.same_bits(runs[0].weights(), runs[1].weights(), "with and without a second pass", lives.rounding(host))
    other = sharp(host, 0.0, dropout=0.5)
    torch.manual_seed(78 + other.rank)
    for i in range(3):
        other.step(*BATCHES[i])
    found.require(hosts.difference(other.weights(), runs[1].weights()) > 1e-3, "dropout did nothing, so the check is void")


def statistics(found: Outcome, host: str) -> None:
    """Running statistics move once per step, in the first pass. At lr 0 they are those of a run without the second pass, also
    under DDP, whose broadcast of rank 0's statistics must come once as well."""
    runs = [sharp(host, rho, lr=0.0, norm=True) for rho in (0.5, 0.0)]
    for run in runs:
        for i in range(3):
            run.step(*BATCHES[i])
    found.same_bits(buffers(runs[0]), buffers(runs[1]), "statistics with and without a second pass")
    counted = {n: b.item() for n, b in buffers(runs[0]).items() if n.endswith("num_batches_tracked")}
    found.require(set(counted.values()) == {3}, f"batches counted in three steps: {counted}")


def skipped_buffers(found: Outcome, host: str) -> None:
    """A skipped step leaves BatchNorm's buffers on every rank, and the next step is the one of a run without it."""
    run, smooth = sharp(host, 0.5, norm=True), sharp(host, 0.5, norm=True)
    for r in (run, smooth):
        advance(r, "", 0, 2)
    kept = buffers(run)
    before = snapshot(run)[0]
    run.step(*BATCHES[4], spoil=run.rank == run.world - 1)
    found.require(run.opt.skipped_count == 1, f"skipped_count is {run.opt.skipped_count}")
    found.same_bits(buffers(run), kept, "buffers after the skipped step")
    found.same_bits(snapshot(run)[0], before, "after the skipped step")
    for r in (run, smooth):
        advance(r, "", 2, 3)
    found.same_bits(buffers(run), buffers(smooth), "buffers after the next good step")
    found.same_bits(snapshot(run)[0], snapshot(smooth)[0], "after the next good step")


class Tiny(nn.Module):
    """One parameter of one element: all ranks but one own nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : hosts.CLASSES] * self.weight


def tiny(found: Outcome, host: str) -> None:
    """Ranks that own no element take part in every collective."""
    ends = []
    for name in (host, "plain"):
        run = hosts.start(BY_NAME[name], lives.composed(MIX, "sgd"), lives.BY_CASE[MIX].options, model=Tiny(), base=BASES["sgd"])
        advance(run, MIX, 0, 2)
        run.step(*BATCHES[2], spoil=run.rank == run.world - 1)
        advance(run, MIX, 2, 3)
        found.require(run.opt.skipped_count == 1, f"skipped_count is {run.opt.skipped_count}")
        ends.append(run.weights())
    found.measure(hosts.difference(*ends))


def forks(found: Outcome, host: str) -> None:
    """Ranks that take different ways through a net in one pass: the gradient is the mean over them, a way not taken counting as
    zero. Where ranks share one sharded copy of the weights that cannot be, and every rank says so."""
    spec, cls = BY_NAME[host], lives.composed(MIX, "sgd")
    world = 1 if spec.kind == "plain" else World.current().size
    start = functools.partial(hosts.start, cls=cls, options=lives.BY_CASE[MIX].options, base=BASES["sgd"])
    # Where it is refused, ways of one size: else gloo ends the process, as it does without this library.
    shared = spec.kind == "fsdp2"
    run, alone = (start(s, model=Ways(even=shared)) for s in (spec, BY_NAME["plain"]))
    for i, (x, y) in enumerate(BATCHES[:3]):
        run.bare.way = (run.rank + i) % 2
        try:
            run.step(x, y)
        except RuntimeError as error:
            found.require(shared and "only some ranks reached" in str(error), f"unclear message: {error}")
            return

        def closure(x: Tensor = x, y: Tensor = y, i: int = i) -> Tensor:
            total = torch.zeros(())
            for rank, (rows, labels) in enumerate(zip(x.chunk(world), y.chunk(world), strict=True)):
                alone.bare.way = (rank + i) % 2
                loss = nn.functional.cross_entropy(alone.forward(rows), labels) / world
                total += loss.detach()
                loss.backward()
            return total

        alone.opt.step(closure)
    found.require(world == 1 or not shared or spec.replicate, "ranks that must take one way took two")
    found.measure(hosts.difference(run.weights(), alone.weights()))


class Ways(hosts.Forked):
    """A forked net, or one whose ways have different sizes."""

    def __init__(self, *, even: bool) -> None:
        torch.manual_seed(0)
        super().__init__("branch")
        if not even:
            self.ways[1] = nn.Sequential(nn.Linear(31, 40), nn.Tanh(), nn.Linear(40, 17))


def self_check(found: Outcome, host: str) -> None:
    """An engine that keeps the gradient of a discarded pass is refused in the first step, not trained with."""
    run = sharp(host, 0.5)
    engine, forget = run.opt.host, run.opt.host.discard
    leftover: list[Any] = []

    def keeps() -> None:
        leftover[:] = [g.clone() for s in engine.shards if (g := s.grad) is not None]
        forget()

    def backward(loss: Any, true: Callable[[Any], None] = engine.backward) -> None:
        true(loss)
        if leftover:
            engine.gradient().add_(Vector(engine, engine.shards, leftover))

    engine.discard, engine.backward = keeps, backward
    try:
        with torch.no_grad():
            run.step(*BATCHES[0])
        found.require(False, "an engine that keeps old gradients was accepted")
    except UnsupportedHost as error:
        found.require("survive in this engine" in str(error), f"unclear message: {error}")
