"""Dynamic sparse training as an optimizer mixin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from everbatch.contract import Cost, parts_of
from everbatch.engines.passes import Objective
from everbatch.engines.shards import ByName, Shard, Vector
from everbatch.errors import check, check_real, nearest
from everbatch.optim.ema import EMA
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.sparsity import tasks as isolation
from everbatch.optim.sparsity import topology
from everbatch.optim.sparsity.densities import draw_mask, exact_counts, layer_densities
from everbatch.optim.sparsity.grow import CRITERIA as GROW
from everbatch.optim.sparsity.layers import maskable
from everbatch.optim.sparsity.prune import CRITERIA as PRUNE
from everbatch.optim.sparsity.schedule import Schedule

__all__ = ["DynamicSparsity"]

WHO = "DynamicSparsity"


class DynamicSparsity(OptimizerMixin):
    """Train a sparse network whose pattern moves: prune small weights, grow others, at a constant count.

        theta <- M * theta from the start;  f <- M * f in every step
        every update_every steps, in each layer with n active weights and zeta = drop fraction now:
            prune the floor(zeta n) least important active weights, grow as many among the inactive ones

    Pruned weights stay exactly zero: their gradient, moments and displacement are zero, so neither decay, momentum nor a
    sharpness perturbation moves them; what other mixins move is masked before the next pass. As masks are folded into the
    weights, the reduced gradient before masking is the dense gradient that growth needs: scores come from the sum over
    ranks, so masks do not depend on the world size (but for rounding where scores all but tie).

    Defaults are RigL: ERK densities, prune by magnitude, grow by gradient, and the update replaces the optimizer's step.
    SET: grow="random", prune="set". SNFS: grow="momentum", redistribute="momentum". ITOP: topology_step="after".

    Tasks with isolated weights (CL-DST): `begin_task`, `end_task`, `with opt.task(k):`, `keep_best`, `capacity`.

    Cost: no pass; a mask multiplied into the gradient per step. One byte per masked weight (5 on CPU, where masks of bytes
    are slow); growth by momentum and score_steps > 1 keep 4 more. Updates: see `topology.change`; no collective elsewhere.
    Order: right of clipping and EMA, left of projections and of mixins that move weights before the gradient.
    Limits: base optimizers must leave a weight of zero with zero gradient and moments at zero (all elementwise ones do).
    Density 1 leaves every bit.

    Source: Evci et al. 2020, arXiv 1911.11134 (RigL); Mocanu et al. 2018 (SET); Dettmers and Zettlemoyer 2019, arXiv 1907.04840
    (SNFS); Liu et al. 2021, arXiv 2102.02887 (ITOP); Yildirim et al. 2023, arXiv 2308.14831 (CL-DST). Differs: counts are exact
    and ties have an order; momentum growth uses a mean of dense gradients, for the optimizer's momentum is masked.
    """

    owns = ("masks",)
    left_of = ("SubspaceProjection", "Refresh")

    minimizes = False
    example = {"density": 0.3, "update_every": 2}
    off = {"density": 1.0}
    search = {"density": (0.5, 0.2, 0.1)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        density: float = 0.1
        """Share of the maskable weights that is active, over all layers; in (0, 1], 1 switches sparsity off."""
        distribution: Literal["erk", "er", "uniform"] = "erk"
        """How the density differs between layers."""
        densities: Mapping[str, float] = field(default_factory=dict)
        """Density of single layers, by name or pattern; in (0, 1]. The others share `density` among themselves."""
        erk_power: float = 1.0
        """Exponent of the Erdos-Renyi raw densities; > 0."""
        first_dense: bool = False
        """Keep the first layer dense ("uniform" only; RigL's uniform does)."""
        include: tuple[str, ...] = ()
        """Patterns of parameter names to mask; empty: weights of linear and convolution layers."""
        exclude: tuple[str, ...] = ()
        """Patterns of parameter names that stay dense."""
        min_fan_in: bool = False
        """Give every output row at least one weight at the start."""
        bernoulli: bool = False
        """Draw first masks, and random growth, entry by entry: counts vary, as in the ITOP and CL-DST code."""
        prune: Literal["magnitude", "set", "taylor", "soft", "momentum"] = "magnitude"
        """What marks a weight as unimportant."""
        grow: Literal["gradient", "random", "momentum", "random_unfired"] = "gradient"
        """What marks an inactive entry as promising."""
        global_threshold: bool = False
        """Prune by one threshold over all layers instead of one per layer."""
        redistribute: Literal["layer", "survivors", "momentum", "global"] = "layer"
        """Where pruned weights grow again: in their layer, in proportion to what is left (DSR) or to the mean momentum (SNFS),
        or wherever the growth score is largest."""
        update_every: int = 100
        """Steps between two changes of topology; >= 1."""
        drop_fraction: float = 0.3
        """Share of the active weights that the first changes drop; in [0, 1], 0 for a mask that stays."""
        drop_floor: float = 0.0
        """What the share falls to; in [0, 1] (ITOP: .005)."""
        anneal: Literal["auto", "cosine", "linear", "constant"] = "auto"
        """How the share falls; auto: cosine if `total_steps` is known, else constant."""
        total_steps: int | None = None
        """Steps of the run, or of a task; None: unknown, topology never stops changing."""
        stop_fraction: float = 0.75
        """Share of `total_steps` after which the topology stays; in [0, 1]."""
        begin_step: int = 0
        """No change up to this step; >= 0."""
        score_steps: int = 1
        """Gradients averaged for growth, the last ones before a change; in [1, update_every)."""
        topology_step: Literal["auto", "instead", "after"] = "auto"
        """Whether a change replaces the optimizer's update or follows it; auto: instead for grow="gradient" (RigL)."""
        as_released: bool = False
        """Do as the ITOP and CL-DST code: drop ceil(zeta n) and, by magnitude, every weight that ties with the threshold; let
        active entries take growth's places where too few have a gradient; frozen weights have none, and those that growth
        activates train as zero, but have their stored value in prediction. Counts drift."""
        gradient_decay: float = 0.9
        """Decay of the mean dense gradient (momentum criteria); in [0, 1)."""
        newborn: Literal["layer_mean_v", "zero"] = "layer_mean_v"
        """Adam's second moment of a new weight: the mean over its layer, or zero."""
        dense_moments: bool = False
        """Let moments see the dense gradient and survive changes, as the CL-DST code does with Adam; costs one more pass over
        the weights per step."""
        fresh_init: Literal["initializer", "zeros"] = "initializer"
        """Never used weights at the start of a later task: U(-1, 1) / sqrt(fan in), torch's default, or zeros."""
        grow_into_used: Literal["allow", "forbid", "prefer"] = "allow"
        """Whether a task may use (frozen) weights of earlier ones: by score, never, before all others."""
        per_task_params: bool = True
        """Keep biases, norms and running statistics per task; without it later tasks change what earlier ones compute."""
        reset_moments: bool = True
        """Start every task with fresh optimizer state."""

        def __post_init__(self) -> None:
            check_real(WHO, "density", self.density, 0.0, 1.0, open_low=True, cure="pass density=1 to switch sparsity off")
            check_real(WHO, "erk_power", self.erk_power, 0.0, open_low=True)
            check_real(WHO, "gradient_decay", self.gradient_decay, 0.0, 1.0, open_high=True)
            for name, value in self.densities.items():
                check_real(WHO, f"densities[{name!r}]", value, 0.0, 1.0, open_low=True)
            for name, choices in CHOICES.items():
                check(getattr(self, name) in choices, WHO, f"{name}={getattr(self, name)!r}", f"be one of {', '.join(choices)}")
            check(not self.as_released or self.grow_into_used == "allow", WHO, f"grow_into_used={self.grow_into_used!r}",
                  "be 'allow' with as_released=True")
            self.schedule(self.total_steps)

        def schedule(self, total: int | None) -> Schedule:
            """The schedule for a task of so many steps."""
            anneal = self.anneal if self.anneal != "auto" else "constant" if total is None else "cosine"
            return Schedule(interval=self.update_every, start=self.drop_fraction, anneal=anneal, floor=self.drop_floor,
                            total=total, begin=self.begin_step, stop=self.stop_fraction, score_steps=self.score_steps)

        @property
        def rules(self) -> topology.Rules:
            """How a change is made."""
            return topology.Rules(self.prune, self.grow, self.global_threshold, self.redistribute, self.as_released,
                                  self.bernoulli, self.grow_into_used)

        @property
        def gradients(self) -> bool:
            """Whether a change needs the dense gradient of single steps."""
            return self.grow == "gradient" or self.prune in ("taylor", "soft")

        @property
        def averages(self) -> bool:
            """Whether a mean of dense gradients is kept."""
            return "momentum" in (self.prune, self.grow, self.redistribute)

    @dataclass
    class State:
        masks: ByName = field(default_factory=ByName)
        fired: ByName = field(default_factory=ByName)
        """Entries active at any time since the task began (random_unfired)."""
        scores: ByName = field(default_factory=ByName)
        """Sum of the dense gradients that count for the next change (score_steps > 1)."""
        averages: ByName = field(default_factory=ByName)
        """Running mean of the dense gradient (momentum criteria)."""
        active: dict[str, int] = field(default_factory=dict)
        """Active entries of each whole layer."""
        changes: int = 0
        task: int = 0
        """The open task, counted from 1; 0: none."""
        task_start: int = 0
        """Steps taken before the task began."""
        task_steps: int | None = None
        """Steps of the task, where they are known better than in the configuration."""
        done: int = 0
        """Tasks that ended."""
        store: ByName = field(default_factory=ByName)
        """Values of the weights that ended tasks use."""
        task_masks: list[ByName] = field(default_factory=list)
        saved: dict[str, Any] = field(default_factory=dict)
        """Per ended task: parameters that are not masked, and buffers."""
        checksums: dict[str, int] = field(default_factory=dict)
        """Of the stored values that ended tasks use, by layer."""
        best_score: float | None = None
        best_masks: ByName = field(default_factory=ByName)
        best_weights: ByName = field(default_factory=ByName)
        best_buffers: dict[str, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------------ construction
    def on_attach(self) -> None:
        """Choose layers, draw the first masks and zero what they leave out. Collective where weights are sharded."""
        config = self.configs[DynamicSparsity]
        self._edits = -1
        self._factors: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._frozen: dict[str, tuple[Tensor, tuple[Tensor, ...], Tensor]] = {}
        self._dense: dict[str, Tensor] = {}
        self._whole: tuple[ByName, dict[str, Tensor]] | None = None
        self._shapes = maskable({n: tuple(shape) for n, (_, shape) in self.host.master_layout().items()}, self.host.module,
                                include=config.include, exclude=config.exclude)
        self._plan = layer_densities(self._shapes, config.density, distribution=config.distribution, power=config.erk_power,
                                     first_dense=config.first_dense, own=config.densities)
        self._counts = exact_counts(self._shapes, self._plan, min_fan_in=config.min_fan_in)
        sparse = [n for n in self._shapes if self._counts[n] < self._size(n)]
        if sparse:
            self._install(self._draw(1, sparse))

    def _size(self, name: str) -> int:
        return int(torch.Size(self._shapes[name]).numel())

    def _draw(self, task: int, names: list[str]) -> dict[str, Tensor]:
        """This rank's slices of fresh random masks of the named layers: a function of (seed, task, name)."""
        config, result = self.configs[DynamicSparsity], {}
        for shard in self.host.shards:
            if shard.name in names:
                whole = draw_mask(self._shapes[shard.name], self._counts[shard.name], (self.seed, "mask", task, shard.name),
                                  density=self._plan[shard.name] if config.bernoulli else None,
                                  min_fan_in=config.min_fan_in)
                result[shard.name] = self._slice(shard, whole)
        return result

    @staticmethod
    def _slice(shard: Shard, whole: Tensor) -> Tensor:
        data = shard.data
        return whole.reshape(-1)[shard.start : shard.start + data.numel()].to(data.device).view(data.shape).clone()

    @torch.no_grad()
    def _install(self, masks: Mapping[str, Tensor], names: list[str] | None = None) -> None:
        """Take masks (slices) as they are, and zero the weights and moments they leave out. Collective where sharded."""
        config, state = self.configs[DynamicSparsity], self.states[DynamicSparsity]
        layers = names or [n for n in self._shapes if n in state.active or self._counts[n] < self._size(n)]
        state.masks = ByName({**state.masks, **masks})
        state.scores = ByName()
        if config.grow == "random_unfired":
            state.fired = ByName({n: m.clone() for n, m in state.masks.items()})
        found = topology.digest(self._masked(), state.masks, layers, self.host.device)
        state.active = topology.verify(self.host, type(self).__name__, found, layers)
        self._enforce(moments=True)
        self._mask_averages()
        self.host.publish_if_dirty()

    def _mask_averages(self, born: Mapping[str, Tensor] | None = None) -> None:
        """Zero what masks leave out in EMA's averages, and entries that were born just now."""
        masks = self.states[DynamicSparsity].masks
        for name, average in self.states[EMA].average.items() if EMA in self.states else ():
            if name in masks:
                average.masked_fill_(~masks[name] if born is None else ~masks[name] | born[name], 0.0)

    def _masked(self) -> list[Shard]:
        """This rank's slices that have a mask."""
        masks = self.states[DynamicSparsity].masks
        return [s for s in self.host.shards if s.name in masks]

    # ----------------------------------------------------------------------------------------------------- verbs
    def move_parameters(self, objective: Objective) -> None:
        """Mask what others moved, between steps or here."""
        super().move_parameters(objective)
        state = self.states[DynamicSparsity]
        if state.done and not state.task:
            raise RuntimeError(f"{type(self).__name__}: a step outside a task would change what tasks 1 to {state.done} compute; "
                               f"call begin_task({state.done + 1})")
        if state.masks and self.host.edits != self._edits:
            self._enforce()

    def displacement(self, vector: Vector) -> Vector:
        """Keep pruned weights at zero, and frozen ones where they are."""
        vector = super().displacement(vector)
        if not self.states[DynamicSparsity].active:
            return vector
        factors = self._displacement_factors(vector)
        masked = [t if m is None else t * m for t, m in zip(vector.tensors, factors, strict=True)]
        return Vector(vector.host, vector.shards, masked)

    def edit_gradient(self) -> None:
        """Note the dense gradient where growth needs it, then mask it. Frozen weights get none."""
        super().edit_gradient()
        config, state = self.configs[DynamicSparsity], self.states[DynamicSparsity]
        if not state.active:
            return
        step, schedule = self.step_count + 1 - state.task_start, self._schedule()
        pairs = [(s, g) for s in self._masked() if (g := s.grad) is not None]
        if config.averages:
            for s, g in pairs:
                kept = state.averages.setdefault(s.name, torch.zeros_like(s.data))
                kept.lerp_(g.to(kept.dtype), 1.0 - config.gradient_decay)
        if config.gradients and schedule.scoring(step):
            if config.score_steps == 1:
                self._dense = {s.name: g.clone() for s, g in pairs}
            else:
                for s, g in pairs:
                    state.scores.setdefault(s.name, torch.zeros_like(s.data)).add_(g, alpha=1.0 / config.score_steps)
        for (_, g), m in zip(pairs, self._gradient_factors(pairs), strict=True):
            if m is not None:
                g.mul_(m)
        if schedule.due(step) and self._instead:
            self.replace_update("a change of topology")

    def edit_parameters(self) -> None:
        """Change the topology where it is due; put frozen weights back."""
        edits = self.host.edits
        super().edit_parameters()
        config, state = self.configs[DynamicSparsity], self.states[DynamicSparsity]
        if state.active:
            step, schedule = self.step_count - state.task_start, self._schedule()
            if config.dense_moments or self.host.edits != edits:  # a part to the right has moved weights
                self._enforce()  # before the change: importances are of masked weights
            if schedule.due(step):
                self._change(step, schedule.fraction(step))
            if self._decays:
                self._thaw()
        self._edits = self.host.edits

    # ------------------------------------------------------------------------------------------------- one change
    @property
    def _instead(self) -> bool:
        config = self.configs[DynamicSparsity]
        return bool(config.topology_step == "instead" or (config.topology_step == "auto" and config.grow == "gradient"))

    def _schedule(self) -> Schedule:
        config, state = self.configs[DynamicSparsity], self.states[DynamicSparsity]
        total = config.total_steps if state.task_steps is None else state.task_steps
        kept = self.__dict__.get("_schedules")
        if kept is None or kept[0] != total:
            kept = self._schedules = (total, config.schedule(total))
        schedule: Schedule = kept[1]
        return schedule

    def _change(self, step: int, fraction: float) -> None:
        """Prune and grow every layer."""
        config, state, host = self.configs[DynamicSparsity], self.states[DynamicSparsity], self.host
        shards, names, used = self._masked(), list(state.active), self._used()
        changes = topology.change(
            host, shards, state.masks, state.active, self._shapes, fraction, config.rules,
            (self.seed, "grow", state.task, step), gradients=state.scores if config.score_steps > 1 else self._dense,
            averages=state.averages, fired=state.fired or None, used=used)
        topology.apply(host, shards, changes, names, keep_moments=config.dense_moments, newborn=config.newborn,
                       stored=self._stored)
        fresh = [c.born.sum() for c in changes.values()]
        state.masks = ByName({n: c.mask for n, c in changes.items()})
        for name, kept in state.fired.items():
            kept |= state.masks[name]
        self._mask_averages({n: c.born for n, c in changes.items()})
        state.scores, self._dense, state.changes = ByName(), {}, state.changes + 1
        found = topology.digest(shards, state.masks, names, host.device)
        state.active = topology.verify(host, type(self).__name__, found, names)
        self.metrics["drop_fraction"] = torch.tensor(fraction)
        if fresh and not host.sharded:
            self.metrics["masks_changed"] = torch.stack(fresh).sum() / max(sum(state.active.values()), 1)

    def _stored(self, shard: Shard, born: Tensor) -> Tensor | None:
        """Values of the entries that earlier tasks use; zero elsewhere."""
        used, store = self._used(), self.states[DynamicSparsity].store
        if used is None or self.configs[DynamicSparsity].as_released:
            return None
        return torch.where(used[shard.name], store[shard.name], torch.zeros_like(shard.data))

    def _used(self) -> dict[str, Tensor] | None:
        """Entries that ended tasks use, by name; None before the first has ended."""
        state = self.states[DynamicSparsity]
        if not state.done:
            return None
        kept = self.__dict__.get("_used_by")
        if kept is None or kept[0] is not state.task_masks[-1] or kept[1] != state.done:
            union = {n: m.bool() for n, m in state.task_masks[0].items()}
            for later in state.task_masks[1:]:
                union = {n: m | later[n] for n, m in union.items()}
            kept = self._used_by = (state.task_masks[-1], state.done, union)
        return kept[2]

    # --------------------------------------------------------------------------------------------- masks at work
    def _factor(self, name: str, dtype: torch.dtype, kind: str) -> Tensor:
        """What to multiply with: the mask without frozen entries for "gradient", all but those for "frozen". A factor of the
        gradient's type on CPU, where torch multiplies by bytes six times slower."""
        mask, used = self.states[DynamicSparsity].masks[name], self._used()
        kept = self._factors.get((name, kind))
        if kept is None or kept[0] is not mask or kept[1].dtype not in (dtype, torch.bool):
            value = mask
            if used is not None:
                value = ~used[name] if kind == "frozen" else mask & ~used[name]
            kept = self._factors[name, kind] = (mask, value if mask.is_cuda else value.to(dtype))
        return kept[1]

    def _gradient_factors(self, pairs: list[tuple[Shard, Tensor]]) -> list[Tensor | None]:
        if self.configs[DynamicSparsity].dense_moments:
            frozen = self._used() is not None
            return [self._factor(s.name, g.dtype, "frozen") if frozen else None for s, g in pairs]
        return [self._factor(s.name, g.dtype, "gradient") for s, g in pairs]

    def _displacement_factors(self, vector: Vector) -> list[Tensor | None]:
        """Masks for the vector's slices: this rank's, or whole ones where a rank moves its own copy of the weights."""
        masks = self.states[DynamicSparsity].masks
        result: list[Tensor | None] = []
        whole = None
        if vector.host is not self.host and self.host.sharded:
            if self._whole is None or self._whole[0] is not masks:
                used, held = self._used(), []
                for shard in self._masked():
                    mask = masks[shard.name]
                    held.append((shard, mask if used is None else mask & ~used[shard.name]))
                names = list(self.states[DynamicSparsity].active)
                self._whole = (masks, self.host.gather(held, names, dict.fromkeys(names, torch.bool)))
            whole = self._whole[1]
        for shard, t in vector:
            if whole is not None:
                mask = whole.get(shard.name)
                result.append(None if mask is None else mask.to(t).view(t.shape))
            else:
                result.append(self._factor(shard.name, t.dtype, "gradient") if shard.name in masks else None)
        return result

    @torch.no_grad()
    def _enforce(self, *, moments: bool = False) -> None:
        """Zero what masks leave out in the weights, and with `moments` in the base's state; put frozen weights back."""
        state = self.states[DynamicSparsity]
        for shard in self._masked():
            off = ~state.masks[shard.name]
            shard.data.masked_fill_(off, 0.0)
            for moment in shard.moments.values() if moments else ():
                moment.masked_fill_(off, 0.0)
        self._thaw()
        self.host.touch()
        self._edits = self.host.edits

    @property
    def _decays(self) -> bool:
        """Whether an update may move a weight whose gradient is zero. The same on every rank: a correction is published."""
        others = [p for p in parts_of(type(self)) if p not in (DynamicSparsity, EMA)]
        return (not self.configs[DynamicSparsity].reset_moments or any(g.get("weight_decay") for g in self.host.groups())
                or any("update" in vars(p) or "edit_parameters" in vars(p) for p in others))

    def _thaw(self) -> None:
        """Copy stored values back into the active weights that earlier tasks use: exact under any decay or momentum."""
        used, state = self._used(), self.states[DynamicSparsity]
        if used is None or not state.task or self.configs[DynamicSparsity].as_released:
            return
        for shard in self._masked():
            mask = state.masks[shard.name]
            kept = self._frozen.get(shard.name)
            if kept is None or kept[0] is not mask:
                at = (mask & used[shard.name]).nonzero(as_tuple=True)
                kept = self._frozen[shard.name] = (mask, at, state.store[shard.name][at])
            shard.data[kept[1]] = kept[2]
        self.host.touch()

    # --------------------------------------------------------------------------------------- what a user may ask
    def whole_masks(self) -> dict[str, Tensor]:
        """Whole bool masks of all masked layers by name, on every rank (copies). Collective where weights are sharded."""
        state = self.states[DynamicSparsity]
        names = list(state.active)
        with self.host.frozen_too():
            held = [(s, state.masks[s.name]) for s in self._masked()]
            return self.host.gather(held, names, dict.fromkeys(names, torch.bool))

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Use these whole bool masks instead, the same on every rank; names left out keep theirs. Collective where sharded.

        Raises:
            ValueError: an unknown name, another shape or type, or a mask without an active entry.
        """
        self._check_masks(masks)
        names = [n for n in self._shapes if n in masks or n in self.states[DynamicSparsity].active]
        self._install({s.name: self._slice(s, masks[s.name]) for s in self.host.shards if s.name in masks}, names)

    def _check_masks(self, masks: Mapping[str, Tensor]) -> None:
        odd = [n for n in masks if n not in self._shapes]
        check(not odd, WHO, f"masks of {odd[:5]}", "be of masked layers", nearest(odd[0], self._shapes) if odd else "")
        odd = [n for n, m in masks.items() if tuple(m.shape) != self._shapes[n]]
        check(not odd, WHO, f"masks of {odd[:5]} have shapes {[tuple(masks[n].shape) for n in odd[:5]]}",
              f"have the weights' shapes {[self._shapes[n] for n in odd[:5]]}")
        odd = [n for n, m in masks.items() if m.dtype != torch.bool or not bool(m.any())]
        check(not odd, WHO, f"masks of {odd[:5]}", "be bool tensors with an active entry")

    def densities(self) -> dict[str, float]:
        """Share of active entries of every maskable layer, by name. No collective."""
        active = self.states[DynamicSparsity].active
        return {n: active.get(n, self._size(n)) / self._size(n) for n in self._shapes}

    def begin_task(self, task: int, *, steps: int | None = None, masks: Mapping[str, Tensor] | None = None) -> None:
        """Begin a task with a mask of its own; weights of ended tasks are frozen. Between two steps. Collective where sharded.

        Args:
            task: 1, 2, ... in order.
            steps: of this task, for its schedule; default `total_steps`.
            masks: whole masks to start from, by name, instead of random ones.

        Raises:
            RuntimeError: another task is open, or grow_into_used="forbid" and too few weights are free.
            ValueError: a task out of order, steps < 1, masks that do not fit.
        """
        isolation.begin(self, task, steps, masks)

    def keep_best(self, score: float) -> bool:
        """Keep weights, masks and statistics as they are now if `score` is the open task's largest so far; for
        `end_task(select="best")`. Give the same score on every rank."""
        return isolation.keep_best(self, score)

    def end_task(self, *, select: Literal["last", "best"] = "last") -> None:
        """Freeze the open task's weights, with the mask they have now, or at the best score. Collective where sharded.

        Raises:
            RuntimeError: no task is open, a frozen weight changed, or "best" without `keep_best`.
        """
        isolation.end(self, select)

    @contextmanager
    def task(self, task: int) -> Iterator[None]:
        """Compute as at the end of a task inside the block: its mask, weights, biases and statistics. Collective.

        Raises:
            RuntimeError: a task that has neither ended nor is open.
        """
        with isolation.showing(self, task):
            yield

    def capacity(self) -> dict[str, isolation.Capacity]:
        """Used and free entries of each layer, and what each task shares with earlier ones. Collective where sharded."""
        return isolation.capacity(self)

    def cost(self) -> Cost:
        """A mask, and what growth keeps."""
        config, state = self.configs[DynamicSparsity], self.states[DynamicSparsity]
        if not state.active:
            return Cost()
        kept = (1 if self.host.device.type == "cuda" else 5) + 4 * config.averages + 4 * (config.score_steps > 1)
        share = sum(self._size(n) for n in state.active) / sum(shape.numel() for _, shape in self.host.master_layout().values())
        note = f"DynamicSparsity: every {config.update_every} steps some 8 to 20 all-reduces, of 256 counts per layer at most"
        return Cost(state_bytes=round(kept * share, 2), note=note if config.drop_fraction else "")


CHOICES = {
    "distribution": ("erk", "er", "uniform"), "prune": PRUNE, "grow": GROW,
    "redistribute": ("layer", "survivors", "momentum", "global"),
    "anneal": ("auto", "cosine", "linear", "constant"), "topology_step": ("auto", "instead", "after"),
    "newborn": ("layer_mean_v", "zero"), "fresh_init": ("initializer", "zeros"),
    "grow_into_used": ("allow", "forbid", "prefer"),
}
