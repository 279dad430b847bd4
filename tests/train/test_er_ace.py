"""Asymmetric cross-entropy: its loss in closed form, and no gradient to classes that did not arrive."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import learning
from everbatch.composition import compose
from everbatch.problems import Classification, Regression
from everbatch.train import ErAce, LwF, Replay, StepRecord, Trainer, TrainerMixin
from everbatch.train.memory.er_ace import asymmetric_losses


def test_losses_are_over_the_given_classes_also_with_label_smoothing() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, generator=g, dtype=torch.float64).requires_grad_()
    targets, classes = torch.tensor([1, 4, 4, 1]), torch.tensor([1, 3, 4])
    found = asymmetric_losses(Classification(), logits, targets, classes)
    by_hand = torch.stack([(u[classes].exp().sum() / u[y].exp()).log() for u, y in zip(logits, targets, strict=True)])
    torch.testing.assert_close(found, by_hand)
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert bool((grad[:, [0, 2, 5]] == 0).all()) and bool((grad[:, classes] != 0).all())
    smooth = asymmetric_losses(Classification(label_smoothing=0.3), logits, targets, classes)
    logs = logits[:, classes].log_softmax(1)
    torch.testing.assert_close(smooth, 0.7 * by_hand - 0.3 * logs.mean(1))


class Spying(TrainerMixin):
    """Keeps every step's record."""

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        self.kept = [*getattr(self, "kept", []), record]


class Spied(Spying, Replay, ErAce, Trainer):
    """Under observation."""


def test_the_stream_competes_within_its_batch_and_the_memory_with_all() -> None:
    t: Any = learning.trainer("plain", cls=Spied, model=learning.net(smooth=True), augment=None, accumulation=2, batch_size=4,
                              replay={"method": "er", "beta": 1.0, "replay_batch": 4})
    t.fit(learning.stream())
    narrow = 0
    for record in t.kept:
        stream = record.parts[0]
        classes = stream.targets.unique()  # of both micro-batches
        narrow += len(classes) < 2
        expected = asymmetric_losses(t.problem, record.outputs["stream"], stream.targets, classes).mean()
        torch.testing.assert_close(record.terms["cross_entropy"], expected)
        if len(record.parts) == 2:
            replayed = torch.nn.functional.cross_entropy(record.outputs["replay"], record.parts[1].targets)
            torch.testing.assert_close(record.terms["replay_label"], replayed)
    assert 0 < narrow < len(t.kept) and "the stream's loss is over the classes of its batch" in t.describe()


def test_it_is_for_labels_alone() -> None:
    optimizer = functools.partial(compose(base=torch.optim.SGD), lr=0.1)
    learner: Any = type("Learner", (ErAce, Trainer), {})
    with pytest.raises(ValueError, match=r"ErAce: problem=Regression, must be cross-entropy of labels"):
        learner(learning.net(smooth=True), optimizer, problem=Regression(), device="cpu")


class WithLwF(ErAce, LwF, Trainer):
    """Both change the stream's loss."""


def test_losses_of_one_head_by_task_are_refused() -> None:
    """LwF numbers a task's classes anew there, and the batch's classes are the stream's."""
    with pytest.raises(ValueError, match=r"^ErAce: LwF\(heads='by_task'\), must be heads='joint'"):
        WithLwF(learning.net(), learning.OPTIMIZER, "plain", config=Trainer.Config(batch_size=4), device="cpu", heads="by_task")
