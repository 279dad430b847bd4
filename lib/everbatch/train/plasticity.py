"""Plasticity at task ends: dormant units, effective rank of features, gradient norms, without a trace in the training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from everbatch.data import Batch, Stream, Task
from everbatch.data.draws import drawing, seeded
from everbatch.data.tasks import bounded
from everbatch.errors import check_real, check_whole
from everbatch.evaluate.evaluator import evaluator_of, mean_buffers
from everbatch.evaluate.subsets import stratified_subset
from everbatch.metrics.plasticity import dormant, effective_rank, threshold_rank
from everbatch.optim.memory.replica import Call, Factory, Weights, evaluating, replica, require_replica
from everbatch.problems import Classification
from everbatch.rows import Rows, each
from everbatch.train.mixin import TrainerMixin
from everbatch.train.record import Report, StepRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Plasticity"]

WHO = "Plasticity"
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
               nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.Sigmoid)
NONE = -1.0
"""In the state, where there is no number."""
COLUMNS = ("dormant_units", "effective_rank", "threshold_rank")


def _nothing() -> Tensor:
    return torch.empty((0, len(COLUMNS)), dtype=torch.float64)


class Plasticity(TrainerMixin):
    """Measure at each task's end whether the network can still learn: dormant units, feature rank, gradient norms.

        dormant_units    share of the units behind activation modules whose mean |h| is at most tau of their layer's mean
        effective_rank   exp(entropy) of the singular values of the features, the last linear layer's input
        threshold_rank   singular values that make up 99 % of their sum
        gradient_norm    of the mean loss on each task seen so far: |d mean_i loss(x_i) / d theta|

    The first three are of the task just trained. Measured are `subset` training samples of each task, un-augmented, drawn once
    by (seed, task), of each class its share; in evaluation mode, with the ranks' mean buffers; the loss is the problem's own,
    without what methods add. Units are channels of (n, C, h, w), else the last dimension. A model whose activations are
    functions, not modules, has no dormant_units, one without a linear layer no ranks: None.

    Training is as without, bit for bit: the model is called as a function of its weights, and nothing of an engine moves.

    Raises:
        UnsupportedHost: at construction's first fit, on ZeRO-3 and FSDP2 without a factory.

    Cost: nothing per step. At a task's end one forward of the task's subset and a forward and backward of each seen task's,
    divided among the ranks; one all-reduce of (subset, features), one of the units, one of the gradient for each task.
    Order: any. Limits: none. A stream that shows methods no boundary is measured where its tasks end all the same.
    Source: Sokar et al. 2023, arXiv 2302.12902 (dormant units); Roy and Vetterli 2007 (effective rank); Kumar et al. 2021, arXiv
    2010.14498 (threshold rank).
    """

    observes = True
    makes = {}  # it measures
    example = {"subset": 9}
    off = {}
    search = {}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        subset: int = 256
        """Training samples of each task, over all ranks; >= 1. Ranks are at most so large."""
        tau: float = 0.025
        """Share of its layer's mean activation up to which a unit is dormant; >= 0."""
        factory: Factory | None = None
        """Builds the bare model on the CPU; needed on ZeRO stage 3 and FSDP2 for the plain replica."""

        def __post_init__(self) -> None:
            check_whole(WHO, "subset", self.subset, 1)
            check_real(WHO, "tau", self.tau, 0.0)

    @classmethod
    def needs_boundaries(cls, config: Plasticity.Config) -> str:
        """No: what it knows of tasks, no method learns."""
        return ""

    @dataclass
    class State:
        found: Tensor = field(default_factory=_nothing)
        """(tasks, 3): COLUMNS after each task."""
        norms: Tensor = field(default_factory=_nothing)
        """(tasks, tasks): row k, after task k, column j, gradient norm on task j."""
        done: int = 0
        """Tasks that were measured."""
        seconds: float = 0.0

    if TYPE_CHECKING:
        optimizer: Any
        module: Any
        stream: Stream | None
        recorder: Any
        device: torch.device
        config: Any
        inputs_of: Callable[[Any], Any]
        predict: Callable[[Any], Tensor]

    def before_fit(self) -> None:
        """Begin anew, and refuse at once what a task's end would refuse after hours."""
        assert self.stream is not None
        require_replica(self.optimizer.host, self.configs[Plasticity].factory, WHO)
        tasks = len(self.stream)
        self.states[Plasticity] = Plasticity.State(
            found=torch.full((tasks, len(COLUMNS)), NONE, dtype=torch.float64),
            norms=torch.full((tasks, tasks), NONE, dtype=torch.float64))

    def on_task_start(self, task: Task) -> None:
        """Before the first task of a trainer that does not call `before_fit`."""
        super().on_task_start(task)  # type: ignore[misc]
        if not self.states[Plasticity].found.numel():
            self.before_fit()

    def after_step(self, record: StepRecord) -> None:
        """Where the stream shows no boundary, which a measurement may know of, measure after a task's last step."""
        super().after_step(record)  # type: ignore[misc]
        stream, index = self.stream, getattr(self, "task_index", 0)
        if stream is None or bounded(stream) or getattr(self, "steps_left", 0) != 1 or index + 1 == len(stream):
            return
        self.__measure(stream.tasks[index], self.step)

    def on_task_end(self, task: Task) -> None:
        """Measure."""
        super().on_task_end(task)  # type: ignore[misc]
        self.__measure(task, self.step - 1)

    def report(self) -> Report | None:
        """What was measured, by task: None where there is no number."""
        state: Plasticity.State = self.states[Plasticity]
        if not state.done:
            return None
        values: dict[str, Any] = {}
        for name, column in zip(COLUMNS, state.found[: state.done].T.tolist(), strict=True):
            values[name] = [None if value == NONE else value for value in column]
        values |= {f"final_{name}": values[name][-1] for name in COLUMNS}  # what several seeds are summed up by
        values["gradient_norm"] = [row[: k + 1] for k, row in enumerate(state.norms[: state.done].tolist())]
        values["measuring_seconds"] = state.seconds
        lines = []
        for name, scale, unit in (("dormant_units", 100.0, " %"), ("effective_rank", 1.0, ""), ("threshold_rank", 1.0, "")):
            shown = " ".join("-" if value is None else f"{scale * value:.1f}" for value in values[name])
            lines.append(f"{name.replace('_', ' ') + ' by task':<30} {shown}{unit}")

        def draw() -> Figure:
            from everbatch.report.curves import plasticity_by_task

            return plasticity_by_task(values, title=str(getattr(self, "title", "")))

        return Report("plasticity", values, tuple(lines), {"plasticity": draw})

    # ------------------------------------------------------------------------------------------------ how
    def __measure(self, task: Task, step: int) -> None:
        """All numbers of a task whose last step was this one. Collective."""
        assert self.stream is not None
        state, begun = self.states[Plasticity], time.perf_counter()
        with seeded(), self.__model() as (call, weights, root):
            state.found[task.id] = torch.tensor(self.__speaking(task, call, weights, root), dtype=torch.float64)
            for earlier in self.stream.tasks[: task.id + 1]:
                state.norms[task.id, earlier.id] = self.__norm(earlier, call, weights)
        state.done = task.id + 1
        state.seconds += time.perf_counter() - begun
        if getattr(self, "recorder", None) is not None:
            pairs = zip(COLUMNS, state.found[task.id].tolist(), strict=True)
            written = {f"plasticity/{name}": value for name, value in pairs if value != NONE}
            norms = state.norms[task.id, : state.done].tolist()
            written |= {f"plasticity/gradient_norm/task_{j}": norm for j, norm in enumerate(norms)}
            self.recorder.scalars(step, written)

    @contextmanager
    def __model(self) -> Iterator[tuple[Call, Weights, nn.Module]]:
        """The model as a function of its weights, in evaluation mode. Collective."""
        host, pick = self.optimizer.host, getattr(self, "pick", None)
        host.publish_if_dirty()
        with pick.on() if pick is not None else nullcontext(), mean_buffers(self.module, self.world):
            call, weights, root = replica(host, self.configs[Plasticity].factory)
            with evaluating(root):
                yield call, weights, root

    def __batches(self, task: Task, dtype: torch.dtype) -> Iterator[tuple[Batch, Rows]]:
        """This rank's share of a task's subset, and its inputs in the weights' type."""
        assert self.stream is not None
        key = (self.seed, "plasticity", task.id)
        problem = getattr(self, "problem", None)
        ids = stratified_subset(self.stream, task.train_ids, self.configs[Plasticity].subset, *key,
                                by_label=problem is None or problem.labels)
        with drawing(*key):
            for batch in evaluator_of(self).ready(self.stream, task, ids):
                yield batch, each(lambda value: value.to(dtype) if value.is_floating_point() else value, batch.inputs)

    def __speaking(self, task: Task, call: Call, weights: Weights, root: nn.Module) -> list[float]:
        """The three numbers of COLUMNS. Two all-reduces."""
        size = min(int(self.configs[Plasticity].subset), len(task.train_ids))
        sums: dict[tuple[str, int], Tensor] = {}
        features: Tensor | None = None
        dtype = next(iter(weights.values())).dtype
        for batch, inputs in self.__batches(task, dtype):
            assert batch.weight is not None
            with torch.no_grad(), _listening(root) as heard:
                call(weights, inputs)
            for key, units in heard.units.items():
                sums[key] = sums.get(key, 0.0) + (batch.weight.double()[:, None] * units).sum(0)
            if heard.features is not None:
                if features is None:
                    features = heard.features.new_zeros((size, heard.features.shape[1]), dtype=torch.float64)
                real = batch.weight > 0
                features[batch.position[real]] = heard.features[real].double()
        asleep = NONE
        if sums:
            flat = self.world.sum(torch.cat([*sums.values()])) / size
            layers = torch.split(flat, [len(layer) for layer in sums.values()])
            asleep = float(torch.cat([dormant(layer, self.configs[Plasticity].tau) for layer in layers]).double().mean())
        if features is None:
            return [asleep, NONE, NONE]
        whole = self.world.sum(features).cpu()
        return [asleep, effective_rank(whole), float(threshold_rank(whole))]

    def __norm(self, task: Task, call: Call, weights: Weights) -> float:
        """Norm of the gradient of the mean loss on a task's subset. One all-reduce."""
        problem = getattr(self, "problem", None) or Classification()
        total: Sequence[Tensor] = []
        units = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch, inputs in self.__batches(task, next(iter(weights.values())).dtype):
            weight = batch.weight
            assert weight is not None

            def loss(w: Weights, x: Rows = inputs, batch: Batch = batch, weight: Tensor = weight) -> Tensor:
                return (problem.losses(call(w, x).float(), batch.targets) * weight).sum()

            found = [g.double() for g in torch.func.grad(loss)(weights).values()]
            total = found if not total else [a + b for a, b in zip(total, found, strict=True)]
            counted = problem.units(batch.targets) if problem.in_units else torch.ones_like(weight)
            units += (counted.double() * weight.double()).sum()
        flat = self.world.sum(torch.cat([*(g.flatten() for g in total), units[None]]))
        return float(flat[:-1].norm() / flat[-1].clamp(min=1.0))


@dataclass
class _Heard:
    """What one forward let be heard."""

    units: dict[tuple[str, int], Tensor]
    """Mean |h| over places, (n, units), by module and call of it: one module may stand in several places."""
    features: Tensor | None = None
    """(n, d) input of the linear layer that was called last."""


@contextmanager
def _listening(root: nn.Module) -> Iterator[_Heard]:
    """Hooks on activations and linear layers; they are gone afterwards."""
    heard, hooks = _Heard({}), []

    def speak(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            turn = sum(1 for known, _ in heard.units if known == name)
            size = output.detach().abs().double()
            by_unit = size.flatten(2).mean(2) if size.ndim == 4 else size.flatten(1, -2).mean(1) if size.ndim > 2 else size
            heard.units[name, turn] = by_unit

        return hook

    def listen(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        value = inputs[0].detach()
        heard.features = value.flatten(1, -2).mean(1) if value.ndim > 2 else value

    for name, part in root.named_modules():
        if isinstance(part, ACTIVATIONS):
            hooks.append(part.register_forward_hook(speak(name)))
        elif isinstance(part, nn.Linear):
            hooks.append(part.register_forward_pre_hook(listen))
    try:
        yield heard
    finally:
        for handle in hooks:
            handle.remove()
