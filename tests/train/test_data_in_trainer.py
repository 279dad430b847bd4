"""What the trainer says of its data, and which of it it refuses before it begins."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from everbatch import compose
from everbatch.data import iid
from everbatch.data.notes import tell
from everbatch.train import Trainer


def trainer() -> Trainer:
    model = nn.Linear(2, 3)
    return Trainer(model, functools.partial(compose(base=torch.optim.SGD), lr=0.1), config=Trainer.Config(batch_size=2))


def test_classes_that_cannot_be_learned_are_said_once_at_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    tell.cache_clear()
    x = torch.zeros(4, 2)
    with pytest.warns(UserWarning, match="no training samples of classes"):
        stream = iid(TensorDataset(x, torch.tensor([0, 0, 0, 1])), TensorDataset(x, torch.tensor([0, 1, 2, 2])))
    one = trainer()
    one.fit(stream)
    one.fit(stream)
    assert capsys.readouterr().err.splitlines() == [
        "data: 1 class with a single training sample ('1'): what they are cannot be learned from it",
        "data: 1 class with test samples and no training sample ('2'): they cannot be learned, and count as errors"]


def test_too_many_workers_are_refused_with_the_configuration() -> None:
    with pytest.raises(ValueError, match=r"Trainer: workers=3000, must be an integer in \[0, \d+\]"):
        Trainer.Config(workers=3000)
