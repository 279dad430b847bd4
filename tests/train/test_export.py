"""The exported model is the trained one, under the bare model's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import learning
from everbatch import __version__
from everbatch.data import Stream
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch
from everbatch.nn import SmallConv, convert_split_bn
from everbatch.train import Trainer, begin_from, load_model, model_info
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


def accuracy(model: nn.Module, stream: Stream, task: int, prepare: Any) -> float:
    """Share of a task's test samples recognised among all classes, as a user of the file computes it."""
    ids = stream.tasks[task].test_ids
    with torch.no_grad():
        return (model(prepare(stream.fetch(ids))).argmax(1) == stream.targets(ids)).double().mean().item()


def enlarge(x: Tensor) -> Tensor:
    return nn.functional.interpolate(x.float() / 16, 32)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_timm_model_is_rebuilt_and_predicts_as_the_run_did(tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm")
    size = {"img_size": 32} if name == "test_vit" else {}
    torch.manual_seed(0)
    model = timm.create_model(name, in_chans=1, num_classes=6, **size)
    trainer = learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN, model=model, prepare=enlarge, epochs=1,
                               batch_size=16)
    matrix = trainer.fit(stream())
    path = trainer.export(tmp_path / "model.safetensors", {"mean": [0.5], "std": 0.25, "note": "ours"})
    info = model_info(path)
    assert info["classes"] == list(stream().classes) and info["input_size"] == [1, 32, 32] and info["model"] == name
    assert (info["mean"], info["std"], info["note"], info["everbatch_version"]) == ([0.5], 0.25, "ours", __version__)
    again = load_model(path)
    assert [accuracy(again, stream(), k, enlarge) for k in range(3)] == matrix[-1] and not again.training
    fresh = timm.create_model(name, in_chans=1, num_classes=6, **size)
    fresh.load_state_dict(load_file(path))
    assert all(torch.equal(v, fresh.state_dict()[n]) for n, v in trainer.module.state_dict().items())


@pytest.mark.parametrize(("name", "options", "why"), [
    ("test_vit", {"patch_size": 8, "depth": 2, "num_heads": 4}, ""),
    ("test_vit", {"dynamic_img_size": True}, ""), ("test_vit", {"dynamic_img_pad": True}, ""),
    ("test_resnet", {"drop_rate": 0.1, "drop_path_rate": 0.1}, ""),
    ("test_resnet", {"act_layer": nn.SiLU}, "act1 is SiLU, there ReLU"),
    ("test_resnet", {"global_pool": "max"}, "global_pool has pool_type='max', there 'avg'"),
    ("test_resnet", {"output_stride": 8}, r"layer3.0(.conv1)? has .*, there")])
def test_a_model_that_its_name_does_not_give_again_is_not_said_to(tmp_path: Path, name: str, options: Any, why: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, in_chans=1, num_classes=6, **options, **({"img_size": 32} if name == "test_vit" else {}))
    last = "head" if name == "test_vit" else "fc"
    setattr(model, last, nn.Linear(getattr(model, last).in_features, 5))  # as many fine-tune
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()  # another class of layer, of the same predictions
    path = learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN, model=model).export(tmp_path / "model.safetensors")
    if why:
        with pytest.raises(CheckpointMismatch, match=f"is of a model like {name}, but {why}"):
            load_model(path)
    else:
        x = torch.rand(2, 1, 32, 32)
        assert torch.equal(load_model(path)(x), model(x))


def test_what_split_norms_add_stays_at_home(tmp_path: Path) -> None:
    model = learning.net()
    convert_split_bn(model)
    trainer = learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN, model=model)
    trainer.fit(stream())
    path = trainer.export(tmp_path / "model.safetensors")
    learning.net().load_state_dict(load_file(path))
    with pytest.raises(CheckpointMismatch, match="does not say what model it is of; pass build="):
        load_model(path)
    assert accuracy(load_model(path, build=lambda info: learning.net()), stream(), 2, learning.scale) == trainer.matrix[-1][2]


def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path, small = tmp_path / "model.safetensors", SmallConv(1, 4, 9, 3)
    path.write_text("no")
    with pytest.raises(CheckpointMismatch, match="model.safetensors: is not a weights file that can be read"):
        model_info(path)
    options = '{"in_chans": 1, "num_classes": 5, "image_size": 9, "width": 3}'
    save_file(small.state_dict(), path, {"model": "small_conv", "options": options})
    with pytest.raises(CheckpointMismatch, match=r"its weights do not fit small_conv with options .*head.weight"):
        load_model(path)
    save_file(small.state_dict(), path, {"model": "small_conv", "options": '{"in_chanz": 1}'})
    with pytest.raises(CheckpointMismatch, match=r"do not fit small_conv with options .*in_chanz"):
        load_model(path)


def test_small_conv_is_rebuilt(tmp_path: Path) -> None:
    for size, width in ((8, 4), (9, 5)):
        model = SmallConv(1, 6, size, width)
        trainer = learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN, model=model,
                                   prepare=lambda x, size=size: nn.functional.interpolate(x.float(), size), augment=None)
        trainer.stream = stream()
        again = load_model(trainer.export(tmp_path / "model.safetensors"))
        assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())


def test_a_start_from_another_run_with_a_head_of_its_own(tmp_path: Path) -> None:
    source = learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN, folder=tmp_path)
    source.fit(stream())
    wider = learning.net(9)
    wider[5] = nn.Linear(15, 8)
    before = {n: v.clone() for n, v in wider.state_dict().items()}
    with pytest.raises(ValueError, match=r"init: '5.bias' has shape \(6,\) in .* and \(8,\) in this model"):
        begin_from(wider, tmp_path, World())
    assert all(torch.equal(v, before[n]) for n, v in wider.state_dict().items())
    begin_from(wider, tmp_path, World(), skip=["5.*"])
    assert torch.equal(wider[1].weight, source.module[1].weight) and torch.equal(wider[5].weight, before["5.weight"])
    with pytest.raises(ValueError, match=r"init: skip=\['head.\*'\], must fit a name of the model"):
        begin_from(wider, tmp_path, World(), skip=["head.*"])
