"""Dynamic sparse training as an optimizer mixin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from everbatch.contract import Cost, parts_of
from everbatch.engines.habits import habits_of
from everbatch.engines.named import ByName
from everbatch.engines.passes import Objective
from everbatch.engines.shards import Vector
from everbatch.optim.composed import stepping_class
from everbatch.optim.ema import EMA, zero_averages
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.sparsity import recall, tasks, topology
from everbatch.optim.sparsity.agreement import digest, verify
from everbatch.optim.sparsity.frozen import Capacity, capacity
from everbatch.optim.sparsity.masks import Masks
from everbatch.optim.sparsity.options import Kept, Options
from everbatch.optim.sparsity.schedule import Schedule
from everbatch.optim.sparsity.scores import Scores

__all__ = ["DynamicSparsity"]


class DynamicSparsity(OptimizerMixin):
    """Train a sparse network whose pattern moves: prune small weights, grow others, at a constant
    count.

        theta <- M * theta from the start;  f <- M * f in every step
        every update_every steps, in each layer with n active weights and zeta = drop fraction now:
            prune the floor(zeta n) least important active weights, grow as many among the inactive
            ones

    Pruned weights stay exactly zero: their gradient, moments and displacement are zero, so neither
    decay, momentum nor a sharpness perturbation moves them; what other mixins move is masked before
    the next pass. As masks are folded into the weights, the reduced gradient before masking is the
    dense gradient that growth needs: scores come from the sum over ranks, so masks do not depend on
    the world size (but for rounding where scores all but tie).

    Defaults are RigL: ERK densities, prune by magnitude, grow by gradient, and the update replaces
    the optimizer's step.
    SET: grow="random", prune="set". SNFS: grow="momentum", redistribute="momentum". ITOP:
    topology_step="after".

    Tasks with isolated weights (CL-DST): `begin_task`, `end_task`, `with opt.task(k):`,
    `keep_best`, `capacity`.

    Cost: no pass; a mask multiplied into the gradient per step. One byte per masked weight (5 on
    CPU, where masks of bytes are slow); growth by momentum and score_steps > 1 keep 4 more.
    Updates: see `topology.change`; no collective elsewhere.
    Order: right of clipping and EMA, left of projections and of mixins that move weights before the
    gradient.
    Limits: after a base that moves weights of zero with zero gradients, as Muon does, weights are
    masked once more. Weights written through `.data` between steps are masked when a topology changes.
    Density 1 leaves every bit.

    Source: Evci et al. 2020, arXiv 1911.11134 (RigL); Mocanu et al. 2018 (SET); Dettmers and
    Zettlemoyer 2019, arXiv 1907.04840 (SNFS); Liu et al. 2021, arXiv 2102.02887 (ITOP); Yildirim et
    al. 2023, arXiv 2308.14831 (CL-DST). Differs: counts are exact and ties have an order; momentum
    growth uses a mean of dense gradients, for the optimizer's momentum is masked.
    """

    owns = ("masks",)
    left_of = ("projection", "Refresh")

    minimizes = False
    example = {"density": 0.3, "update_every": 2}
    off = {"density": 1.0}
    search = {"density": (0.5, 0.2, 0.1)}

    @dataclass(frozen=True, kw_only=True)
    class Config(Options):
        __doc__ = Options.__doc__

    @dataclass
    class State(Kept):
        __doc__ = Kept.__doc__

    @classmethod
    def fixed(cls, config: Any) -> str:
        """Masks are drawn once."""
        return "its masks, and how many weights each layer keeps, are chosen once over all layers"

    def on_attach(self) -> None:
        """Choose layers, draw the first masks and zero what they leave out. Collective where
        weights are sharded."""
        config = self.configs[DynamicSparsity]
        self._masks = Masks(config, self.host, self.seed)
        self._scores = Scores(config)
        self._schedules: tuple[int | None, Schedule] | None = None
        self._due = False
        """Whether the step under way changes the topology."""
        self._edits = -1
        """The host's count of edits when weights were masked last, and what tells whether others wrote to them since."""
        self._written, self._apart = 0, self.host.masters_apart
        self._strays = not habits_of(stepping_class(self), self.host.groups()).keeps_zeros
        """Whether the base moves weights that are zero and have no gradient, as Muon does."""
        sparse = self._masks.sparse()
        if sparse:
            self._install(self._masks.draw(self.host, 1, sparse))

    # ---------------------------------------------------------------------------------------- verbs
    def move_parameters(self, objective: Objective) -> None:
        """Mask what others moved, between steps or here."""
        super().move_parameters(objective)
        state: Kept = self.states[DynamicSparsity]
        if state.done and not state.task:
            raise RuntimeError(f"{type(self).__name__}: a step outside a task would change what tasks 1 to {state.done} compute; "
                               f"call begin_task({state.done + 1})")
        if state.masks and (self.host.edits != self._edits or self._writes() != self._written):
            self._enforce()

    def displacement(self, vector: Vector) -> Vector:
        """Keep pruned weights at zero, and frozen ones where they are."""
        vector = super().displacement(vector)
        state: Kept = self.states[DynamicSparsity]
        return vector.times(self._masks.of_move(vector, self.host, state)) if state.active else vector

    def edit_gradient(self) -> None:
        """Note the dense gradient where growth needs it, then mask it. Frozen weights get none."""
        super().edit_gradient()
        state: Kept = self.states[DynamicSparsity]
        if not state.active:
            return
        dense = self.host.gradient()
        shards, gradients = [], []
        for shard, gradient in zip(dense.shards, dense.tensors, strict=True):
            if shard.name in state.masks:
                shards.append(shard)
                gradients.append(gradient)

        # Before the mask: scores are of the dense gradient.
        scores = self._scores
        counts, self._due = self._schedule().events(self.step_count + 1 - state.task_start)
        scoring = counts and scores.gradients
        if scoring or scores.averages:
            scores.note(shards, gradients, state, scoring=scoring)
        self._masks.mask_gradient_(shards, gradients, state)
        if self._due and self._instead:
            self.replace_update("a change of topology")

    def edit_parameters(self) -> None:
        """Change the topology where it is due; put frozen weights back."""
        edits = self.host.edits
        super().edit_parameters()
        config, state = self.configs[DynamicSparsity], self.states[DynamicSparsity]
        if state.active:
            if config.dense_moments or self._strays or self.host.edits != edits:  # a part to the right has moved weights
                self._enforce()  # before the change: importances are of masked weights
            if self._due:
                step = self.step_count - state.task_start
                self._change(step, self._schedule().fraction(step))
            if state.done and self._decays:
                self._masks.thaw(self.host, state)
        self._edits, self._written = self.host.edits, self._writes()

    # ----------------------------------------------------------------------------------- one change
    @property
    def _instead(self) -> bool:
        config = self.configs[DynamicSparsity]
        return bool(config.topology_step == "instead" or (config.topology_step == "auto" and config.grow == "gradient"))

    def _schedule(self) -> Schedule:
        config, state = self.configs[DynamicSparsity], self.states[DynamicSparsity]
        total = config.total_steps if state.task_steps is None else state.task_steps
        if self._schedules is None or self._schedules[0] != total:
            self._schedules = (total, config.schedule(total))
        return self._schedules[1]

    def _change(self, step: int, fraction: float) -> None:
        """Prune and grow every layer."""
        config, state, host = self.configs[DynamicSparsity], self.states[DynamicSparsity], self.host
        masks, shards, names = self._masks, self._masks.shards(self.host, state), list(state.active)
        changes = topology.change(
            host, shards, state.masks, state.active, masks.shapes, fraction, config.rules,
            (self.seed, "grow", state.task, step), gradients=self._scores.growth(state), averages=state.averages,
            fired=state.fired or None, used=masks.used(state))
        topology.apply(
            host, shards, changes, names, keep_moments=config.dense_moments, newborn=config.newborn,
            stored=lambda shard, born: masks.stored(state, shard))

        state.masks = ByName({name: change.mask for name, change in changes.items()})
        for name, fired in state.fired.items():
            fired |= state.masks[name]
        self._zero_averages({name: change.born for name, change in changes.items()})
        self._scores.forget(state)
        state.changes += 1

        found = digest(shards, state.masks, names, host.device)
        state.active = verify(host, type(self).__name__, found, names)
        self.metrics["drop_fraction"] = torch.tensor(fraction)
        if changes and not host.sharded:
            fresh = torch.stack([change.born.sum() for change in changes.values()]).sum()
            self.metrics["masks_changed"] = fresh / max(sum(state.active.values()), 1)

    # ------------------------------------------------------------------------------- masked weights
    def _install(self, masks: Mapping[str, Tensor], names: list[str] | None = None) -> None:
        """Take masks (slices) as they are. Collective where weights are sharded."""
        self._masks.install(self.host, self.states[DynamicSparsity], masks, type(self).__name__, names)
        self._installed()

    def _installed(self) -> None:
        """Weights are masked as of now; EMA's averages follow."""
        self._edits, self._written = self.host.edits, self._writes()
        self._zero_averages()

    def _enforce(self) -> None:
        """Zero what masks leave out, and put frozen weights back."""
        self._masks.enforce(self.host, self.states[DynamicSparsity])
        self._edits, self._written = self.host.edits, self._writes()

    def _writes(self) -> int:
        """A number that grows with every write to a weight, `load_state_dict` of a model among them."""
        return 0 if self._apart else sum(shard.owner._version for shard in self.host.shards)

    def _zero_averages(self, born: Mapping[str, Tensor] | None = None) -> None:
        """Zero what masks leave out in EMA's averages, and entries that were born just now."""
        if EMA not in self.states:
            return
        off = {name: ~mask for name, mask in self.states[DynamicSparsity].masks.items()}
        if born is not None:
            off = {name: out | born[name] for name, out in off.items()}
        zero_averages(self, off)

    @property
    def _decays(self) -> bool:
        """Whether an update may move a weight whose gradient is zero. The same on every rank: a
        correction is published."""
        others = [vars(part) for part in parts_of(type(self)) if part not in (DynamicSparsity, EMA)]
        moves = any("update" in verbs or "edit_parameters" in verbs for verbs in others)
        decays = any(group.get("weight_decay") for group in self.host.groups())
        return moves or decays or not self.configs[DynamicSparsity].reset_moments

    # -------------------------------------------------------------------------- what a user may ask
    def whole_masks(self) -> dict[str, Tensor]:
        """Whole bool masks of all masked layers by name, on every rank (copies). Collective where
        weights are sharded."""
        state = self.states[DynamicSparsity]
        names = list(state.active)
        with self.host.frozen_too():
            held = [(shard, state.masks[shard.name]) for shard in self._masks.shards(self.host, state)]
            return self.host.gather(held, names, dict.fromkeys(names, torch.bool))

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Use these whole bool masks instead, the same on every rank; names left out keep theirs.
        Collective where sharded.

        Raises:
            ValueError: an unknown name, another shape or type, or a mask without an active entry.
        """
        self._masks.check(masks)
        active = self.states[DynamicSparsity].active
        names = [name for name in self._masks.shapes if name in masks or name in active]
        self._install(self._masks.given(self.host, masks), names)

    def densities(self) -> dict[str, float]:
        """Share of active entries of every maskable layer, by name. No collective."""
        active, size = self.states[DynamicSparsity].active, self._masks.size
        return {name: active.get(name, size(name)) / size(name) for name in self._masks.shapes}

    def begin_task(self, task: int, *, steps: int | None = None, masks: Mapping[str, Tensor] | None = None) -> None:
        """Begin a task with a mask of its own; weights of ended tasks are frozen. Between two
        steps. Collective where sharded.

        Args:
            task: 1, 2, ... in order.
            steps: of this task, for its schedule; default `total_steps`.
            masks: whole masks to start from, by name, instead of random ones.

        Raises:
            RuntimeError: another task is open, or grow_into_used="forbid" and too few weights are
                free.
            ValueError: a task out of order, steps < 1, masks that do not fit.
        """
        state: Kept = self.states[DynamicSparsity]
        tasks.begin(self._masks, state, self.host, task, steps, masks, taken=self.step_count, who=type(self).__name__)
        self._installed()

    def keep_best(self, score: float) -> bool:
        """Keep weights, masks and statistics as they are now if `score` is the open task's largest
        so far; for `end_task(select="best")`. Give the same score on every rank."""
        return tasks.keep_best(self.states[DynamicSparsity], self.host, score)

    def end_task(self, *, select: Literal["last", "best"] = "last") -> None:
        """Freeze the open task's weights, with the mask they have now, or at the best score.
        Collective where sharded.

        Raises:
            RuntimeError: no task is open, a frozen weight changed, or "best" without `keep_best`.
        """
        tasks.end(self._masks, self.states[DynamicSparsity], self.host, select, who=type(self).__name__)
        if select == "best":
            self._installed()

    @contextmanager
    def task(self, task: int) -> Iterator[None]:
        """Compute as at the end of a task inside the block: its mask, weights, biases and
        statistics. Collective.

        Raises:
            RuntimeError: a task that has neither ended nor is open.
        """
        with recall.showing(self.states[DynamicSparsity], self.host, task):
            yield

    def capacity(self) -> dict[str, Capacity]:
        """Used and free entries of each layer, and what each task shares with earlier ones.
        Collective where sharded."""
        return capacity(self._masks, self.states[DynamicSparsity], self.host)

    def cost(self) -> Cost:
        """A mask, and what growth keeps."""
        config, state = self.configs[DynamicSparsity], self.states[DynamicSparsity]
        if not state.active:
            return Cost()
        kept = (1 if self.host.device.type == "cuda" else 5) + 4 * config.averages + 4 * (config.score_steps > 1)
        whole = sum(shape.numel() for _, shape in self.host.master_layout().values())
        share = sum(self._masks.size(name) for name in state.active) / whole
        note = f"DynamicSparsity: every {config.update_every} steps some 8 to 20 all-reduces, of 256 counts per layer at most"
        return Cost(state_bytes=round(kept * share, 2), note=note if config.drop_fraction else "")
