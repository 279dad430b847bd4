"""The network that an option names: sized by the data, given timm's own options, tried first, one line when wrong."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everbatch.experiment import Factory, Model

timm = pytest.importorskip("timm")


def build(shape: tuple[int, ...] = (3, 32, 32), **given: Any) -> nn.Module:
    return Model(**given).build(torch.empty(shape), 5, 0)


def test_a_transformer_gets_the_size_of_the_data() -> None:
    model = build((1, 32, 32), name="test_vit")
    assert tuple(model(torch.rand(2, 1, 32, 32)).shape) == (2, 5)
    assert all(module.training for module in model.modules())


def test_options_reach_timm_and_the_trial_leaves_no_trace() -> None:
    model: Any = build(name="test_resnet", options={"drop_rate": 0.25})
    plain = timm.create_model("test_resnet", num_classes=5)
    assert model.drop_rate == 0.25 and model.state_dict().keys() == plain.state_dict().keys()
    assert all(int(m.num_batches_tracked) == 0 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    again = Factory(model=Model(name="test_resnet"), shape=(3, 32, 32), num_classes=5)
    torch.manual_seed(3)
    first = again()
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again().parameters(), strict=True))


@pytest.mark.parametrize(("shape", "given", "message"), [
    ((3, 32, 32), {"name": "test_resnte"}, r"name='test_resnte', must be .*; did you mean 'test_resnet'\?"),
    ((3, 32, 32), {"name": ""}, r"must be small_conv or a model of timm; known: .* more$"),
    ((3, 32, 32), {"name": "test_resnet.nobody"}, r"Invalid pretrained tag .*must name weights that timm knows"),
    ((3, 32, 32), {"name": "test_resnet", "options": {"foo": 1}}, r"options=\{'foo': 1\} \(TypeError.*'foo'"),
    ((3, 32, 32), {"name": "test_resnet", "options": {"num_classes": 3}}, r"options.num_classes, must be left out; it follows"),
    ((3, 32, 32), {"name": "test_vit", "options": {"img_size": "a"}}, r"options=.*must be built by timm"),
    ((3, 32, 32), {"name": "test_resnet", "options": {"features_only": True}}, r"returns list of 0, 1.*name them: model.output"),
    ((3, 32, 32), {"name": "test_resnet", "output": "logits"}, r"output='logits', and test_resnet returns one tensor"),
    ((3, 32, 32), {"name": "test_resnet", "options": {"global_pool": ""}}, r"cannot take images of shape \(3, 32, 32\) \("),
    ((1, 2, 2), {}, r"small_conv on inputs of shape \(1, 2, 2\) .*set data.image_size"),
    ((3, 4, 4), {"name": "test_vit"}, r"shape \(3, 4, 4\).*set data.image_size"),
    ((7,), {}, r"samples of shape \(7,\), must be"),
    ((1, 8, 8), {"pretrained": True}, r"pretrained=True with name=small_conv, must be left out"),
    ((1, 8, 8), {"options": {"width": 3}}, r"options=.* with name=small_conv, must be left out"),
])
def test_what_does_not_fit_is_one_line(shape: tuple[int, ...], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^model: .*{message}") as caught:
        build(shape, **given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Several(nn.Module):
    """Returns its logits among other things."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.head, self.kind = nn.Linear(12, 5), kind

    def forward(self, inputs: Tensor) -> Any:
        logits = self.head(inputs.flatten(1))
        every = {"dict": {"hidden": inputs, "logits": logits}, "tuple": (inputs, logits), "data": Answer(logits, inputs)}
        return every[self.kind]


@pytest.mark.parametrize(("kind", "name"), [("dict", "logits"), ("tuple", "1"), ("data", "logits")])
def test_the_named_output_is_what_the_model_returns(monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    monkeypatch.setattr(Model, "_timm", lambda self, sample, num_classes: Several(kind))
    model = build((3, 2, 2), name="several", output=name)
    x = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for module in (model, copy.deepcopy(model)):
        assert torch.equal(module(x), module.head(x.flatten(1)))  # type: ignore[operator, union-attr, arg-type]
    assert list(model.state_dict()) == ["head.weight", "head.bias"]
    with pytest.raises(ValueError, match=rf"^model: several returns {dict(dict='dict', tuple='tuple', data='Answer')[kind]} of .*"
                                         "must return logits; name them: model.output=..."):
        build((3, 2, 2), name="several")
    with pytest.raises(ValueError, match=r"output='logit', must be a name of what the model returns"):
        build((3, 2, 2), name="several", output="logit")
