"""What a model that has grown is written as: a head in parts is one layer, anything else is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import growing
import learning
from everbatch.errors import CheckpointMismatch
from everbatch.nn import PartsHead, SmallConv, grow_head
from everbatch.nn.heads import head_of
from everbatch.train import GrowingHead, Trainer, load_model, model_info
from learning import stream


class Grown(GrowingHead, Trainer):
    """Grows."""


def enlarge(x: Tensor) -> Tensor:
    return nn.functional.interpolate(x.float() / 16, 32)


def build(name: str, growths: Any = ()) -> nn.Module:
    timm = pytest.importorskip("timm")
    size = {"img_size": 32} if name == "test_vit" else {}
    made = timm.create_model(name, in_chans=1, num_classes=2, **size)
    return grow_head(made, [growth["classes"] for growth in growths])


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_head_in_parts_is_one_layer_of_timms(tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    trainer = learning.trainer("plain", cls=Grown, optimizer=learning.PLAIN, model=build(name), prepare=enlarge, epochs=1,
                               grown=lambda growths: build(name, growths), batch_size=16)
    matrix = trainer.fit(stream())
    path = trainer.export(tmp_path / "model.safetensors")
    info, saved = model_info(path), load_file(path)
    assert info["model"] == name and info["options"]["num_classes"] == 6 and info["growths"] == [{"classes": 2}] * 2
    size = {"img_size": 32} if name == "test_vit" else {}
    fresh = timm.create_model(name, in_chans=1, num_classes=6, **size)
    fresh.load_state_dict(saved)
    for model in (fresh.eval(), load_model(path)):
        assert accuracies_of(model) == matrix[-1]

    kept = trainer.export(tmp_path / "parts.safetensors", parts=True)
    again = load_model(kept)
    head: Any = again.get_submodule(head_of(again))
    assert isinstance(head, PartsHead) and head.sizes == [2, 2, 2] and accuracies_of(again) == matrix[-1]
    assert model_info(kept)["conversion"] == {head_of(again): {"in_features": head.in_features, "sizes": [2, 2, 2], "bias": True}}


def accuracies_of(model: nn.Module) -> list[float]:
    found = []
    for task in stream().tasks:
        with torch.no_grad():
            right = model(enlarge(stream().fetch(task.test_ids))).argmax(1) == stream().targets(task.test_ids)
        found.append(right.double().mean().item())
    return found


def test_small_conv_is_rebuilt(tmp_path: Path) -> None:
    def made(growths: Any = ()) -> nn.Module:
        return grow_head(SmallConv(1, 2, 8, width=4), [growth["classes"] for growth in growths])

    trainer = learning.trainer("plain", cls=Grown, optimizer=learning.PLAIN, model=made(), grown=made)
    trainer.fit(stream())
    path = trainer.export(tmp_path / "model.safetensors")
    again, inputs = load_model(path), torch.randn(3, 1, 8, 8)
    assert isinstance(again, SmallConv) and again.head.out_features == 6
    trainer.module.eval()
    torch.testing.assert_close(again(inputs), trainer.module(inputs))
    assert torch.equal(again(inputs).argmax(1), trainer.module(inputs).argmax(1))


def test_before_the_last_task_it_names_the_classes_it_knows(tmp_path: Path) -> None:
    trainer = growing.trainer("plain", growing.Widened)
    trainer.run.stream = stream()
    path = trainer.export(tmp_path / "model.safetensors", {"model": "ours"})
    assert model_info(path)["classes"] == list(stream().classes)[:2] and "growths" not in model_info(path)


class Deeper(SmallConv):
    """With a block that no `SmallConv` has."""

    def __init__(self, blocks: int) -> None:
        super().__init__(1, 6, 8, width=4)
        self.blocks = nn.Sequential(*(nn.Linear(16, 16) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.features(x)))  # type: ignore[no-any-return]


def deeper(growths: Any = ()) -> nn.Module:
    return Deeper(sum(growth["blocks"] for growth in growths))


def test_what_timm_cannot_hold_is_rebuilt_from_the_growths(tmp_path: Path) -> None:
    trainer = learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN, model=deeper(), grown=deeper)
    trainer.relaunch({"blocks": 2})
    trainer.fit(stream())
    path = trainer.export(tmp_path / "model.safetensors")
    info = model_info(path)
    assert "model" not in info and info["base"] == "small_conv" and info["growths"] == [{"blocks": 2}]
    with pytest.raises(CheckpointMismatch, match=r"has grown, by \[\{'blocks': 2\}\]; pass build=lambda info"):
        load_model(path)
    again, inputs = load_model(path, build=lambda info: deeper(info["growths"])), torch.randn(3, 1, 8, 8)
    trainer.module.eval()
    assert torch.equal(again(inputs), trainer.module(inputs))


def test_options_that_no_model_takes_stop_no_rank_of_an_export(tmp_path: Path) -> None:
    """Only the first rank looks: what it raised alone, the others would wait for."""
    trainer = learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN, model=deeper(), grown=deeper)
    trainer.relaunch({"blocks": 1})
    info = model_info(trainer.export(tmp_path / "model.safetensors", {"options": {"depth": 3}}))
    assert "model" not in info and info["base"] == "small_conv" and info["options"]["depth"] == 3


def test_heads_that_cannot_grow_are_named() -> None:
    with pytest.raises(ValueError, match="the classifier of Sequential is none, must be one linear layer"):
        grow_head(nn.Sequential(nn.Linear(2, 2)), [1])
    with pytest.raises(ValueError, match="PartsHead: no part, must have at least one"):
        PartsHead(3, [])
    with pytest.raises(ValueError, match="classes of a part=0, must be an integer >= 1"):
        PartsHead(3, [2, 0])


def test_a_part_that_comes_changes_no_bit_of_the_others() -> None:
    torch.manual_seed(0)
    flat = SmallConv(1, 3, 8, width=4)
    inputs = torch.randn(2, 1, 8, 8)
    before = flat(inputs)
    grown = grow_head(flat, [])
    assert torch.equal(grown(inputs), before) and grow_head(grown, [2, 1])(inputs).shape == (2, 6)
    assert torch.equal(grown(inputs)[:, :3], before)
