"""Tasks with weights of their own in one network: what `DynamicSparsity.begin_task` and its kin do.

A task trains a sparse mask. When it ends, its weights go into a store and are frozen for good:
later tasks may compute with them, and never move them. Prediction for a task puts its mask, its
stored weights, and its biases, norms and statistics back: see `recall`.

Source: Yildirim et al. 2023, arXiv 2308.14831, and the code muratonuryildirim/CL-with-DST. Differs
where that code forgets: parameters no mask covers are kept per task, frozen weights are restored
after every update (there, weight decay moves them), and an activated weight of an earlier task has
its stored value in training too (there it trains as zero and comes back in prediction).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from everbatch.distributed import World
from everbatch.engines.host import Host
from everbatch.engines.named import ByName
from everbatch.engines.shards import Shard
from everbatch.errors import check
from everbatch.optim.sparsity import recall
from everbatch.optim.sparsity.frozen import Capacity, capacity, check_frozen, checksums
from everbatch.optim.sparsity.grow import random_keys
from everbatch.optim.sparsity.masks import Masks
from everbatch.optim.sparsity.options import WHO, Kept
from everbatch.optim.sparsity.select import Piece, choose

__all__ = ["begin", "end", "keep_best"]


# ------------------------------------------------------------------------------------ a task begins
@torch.no_grad()
def begin(
    masks: Masks, kept: Kept, host: Host, task: int, steps: int | None, given: Mapping[str, Tensor] | None, *, taken: int,
    who: str,
) -> None:
    """See `DynamicSparsity.begin_task`.

    Args:
        taken: steps taken so far. who: the optimizer, for errors.
    """
    options = masks.options
    if kept.task:
        raise RuntimeError(f"{WHO}: begin_task({task!r}) while task {kept.task} is open; call end_task() first")
    check(isinstance(task, int) and not isinstance(task, bool) and task == kept.done + 1, WHO, f"begin_task({task!r})",
          f"be the next task, {kept.done + 1}")
    options.schedule(steps if steps is not None else options.total_steps)
    if given is not None:
        masks.check(given)
    names, given = list(masks.shapes), given or {}
    if kept.done:
        _warn(masks, kept, host, capacity(masks, kept, host))
        drawn = _draw(masks, kept, host, task, [name for name in names if name not in given])
    else:
        drawn = _first(masks, kept, host)
    chosen = {**drawn, **masks.given(host, given)}

    # Weights before the mask: what it leaves out is zeroed when it is installed.
    for shard in host.shards if kept.done else ():
        if shard.name in chosen:
            _load(masks, kept, shard, chosen[shard.name], task)
    if options.reset_moments:
        host.reset_moments()
    kept.task, kept.task_start, kept.task_steps = task, taken, steps
    kept.scores, kept.averages, kept.changes = ByName(), ByName(), 0
    masks.install(host, kept, chosen, who, names)


def _first(masks: Masks, kept: Kept, host: Host) -> dict[str, Tensor]:
    """The first task keeps what it was built with; layers that were left dense get a mask of ones,
    to be frozen by."""
    result = {}
    with host.frozen_too():
        for shard in host.shards:
            if shard.name in masks.shapes:
                ones = torch.ones_like(shard.data, dtype=torch.bool)
                result[shard.name] = kept.masks.get(shard.name, ones)
    return result


def _draw(masks: Masks, kept: Kept, host: Host, task: int, names: list[str]) -> dict[str, Tensor]:
    """New masks: of all entries, of free ones only ("forbid"), or of used ones first ("prefer")."""
    way = masks.options.grow_into_used
    if way == "allow" or not names:
        return masks.draw(host, task, names)
    used = masks.used(kept)
    assert used is not None
    shards = [shard for shard in host.shards if shard.name in names]
    pieces = []
    for shard in shards:
        taken = used[shard.name].reshape(-1)
        candidates = ~taken if way == "forbid" else torch.ones_like(taken)
        first = taken.to(torch.uint8) if way == "prefer" else None
        keys = random_keys(candidates, shard.start, (masks.seed, "mask", task, shard.name))
        pieces.append(Piece(names.index(shard.name), shard.start, keys, candidates, first))
    counts = torch.tensor([masks.counts[name] for name in names], dtype=torch.int64)
    picked = choose(
        pieces, counts, host.total, span=max(masks.size(name) for name in names), dtype=torch.float64, device=host.device,
        ranked=way == "prefer")
    return {shard.name: mask.view(shard.data.shape) for shard, mask in zip(shards, picked, strict=True)}


def _load(masks: Masks, kept: Kept, shard: Shard, mask: Tensor, task: int) -> None:
    """Weights of a new task: stored values where earlier tasks use an entry, fresh ones elsewhere.
    The mask comes later."""
    used, data, name = masks.used(kept), shard.data, shard.name
    assert used is not None
    value = torch.where(used[name], kept.store[name], torch.zeros_like(data))
    if masks.options.fresh_init == "initializer":
        fresh = (mask & ~used[name]).reshape(-1)
        bound = float(np.prod(shard.shape[1:])) ** -0.5
        keys = random_keys(fresh, shard.start, (masks.seed, "fresh", task, name))
        draws = keys.mul_(2.0).sub_(1.0).mul_(bound).to(data.dtype)
        value = torch.where(fresh.view(data.shape), draws.view(data.shape), value)
    data.copy_(value)


def _warn(masks: Masks, kept: Kept, host: Host, room: dict[str, Capacity]) -> None:
    """Before a later task: too little room, or state that no mask protects."""
    options, speaks = masks.options, World.current().rank == 0
    tight = [name for name, layer in room.items() if layer.size - layer.used < masks.counts[name]]
    if tight and options.grow_into_used == "forbid":
        wanted = [masks.counts[name] for name in tight[:3]]
        free = [room[name].size - room[name].used for name in tight[:3]]
        raise RuntimeError(f"{WHO}: task {kept.done + 1} wants {wanted} fresh weights in {tight[:3]}, {free} are free; use "
                           "grow_into_used='allow', a smaller density or a larger network")
    if tight and options.grow_into_used != "prefer" and "tight" not in masks.told and speaks:
        warnings.warn(f"{WHO}: {len(tight)} layers have fewer free weights than a task uses ({tight[:3]}); tasks share more from "
                      "here on", stacklevel=5)
    if tight:
        masks.told.add("tight")

    if options.per_task_params or "bare" in masks.told:
        return
    bare = [name for name in host.names if name not in masks.shapes]
    modules = host.module.modules() if host.module is not None else ()
    running = any(getattr(module, "track_running_stats", False) for module in modules)
    if (bare or running) and speaks:
        warnings.warn(f"{WHO}: per_task_params=False, and {bare[:3]}{' and running statistics' * running} are trained by every "
                      "task: earlier tasks will be forgotten", stacklevel=5)
    masks.told.add("bare")


# -------------------------------------------------------------------------------------- a task ends
@torch.no_grad()
def keep_best(kept: Kept, host: Host, score: float) -> bool:
    """See `DynamicSparsity.keep_best`."""
    if not kept.task:
        raise RuntimeError(f"{WHO}: keep_best() without begin_task")
    if kept.best_score is not None and not score > kept.best_score:
        return False
    with host.frozen_too():  # the whole network, whatever the user has frozen by then or will have unfrozen
        kept.best_score = float(score)
        kept.best_masks = ByName({name: mask.clone() for name, mask in kept.masks.items()})
        kept.best_weights = ByName({shard.name: shard.data.clone() for shard in host.shards})
        kept.best_buffers = recall.buffers(host)
    return True


@torch.no_grad()
def end(masks: Masks, kept: Kept, host: Host, select: str, *, who: str) -> None:
    """See `DynamicSparsity.end_task`."""
    check(select in ("last", "best"), WHO, f"select={select!r}", "be 'last' or 'best'")
    if not kept.task:
        raise RuntimeError(f"{WHO}: end_task() without begin_task")
    if select == "best" and kept.best_score is None:
        raise RuntimeError(f"{WHO}: end_task(select='best') without keep_best(score); call it after every epoch")
    with host.frozen_too():
        if select == "best":
            _take_best(masks, kept, host, who)
        check_frozen(masks, kept, host)
        _store(masks, kept, host)
        kept.task_masks.append(ByName({name: mask.clone() for name, mask in kept.masks.items()}))
        kept.done, kept.task = kept.task, 0
        kept.checksums = {**kept.checksums, **checksums(masks, kept, host)}
        if masks.options.per_task_params:
            bare = recall.bare(masks, host)
            kept.saved[str(kept.done)] = {"parameters": bare, "buffers": recall.buffers(host)}
    kept.best_score, kept.best_buffers = None, {}
    kept.best_masks, kept.best_weights = ByName(), ByName()


def _take_best(masks: Masks, kept: Kept, host: Host, who: str) -> None:
    for shard in host.shards:
        if shard.name in kept.best_weights:  # not what came since
            shard.data.copy_(kept.best_weights[shard.name])
    recall.set_buffers(host, kept.best_buffers)
    masks.install(host, kept, kept.best_masks, who, list(masks.shapes))


def _store(masks: Masks, kept: Kept, host: Host) -> None:
    """Keep the values of the entries that no task used before."""
    used = masks.used(kept) or {}
    for shard in masks.shards(host, kept):
        name, data = shard.name, shard.data
        fresh = kept.masks[name] & ~used[name] if name in used else kept.masks[name]
        old = kept.store.get(name, torch.zeros_like(data))
        kept.store[name] = torch.where(fresh, data, old)
