"""The root of the trainer mixins: the verbs a batch travels through, and what a trainer must offer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from everbatch.contract import Contract, base_of, option_names, parts_of, reject_unknown
from everbatch.data import Batch
from everbatch.distributed import World
from everbatch.errors import CompositionError
from everbatch.train.record import Report

__all__ = ["TrainerMixin", "gather_rows", "gathers_rows"]


class TrainerMixin(Contract):
    """Root of the trainer mixins; stands between the parts and a trainer: everbatch's or your own.

    Verbs, in the order the data travels; a trainer that wants to take a mixin offers those the mixin extends:

    - `configure_model(model) -> model`            once, before the engine is built
    - `configure_stream(stream) -> stream`         once per run, before anything looks at it
    - `on_task_start(task)`, `on_task_end(task)`   around each task
    - `draw_batch(parts) -> parts`                 host side; may add parts (`Batch` with a name of its own)
    - `augment_batch(parts) -> parts`              device side, once per step
    - `forward(batch) -> outputs`                  one part
    - `forward_parts(parts) -> outputs of each`    all parts of a micro-batch, in their order; optional
    - `loss_terms(outputs, batch) -> {name: scalar}`  one part; the sum of all terms of all parts is minimised
    - `after_step(record)`                         after an applied or skipped step
    - `consolidate(task)`                          after the last step of a task; may run loops of its own
    - `predict(batch) -> logits`                   inference

    A trainer also offers the attributes `world` (`everbatch.distributed.World`), `seed` and `step` (steps begun), and calls
    its verbs itself. `global_rows(batch)` is optional: ids, targets and positions of the whole global batch; without it they
    are gathered, one small collective per step.
    """

    verbs: ClassVar[tuple[str, ...]] = (
        "configure_model", "configure_stream", "on_task_start", "draw_batch", "augment_batch", "forward", "forward_parts",
        "loss_terms", "after_step", "consolidate", "on_task_end", "predict")
    optional: ClassVar[tuple[str, ...]] = ("forward_parts",)
    """Verbs that a trainer may lack: a part that extends one says itself when it needs it."""
    final: ClassVar[tuple[str, ...]] = ("training_step", "fit")
    gives: ClassVar[tuple[str, ...]] = ()
    """Auxiliary objectives of the optimizer whose samples the part draws."""
    world: World
    seed: int
    step: int
    global_rows: Callable[[Batch], tuple[Tensor, Tensor, Tensor]]
    """Ids, targets and positions of the global batch of which `batch` is this rank's part, the same on every rank."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        base = base_of(cls)
        if base is None:
            return
        if not hasattr(cls, "global_rows"):
            cls.global_rows = _gathered  # type: ignore[assignment]  # bound when it is read
        for part in parts_of(cls):
            needed = [verb for verb in cls.verbs if verb not in cls.optional]
            lacking = [verb for verb in needed if verb in vars(part) and not hasattr(base, verb)]
            if lacking:
                raise CompositionError(f"{cls.__name__}: {part.__name__} extends {lacking[0]}(), which {base.__name__} "
                                       f"does not offer; define {', '.join(f'{v}()' for v in lacking)} there")

    def __init__(self, *args: Any, **options: Any) -> None:
        rest = self._configure(options)
        base = base_of(type(self))
        parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            reject_unknown(type(self), rest, set(parameters) - {"self"} | option_names(type(self)))
        super().__init__(*args, **rest)

    def for_optimizer(self, optimizer: functools.partial[Any]) -> functools.partial[Any]:
        """Called of each part by `Trainer`, before anything is built: the optimizer's class and options, with what the part needs
        of it. No verb: parts do not call super()."""
        return optimizer

    def before_fit(self) -> None:
        """Called of each part by `Trainer.fit`, before anything of a run that begins anew. No verb: parts do not call super()."""

    def report(self) -> Report | None:
        """Called of each part by recipes when training has ended: what it adds to the results. No
        collective."""
        return None

    def exported(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Called of each part by `export`, on rank 0: tensors that go into the file beside the network's, and what its metadata
        say of them. No collective."""
        return {}, {}

    def notes(self) -> str:
        """Called of each part by `Trainer.describe`: a line about what it does, with these options; "" for none."""
        return ""


def _gathered(trainer: TrainerMixin, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """`global_rows` of a trainer that has none."""
    return gather_rows(batch, trainer.world)


def gathers_rows(trainer: Any) -> bool:
    """Whether a trainer has to ask the other ranks for the rows of a global batch."""
    return type(trainer).global_rows is _gathered


def gather_rows(batch: Batch, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Gather ids, labels and positions of equally large parts in rank order: (world * n,) each. One all-reduce."""
    labelled = batch.targets.ndim == 1 and batch.targets.dtype == torch.int64
    labels = batch.targets if labelled else torch.zeros_like(batch.ids)  # other targets are of no class
    mine = torch.stack([batch.ids, labels, batch.position]).cpu()
    table = mine.new_zeros((world.size, *mine.shape))
    table[world.rank] = mine
    ids, targets, position = world.sum(table).permute(1, 0, 2).reshape(3, -1)
    return ids, targets, position
