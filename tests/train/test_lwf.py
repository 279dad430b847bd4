"""LwF and CPR in the trainer, against a plain loop."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import learning
from everbatch import compose
from everbatch.data import Loader, Stream, task_incremental
from everbatch.distributed import World
from everbatch.train import CPR, LwF, Trainer

LR, BATCH, STRENGTH, HEAT = 0.1, 8, 2.0, 1.5
SGD = functools.partial(compose(base=torch.optim.SGD), lr=LR)


class Learner(LwF, CPR, Trainer):
    """Both."""


def data(kind: str) -> Stream:
    made = learning.stream()
    return made if kind == "class" else task_incremental(made.train, made.test, tasks=3, seed=1, classes=range(6))


def learner(net: nn.Module, **options: Any) -> Any:
    config = Trainer.Config(batch_size=BATCH, epochs=1, seed=3)
    return Learner(net, SGD, config=config, prepare=learning.scale, device="cpu", **options)


def by_hand(net: nn.Module, stream: Stream, heads: str, bonus: float) -> None:
    """The same in a loop: a copy of the model before each task is forwarded beside it."""
    for k, task in enumerate(stream.tasks):
        before = copy.deepcopy(net)
        seen = max(task.classes) + 1
        spans = [(min(t.classes), max(t.classes) + 1) for t in stream.tasks[:k]]
        spans = spans if heads == "by_task" else [(0, min(task.classes))][: k]
        first = min(task.classes) if heads == "by_task" else 0
        for batch in Loader(stream, task, BATCH, 1, 3, World(), position0=0):
            x = learning.scale(batch.inputs)  # type: ignore[arg-type]
            u, z = net(x), before(x).detach()
            loss = functional.cross_entropy(u[:, first:seen], batch.targets - first)
            loss = loss - bonus * entropy(u[:, first:seen])
            for a, b in spans:
                old = (z[:, a:b] / HEAT).softmax(1)
                loss = loss - STRENGTH * (old * (u[:, a:b] / HEAT).log_softmax(1)).sum(1).mean()
            grads = torch.autograd.grad(loss, list(net.parameters()))
            with torch.no_grad():
                for p, g in zip(net.parameters(), grads, strict=True):
                    p -= LR * g


def entropy(u: Tensor) -> Tensor:
    p = u.softmax(1)
    return -(p * p.log()).sum(1).mean()


@pytest.mark.parametrize(("kind", "heads"), [("class", "joint"), ("task", "by_task")])
def test_it_is_what_a_loop_beside_a_copy_of_the_model_gives(kind: str, heads: str) -> None:
    net, bonus = learning.net(smooth=True), 0.3
    trainer, expected = learner(copy.deepcopy(net), lwf_strength=STRENGTH, temperature=HEAT, heads=heads, rows=7,
                                cpr_strength=bonus), copy.deepcopy(net)
    trainer.fit(data(kind))
    by_hand(expected, data(kind), heads, bonus)
    for p, q in zip(trainer.module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)  # fp32, 12 steps: losses are weighted sums, not means
    assert len(trainer.states[LwF].old) == 0


def test_describe_prints_both_terms() -> None:
    trainer = learner(learning.net(smooth=True), lwf_strength=2.0, cpr_strength=0.3)
    terms = "E_stream CE(logits, labels) + 2 E_stream CE(softmax(logits / 2), old softmax) + " \
            "0.3 E_stream KL(softmax(logits), uniform)"
    assert f"L = {terms}\n" in trainer.describe()


def test_a_softmax_by_task_needs_the_task_at_test_time() -> None:
    trainer = learner(learning.net(smooth=True), heads="by_task", lwf_strength=1.0, cpr_strength=0.0)
    with pytest.raises(ValueError, match="LwF: heads='by_task' on a stream of kind 'class', must be task-incremental"):
        trainer.fit(data("class"))
    for wrong, said in (({"temperature": 0.0}, "temperature=0.0"), ({"heads": "own"}, "heads='own'"), ({"rows": 0}, "rows=0")):
        with pytest.raises(ValueError, match=f"LwF: {said}"):
            LwF.Config(**wrong)  # type: ignore[arg-type]
