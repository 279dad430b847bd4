"""What `replay.py` times: DER++ of the trainer, the same written by hand, and rows that stay the same in the memory's place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timing import conv_net
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from everbatch import compose
from everbatch.data import Batch, Stream, class_incremental
from everbatch.data.sources import TensorSource
from everbatch.train import Replay, Trainer, TrainerMixin
from everbatch.train.fit import loader_of, schedule_of
from everbatch.train.schedule import set_rates

ALPHA, BETA, LR = 0.1, 0.5, 0.03
AUGMENT = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])


def prepare(images: Tensor) -> Tensor:
    """Bytes to what a network takes."""
    return images.float() / 255.0


@functools.cache
def stream(tasks: int, samples: int, classes: int) -> Stream:
    """Images of noise in the form of CIFAR: uint8, (3, 32, 32)."""
    g = torch.Generator().manual_seed(0)

    def part(count: int) -> TensorSource:
        images = torch.randint(0, 256, (count * classes, 3, 32, 32), generator=g, dtype=torch.uint8)
        return TensorSource(images, torch.arange(classes).repeat(count), name="noise")

    return class_incremental(part(samples * tasks // classes), part(1), tasks=tasks, seed=0)


class Learner(Replay, Trainer):
    """DER++."""


class InTime(Learner):
    """DER++ whose draws are made when they are needed."""

    draws_ahead = False


class Constant(TrainerMixin):
    """The parts of DER++, of rows that are always the same: the arithmetic of rehearsal without a memory."""

    def draw_batch(self, parts: list[Batch]) -> list[Batch]:
        """Add the parts that Replay would."""
        parts = super().draw_batch(parts)  # type: ignore[misc]
        if not hasattr(self, "rows"):
            first, targets = parts[0], parts[0].targets
            logits = torch.zeros(len(first), 10)
            self.rows = [Batch(first.inputs, targets, first.ids, first.position, part="dark", extras={"logits": logits}),
                         Batch(first.inputs, targets, first.ids, first.position, part="replay")]
        return [*parts, *self.rows]

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The terms of DER++."""
        terms: dict[str, Tensor] = super().loss_terms(outputs, batch)  # type: ignore[misc]
        if batch.part == "dark":
            return {"dark": ALPHA * functional.mse_loss(outputs, batch.extras["logits"])}
        if batch.part == "replay":
            return {"label": BETA * functional.cross_entropy(outputs, batch.targets)}
        return terms


class Enlarged(Constant, Trainer):
    """A batch enlarged by constant rows."""


class Driven:
    """A trainer step by step, with what `fit` does around a step."""

    def __init__(self, trainer: Any, data: Stream, task: int = 0) -> None:
        self.trainer = trainer
        trainer.run.stream, trainer.run.task_index, trainer.num_tasks = data, task, len(data)
        loader = loader_of(trainer, data, data.tasks[task])
        trainer.run.begin_task(loader)
        trainer.run.task_step = 0
        trainer.on_task_start(data.tasks[task])
        self.schedule = schedule_of(trainer, loader)

    def __call__(self) -> None:
        run, trainer = self.trainer.run, self.trainer
        assert run.fetched(1)
        trainer.training_step(run.ahead.popleft())
        run.task_step += 1
        self.schedule.step()
        set_rates(trainer.optimizer.param_groups, self.schedule)


def trainer(cls: type, batch: int, capacity: int, *, engine: str = "plain", classes: int = 10, width: int = 32) -> Any:
    """A trainer with this batch and draws of the same size, both over all ranks."""
    options = {"capacity": capacity, "replay_batch": batch, "alpha": ALPHA, "beta": BETA} if issubclass(cls, Replay) else {}
    return cls(conv_net(0, width, classes), functools.partial(compose(base=torch.optim.SGD), lr=LR), engine,
               config=Trainer.Config(batch_size=batch, epochs=1000), augment=AUGMENT, prepare=prepare, device="cpu", **options)


class ByHand:
    """DER++ as its authors' loop has it: augment, three forwards, one backward, a step, a reservoir. Plain torch."""

    def __init__(self, data: Stream, batch: int, capacity: int, width: int = 32) -> None:
        self.model: nn.Module = conv_net(0, width)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        self.images, self.targets = data.fetch(data.tasks[0].train_ids), data.targets(data.tasks[0].train_ids)
        self.batch, self.capacity, self.seen, self.at = batch, capacity, 0, 0
        self.examples = torch.empty((capacity, 3, 32, 32), dtype=torch.uint8)
        self.labels, self.logits = torch.empty(capacity, dtype=torch.int64), torch.empty(capacity, 10)
        self.order, self.chance = torch.randperm(len(self.images)), np.random.default_rng(0)

    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """Augmented samples of the memory, their labels and logits."""
        held = min(self.seen, self.capacity)
        index = torch.from_numpy(self.chance.choice(held, min(self.batch, held), replace=False))
        return augmented(self.examples[index]), self.labels[index], self.logits[index]

    def __call__(self) -> None:
        if self.at + self.batch > len(self.order):
            self.order, self.at = torch.randperm(len(self.images)), 0
        rows = self.order[self.at : self.at + self.batch]
        self.at += self.batch
        raw, targets = self.images[rows], self.targets[rows]
        self.optimizer.zero_grad()
        outputs = self.model(augmented(raw))
        loss = functional.cross_entropy(outputs, targets)
        if self.seen:
            images, _, logits = self.drawn()
            loss = loss + ALPHA * functional.mse_loss(self.model(images), logits)
            images, labels, _ = self.drawn()
            loss = loss + BETA * functional.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        for image, label, logits in zip(raw, targets, outputs.detach(), strict=True):
            slot = self.seen if self.seen < self.capacity else int(self.chance.integers(self.seen + 1))
            if slot < self.capacity:
                self.examples[slot], self.labels[slot], self.logits[slot] = image, label, logits
            self.seen += 1


def augmented(raw: Tensor) -> Tensor:
    """Model inputs, each row augmented on its own."""
    return prepare(torch.stack([AUGMENT(row) for row in raw]))


def flops(step: Callable[[], Any]) -> int:
    """FLOPs of one call."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())
