"""Batch norms that normalise by their batch, mixed with the source's statistics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from everbatch.errors import NoNormalizationLayers, NoSourceStatistics
from everbatch.nn import (
    BatchAdapted,
    adapt_batch_norm,
    convert_split_bn,
    convert_unmix_tns,
    restore_adapted,
    restore_batch_norm,
)


def source(**options: Any) -> Any:
    """A batch norm that has seen something."""
    layer, g = nn.BatchNorm2d(5, **options).double(), torch.Generator().manual_seed(3)
    layer.running_mean.copy_(torch.randn(5, generator=g))  # type: ignore[union-attr]
    layer.running_var.copy_(torch.rand(5, generator=g) + 0.5)  # type: ignore[union-attr]
    return layer


def rows(count: int = 6) -> Tensor:
    return torch.randn(count, 5, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 100


@pytest.mark.parametrize(("options", "share"), [
    ({"alpha": 0.0}, 0.0), ({"alpha": 1.0}, 1.0), ({"alpha": 0.3}, 0.3), ({"prior": 18}, 0.25), ({"prior": 0}, 1.0)])
@pytest.mark.parametrize("affine", [True, False])
def test_statistics_are_mixed(options: dict[str, Any], share: float, affine: bool) -> None:
    layer, x = source(affine=affine), rows().requires_grad_()
    before = copy.deepcopy(layer.state_dict())
    assert adapt_batch_norm(layer, **options) == [""]
    mean = (1 - share) * layer.running_mean + share * x.mean((0, 2, 3))
    var = (1 - share) * layer.running_var + share * x.var((0, 2, 3), unbiased=False)
    want = (x - mean[:, None, None]) / (var + layer.eps).sqrt()[:, None, None]
    got = layer.eval()(x)
    torch.testing.assert_close(got, want)
    weights = rows() - 100
    slopes = [torch.autograd.grad((y * weights).sum(), x, retain_graph=True)[0] for y in (got, want)]
    torch.testing.assert_close(*slopes)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_a_timm_network_and_back() -> None:
    net = timm.create_model("resnet10t", num_classes=3).eval()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    want, names = net(x), adapt_batch_norm(net)
    assert len(names) == sum(isinstance(m, BatchAdapted) for m in net.modules()) > 5 and adapt_batch_norm(net) == []
    training = copy.deepcopy(net)
    restore_adapted(training)
    torch.testing.assert_close(net(x), training.train()(x))
    assert restore_adapted(net) == names
    assert torch.equal(net(x), want)


@pytest.mark.parametrize("convert", [convert_unmix_tns, adapt_batch_norm])
def test_what_has_no_statistics_is_refused_by_name(convert: Any) -> None:
    with pytest.raises(NoNormalizationLayers, match="a Sequential without batch norms, must have one to convert"):
        convert(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(NoSourceStatistics, match="'0', a BatchNorm2d without running statistics"):
        convert(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))


@pytest.mark.parametrize(("options", "says"), [
    ({"alpha": 1.1}, "alpha=1.1, must be in"), ({"prior": -1}, "prior=-1"), ({"exclude": "*"}, "exclude='\\*'")])
def test_refused(options: dict[str, Any], says: str) -> None:
    layer = source()
    with pytest.raises(ValueError, match=says):
        adapt_batch_norm(layer, **options)
    assert type(layer) is nn.BatchNorm2d


@pytest.mark.parametrize(("convert", "undo"), [(convert_unmix_tns, restore_batch_norm), (adapt_batch_norm, restore_adapted)])
def test_one_way_of_normalising_at_a_time(convert: Any, undo: Any) -> None:
    """Split and converted exclude each other, in either order, until one is undone."""
    net = nn.Sequential(nn.BatchNorm2d(3))
    convert(net)
    with pytest.raises(ValueError, match=r"convert_split_bn: a model with \['(UnMixTNS|BatchAdapted)'\] in place of batch norms"):
        convert_split_bn(net)
    undo(net)
    assert convert_split_bn(net) == 1
    with pytest.raises(ValueError, match="undo split batch norms first"):
        convert(net)
