"""CLS-ER: the averages, what is held to them, and who predicts."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch.nn import functional

import learning
from everbatch import compose, seeds
from everbatch.optim import SemanticMemory
from everbatch.train import CLSER, Replay, StepRecord, Trainer, TrainerMixin
from everbatch.train.memory.cls_er import surer

OPTIONS = {"stable_decay": 0.9, "plastic_decay": 0.6, "stable_often": 0.4, "plastic_often": 0.8}
SGD = functools.partial(compose(SemanticMemory, base=torch.optim.SGD), lr=0.1, **OPTIONS)


class Spying(TrainerMixin):
    """Keeps records, and the weights before and after every step."""

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        self.kept = [*getattr(self, "kept", []), (record, copy.deepcopy(self.module.state_dict()))]  # type: ignore[attr-defined]


class Learner(Spying, CLSER, Replay, Trainer):
    """All of it."""


def fitted(cls: type = Learner, optimizer: Any = SGD, **options: Any) -> Any:
    config = Trainer.Config(batch_size=8, epochs=1, seed=3)
    made = cls(learning.net(smooth=True), optimizer, config=config, prepare=learning.scale, device="cpu", **options)
    made.fit(learning.stream())
    return made


def test_it_is_a_loop_with_two_slow_copies() -> None:
    t = fitted(strength=0.7, method="er", beta=1.0, replay_batch=5, capacity=20)
    copies: dict[str, Any] = {}
    for number, (record, after) in enumerate(t.kept):
        assert ("cls_er" in record.terms) == (number > 0)
        if number:
            part = record.parts[1]
            logits = []
            for which in ("stable", "plastic"):
                net = learning.net(smooth=True)
                net.load_state_dict(copies[which])
                logits.append(net(part.inputs).detach())
            expected = 0.7 * functional.mse_loss(record.outputs["replay"], surer(*logits, part.targets))
            torch.testing.assert_close(record.terms["cls_er"], expected, rtol=1e-5, atol=1e-7)
        for which in ("stable", "plastic"):
            draw = torch.rand((), generator=seeds.generator(3, "semantic memory", which, number + 1))
            if not number:
                copies[which] = after
            elif draw < OPTIONS[f"{which}_often"]:
                decay = min(OPTIONS[f"{which}_decay"], 1 - 1 / (number + 2))
                copies[which] = {n: decay * copies[which][n] + (1 - decay) * p for n, p in after.items()}
    stable = learning.net(smooth=True)
    stable.load_state_dict(copies["stable"])
    x = learning.scale(learning.stream().fetch(torch.arange(9)))  # type: ignore[arg-type]
    torch.testing.assert_close(t.predict(x), stable(x).detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(t.module(x), stable(x), rtol=0, atol=1e-3)
    for name, p in t.module.state_dict().items():
        assert torch.equal(p, t.kept[-1][1][name])  # predictions leave the weights as they are
    assert "0.7 E_replay ||logits - averages'||^2 / classes + 1 E_replay CE(logits, labels)\n" in t.describe()


def test_the_surer_of_two() -> None:
    stable, plastic = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert surer(stable, plastic, torch.tensor([0, 1])).tolist() == [[2.0, 0.0], [0.0, 3.0]]


def test_what_it_stands_beside() -> None:
    class Alone(CLSER, Trainer): ...

    with pytest.raises(ValueError, match="CLSER: rows='replay' without rehearsal of labels, must stand beside Replay"):
        fitted(Alone)
    with pytest.raises(ValueError, match="CLSER: optimizer SGD, must hold SemanticMemory"):
        fitted(Alone, functools.partial(compose(base=torch.optim.SGD, name="SGD"), lr=0.1), rows="stream")
    for wrong in ({"strength": -1.0}, {"rows": "all"}):
        with pytest.raises(ValueError, match="CLSER: "):
            CLSER.Config(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SemanticMemory: stable_often=1.5"):
        SemanticMemory.Config(stable_often=1.5)
