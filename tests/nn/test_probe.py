"""Images that a network cannot take are found before training, and the network is left as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from everbatch.experiment import Model
from everbatch.nn.probe import check_input


def net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 4, stride=4), nn.BatchNorm2d(4), nn.Dropout(), *layers)


class Asking(nn.Module):
    """Looks at values, which shapes alone do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net(nn.Flatten(), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.mean().item() < 2 else x  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [Asking, lambda: net(nn.Flatten(), nn.Linear(16, 2))])
def test_a_network_that_fits_is_left_as_it_is(make: type[nn.Module]) -> None:
    model = make()
    model.get_submodule("2" if isinstance(model, nn.Sequential) else "inner.2").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    check_input(model, torch.zeros(1, 8, 8), "net")
    assert flags == [module.training for module in model.modules()] and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"net cannot take images of shape \(1, 12, 12\) \(mat1 and mat2"):
        check_input(model, torch.zeros(1, 12, 12), "net")
    assert flags == [module.training for module in model.modules()]


def test_what_is_no_image_is_named() -> None:
    with pytest.raises(ValueError, match=r"samples of shape \(64,\), must be \(C, H, W\) images for net"):
        check_input(net(), torch.zeros(64), "net")
    with pytest.raises(ValueError, match=r"samples of shape \(64,\), must be images"):
        Model().build(torch.zeros(64), 3, 0)


@pytest.mark.parametrize(("name", "text"), [("convnext_atto", "Kernel size"), ("vgg11", "Output size is too small")])
def test_timm_models_that_are_too_large_for_the_images(name: str, text: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=rf"{name} cannot take images of shape \(1, 8, 8\) .*{text}.*set data.image_size=\d+"):
        Model(name=name).build(torch.zeros(1, 8, 8), 3, 0)
