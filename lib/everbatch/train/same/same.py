"""SAME: routers and experts of a frozen network, kept right for earlier tasks by what those fed them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from everbatch.data import Batch, Stream, Task
from everbatch.errors import check
from everbatch.objective.terms import OutputTerm
from everbatch.train.mixin import TrainerMixin
from everbatch.train.record import Report, StepRecord
from everbatch.train.same.drift import drift_of, gathered, logits_of, scalars_of, told
from everbatch.train.same.keeper import Keeper
from everbatch.train.same.moments import LayerSums, TaskSums, reduced
from everbatch.train.same.options import SAMEOptions
from everbatch.train.same.released_mode import ReleasedMode
from everbatch.train.same.setting import projecting
from everbatch.train.same.state import SAMEState, nobody

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
    Order: anywhere. Limits: routing of old tokens is kept at the inputs that a layer was
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
    class State(SAMEState):
        """See `SAMEState`."""

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

    def terms(self) -> tuple[OutputTerm, ...]:
        """It adds none; heads="by_task" only says over which classes the stream's loss is."""
        return ()

    # ------------------------------------------------------------------------------------------------------- the verbs
    def configure_model(self, model: nn.Module) -> nn.Module:
        """Put the experts in."""
        model = super().configure_model(model)  # type: ignore[misc]
        config: SAMEOptions = self.configs[SAME]
        self._same: Keeper | None = None
        if not config.layers:
            return model
        compiled = getattr(getattr(self, "config", None), "compile", False)
        check(not compiled, "SAME", "compile=True", "be false", "its statistics are taken by hooks inside the network")
        self._same = Keeper(model, config, self.seed)
        self._same_released = ReleasedMode(config.experts, config.tau, self.seed) if config.released else None
        self.states[SAME].open = TaskSums(self.world)
        return model

    def on_task_start(self, task: Task) -> None:
        """Set the maps that earlier tasks ask for, and begin to sum up."""
        super().on_task_start(task)  # type: ignore[misc]
        config: SAMEOptions = self.configs[SAME]
        if self._same is None:
            return
        kind, stream = type(self.optimizer).__name__, self.stream
        check(hasattr(self.optimizer, "set_projections"), "SAME", f"optimizer {kind}", "hold SubspaceProjection",
              f"compose it, with space={config.space!r}")
        known = stream is None or stream.kind == "task"
        check(config.heads == "joint" or known, "SAME", f"heads='by_task' on a stream of kind {getattr(stream, 'kind', '')!r}",
              "be task-incremental", "use heads='joint', or task_incremental(...)")
        state: SAME.State = self.states[SAME]
        state.begun, state.resting = self.step, nobody()
        self._same.begin(state.open, self.device)
        if self._same_released is not None:
            state.released = self._same_released.begin(state.released)
            maps = self._same_released.maps(state.released, 0)
        else:
            maps = self._same.maps(state.history, None, self.device, f"before task {task.id}")
        self.optimizer.set_projections(maps, project_moments=True)

    def draw_batch(self, parts: list[Batch]) -> list[Batch]:
        """Let those rest that are to."""
        parts = super().draw_batch(parts)  # type: ignore[misc]
        config: SAMEOptions = self.configs[SAME]
        if self._same is not None:
            masked = config.released or config.action == "mask"
            held = self._same.rest(self.states[SAME].resting, masked=masked)
            if held and not config.released:  # there decay and momentum go on moving them
                self.optimizer.hold(held)
        return parts

    def forward(self, batch: Batch) -> Tensor:
        """Sum up what the stream's samples feed the layers, in the pass that is recorded."""
        counts = self._same is not None and batch.part == "stream" and torch.is_grad_enabled() and getattr(
            self.optimizer, "recording", True)
        if not counts or self._same is None or not self.__sums.layers:
            return super().forward(batch)  # type: ignore[misc, no-any-return]
        named = batch.inputs if isinstance(batch.inputs, dict) else {}
        with self._same.watch.counting(self.__given, self.__weighed, named.get(self.configs[SAME].mask)):
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
        config: SAMEOptions = self.configs[SAME]
        state: SAME.State = self.states[SAME]
        if self._same is not None:
            self._same.rest(state.resting, masked=False)
        super().after_step(record)  # type: ignore[misc]
        if self._same is None or not self.__sums.layers:
            return
        step = self.step + 1 - state.begun
        if self._same_released is not None:
            state.released, changed = self._same_released.after_step(state.released, self.world, step=step, task=state.ended)
            if changed:
                self.optimizer.set_projections(self._same_released.maps(state.released, step))
            state.resting = self._same_released.resting(state.released, self._same.names)
            return
        again = bool(config.decide_every) and step % config.decide_every == 0
        if state.ended and config.tau > -1.0 and (again or not state.resting.numel()):
            found = self._same.decided(self.__sums, state.history, self.world, self.device)
            state.resting = state.resting if found is None else found
        late = step - config.start_step
        if config.router == "paper" and late >= 0 and late % config.refresh == 0:
            where = f"step {step} of task {getattr(self, 'task_index', state.ended)}"
            self.optimizer.set_projections(self._same.maps(state.history, self.__reduced(), self.device, where))

    def consolidate(self, task: Task) -> None:
        """Reduce the task's sums into the history, measure the drift of earlier tasks' routing, and keep some tokens."""
        super().consolidate(task)  # type: ignore[misc]
        state: SAME.State = self.states[SAME]
        if self._same is None:
            return
        routers = self._same.routers(self.optimizer.host)
        drift = drift_of(state.probes, routers, self.configs[SAME].top_k)
        row: dict[str, Any] = {"task": task.id, "drift": {str(k): values for k, values in drift.items()}, "load": {},
                               "resting": self._same.resting(state.resting)}
        history, probes = dict(state.history), dict(state.probes)
        for name, found in self.__reduced().items():
            row["load"][name] = (found["load"] / found["numbers"][3].clamp_min(1.0)).tolist()
            history |= {f"{name}/{key}": value.cpu() + history.get(f"{name}/{key}", 0.0) for key, value in found.items()}
            x = gathered(self.__sums.layers[name]["inputs"], self.world).cpu()
            key = f"{name}/{state.ended}"
            probes |= {f"{key}/inputs": x, f"{key}/logits": logits_of(x, routers[name])}
        state.history, state.probes, state.log = history, probes, [*state.log, row]
        state.open.layers, state.resting, state.ended = {}, nobody(), state.ended + 1
        self._same.rest(state.resting, masked=False)
        self.__write(row)

    def notes(self) -> str:
        """Which promise holds."""
        config: SAMEOptions = self.configs[SAME]
        return config.promise([layer.in_features for layer in self._same.layers.values()] if self._same is not None else [])

    def report(self) -> Report | None:
        """Load and drift by task."""
        log = self.states[SAME].log
        return Report("same", {"tasks": log}, told(log)) if log else None

    # ------------------------------------------------------------------------------------------------------------- how
    @property
    def __sums(self) -> TaskSums:
        """The open sums, on the device."""
        held: TaskSums = self.states[SAME].open
        if held.read and self._same is not None:
            held.to(self.device, self._same.draws)
        return held

    def __reduced(self) -> dict[str, LayerSums]:
        """The open sums of all ranks. Collective."""
        task = getattr(self, "task_index", self.states[SAME].ended)
        return {name: reduced(sums, self.world, name=name, task=task) for name, sums in self.__sums.layers.items()}

    def __given(self, name: str, x: Tensor, mask: Tensor | None) -> None:
        assert self._same is not None
        if self._same.due(name, self.step - self.states[SAME].begun):
            self.__sums.add(name, x, mask)

    def __weighed(self, name: str, x: Tensor, weights: Tensor, mask: Tensor | None) -> None:
        assert self._same is not None
        if self._same.due(name, self.step - self.states[SAME].begun):
            self.__sums.weigh(name, x, weights, mask)
        if self._same_released is not None:
            self._same_released.seen(name, x, weights)

    def __write(self, row: dict[str, Any]) -> None:
        """Load and drift, where scalars go."""
        recorder: Any = getattr(self, "recorder", None)
        if recorder is None:
            return
        recorder.scalars(self.step - 1, scalars_of(row))
