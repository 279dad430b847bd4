"""The life of one case on one host: steps, a save, a resumed twin, a skipped step; and a move to another host."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import hosts
import torch
from cases import BASES, BY_CASE, CALLS, FORKED, SAVE_AFTER, SKIP_AT, STEPS, TOLERANCE
from hosts import BY_NAME, Run
from record import Outcome, Record, Tensors

from everbatch import checkpoint
from everbatch.composition import compose
from everbatch.distributed import World
from everbatch.optim import DynamicSparsity
from everbatch.optim.state import load_pieces, pieces

BATCHES = hosts.batches(STEPS + 1)


@functools.cache
def composed(case: str, base: str) -> type:
    """The class of a case; "" is the base with the step protocol alone."""
    return compose(*(BY_CASE[case].mixins if case else ()), base=BASES[base].func)


def fresh(host: str, case: str, base: str, *, zero: bool = False, seed: int = 0, **net: Any) -> Run:
    """A new run of a case on a host."""
    options = {} if not case else BY_CASE[case].zero if zero else BY_CASE[case].options
    net.setdefault("fork", BY_CASE[case].fork if case else "")
    return hosts.start(BY_NAME[host], composed(case, base), options, model=hosts.net(seed, **net), base=BASES[base])


def advance(run: Run, case: str, begin: int, end: int) -> None:
    """Steps `begin` to `end` of the common data, with the case's calls between them."""
    for i in range(begin, end):
        if case and BY_CASE[case].call and i in CALLS:
            run.bare.way = 0  # as a replica that a factory builds has it
            getattr(run.opt, BY_CASE[case].call)()
        torch.default_generator.manual_seed(1000 + i)
        if hosts.DEVICE == "cuda":
            torch.cuda.manual_seed(1000 + i)
        if case and BY_CASE[case].fork:
            run.bare.way = hosts.WAYS[BY_CASE[case].fork][i]
        run.step(*BATCHES[i])


def snapshot(run: Run) -> tuple[Tensors, dict[str, Any]]:
    """Masters, moments and mixin state, whole and copied, and the plain values."""
    saved = run.opt.state_dict(weights=True)["everbatch"]
    return {n: t.clone() for n, t in saved["tensors"].items()}, copy.deepcopy(saved["meta"])


@functools.cache
def reference(case: str, base: str) -> Tensors:
    """Weights after STEPS steps of one process on the whole batch."""
    run = fresh("plain", case, base)
    advance(run, case, 0, STEPS)
    return run.weights()


@functools.cache
def bare(host: str, base: str, fork: str) -> Tensors:
    """Weights after STEPS steps of the base alone."""
    case = next(c.name for c in FORKED if c.fork == fork and not c.mixins) if fork else ""
    run = fresh(host, case, base)
    advance(run, case, 0, STEPS)
    return run.weights()


def apart(found: Outcome, run: Run, case: str, expected: Tensors) -> float:
    """Largest difference of a weight. In bf16 a mask may take one weight instead of another of nearly the same score: two of a
    tensor, or one in a hundred, which are zero on one side alone; they are left out, and all others count."""
    weights = run.weights()
    if not run.spec.bf16 or DynamicSparsity not in BY_CASE[case].mixins:
        return hosts.difference(weights, expected)
    taken = {name: (weights[name] == 0) != (expected[name] == 0) for name in expected}
    many = {name: int(odd.sum()) for name, odd in taken.items() if odd.sum() > max(2, odd.numel() / 100)}
    found.require(not many, f"masks take other weights: {many}")
    sides = ({name: t.masked_fill(taken[name], 0.0) for name, t in side.items()} for side in (weights, expected))
    return hosts.difference(*sides)


def tolerance(host: str) -> float:
    return TOLERANCE["bf16" if BY_NAME[host].bf16 else "fp32"]


def rounding(host: str) -> float:
    """0, or what a resumed run may differ by: from three ranks on the order of a sum matters, and DDP packs its gradients anew
    after the first backward, so that its ring starts elsewhere in them."""
    return TOLERANCE["fp32"] if host == "ddp" and World.current().size > 2 else 0.0


def live(record: Record, host: str, case: str, base: str, store: Path) -> None:
    """absent, parity, resume, skipped. The checkpoint goes to `store` for moves."""
    world, tail = World.current(), f"{host}/{case}-{base}"
    folder, exact = store / str(world.size) / f"{host}-{case}-{base}", rounding(host)
    amplifies = BY_CASE[case].amplifies if BY_NAME[host].bf16 else 1.0
    with record.check(f"parity/{tail}", amplifies * tolerance(host)) as found:
        run = fresh(host, case, base)
        advance(run, case, 0, SAVE_AFTER)
        tensors, meta = pieces(run.opt)
        checkpoint.save(folder, SAVE_AFTER, tensors, meta, world=world)
        saved = snapshot(run)
        advance(run, case, SAVE_AFTER, SKIP_AT)
        late = snapshot(run)
        advance(run, case, SKIP_AT, STEPS)
        end = snapshot(run)
        found.measure(apart(found, run, case, reference(case, base)))
    with record.check(f"resume/{tail}", exact) as found:
        twin = fresh(host, case, base, seed=7)
        kept = checkpoint.latest(folder, world=world)
        assert kept is not None
        load_pieces(twin.opt, kept, kept.meta)
        now = snapshot(twin)
        found.same_bits(now[0], saved[0], "loaded")
        found.require(plain(now[1]) == plain(saved[1]), "loaded: plain values differ")
        advance(twin, case, SAVE_AFTER, SKIP_AT)
        now = snapshot(twin)
        found.same_bits(now[0], late[0], "resumed against uninterrupted", exact)
        found.require(alike(plain(now[1]), plain(late[1]), exact), "resumed: plain values differ")
    with record.check(f"skipped/{tail}", exact) as found:
        before, outputs = snapshot(twin), twin.outputs()
        twin.step(*BATCHES[STEPS], spoil=twin.rank == twin.world - 1)
        after = snapshot(twin)
        found.same_bits(after[0], before[0], "after the skipped step")
        found.require(twin.opt.skipped_count == 1, f"skipped_count is {twin.opt.skipped_count}")
        before[1]["skipped"] = 1
        found.require(plain(after[1]) == plain(before[1]), "plain values changed in the skipped step")
        found.same_bits({"outputs": twin.outputs()}, {"outputs": outputs}, "working weights")
        advance(twin, case, SKIP_AT, STEPS)
        found.same_bits(snapshot(twin)[0], end[0], "after the next good step", exact)
    if not BY_NAME[host].bf16:
        with record.check(f"absent/{tail}") as found:
            quiet = fresh(host, case, base, zero=True)
            advance(quiet, case, 0, STEPS)
            found.same_bits(quiet.weights(), bare(host, base, BY_CASE[case].fork if case else ""), "against the bare base")


def move(record: Record, source: str, host: str, case: str, base: str, store: Path) -> None:
    """Load on this host and world what two ranks saved on another; every bit is there, and the run goes on as one process."""
    world = World.current()
    with record.check(f"moved from {source}/{host}/{case}-{base}", tolerance(host)) as found:
        kept = checkpoint.latest(store / "2" / f"{source}-{case}-{base}", world=world)
        assert kept is not None and kept.world_size == 2
        run = fresh(host, case, base, seed=7)
        load_pieces(run.opt, kept, kept.meta)
        found.same_bits(snapshot(run)[0], {n: kept.whole(n) for n in kept.names()}, "loaded")
        advance(run, case, SAVE_AFTER, STEPS)
        found.measure(hosts.difference(run.weights(), reference(case, base)))


def alike(a: Any, b: Any, tolerance: float) -> bool:
    """Equal, but for floats, which may differ by the tolerance of the host."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k], tolerance) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(alike(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or abs(a - b) <= tolerance
    return bool(a == b)


def plain(meta: dict[str, Any]) -> dict[str, Any]:
    """Plain values with tuples as lists, as JSON leaves them."""
    return json.loads(json.dumps(meta))  # type: ignore[no-any-return]
