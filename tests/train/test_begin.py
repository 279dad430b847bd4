"""A new run from another's weights: from its folder, its checkpoints or a file, equal to the bit, or refused by name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import learning
from everbatch import compose
from everbatch.distributed import World
from everbatch.optim import SAM
from everbatch.train import ConAdv, Trainer
from everbatch.train.begin import begin_from
from learning import stream


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A finished run's folder, with batch norm and dropout in the model, and its last weights."""
    folder = tmp_path_factory.mktemp("init") / "run"
    t = learning.trainer("plain", cls=Trainer, folder=folder / "checkpoints")
    t.fit(stream())
    t.export(folder / "model.safetensors")
    return folder, {name: value.clone() for name, value in t.module.state_dict().items()}


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step-00000024", "model.safetensors"])
def test_the_weights_are_those_of_the_run(run: tuple[Path, dict[str, torch.Tensor]], place: str) -> None:
    folder, expected = run
    model = learning.net(7)
    begin_from(model, folder / place, World())
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_what_does_not_fit_is_named_and_changes_nothing(run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"^init: .*'1.bias'|^init: '1\.weight' has shape .* in .* and \(3, 64\) in this model"):
        begin_from(other, run[0], World())
    wide = learning.net(7)
    name, head = list(wide.named_parameters())[-1]
    head.data = torch.zeros(len(head) + 1, *head.shape[1:])
    with pytest.raises(ValueError, match=rf"init: '{name}' has shape .* must be the same; start from a run with the same model"):
        begin_from(wide, run[0], World())
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    extra = {**run[1], "odd.weight": torch.zeros(1)}
    save_file(extra, tmp_path / "extra.safetensors")
    with pytest.raises(ValueError, match=r"has \['odd.weight'\], which this model lacks"):
        begin_from(learning.net(7), tmp_path / "extra.safetensors", World())
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    for place, text in ((tmp_path / "bad.safetensors", "cannot be read"), (tmp_path, "neither checkpoints nor weights"),
                        (tmp_path / "nowhere", "neither checkpoints nor weights")):
        with pytest.raises(ValueError, match=f"^init: .*{text}"):
            begin_from(learning.net(7), place, World())


def test_second_batch_norms_of_adversarial_training_are_left_out(tmp_path: Path) -> None:
    def learner(folder: Path | None) -> Any:
        torch.manual_seed(0)
        return type("L", (ConAdv, Trainer), {})(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 6)),
            partial(compose(SAM, base=torch.optim.SGD), lr=0.1, rho=0.01), config=Trainer.Config(batch_size=8),
            prepare=learning.scale, folder=folder, device="cpu", radius=1.0)

    t = learner(tmp_path)
    t.fit(stream())
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 6))
    begin_from(model, tmp_path, World())
    mine, theirs = model.state_dict(), t.module.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items()) and len(theirs) > len(mine)
