"""SAME: routers and experts of a frozen network, kept right for earlier tasks by what those fed them."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from everbatch.data import Batch, Stream, Task
from everbatch.distributed import World
from everbatch.errors import check
from everbatch.optim.subspace.transforms import Projection
from everbatch.train.mixin import TrainerMixin
from everbatch.train.record import Report, StepRecord
from everbatch.train.same.drift import drift_of, gathered, logits_of, told
from everbatch.train.same.freezing import resting
from everbatch.train.same.moments import LayerSums, TaskSums, draw_of, reduced
from everbatch.train.same.options import SAMEOptions
from everbatch.train.same.rules import maps_of, mean_square, router_map, split_of
from everbatch.train.same.setting import projecting, with_experts
from everbatch.train.same.watch import Watch

__all__ = ["SAME"]


class SAME(TrainerMixin):
    """Experts with a router in frozen layers, whose updates keep off what earlier tasks fed them:

        dR   <- dR M_router,     M = I - V V^T  (null),   I + V diag(mu / (lambda + mu) - 1) V^T  (soft)
        dA_i <- dA_i M_curv,     M_curv as soft

    V, lambda: the leading eigenpairs of the second moment of the layer's inputs over earlier tasks' training tokens,
    C = (1/n) sum x x^T, uncentred, summed in the training passes and reduced over the ranks once, when a task has ended. Layers:
    see `everbatch.nn.MoELoRALinear`. In the space of updates, where the map acts on what any optimizer has done, decay and
    momentum included, router logits of inputs in the span of V stay as they are (null). Experts whose importance to earlier tasks
    is above their use in this one rest for the task: no gradient, decay or momentum moves them.

    The optimizer gets `SubspaceProjection` in the space of updates, where it has none. A trainer of your own also offers
    `optimizer`, `module` and `device`, composes that itself, and runs its forwards through the verb.

    Args (Config): see the fields.

    Raises:
        UnknownTarget: patterns that fit nothing. CompositionError: beside MOS: both own the adapters.
        NonFiniteStatistics: at a task's end, naming layer and task. NoFreeSubspace: router="null" with delta pinned.

    Cost: 2 n d^2 operations per layer in a step (every 10th above width 1024, of a sketch), no host sync; while it is to be
    decided who rests, one all-reduce of a number per step. At a task's end d^2 numbers per layer over the ranks and one
    eigen-decomposition: 0.1 s at width 384, 0.7 s at 768. Memory: d^2 numbers per layer, twice.
    Order: anywhere; left_of says who must stand right. Limits: routing of old tokens is kept at the inputs that a layer was
    given; where earlier layers change, they drift. Layers above width 1024: to the share that a sketch keeps.
    Source: Xie et al. 2026, arXiv 2602.01990, whose router rule (router="paper") protects nothing: old inputs lie where it acts.
    Differs from the released code (released=True), which routes by batch, projects centred one-batch sketches of each rank, and
    soon leaves one expert per task.
    """

    owns = ("adapters",)
    makes = {}  # it needs a network with layers of known names
    example = {"layers": ("1",), "trained": ("3.*",), "experts": 3, "rank": 2, "router": "null", "delta": 0.8,
               "warmup_tokens": 8, "min_active": 1, "probes": 4, "statistics": "float64"}
    off = {"layers": ()}
    search = {"delta": (0.95, 0.8, 0.99), "mu_rel": (0.01, 0.001, 0.1)}

    @dataclass(frozen=True, kw_only=True)
    class Config(SAMEOptions):
        """See `SAMEOptions`."""

    @dataclass
    class State:
        open: TaskSums = field(default_factory=lambda: TaskSums(World()))
        """This rank's sums of the present task."""
        history: dict[str, Tensor] = field(default_factory=dict)
        """Sums over all ranks and ended tasks, by "LAYER/FIELD"."""
        probes: dict[str, Tensor] = field(default_factory=dict)
        """Tokens of ended tasks, and how they were routed then."""
        resting: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
        """(layers, experts): who rests in the present task; empty before it is decided."""
        begun: int = 0
        """Step at which the present task began."""
        ended: int = 0
        """Tasks."""
        log: list[dict[str, Any]] = field(default_factory=list)
        """Load, drift, who rested, kept shares: of each ended task."""

    if TYPE_CHECKING:
        optimizer: Any
        module: nn.Module
        stream: Stream | None
        device: torch.device
        recorder: Any
        config: Any

    @classmethod
    def fixed(cls, config: SAMEOptions) -> str:
        """Experts are there from the start."""
        return "its experts are put into the network when the trainer is built; leave the head as wide as the stream" \
            if config.layers else ""

    @classmethod
    def needs_boundaries(cls, config: SAMEOptions) -> str:
        """Its history is of ended tasks."""
        return "what it protects is of tasks that have ended" if config.layers else ""

    def for_optimizer(self, optimizer: functools.partial[Any]) -> functools.partial[Any]:
        """With the projection."""
        config: SAMEOptions = self.configs[SAME]
        return projecting(optimizer, config.space) if config.layers else optimizer

    # ------------------------------------------------------------------------------------------------------- the verbs
    def configure_model(self, model: nn.Module) -> nn.Module:
        """Put the experts in."""
        model = super().configure_model(model)  # type: ignore[misc]
        config: SAMEOptions = self.configs[SAME]
        self._same_layers, self._same_names = {}, []
        if not config.layers:
            return model
        compiled = getattr(getattr(self, "config", None), "compile", False)
        check(not compiled, "SAME", "compile=True", "be false", "its statistics are taken by hooks inside the network")
        self._same_layers = with_experts(model, config, self.seed)
        self._same_names = list(self._same_layers)
        self._same_watch = Watch(self._same_layers)
        self._same_draws = {name: draw_of(layer.in_features, config.wide_rank, name, self.seed)
                            for name, layer in self._same_layers.items()}
        self._same_applied: Tensor | None = None
        self.states[SAME].open = TaskSums(self.world)
        return model

    def on_task_start(self, task: Task) -> None:
        """Set the maps that earlier tasks ask for, and begin to sum up."""
        super().on_task_start(task)  # type: ignore[misc]
        config: SAMEOptions = self.configs[SAME]
        if not config.layers:
            return
        kind = type(self.optimizer).__name__
        check(hasattr(self.optimizer, "set_projections"), "SAME", f"optimizer {kind}", "hold SubspaceProjection",
              f"compose it, with space={config.space!r}")
        by_task = config.heads == "by_task"
        stream = self.stream
        check(not by_task or stream is None or stream.kind == "task", "SAME", f"heads='by_task' on a stream of kind "
              f"{getattr(stream, 'kind', '')!r}", "be task-incremental", "use heads='joint', or task_incremental(...)")
        state: SAME.State = self.states[SAME]
        state.begun, state.resting = self.step, torch.zeros(0, 0, dtype=torch.bool)
        for name, layer in self._same_layers.items():
            state.open.begin(name, layer.in_features, config.experts, probes=config.probes, draw=self._same_draws[name],
                             dtype=getattr(torch, config.statistics), device=self.device)
        self.optimizer.set_projections(self.__maps(task), project_moments=True)

    def draw_batch(self, parts: list[Batch]) -> list[Batch]:
        """Let those rest that are to."""
        parts = super().draw_batch(parts)  # type: ignore[misc]
        self.__rest(True)
        return parts

    def forward(self, batch: Batch) -> Tensor:
        """Sum up what the stream's samples feed the layers, in the pass that is recorded."""
        counts = self._same_layers and batch.part == "stream" and torch.is_grad_enabled() and getattr(
            self.optimizer, "recording", True) and self.__sums.layers
        with self._same_watch.counting(self.__given, self.__weighed, self.__mask(batch)) if counts else nullcontext():
            return super().forward(batch)  # type: ignore[misc, no-any-return]

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Over the task's own classes, where tasks have heads of their own."""
        config: SAMEOptions = self.configs[SAME]
        if not (config.layers and config.heads == "by_task" and batch.part == "stream"):
            return super().loss_terms(outputs, batch)  # type: ignore[misc, no-any-return]
        assert self.stream is not None
        classes = self.stream.tasks[batch.task].classes
        first, last = min(classes), max(classes) + 1
        own = replace(batch, targets=batch.targets - first)
        return super().loss_terms(outputs[:, first:last], own)  # type: ignore[misc, no-any-return]

    def after_step(self, record: StepRecord) -> None:
        """Decide who rests, once enough tokens were seen; decompose anew, where the printed rule asks for it."""
        self.__rest(False)
        super().after_step(record)  # type: ignore[misc]
        config: SAMEOptions = self.configs[SAME]
        state: SAME.State = self.states[SAME]
        if not self.__sums.layers:
            return
        step = self.step + 1 - state.begun
        self.__decide(step)
        late = step - config.start_step
        if config.router == "paper" and late >= 0 and late % config.refresh == 0:
            task = getattr(self, "task_index", state.ended)
            found = {name: reduced(sums, self.world, name=name, task=task) for name, sums in self.__sums.layers.items()}
            self.optimizer.set_projections(self.__maps(None, found))

    def consolidate(self, task: Task) -> None:
        """Reduce the task's sums into the history, measure the drift of earlier tasks' routing, and keep some tokens."""
        super().consolidate(task)  # type: ignore[misc]
        config: SAMEOptions = self.configs[SAME]
        state: SAME.State = self.states[SAME]
        if not config.layers:
            return
        routers = self.__routers()
        row: dict[str, Any] = {"task": task.id, "drift": {str(k): v for k, v in drift_of(
            state.probes, routers, config.top_k).items()}, "load": {}, "resting": self.__resting_names()}
        history, probes = dict(state.history), dict(state.probes)
        for name, sums in self.__sums.layers.items():
            found = reduced(sums, self.world, name=name, task=task.id)
            row["load"][name] = (found["load"] / found["numbers"][3].clamp_min(1.0)).tolist()
            history |= {f"{name}/{key}": value.cpu() + history.get(f"{name}/{key}", 0.0) for key, value in found.items()}
            x = gathered(sums["inputs"], self.world).cpu()
            key = f"{name}/{state.ended}"
            probes |= {f"{key}/inputs": x, f"{key}/logits": logits_of(x, routers[name])}
        state.history, state.probes, state.log = history, probes, [*state.log, row]
        state.open.layers, state.resting, state.ended = {}, torch.zeros(0, 0, dtype=torch.bool), state.ended + 1
        self.__rest(False)
        self.__write(row)

    def notes(self) -> str:
        """Which promise holds."""
        config: SAMEOptions = self.configs[SAME]
        return config.promise([layer.in_features for layer in self._same_layers.values()])

    def report(self) -> Report | None:
        """Load and drift by task."""
        log = self.states[SAME].log
        return Report("same", {"tasks": log}, told(log)) if log else None

    # ------------------------------------------------------------------------------------------------------------- how
    @property
    def __sums(self) -> TaskSums:
        """The open sums, on the device."""
        held: TaskSums = self.states[SAME].open
        if held.read:
            held.to(self.device, self._same_draws)
        return held

    def __mask(self, batch: Batch) -> Tensor | None:
        named = batch.inputs if isinstance(batch.inputs, dict) else {}
        return named.get(self.configs[SAME].mask)

    def __due(self, name: str) -> bool:
        every = self.configs[SAME].every or (1 if self._same_draws[name] is None else 10)
        return (self.step - int(self.states[SAME].begun)) % every == 0

    def __given(self, name: str, x: Tensor, mask: Tensor | None) -> None:
        if self.__due(name):
            self.__sums.add(name, x, mask)

    def __weighed(self, name: str, x: Tensor, weights: Tensor, mask: Tensor | None) -> None:
        if self.__due(name):
            self.__sums.weigh(name, x, weights, mask)

    def __history(self, name: str) -> LayerSums:
        keys = ("second", "numbers", "load", "importance")
        return {key: self.states[SAME].history[f"{name}/{key}"].to(self.device) for key in keys}

    def __maps(self, task: Task | None, present: dict[str, LayerSums] | None = None) -> dict[str, Projection]:
        """The maps of every layer: of earlier tasks, and for the printed rule of the present one as well."""
        config: SAMEOptions = self.configs[SAME]
        found: dict[str, Projection] = {}
        for name in self._same_names:
            who = f"SAME: layer {name!r}, before task {task.id if task is not None else self.states[SAME].ended}"
            past = self.__history(name) if self.states[SAME].ended else None
            if past is not None and past["numbers"][0] > 0:
                split = split_of(past, self._same_draws[name], config, router=config.router, who=who)
                found |= maps_of(name, config.experts, split, config, config.mu_rel * mean_square(past))
            if present is not None:
                both = present[name] if past is None else {key: value + past[key] for key, value in present[name].items()}
                split = split_of(both, self._same_draws[name], config, router="paper", who=who)
                if split.rank:
                    found[f"{name}.router"] = Projection(right=router_map(split, config, 0.0, "paper"))
        return found

    def __decide(self, step: int) -> None:
        """Who rests: the same on every rank. Collective while it is to be decided."""
        config: SAMEOptions = self.configs[SAME]
        state: SAME.State = self.states[SAME]
        again = config.decide_every and step % config.decide_every == 0
        if not state.ended or config.tau == -1.0 or (state.resting.numel() and not again):
            return
        first = self.__sums.layers[self._same_names[0]]
        tokens = float(self.world.sum(first["numbers"][3].clone()))
        if tokens < config.warmup_tokens:
            return
        now = torch.stack([torch.cat([s["numbers"][3:], s["load"]]) for s in self.__sums.layers.values()])
        now = self.world.sum(now)
        use = now[:, 1:] / now[:, :1].clamp_min(1.0)
        past = [self.__history(name) for name in self._same_names]
        weight = torch.stack([p["importance"] / p["numbers"][3].clamp_min(1.0) for p in past])
        found = resting(use, weight, config.tau, config.least_active)
        # What ranks computed alike may differ in the last bit between devices: all take rank 0's.
        state.resting = (self.world.sum(found.double() if self.world.rank == 0 else torch.zeros_like(use)) > 0).cpu()

    def __resting_names(self) -> dict[str, list[int]]:
        """Experts that rest, by layer."""
        rows = self.states[SAME].resting
        return {name: torch.nonzero(row).flatten().tolist() for name, row in zip(self._same_names, rows, strict=False)
                if bool(row.any())}

    def __rest(self, inside: bool) -> None:
        """Tell the layers, and in a step the optimizer, who rests."""
        state: SAME.State = self.states[SAME]
        if not self._same_layers:
            return
        if self._same_applied is not state.resting:
            names = self.__resting_names()
            for name, layer in self._same_layers.items():
                layer.frozen = tuple(names.get(name, ()))
            self._same_applied = state.resting
        masking = inside and self.configs[SAME].action == "mask"
        held = []
        for name, layer in self._same_layers.items():
            layer.masked = masking and bool(layer.frozen)
            held += [f"{name}.{kind}_{i}" for i in layer.frozen for kind in ("down", "up")]
        if inside and held:
            self.optimizer.hold(held)

    def __routers(self) -> dict[str, Tensor]:
        """Whole routers, on every rank. Collective where weights are sharded."""
        host = self.optimizer.host
        names = [f"{name}.router" for name in self._same_names]
        mine = [(shard, shard.data) for shard in host.shards if shard.name in names]
        whole = host.gather(mine, names)
        return {name: whole[f"{name}.router"] for name in self._same_names}

    def __write(self, row: dict[str, Any]) -> None:
        """Load and drift, where scalars go."""
        recorder: Any = getattr(self, "recorder", None)
        if recorder is None:
            return
        values = {f"same/load/{name}/{i}": share for name, shares in row["load"].items() for i, share in enumerate(shares)}
        values |= {f"same/{what}/task_{task}": value for task, found in row["drift"].items() for what, value in found.items()}
        recorder.scalars(self.step - 1, values)


