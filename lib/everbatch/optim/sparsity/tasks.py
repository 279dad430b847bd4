"""Tasks with weights of their own in one network: what `DynamicSparsity.begin_task` and its kin do.

A task trains a sparse mask. When it ends, its weights go into a store and are frozen for good: later tasks may compute with
them, and never move them. Prediction for a task puts its mask, its stored weights, and its biases, norms and statistics back.

Source: Yildirim et al. 2023, arXiv 2308.14831, and the code muratonuryildirim/CL-with-DST. Differs where that code forgets:
parameters no mask covers are kept per task, frozen weights are restored after every update (there, weight decay moves them), and
an activated weight of an earlier task has its stored value in training too (there it trains as zero and comes back in
prediction).
"""

from __future__ import annotations

import base64
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from everbatch.distributed import World
from everbatch.engines.host import plain_name
from everbatch.engines.shards import ByName, Shard
from everbatch.errors import check
from everbatch.optim.sparsity.grow import random_keys
from everbatch.optim.sparsity.select import Piece, choose

if TYPE_CHECKING:
    from everbatch.optim.sparsity.dynamic import DynamicSparsity

__all__ = ["Capacity", "begin", "capacity", "end", "keep_best", "showing"]

WHO = "DynamicSparsity"
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Capacity:
    """Room in one layer."""

    size: int
    used: int
    """Entries that ended tasks use."""
    shared: dict[int, float]
    """Per ended task: the share of its entries that earlier tasks used already."""

    @property
    def free(self) -> float:
        """Share of entries no ended task uses."""
        return 1.0 - self.used / self.size


def _state(opt: DynamicSparsity) -> Any:
    from everbatch.optim.sparsity.dynamic import DynamicSparsity as Part

    return opt.configs[Part], opt.states[Part]


def _frozen_too(function: Callable[Concatenate[DynamicSparsity, P], R]) -> Callable[Concatenate[DynamicSparsity, P], R]:
    """What a task keeps and shows is the whole network, whatever the user has frozen by then or will have unfrozen."""
    @functools.wraps(function)
    def wrapped(opt: DynamicSparsity, *args: P.args, **kwargs: P.kwargs) -> R:
        with opt.host.frozen_too():
            return function(opt, *args, **kwargs)

    return wrapped  # type: ignore[return-value]  # mypy holds the name of the first argument against it


# ---------------------------------------------------------------------------------------------------------- a task
@torch.no_grad()
def begin(opt: DynamicSparsity, task: int, steps: int | None, masks: Mapping[str, Tensor] | None) -> None:
    """See `DynamicSparsity.begin_task`."""
    config, state = _state(opt)
    if state.task:
        raise RuntimeError(f"{WHO}: begin_task({task!r}) while task {state.task} is open; call end_task() first")
    check(isinstance(task, int) and not isinstance(task, bool) and task == state.done + 1, WHO, f"begin_task({task!r})",
          f"be the next task, {state.done + 1}")
    config.schedule(steps if steps is not None else config.total_steps)
    if masks is not None:
        opt._check_masks(masks)
    names = list(opt._shapes)
    if state.done:
        _warn(opt, capacity(opt))
    given = {s.name: opt._slice(s, masks[s.name]) for s in opt.host.shards if masks is not None and s.name in masks}
    if state.done:
        fresh = _draw(opt, task, [n for n in names if masks is None or n not in masks])
    else:
        # The first task keeps what it was built with; layers that were left dense get a mask of ones, to be frozen by.
        with opt.host.frozen_too():
            fresh = {s.name: state.masks.get(s.name, torch.ones_like(s.data, dtype=torch.bool)) for s in opt.host.shards
                     if s.name in opt._shapes}
    chosen = {**fresh, **given}
    if state.done:
        for shard in opt.host.shards:
            if shard.name in chosen:
                _load(opt, shard, chosen[shard.name], task)
    if config.reset_moments:
        opt.host.reset_moments()
    state.task, state.task_start, state.task_steps = task, opt.step_count, steps
    state.scores, state.averages, state.changes = ByName(), ByName(), 0
    opt._install(chosen, names)


def _load(opt: DynamicSparsity, shard: Shard, mask: Tensor, task: int) -> None:
    """Weights of a new task: stored values where earlier tasks use an entry, fresh ones elsewhere. The mask comes later."""
    config, state = _state(opt)
    used, data = opt._used(), shard.data
    assert used is not None
    value = torch.where(used[shard.name], state.store[shard.name], torch.zeros_like(data))
    fresh = (mask & ~used[shard.name]).reshape(-1)
    if config.fresh_init == "initializer":
        bound = float(np.prod(shard.shape[1:])) ** -0.5
        draws = random_keys(fresh, shard.start, (opt.seed, "fresh", task, shard.name)).mul_(2.0).sub_(1.0).mul_(bound)
        value = torch.where(fresh.view(data.shape), draws.to(data.dtype).view(data.shape), value)
    data.copy_(value)


def _draw(opt: DynamicSparsity, task: int, names: list[str]) -> dict[str, Tensor]:
    """New masks: of all entries, of free ones only ("forbid"), or of used ones first ("prefer")."""
    config, state = _state(opt)
    if config.grow_into_used == "allow" or not names:
        drawn: dict[str, Tensor] = opt._draw(task, names)
        return drawn
    used = opt._used()
    assert used is not None
    place = {n: i for i, n in enumerate(names)}
    shards = [s for s in opt.host.shards if s.name in place]
    forbid = config.grow_into_used == "forbid"
    pieces = []
    for s in shards:
        taken = used[s.name].reshape(-1)
        candidates = ~taken if forbid else torch.ones_like(taken)
        keys = random_keys(candidates, s.start, (opt.seed, "mask", task, s.name))
        pieces.append(Piece(place[s.name], s.start, keys, candidates, None if forbid else taken.to(torch.uint8)))
    counts = torch.tensor([opt._counts[n] for n in names], dtype=torch.int64)
    picked = choose(pieces, counts, opt.host.total, span=max(opt._size(n) for n in names), dtype=torch.float64,
                    device=opt.host.device, ranked=not forbid)
    return {s.name: m.view(s.data.shape) for s, m in zip(shards, picked, strict=True)}


def _warn(opt: DynamicSparsity, room: dict[str, Capacity]) -> None:
    """Before a later task: too little room, or state that no mask protects."""
    config, state = _state(opt)
    tight = [n for n, c in room.items() if c.size - c.used < opt._counts[n]]
    if tight and config.grow_into_used == "forbid":
        wanted, free = [opt._counts[n] for n in tight[:3]], [room[n].size - room[n].used for n in tight[:3]]
        raise RuntimeError(f"{WHO}: task {state.done + 1} wants {wanted} fresh weights in {tight[:3]}, {free} are free; use "
                           "grow_into_used='allow', a smaller density or a larger network")
    world = World.current()
    if tight and config.grow_into_used != "prefer" and not opt.__dict__.get("_told_tight") and world.rank == 0:
        warnings.warn(f"{WHO}: {len(tight)} layers have fewer free weights than a task uses ({tight[:3]}); tasks share more from "
                      "here on", stacklevel=4)
    opt.__dict__["_told_tight"] = bool(tight) or opt.__dict__.get("_told_tight", False)
    if config.per_task_params or opt.__dict__.get("_told_bare"):
        return
    bare = [n for n in opt.host.names if n not in opt._shapes]
    running = opt.host.module is not None and any(getattr(m, "track_running_stats", False) for m in opt.host.module.modules())
    if (bare or running) and world.rank == 0:
        warnings.warn(f"{WHO}: per_task_params=False, and {bare[:3]}{' and running statistics' * running} are trained by every "
                      "task: earlier tasks will be forgotten", stacklevel=4)
    opt.__dict__["_told_bare"] = True


@torch.no_grad()
@_frozen_too
def keep_best(opt: DynamicSparsity, score: float) -> bool:
    """See `DynamicSparsity.keep_best`."""
    _, state = _state(opt)
    if not state.task:
        raise RuntimeError(f"{WHO}: keep_best() without begin_task")
    if state.best_score is not None and not score > state.best_score:
        return False
    state.best_score = float(score)
    state.best_masks = ByName({n: m.clone() for n, m in state.masks.items()})
    state.best_weights = ByName({s.name: s.data.clone() for s in opt.host.shards})
    state.best_buffers = _buffers(opt)
    return True


@torch.no_grad()
@_frozen_too
def end(opt: DynamicSparsity, select: str) -> None:
    """See `DynamicSparsity.end_task`."""
    config, state = _state(opt)
    check(select in ("last", "best"), WHO, f"select={select!r}", "be 'last' or 'best'")
    if not state.task:
        raise RuntimeError(f"{WHO}: end_task() without begin_task")
    if select == "best":
        if state.best_score is None:
            raise RuntimeError(f"{WHO}: end_task(select='best') without keep_best(score); call it after every epoch")
        for shard in opt.host.shards:
            if shard.name in state.best_weights:  # not what came since
                shard.data.copy_(state.best_weights[shard.name])
        _set_buffers(opt, state.best_buffers)
        opt._install(state.best_masks, list(opt._shapes))
    _check_frozen(opt)
    used = opt._used() or {}
    for shard in opt._masked():
        name, data = shard.name, shard.data
        fresh = state.masks[name] & ~used[name] if name in used else state.masks[name]
        old = state.store.get(name, torch.zeros_like(data))
        state.store[name] = torch.where(fresh, data, old)
    state.task_masks.append(ByName({n: m.clone() for n, m in state.masks.items()}))
    state.done, state.task = state.task, 0
    state.checksums = {**state.checksums, **_checksums(opt)}
    if config.per_task_params:
        state.saved[str(state.done)] = {"parameters": _bare(opt), "buffers": _buffers(opt)}
    state.best_score, state.best_masks, state.best_weights, state.best_buffers = None, ByName(), ByName(), {}


def _check_frozen(opt: DynamicSparsity) -> None:
    """Raise, on every rank, if a frozen weight or its stored value changed."""
    config, state = _state(opt)
    used = opt._used()
    if used is None:
        return
    names = list(opt._shapes)
    moved = torch.zeros(len(names), dtype=torch.int64, device=opt.host.device)
    for shard in opt._masked():
        frozen = used[shard.name] & state.masks[shard.name]
        if config.as_released:
            frozen = frozen & (shard.data != 0)  # what growth activated trains as zero there
        moved[names.index(shard.name)] += (frozen & (shard.data != state.store[shard.name])).sum()
    odd = [n for n, count in zip(names, opt.host.total(moved).tolist(), strict=True) if count]
    odd += [n for n, value in _checksums(opt).items() if state.checksums.get(n, value) != value]
    if odd:
        raise RuntimeError(f"{WHO}: frozen weights of {sorted(set(odd))[:5]} changed during task {state.task}; something moves "
                           "masters without going through the optimizer's step")


def _checksums(opt: DynamicSparsity) -> dict[str, int]:
    """A sum over the stored bits that ended tasks use, each times an odd number of its position; the same at any sharding."""
    _, state = _state(opt)
    used, names = opt._used() or {}, list(opt._shapes)
    sums = torch.zeros(len(names), dtype=torch.int64, device=opt.host.device)
    for shard in opt._masked():
        if shard.name in used:
            at = used[shard.name].reshape(-1).nonzero().view(-1)
            kept = state.store[shard.name].reshape(-1)[at]
            bits = kept.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[kept.element_size()]).to(torch.int64)
            sums[names.index(shard.name)] += (bits * (2 * (at + shard.start) + 1)).sum()
    return dict(zip(names, opt.host.total(sums).tolist(), strict=True))


@torch.no_grad()
@_frozen_too
def capacity(opt: DynamicSparsity) -> dict[str, Capacity]:
    """See `DynamicSparsity.capacity`. One all-reduce."""
    _, state = _state(opt)
    names, tasks = list(opt._shapes), state.done
    table = torch.zeros(1 + 2 * tasks, len(names), dtype=torch.int64, device=opt.host.device)
    for shard in opt.host.shards:
        if shard.name not in opt._shapes:
            continue
        at, union = names.index(shard.name), torch.zeros_like(shard.data, dtype=torch.bool)
        for k, masks in enumerate(state.task_masks):
            mask = masks[shard.name].bool()
            table[1 + 2 * k, at] += mask.sum()
            table[2 + 2 * k, at] += (mask & union).sum()
            union |= mask
        table[0, at] += union.sum()
    rows = opt.host.total(table).tolist()
    return {n: Capacity(opt._size(n), rows[0][i], {k + 1: rows[2 + 2 * k][i] / max(rows[1 + 2 * k][i], 1) for k in range(tasks)})
            for i, n in enumerate(names)}


# ------------------------------------------------------------------------------------------------------ prediction
@contextmanager
def showing(opt: DynamicSparsity, task: int) -> Iterator[None]:
    """See `DynamicSparsity.task`. Two publications; one if the block raises, and the next pass then publishes the weights."""
    _, state = _state(opt)
    if task == state.task and task:
        yield
        return
    if not (isinstance(task, int) and 1 <= task <= state.done):
        known = f"1 to {state.done}" if state.done else "none"
        raise RuntimeError(f"{WHO}: task({task!r}) has no mask; tasks that ended: {known}, open: {state.task or 'none'}")
    with opt.host.frozen_too():
        shards = opt.host.shards
    weights = {s.name: s.data.clone() for s in shards}
    buffers = [(b, b.clone()) for _, b in _named_buffers(opt)]
    try:
        _show(opt, task)
        opt.host.publish_if_dirty()
        yield
    finally:
        with torch.no_grad():  # locally: what raised on one rank must not start a collective
            for shard in shards:
                shard.data.copy_(weights[shard.name])
            for buffer, kept in buffers:
                buffer.copy_(kept)
        opt.host.touch()
    opt.host.publish_if_dirty()


@torch.no_grad()
@_frozen_too
def _show(opt: DynamicSparsity, task: int) -> None:
    _, state = _state(opt)
    masks, saved = state.task_masks[task - 1], state.saved.get(str(task))
    for shard in opt.host.shards:
        if shard.name in masks:
            shard.data.copy_(torch.where(masks[shard.name].bool(), state.store[shard.name], torch.zeros_like(shard.data)))
        elif saved is not None and shard.name in saved["parameters"]:  # what came after the task stays as it is
            whole = _unpack(saved["parameters"][shard.name])
            shard.data.copy_(whole.view(-1)[shard.start : shard.start + shard.numel].view(shard.data.shape))
    if saved is not None:
        _set_buffers(opt, saved["buffers"])
    opt.host.touch()


# ------------------------------------------------------------------- what no mask covers, as plain values for a state
def _bare(opt: DynamicSparsity) -> dict[str, Any]:
    """Whole parameters that have no mask. Collective where weights are sharded."""
    names = [n for n in opt.host.names if n not in opt._shapes]
    whole = opt.host.gather([(s, s.data) for s in opt.host.shards if s.name in names], names)
    return {n: _pack(t) for n, t in whole.items()}


def _named_buffers(opt: DynamicSparsity) -> list[tuple[str, Tensor]]:
    module: nn.Module | None = opt.host.module
    pairs = list(module.named_buffers()) if module is not None else []
    return [(plain_name(n), b) for n, b in pairs]


def _buffers(opt: DynamicSparsity) -> dict[str, Any]:
    """All buffers: statistics that differ by rank become their mean, anything else rank 0's. Collective with several ranks."""
    world, result = World.current(), {}
    for name, buffer in _named_buffers(opt):
        value = buffer.detach().clone()
        if world.size > 1 and value.is_floating_point():
            value = (world.sum(value.double()) / world.size).to(value.dtype)
        elif world.size > 1:
            value = world.sum(value.to(torch.int64) * (world.rank == 0)).to(value.dtype)
        result[name] = _pack(value)
    return result


def _set_buffers(opt: DynamicSparsity, saved: dict[str, Any]) -> None:
    for name, buffer in _named_buffers(opt):
        if name in saved:
            buffer.copy_(_unpack(saved[name]).view(buffer.shape))


def _pack(value: Tensor) -> list[Any]:
    """A tensor as plain values: type, shape, and its bytes as text."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    text = base64.b64encode(flat.view(torch.uint8).numpy().tobytes()).decode() if flat.numel() else ""
    return [str(value.dtype).removeprefix("torch."), list(value.shape), text]


def _unpack(kept: list[Any]) -> Tensor:
    raw = np.frombuffer(base64.b64decode(kept[2]), dtype=np.uint8).copy()
    return torch.from_numpy(raw).view(getattr(torch, kept[0])).view(kept[1])
