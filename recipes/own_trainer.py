"""A trainer of your own that takes everbatch's trainer mixins: Replay (DER++) over a plain torch loop, on digits.

python recipes/own_trainer.py          three tasks of three digits, without and with replay, about 10 seconds

`MyTrainer` inherits from nothing of everbatch. It offers the four verbs that Replay extends (configure_model,
draw_batch, loss_terms, after_step) and the attributes world, seed and step; `class Mine(Replay, MyTrainer)` does the
rest. A verb that a mixin extends and the trainer lacks is an error, by name, when the class is created.
"""

from __future__ import annotations

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

import torch
from torch import Tensor, nn
from torch.nn import functional

from everbatch.checkpoint import export_weights
from everbatch.data import Batch, Loader, Stream, Task, class_incremental, load
from everbatch.distributed import World
from everbatch.ends import guard
from everbatch.evaluate.weights import built_as, metadata_texts
from everbatch.nn import SmallConv
from everbatch.train import Replay, StepRecord


class MyTrainer:
    """Plain fine-tuning: one process, torch.optim.SGD, cross-entropy."""

    def __init__(self, model: nn.Module, stream: Stream, *, lr: float, batch_size: int, epochs: int) -> None:
        self.world, self.seed, self.step = World.current(), 0, 0
        self.stream, self.batch_size, self.epochs = stream, batch_size, epochs
        self.model = self.configure_model(model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)

    def configure_model(self, model: nn.Module) -> nn.Module:
        """Verb: change the model before training, or make ready what a method needs."""
        return model

    def draw_batch(self, parts: list[Batch]) -> list[Batch]:
        """Verb: add parts to the batch of the stream."""
        return parts

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Verb: named scalars of one part; the sum of all is minimised."""
        if batch.part != "stream":
            return {}
        return {"cross_entropy": batch.mean(functional.cross_entropy(outputs, batch.targets, reduction="none"))}

    def after_step(self, record: StepRecord) -> None:
        """Verb: what is to be done with a finished step."""

    def training_step(self, batch: Batch) -> None:
        """One step: the verbs in order, one backward, one update."""
        parts = self.draw_batch([batch])
        outputs = {part.part: self.model(part.inputs.float() / 16) for part in parts}
        terms = {k: v for part in parts for k, v in self.loss_terms(outputs[part.part], part).items()}
        loss = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.after_step(StepRecord(self.step, True, loss.detach(), {k: v.detach() for k, v in terms.items()}, parts,
                                   {k: v.detach() for k, v in outputs.items()}))
        self.step += 1

    def run(self) -> list[list[float]]:
        """Train on one task after the other; after each, the accuracy on every task and among all classes so far."""
        matrix = []
        for task in self.stream.tasks:
            for batch in Loader(self.stream, task, self.batch_size, self.epochs, self.seed, self.world,
                                position0=self.step * self.batch_size):
                self.training_step(batch)
            matrix.append([self.accuracy(earlier, len(self.stream.seen_classes(task.id)))
                           for earlier in self.stream.tasks[: task.id + 1]])
        return matrix

    @torch.no_grad()
    def accuracy(self, task: Task, classes: int) -> float:
        """Share of a task's test samples that are recognised among the first `classes` labels."""
        guess = self.model(self.stream.fetch(task.test_ids).float() / 16)[:, :classes].argmax(1)
        return (guess == self.stream.targets(task.test_ids)).double().mean().item()


class Mine(Replay, MyTrainer):
    """The same trainer, rehearsing from a memory."""


def main() -> None:
    """Both trainers on the same stream, from the same weights."""
    train, test = load("digits", train=True), load("digits", train=False)
    stream = class_incremental(train, test, tasks=3, classes=range(9))
    for cls, options in ((MyTrainer, {}), (Mine, {"method": "dark_er_pp", "capacity": 200, "alpha": 0.3, "beta": 0.5})):
        torch.manual_seed(0)
        trainer = cls(SmallConv(1, stream.num_classes, 8), stream, lr=0.05, batch_size=32, epochs=6, **options)
        for row in trainer.run():
            print(f"{cls.__name__:<10} accuracy by task, %: {' '.join(f'{100 * a:5.1f}' for a in row)}", flush=True)
    # The replaying one's weights, to take home: everbatch.train.load_model(path) rebuilds the model.
    about = {"classes": stream.classes, "input_size": (1, 8, 8), "mean": 0.0, "std": 1.0, "scale": 16.0}
    path = export_weights("runs/own_trainer/model.safetensors", trainer.model.state_dict(),
                          metadata_texts({**built_as(trainer.model), **about}))
    print(f"weights: {path}")


if __name__ == "__main__":
    with guard("own_trainer"):
        main()
