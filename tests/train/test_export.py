"""The exported model is the trained one, under the bare model's names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import learning
from everbatch.train import Trainer
from learning import stream


def test_the_file_loads_into_the_bare_model(tmp_path: Path) -> None:
    trainer = learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN)
    trainer.fit(stream())
    saved = load_file(trainer.export(tmp_path / "model.safetensors"))
    twin = learning.net()
    assert any(not torch.equal(a, saved[name]) for name, a in twin.state_dict().items())
    twin.load_state_dict(saved)
    for name, value in trainer.module.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


class Tied(nn.Module):
    """Two names of one weight, and a buffer that is no part of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, 6)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x.flatten(1)).tanh()).tanh() * self.scale)  # type: ignore[no-any-return]


class Shared(nn.Module):
    """A norm and a scale that are each registered under two names; the scale is no part of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
        self.b = nn.Sequential(nn.Linear(64, 64), self.a[1])
        self.head = nn.Linear(64, 6)
        self.a[1].register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x.flatten(1)).tanh()).tanh())  # type: ignore[no-any-return]


def test_a_module_under_two_names(tmp_path: Path) -> None:
    trainer = learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN, model=Shared())
    trainer.fit(stream())
    saved, twin = load_file(trainer.export(tmp_path / "model.safetensors")), Shared()
    twin.load_state_dict(saved)
    assert all(torch.equal(v, twin.state_dict()[n]) for n, v in trainer.module.state_dict().items())


def test_tied_weights_and_passing_buffers(tmp_path: Path) -> None:
    trainer = learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN, model=Tied())
    trainer.fit(stream())
    saved = load_file(trainer.export(tmp_path / "model.safetensors"))
    twin = Tied()
    twin.load_state_dict(saved)
    assert all(torch.equal(v, twin.state_dict()[n]) for n, v in trainer.module.state_dict().items())
