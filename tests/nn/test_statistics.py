"""Running statistics of norms whose forward is not torch's: kept where torch's are kept, and estimated anew or refused."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from everbatch.composition import compose
from everbatch.nn import bn_recalibrate, frozen_statistics
from everbatch.nn.statistics import has_buffers_of_its_own
from everbatch.optim import SAM


def normalise(self: Any, x: Tensor) -> Tensor:
    """Batch norm that moves its statistics itself, whatever `track_running_stats` says."""
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    if self.training:
        with torch.no_grad():
            self.running_mean += 0.1 * (mean - self.running_mean)
            self.running_var += 0.1 * (var - self.running_var)
    return (x - mean[:, None, None]) * (var[:, None, None] + 1e-5).rsqrt()


class Own(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return normalise(self, input)


class Counting(nn.BatchNorm2d):
    """Calls torch's forward, and keeps a number beside it."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.rows += len(input)
        return super().forward(input)


class Eager(nn.BatchNorm2d):
    """Multiplies by momentum, which may be None."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            assert self.running_mean is not None
            self.running_mean += self.momentum * input.mean((0, 2, 3))  # type: ignore[operator]
        return input


class Cumulative(nn.BatchNorm2d):
    """A copy of torch's rule, as timm's norms with an activation have."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                assert self.num_batches_tracked is not None and self.running_mean is not None
                self.num_batches_tracked += 1
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(input.mean((0, 2, 3)), share)
        return input


def patched(n: int) -> nn.Module:
    layer = nn.BatchNorm2d(n)
    layer.forward = types.MethodType(normalise, layer)  # type: ignore[method-assign]
    return layer


NORMS = [nn.BatchNorm2d, Own, Counting, Cumulative, patched]


def net(norm: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def buffers(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("norm", NORMS)
def test_extra_passes_and_frozen_blocks_move_no_statistics(norm: Any) -> None:
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + 1

    def trained(rho: float) -> nn.Sequential:
        model = net(norm)
        opt = compose(SAM, base=torch.optim.SGD)(model, lr=0.0, rho=rho)  # both passes see the same weights, but for SAM's move

        def closure() -> Tensor:
            loss = functional.cross_entropy(model(x), torch.arange(8) % 3)
            opt.backward(loss)
            return loss

        for _ in range(3):
            opt.step(closure)
        return model

    once, twice = trained(0.0), trained(0.05)
    assert all(torch.equal(a, b) for a, b in zip(once.buffers(), twice.buffers(), strict=True))
    assert not torch.equal(once[1].running_mean, net(norm)[1].running_mean)
    before = buffers(twice)
    with frozen_statistics(twice):
        inside = twice(x)
    assert all(torch.equal(a, b) for a, b in zip(before, twice.buffers(), strict=True))
    assert torch.equal(inside, twice(x))


def test_recalibration_takes_subclasses_that_keep_a_cumulative_mean() -> None:
    batches = list(torch.rand(3, 8, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    plain, own = net(nn.BatchNorm2d), net(Cumulative)
    assert bn_recalibrate(plain, batches) == bn_recalibrate(own, batches) == 1
    torch.testing.assert_close(plain[1].running_mean, own[1].running_mean)
    assert own[1].num_batches_tracked == 3 and own[1].momentum == 0.1


@pytest.mark.parametrize(("norm", "why"), [(Own, "keep a cumulative mean"), (Eager, "take momentum=None"),
                                           (patched, "keep a cumulative mean")])
def test_recalibration_refuses_the_others_and_leaves_them(norm: Any, why: str) -> None:
    model = net(norm)
    before = buffers(model)
    with pytest.raises(ValueError, match=rf"bn_recalibrate: layers \['1'\] of class .*, with a forward of their own, must {why}"):
        bn_recalibrate(model, [torch.rand(8, 1, 8, 8)])
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True)) and model[1].momentum == 0.1


def test_recalibration_leaves_layers_that_were_put_into_evaluation_mode() -> None:
    model = nn.Sequential(net(nn.BatchNorm2d)[:2], nn.BatchNorm2d(4))
    frozen = model[0][1].eval()
    before = buffers(frozen)
    assert bn_recalibrate(model, [torch.rand(8, 1, 8, 8)]) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, frozen.buffers(), strict=True)) and not frozen.training
    assert model[1].num_batches_tracked == 1 and model[1].training
    assert bn_recalibrate(model.eval(), [torch.rand(8, 1, 8, 8)]) == 2 and frozen.num_batches_tracked == 1


def test_buffers_that_no_flag_holds_are_known() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    assert not has_buffers_of_its_own(plain)
    assert has_buffers_of_its_own(nn.Sequential(plain, nn.InstanceNorm2d(2, track_running_stats=True)))
    plain[2].register_buffer("seen", torch.zeros(1))
    assert has_buffers_of_its_own(plain)
