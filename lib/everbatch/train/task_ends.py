"""What parts of the optimizer take at a task's end (`at_task_end`), on the task's own training samples."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from everbatch import seeds
from everbatch.contract import base_of, parts_of
from everbatch.data import Task
from everbatch.data.notes import tell
from everbatch.data.tasks import rows_of_stream
from everbatch.errors import check
from everbatch.evaluate.evaluator import mean_buffers
from everbatch.rows import Rows, each

__all__ = ["active_parts", "called_parts", "is_active", "remember", "require_stable", "rows_of", "taken"]


def is_active(optimizer: Any, part: type) -> bool:
    """Whether the optimizer has this part, at a strength other than 0, or `active`, where its Config says so."""
    config = optimizer.configs.get(part)
    return part in parts_of(type(optimizer)) and bool(getattr(config, "active", getattr(config, "strength", True)))


def called_parts(optimizer: Any) -> list[type]:
    """The parts that have something to do at a task's end, whatever their strength, by name: on every rank in one order."""
    return sorted((part for part in parts_of(type(optimizer)) if "at_task_end" in vars(part)), key=lambda part: part.__name__)


def active_parts(optimizer: Any) -> list[type]:
    """Of them, those that want to be called."""
    return [part for part in called_parts(optimizer) if is_active(optimizer, part)]


def taken(optimizer: Any) -> dict[type, int]:
    """How many tasks each part remembers, of those that count: another (SI), taken twice, gives what it gave."""
    counts = {part: getattr(optimizer.states.get(part), "tasks", None) for part in active_parts(optimizer)}
    return {part: count for part, count in counts.items() if count is not None}


def remember(trainer: Any, task: Task, *, samples: int = 0, rows: int = 64, done: dict[type, int] | None = None) -> None:
    """Call what the optimizer's active parts want called. Collective.

    Args:
        trainer: offers what `Consolidate` asks of one.
        samples, rows: as in `Consolidate.Config`.
        done: `taken` before the trainer's own verbs ran: a part that they called is not called again, and of one with
            estimator="given" that they did not call, a user is warned.
    """
    optimizer, now = trainer.optimizer, taken(trainer.optimizer)
    wanted: list[Any] = [part for part in active_parts(optimizer)
                         if done is None or part not in now or now[part] == done[part]]
    given = [part for part in wanted if getattr(optimizer.configs[part], "estimator", "") == "given"]
    if given:
        names = " and ".join(part.__name__ for part in given)
        warnings.warn(f"Trainer: {names} with estimator='given' was handed no importance for task {task.id}, so it is not "
                      "protected; hand it in from a trainer mixin's consolidate(), or use another estimator", stacklevel=3)
        wanted = [part for part in wanted if part not in given]

    def found() -> Iterator[tuple[Rows, Tensor, Tensor]]:
        return rows_of(trainer, task, samples, rows)

    pick = getattr(trainer, "pick", None)
    picking = pick.on() if pick is not None else nullcontext()
    with picking, mean_buffers(trainer.module, trainer.world):  # or importance would depend on which rank holds which sample
        for part in wanted:
            part.at_task_end(optimizer, found())


def rows_of(trainer: Any, task: Task, samples: int, rows: int) -> Iterator[tuple[Rows, Tensor, Tensor]]:
    """This rank's (inputs, targets, ids), the task's samples in a seeded order dealt out in turn."""
    order = torch.randperm(len(task.train_ids), generator=seeds.generator(trainer.seed, "consolidate", task.id))
    device = trainer.optimizer.host.device
    chosen = task.train_ids[order[: samples or None]]
    mine = chosen[trainer.world.rank :: trainer.world.size].contiguous()
    for ids in torch.split(mine, rows) if len(mine) else ():
        raw, targets = rows_of_stream(trainer.stream, ids)
        yield trainer.inputs_of(each(lambda value: value.to(device), raw)), targets, ids


CLEARLY = 4.0
"""How far beyond the largest stable step a quadratic's gradient step is refused: displacements grow sevenfold in each."""


def require_stable(trainer: Any) -> None:
    """Refuse, before a task begins, a pull so strong that plain gradient steps along it grow until they overflow; and say so
    where they may.

    A step of SGD on strength * importance * d^2 multiplies d by 1 - 2 * strength * importance * lr / (1 + momentum) at best. Only
    where nothing clips or rescales the gradient. One gather. Raises `ValueError` on every rank.
    """
    optimizer, base = trainer.optimizer, base_of(type(trainer.optimizer))
    assert base is not None
    # A pull that is no part of the gradient, as NCL's, is in a metric of its own.
    bound = [part for part in active_parts(optimizer)
             if hasattr(optimizer.configs.get(part), "strength") and "add_penalty" in vars(part)]
    others = [part for part in parts_of(type(optimizer)) if part not in called_parts(optimizer)]
    if not bound or not issubclass(base, torch.optim.SGD) or any({"update", "edit_gradient"} & vars(p).keys() for p in others):
        return
    for part in bound:
        held = [float(value.max()) for value in optimizer.states[part].importance.values() if value.numel()]
        largest = max(float(str(value)) for value in trainer.world.gather(max(held, default=0.0)))
        strength = optimizer.configs[part].strength
        groups = optimizer.param_groups
        lr = max(trainer.begun.rates)
        room = min(2.0 * (1.0 + group.get("momentum", 0.0)) for group in groups)
        step = 2.0 * strength * largest * lr
        got = f"{part.__name__} with strength={strength:g} and importance up to {largest:.3g} at lr={lr:g}"
        must = f"have strength below {room / (2.0 * largest * lr or 1.0):.2g}, where steps along the pull shrink it"
        cure = "lower the strength or lr, or compose ClipGradNorm"
        check(step <= CLEARLY * room, "Trainer", got, must, cure)
        if step > room:  # the loss's own curvature and rare large entries decide whether it still converges
            tell(f"Trainer: {got}, should {must.removeprefix('have ')}; {cure}")
