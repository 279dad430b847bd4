"""`replay*`: ER, DER and DER++ by the shipped mixin and store, over a trainer of a few lines.

What the references drew at random is in the file: it takes the place of the memory's own choices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everbatch.composition import compose
from everbatch.data import Batch, Buffer, ReplayStore, Slots, reservoir_index
from everbatch.distributed import World
from everbatch.train.memory.replay import Replay
from everbatch.train.record import StepRecord
from golden.comparison import Array, Comparison, FormatError, Tolerance, Vectors
from golden.families.buffers import RecordedDraws
from golden.families.nets import build

__all__ = ["Recorded", "Replaying", "check", "content"]

METHODS = {"er": "er", "der": "dark_er", "derpp": "dark_er_pp"}
"""Name in the file to the library's."""


def check(file: Vectors, compare: Comparison) -> None:
    """Loss, weights and memory after every step of every method that the file holds."""
    methods = [name for name in file.groups() if name in METHODS]
    if not methods:
        raise FormatError(f"none of the methods {', '.join(METHODS)}")
    for method in methods:
        compare.floats = Tolerance.of(file[f"{method}/x"].dtype)
        _check_method(file, compare, method)


def _check_method(file: Vectors, compare: Comparison, method: str) -> None:
    model = build(file.under(f"{method}/theta_init/"))
    # Not part of SAM's steps: the base alone, with the step protocol.
    opt: Any = compose(base=torch.optim.SGD)(model, lr=float(file["hp_lr"]), weight_decay=_weight_decay(file, method))
    capacity = file.integer("hp_buffer_size")
    trainer: Any = Replaying(
        model, opt, method=METHODS[method], capacity=capacity, replay_batch=file.integer("hp_minibatch"),
        alpha=float(file["hp_alpha"]), beta=float(file["hp_beta"]))
    memory = Recorded(capacity)
    trainer.states[Replay].store = store = ReplayStore(memory, trainer.world)
    for i, (x, y) in enumerate(zip(file[f"{method}/x"], file[f"{method}/y"], strict=True)):
        at = f"{method}/step{i}"
        memory.draws = RecordedDraws(f"{at}/reservoir_randint", file[f"{at}/reservoir_randint"])
        memory.choices = list(file.under(f"{at}/buffer_choice").values())
        loss = trainer.train(torch.from_numpy(x.copy()), torch.from_numpy(y.copy()))
        memory.draws.finish()
        if memory.choices:
            raise FormatError(f"{at} holds {len(memory.choices)} draws from the buffer more than the library takes")
        compare.close(f"{at}/loss", loss.numpy(), file[f"{at}/loss"])
        for name, weight in model.named_parameters():
            compare.close(f"{at}/theta_after/{name}", weight.detach().numpy(), file[f"{at}/theta_after/{name}"])
        for name, value in content(store).items():
            if f"{at}/{name}" in file:
                compare.close(f"{at}/{name}", value, file[f"{at}/{name}"])


def _weight_decay(file: Vectors, method: str) -> float:
    """`hp_weight_decay`, or the key that adds the names of the methods it is for."""
    for key in file.arrays:
        if key.startswith("hp_weight_decay") and (key == "hp_weight_decay" or method in key.split("_")[3:]):
            return float(file[key])
    raise FormatError(f"no key hp_weight_decay, alone or with _{method} behind it")


def content(store: ReplayStore) -> dict[str, Array]:
    """What the reference calls the buffer: a row for every slot, zeros where none was filled yet."""
    memory, rows = store.buffer, store.state_dict()["rows"]
    found = {"buffer_labels": memory.targets[memory.filled], "buffer_examples": rows["raw"].numpy(),
               "buffer_logits": rows["logits"].numpy()}
    result = {name: np.zeros((memory.capacity, *value.shape[1:]), value.dtype) for name, value in found.items()}
    for name, value in found.items():
        result[name][memory.filled] = value
    return result


class Recorded(Buffer):
    """The references' reservoir, one sample after the other, with the integers and draws they recorded."""

    draws: RecordedDraws
    choices: list[Array]

    def _add(self, ids: Array, targets: Array, positions: Array, task: int) -> Slots:
        slots = [reservoir_index(int(seen), self.capacity, self.draws) for seen in positions]
        last = {slot: row for row, slot in enumerate(slots) if slot >= 0}  # within a batch, the later sample stays
        rows = np.asarray(sorted(last.values()), dtype=np.int64)
        where = np.asarray([slots[row] for row in rows], dtype=np.int64)
        evicted = np.sort(where[self.used[where]])
        self._write(where, ids[rows], targets[rows], positions[rows], task)
        return Slots(rows, where, evicted)

    def draw(self, count: int, *key: int | str, balanced: bool = False) -> Array:
        if len(self) == 0:
            return np.empty(0, dtype=np.int64)
        if not self.choices:
            raise FormatError(f"no recorded draw left for {key}")
        chosen = self.choices.pop(0)
        if len(chosen) != min(count, len(self)):
            raise FormatError(f"a recorded draw of {len(chosen)} samples, the library takes {min(count, len(self))}")
        return chosen

    def _place(self, state: Any, capacity: int, slots: Array, *columns: Array) -> Array:
        return slots


@dataclass
class _Trainer:
    """A user's own trainer: the verbs that `Replay` extends, and a step."""

    model: nn.Module
    opt: Any
    world: World = field(default_factory=World)
    seed: int = 0
    step: int = 0
    rows: int = 0

    def configure_model(self, model: nn.Module) -> nn.Module:
        return model

    def draw_batch(self, parts: list[Batch]) -> list[Batch]:
        return parts

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"ce": nn.functional.cross_entropy(outputs, batch.targets)} if batch.part == "stream" else {}

    def after_step(self, record: StepRecord) -> None:
        self.step += 1

    def train(self, x: Tensor, y: Tensor) -> Tensor:
        """One step; returns its loss."""
        position = torch.arange(self.rows, self.rows + len(y))
        parts = self.draw_batch([Batch(x, y, position, position)])
        outputs: dict[str, Tensor] = {}
        terms: dict[str, Tensor] = {}

        def closure() -> Tensor:
            for part in parts:
                outputs[part.part] = logits = self.model(part.inputs)
                terms.update(self.loss_terms(logits, part))
            loss = _sum(terms.values())
            self.opt.backward(loss)
            return loss

        loss: Tensor = self.opt.step(closure)
        detached = {name: value.detach() for name, value in outputs.items()}
        self.after_step(StepRecord(self.step, self.opt.last_applied, loss, terms, parts, detached))
        self.rows += len(y)
        return loss


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


class Replaying(Replay, _Trainer):
    """The mixin over the trainer above."""
