"""Weights that a flat group of DeepSpeed's must not update like their neighbours: those without a gradient, and those that were
without one before, whose count of steps has fallen behind.

DeepSpeed puts many weights into one tensor, and the base optimizer keeps one count of steps for it. torch keeps a count per
weight, and leaves a weight whose gradient is None alone: no decay, no momentum, no count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from everbatch.engines.shards import Shard

__all__ = ["Clocks"]

Clock = dict[str, Any]
"""What the base keeps for a weight that is not per element: its count of steps."""


@dataclass
class _Kept:
    """One weight's slice as it was just before the base's step."""

    shard: Shard
    data: Tensor
    moments: dict[str, Tensor]
    gradient: Tensor | None
    """None: no pass reached it."""


@dataclass
class _Owner:
    """One flat tensor that the step under way updates, and what of it must not be."""

    owner: Tensor
    group: dict[str, Any]
    """Its options at the time of the step; what is rewritten for the step alone is back when it has ended."""
    kept: list[_Kept]
    idle: bool
    """Whether no weight in it has a gradient."""
    had_state: bool
    clock: Clock = field(default_factory=dict)


class Clocks:
    """The counts of weights that missed a step, by name, and the base's step for them.

    Around the base's own step, weights without a gradient are saved and put back. Weights that are behind are put back too, and
    then take the base's step once more, each with its own count. Where all weights of a flat tensor are without a gradient, its
    count does not go on either.

    Cost: none where every weight has always had a gradient. Else a copy of the weights and moments concerned, inside the step,
    and for those behind a second run of the base's arithmetic. No collective, and no weight is published twice.
    """

    def __init__(self, inner: torch.optim.Optimizer, all_shards: Callable[[], Sequence[Shard]]) -> None:
        self.inner, self._all_shards = inner, all_shards
        self.behind: dict[str, Clock | None] = {}
        """Of each weight that is behind: its clock; None if it was never updated."""

    def state_of(self, name: str) -> dict[Any, Any]:
        """The base's state as this weight sees it: none before its first update."""
        fresh = name in self.behind and self.behind[name] is None
        return {} if fresh else self.inner.state

    def kept(self, shard: Shard) -> dict[str, Any]:
        """The base's state of the flat tensor that holds this weight, with the weight's own clock."""
        clock = self.behind.get(shard.name, {})
        if clock is None:
            return {}
        state = self.inner.state.get(shard.owner, {})
        return {**state, **clock} if clock else dict(state)

    def restore(self, saved: Mapping[str, tuple[Clock, bool]]) -> None:
        """Set the clocks a checkpoint holds: by name, the clock and whether the base had any state for the weight. Moments are
        in their places. The flat tensor takes the clock of most of its weights."""
        self.behind = {}
        for owner, shards in _by_owner(self._all_shards()):
            clocks = {s.name: saved[s.name][0] for s in shards if s.name in saved and saved[s.name][1]}
            if not clocks:
                continue
            texts = {name: repr(sorted((k, float(v)) for k, v in clock.items())) for name, clock in clocks.items()}
            common = max(texts.values(), key=list(texts.values()).count)
            whose = next(name for name, text in texts.items() if text == common)
            self.inner.state[owner].update({k: _copy(v) for k, v in clocks[whose].items()})
            for name in (s.name for s in shards if texts.get(s.name) != common):
                clock = clocks.get(name)
                self.behind[name] = None if clock is None else {k: _copy(v) for k, v in clock.items()}

    def forget(self, shards: Sequence[Shard]) -> None:
        """Have no state for these weights, as before their first update. What shares a flat tensor with one keeps its own."""
        names, state = {s.name for s in shards}, self.inner.state
        for owner, inside in _by_owner(self._all_shards()):
            mine = [s for s in inside if s.name in names]
            if len(mine) == len(inside):
                state.pop(owner, None)
            for s in mine:
                self.behind.pop(s.name, None)
            for s in mine if owner in state else ():
                self.behind[s.name] = None
                for value in state[owner].values():
                    if _per_element(value, owner):
                        s.slice_of(value).zero_()

    @contextmanager
    def stepping(self, unreached: frozenset[str]) -> Iterator[None]:
        """Around the call in which the engine runs the base's step, once or once for each flat tensor.

        Args:
            unreached: names of the weights without a gradient, the same on every rank.
        """
        if not unreached and not self.behind:
            yield
            return
        todo = {id(owner): shards for owner, shards in _by_owner(self._all_shards())}
        under_way: list[_Owner] = []

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            under_way.clear()
            for group in optimizer.param_groups:
                for owner in group["params"]:
                    shards = todo.get(id(owner), [])
                    if any(s.name in unreached or s.name in self.behind for s in shards):
                        under_way.append(self._keep(owner, dict(group), shards, unreached))

        def after(*_: Any) -> None:
            for entry in under_way:
                self._put_back(entry)
            self._step_alone(under_way)
            under_way.clear()

        hooks = [self.inner.register_step_pre_hook(before), self.inner.register_step_post_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, owner: Tensor, group: dict[str, Any], shards: list[Shard], unreached: frozenset[str]) -> _Owner:
        state = self.inner.state.get(owner, {})
        apart = [s for s in shards if s.name in unreached or s.name in self.behind]
        kept = []
        for s in apart:
            moments = {k: s.slice_of(v).clone() for k, v in state.items() if _per_element(v, owner)}
            gradient = None if s.name in unreached or owner.grad is None else s.slice_of(owner.grad).clone()
            kept.append(_Kept(s, s.data.clone(), moments, gradient))
        clock = {k: _copy(v) for k, v in state.items() if not _per_element(v, owner)}
        return _Owner(owner, group, kept, all(s.name in unreached for s in shards), bool(state), clock)

    def _put_back(self, entry: _Owner) -> None:
        """Undo the base's step for what was kept."""
        state = self.inner.state.get(entry.owner, {})
        for kept in entry.kept:
            kept.shard.data.copy_(kept.data)
            for key, value in state.items():
                if _per_element(value, entry.owner):
                    here = kept.shard.slice_of(value)
                    here.copy_(kept.moments[key]) if key in kept.moments else here.zero_()
        if not entry.idle:
            late = [kept.shard.name for kept in entry.kept if kept.gradient is None]
            for name in late:
                self.behind.setdefault(name, {k: _copy(v) for k, v in entry.clock.items()} if entry.had_state else None)
        elif entry.had_state:
            state.update(entry.clock)
        else:
            self.inner.state.pop(entry.owner, None)

    def _step_alone(self, entries: list[_Owner]) -> None:
        """The base's step for weights that are behind and have a gradient now, each as a tensor of its own."""
        inner, alone = self.inner, [(e, k, k.shard.data.detach()) for e in entries for k in e.kept if k.gradient is not None]
        if not alone:
            return
        groups: dict[int, dict[str, Any]] = {}
        for entry, kept, weight in alone:
            weight.grad = kept.gradient
            groups.setdefault(id(entry), {**entry.group, "params": []})["params"].append(weight)
            clock = self.behind[kept.shard.name]
            if clock is not None:
                state = inner.state[entry.owner]
                views = {k: kept.shard.slice_of(v) for k, v in state.items() if _per_element(v, entry.owner)}
                inner.state[weight] = {**views, **clock}
        step, every = type(inner).step, inner.param_groups
        inner.param_groups = list(groups.values())
        try:
            # Without torch's hook wrapper: the hooks are those of the step that has just been taken.
            (step.__wrapped__ if getattr(step, "hooked", False) else step)(inner)  # type: ignore[attr-defined]
        finally:
            inner.param_groups = every
            states = [inner.state.pop(weight, {}) for _, _, weight in alone]
        for (entry, kept, weight), state in zip(alone, states, strict=True):
            own = inner.state[entry.owner]
            for key, value in state.items():
                if _per_element(value, weight) and _per_element(own.get(key), entry.owner):
                    place = kept.shard.slice_of(own[key])
                    if place.data_ptr() != value.data_ptr():
                        place.copy_(value)
            clock = {k: v for k, v in state.items() if not _per_element(v, weight)}
            name = kept.shard.name
            self.behind[name] = clock
            if all(_same(value, own.get(key)) for key, value in clock.items()):
                del self.behind[name]


def _by_owner(shards: Sequence[Shard]) -> list[tuple[Tensor, list[Shard]]]:
    found: dict[int, tuple[Tensor, list[Shard]]] = {}
    for s in shards:
        found.setdefault(id(s.owner), (s.owner, []))[1].append(s)
    return list(found.values())


def _per_element(value: Any, owner: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == owner.shape


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _same(a: Any, b: Any) -> bool:
    """Whether two entries of clocks are equal, as far as that is known without waiting for a device."""
    if any(isinstance(v, Tensor) and v.device.type != "cpu" for v in (a, b)):
        return False
    return bool(a == b)
