"""The exported model is the trained one, under the bare model's names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

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
