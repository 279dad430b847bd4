"""UnMix-TNS layers: against the released form, closed forms, what the batch may not change, conversion and its undoing."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from everbatch.distributed import World
from everbatch.evaluate.evaluator import evaluating
from everbatch.nn import (
    UnMixTNS,
    convert_split_bn,
    convert_unmix_tns,
    restore_batch_norm,
    unmix_layers,
    unmix_mode,
)
from processes import Zygote

POSITIONS = {1: (6,), 2: (4, 3), 3: (2, 3, 2)}


def source(kind: int = 2, channels: int = 5, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A batch norm that has seen something."""
    g = torch.Generator().manual_seed(3)
    layer = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[kind](channels, **options).to(dtype)
    layer.running_mean.copy_(torch.randn(channels, generator=g))  # type: ignore[union-attr]
    layer.running_var.copy_(torch.rand(channels, generator=g) + 0.5)  # type: ignore[union-attr]
    if layer.affine:
        nn.init.normal_(layer.weight, generator=g)
        nn.init.normal_(layer.bias, generator=g)
    return layer


def rows(count: int = 4, channels: int = 5, kind: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, *POSITIONS[kind], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def released(layer: UnMixTNS, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The published form: every pair of sample and component as a tensor. Output, and components afterwards."""
    positions = tuple(range(2, x.dim()))
    mean, var = x.mean(positions), x.var(positions, unbiased=False)
    mu, s = layer.component_means.clone(), layer.component_vars.clone()
    with torch.no_grad():
        p = (torch.cosine_similarity(mean[:, None], mu[None], dim=2) / layer.temperature).softmax(1)[..., None]
    mu_bk = (1 - p) * mu + p * mean[:, None]
    s_bk = (1 - p) * s + p * var[:, None]
    if layer.total_variance:
        s_bk = s_bk + p * (1 - p) * (mean[:, None] - mu).square()
    middle = mu_bk.mean(1)
    spread = s_bk.mean(1) + (mu_bk - middle[:, None]).square().mean(1)
    wide = (..., *(None,) * len(positions))
    y = (x - middle[wide]) / (spread[wide] + layer.eps).sqrt()
    if layer.weight is not None and layer.bias is not None:
        y = y * layer.weight[wide] + layer.bias[wide]
    with torch.no_grad():
        mu += layer.step * (p * (mean[:, None] - mu)).mean(0)
        s += layer.step * (p * (var[:, None] - s)).mean(0)
    return y, mu, s


@pytest.mark.parametrize("kind", [1, 2, 3])
@pytest.mark.parametrize(("count", "far", "options"), [
    (16, 0.0, {}), (4, 1000.0, {}), (2, 3.0, {"total_variance": True}), (1, 1.0, {"batch_size": 4})])
def test_equals_the_released_form(kind: int, count: int, far: float, options: dict[str, Any]) -> None:
    layer = source(kind)
    layer.running_mean.add_(far)
    convert_unmix_tns(layer, count, **options)
    for batch in range(3):
        x = (rows(kind=kind, seed=batch) + far).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        want, means, variances = released(layer, twin)
        y = layer(x)
        torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer.component_means, means, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.component_vars, variances, rtol=1e-9, atol=1e-9)
        weights = rows(kind=kind, seed=9)
        (y * weights).sum().backward()
        (want * weights).sum().backward()
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-8, atol=1e-9)


def test_one_component_is_instance_norm() -> None:
    layer = source()
    x = rows()
    want = nn.functional.instance_norm(x, weight=layer.weight, bias=layer.bias, eps=layer.eps)
    convert_unmix_tns(layer, 1)
    torch.testing.assert_close(layer(x), want)


def test_equal_components_give_closed_forms() -> None:
    layer, x, count = source(affine=False), rows(), 4
    convert_unmix_tns(layer, count)
    layer.component_means.copy_(layer.running_mean.expand(count, -1))
    layer.component_vars.copy_(layer.running_var.expand(count, -1))
    with unmix_mode(layer, "frozen"):
        y = layer(x)
    m, v = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
    source_mean, source_var = layer.running_mean[:, None, None], layer.running_var[:, None, None]
    mean = (1 - 1 / count) * source_mean + m / count
    squares = ((1 - 1 / count) * source_mean + m / count).square()  # every pair has the same mean
    var = (1 - 1 / count) * source_var + v / count + squares - mean.square()
    torch.testing.assert_close(y, (x - mean) / (var + layer.eps).sqrt())


def test_a_sample_does_not_depend_on_the_others() -> None:
    layer, x = source(), rows(6)
    convert_unmix_tns(layer, 8)
    other = torch.cat([x[:1], 100 * rows(5, seed=1)])
    with unmix_mode(layer, "frozen"):
        torch.testing.assert_close(layer(x)[0], layer(other)[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer(x.flip(0)).flip(0), layer(x), rtol=1e-12, atol=1e-12)


def test_first_components_keep_the_source_variance() -> None:
    """E[mean_k s_k + Var_k(mu_k)] = v, and the mean of means is m, with standard deviation sqrt(alpha v / (K - 1))."""
    layer = source(channels=20_000, affine=False)
    layer.running_mean.fill_(2.0)
    layer.running_var.fill_(3.0)
    convert_unmix_tns(layer, 4)
    total = layer.component_vars.mean(0) + layer.component_means.var(0, unbiased=False)
    assert abs(total.mean().item() / 3 - 1) < 0.01
    assert abs(layer.component_means.mean().item() - 2) < 0.02
    assert abs(layer.component_means.mean(0).std().item() / (0.5 * 3 / 3) ** 0.5 - 1) < 0.02


@pytest.mark.parametrize("count", [2, 16])
def test_balanced_components_are_the_source_exactly(count: int) -> None:
    layer = source()
    convert_unmix_tns(layer, count, balanced=True)
    torch.testing.assert_close(layer.component_means.mean(0), layer.running_mean)
    total = layer.component_vars.mean(0) + layer.component_means.var(0, unbiased=False)
    torch.testing.assert_close(total, layer.running_var)


def test_components_move_as_a_geometric_series() -> None:
    """Towards identical samples, by the factor 1 - momentum p at each step, p being that of the time."""
    layer, x = source(), rows(1).expand(3, -1, -1, -1)
    convert_unmix_tns(layer, 3, batch_size=64)
    mean, var = x[0].mean((1, 2)), x[0].var((1, 2), unbiased=False)
    for _ in range(20):
        left = layer.component_means - mean, layer.component_vars - var
        factor = 1 - layer.step * layer.assignments(mean[None])[0][:, None]
        layer(x)
        torch.testing.assert_close(layer.component_means - mean, left[0] * factor)
        torch.testing.assert_close(layer.component_vars - var, left[1] * factor)


def test_momentum_by_batch_size() -> None:
    """Sixty-four single samples move components about as one batch of sixty-four does, also where the batch's size decides."""
    moved = {}
    for name, size, options in (("batch", 64, {}), ("single", 1, {"batch_size": 1}), ("dynamic", 1, {"dynamic_momentum": True})):
        layer = source()
        convert_unmix_tns(layer, 2, **options)
        before = layer.component_means.clone()
        for part in rows(64, seed=5).split(size):
            layer(part)
        moved[name] = layer.component_means - before
    torch.testing.assert_close(moved["single"], moved["dynamic"], rtol=1e-9, atol=1e-12)
    assert (moved["single"] - moved["batch"]).norm() < 0.1 * moved["batch"].norm()


def test_reduced_precision_keeps_components_in_float32() -> None:
    layer = source(dtype=torch.float32)
    convert_unmix_tns(layer, 8)
    exact, plain = copy.deepcopy(layer), rows().float()
    want = exact(plain)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(copy.deepcopy(layer)(plain), want)
    half = layer.bfloat16()
    y = half(plain.bfloat16())
    assert y.dtype is torch.bfloat16 and half.component_means.dtype is torch.float32 and half.weight.dtype is torch.bfloat16
    assert (y.float() - want).norm() < 0.02 * want.norm()


def test_channels_last_stays() -> None:
    layer, x = source(), rows()
    convert_unmix_tns(layer, 8)
    want = copy.deepcopy(layer)(x)
    y = layer(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, want)


def test_samples_that_are_not_finite_move_nothing() -> None:
    layer, x = source(), rows()
    convert_unmix_tns(layer, 8)
    twin, bad = copy.deepcopy(layer), x.clone()
    bad[1, 2, 0, 0], bad[3, 0, 1, 1] = float("nan"), float("inf")
    y = layer(bad)
    assert layer.skipped.item() == 2 and bool(layer.component_means.isfinite().all())
    torch.testing.assert_close(y[0], twin(x)[0])
    few = copy.deepcopy(twin)
    few.reset()
    few(x[[0, 2]])
    fresh = copy.deepcopy(few)
    fresh.reset()
    # Two of four rows moved it: half of what the two alone would have done.
    torch.testing.assert_close(layer.component_means - fresh.component_means,
                               (few.component_means - fresh.component_means) / 2, rtol=1e-8, atol=1e-10)


def test_modes_reset_and_state() -> None:
    plain = source().eval()
    layer, x = copy.deepcopy(plain), rows()
    convert_unmix_tns(layer, 8)
    first = {name: value.clone() for name, value in layer.state_dict().items()}
    with unmix_mode(layer, "source"):
        torch.testing.assert_close(layer(x), plain(x))
    with unmix_mode(layer, "frozen"):
        layer(x)
    assert all(torch.equal(first[name], value) for name, value in layer.state_dict().items())
    layer.eval()(x)
    assert not torch.equal(first["component_means"], layer.component_means)
    other = source()
    convert_unmix_tns(other, 8, seed=7)
    other.load_state_dict(layer.state_dict())
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    y = layer(x)
    assert torch.equal(other(x), y) and torch.equal(again(x), y)
    layer.reset()
    assert all(torch.equal(first[name], value) for name, value in layer.state_dict().items())


def test_evaluation_leaves_components_as_they_were() -> None:
    layer = source()
    convert_unmix_tns(layer, 8)
    before = layer.component_means.clone()
    with evaluating(layer, World()):
        layer(rows())
        assert not torch.equal(before, layer.component_means)
    assert torch.equal(before, layer.component_means)


def test_a_timm_network_and_back() -> None:
    """Names, drop and activation stay; a source's state dict loads; layers shared under two names are one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = timm.create_model("efficientnet_b0", num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    want, state = net(x), copy.deepcopy(net.state_dict())
    parameters = dict(net.named_parameters())
    names = convert_unmix_tns(net)
    assert len(names) == len(unmix_layers(net)) == 49 and convert_unmix_tns(net) == []
    assert all(parameters[name] is p for name, p in net.named_parameters())
    assert net.load_state_dict(state, strict=False).unexpected_keys == []
    with unmix_mode(net, "source"):
        torch.testing.assert_close(net(x), want)
    assert net(x).isfinite().all() and (net(x) - want).abs().max() > 1e-3
    assert restore_batch_norm(net) == names
    assert net.state_dict().keys() == state.keys()
    torch.testing.assert_close(net(x), want)


def test_other_settings_of_the_source() -> None:
    """No momentum, no weights, synchronised over ranks."""
    for layer in (nn.BatchNorm2d(5, momentum=None), nn.BatchNorm2d(5, affine=False), nn.SyncBatchNorm(5)):
        net = nn.Sequential(layer).double()
        assert convert_unmix_tns(net, 2) == ["0"]
        assert net(rows()).shape == rows().shape and unmix_layers(net)["0"].step == pytest.approx(0.1)
        assert "components=2" in repr(net)


@pytest.mark.parametrize(("make", "options", "says"), [
    (lambda: nn.Sequential(nn.LayerNorm(3)), {}, "without batch norms"),
    (lambda: nn.BatchNorm2d(3, track_running_stats=False), {}, "without running statistics"),
    (lambda: nn.LazyBatchNorm2d(), {}, "without shape"),
    (lambda: nn.BatchNorm2d(3), {"exclude": "*"}, "exclude='\\*', must be a sequence"),
    (lambda: nn.BatchNorm2d(3), {"exclude": ["*"]}, "without batch norms"),
    (lambda: nn.BatchNorm2d(3), {"num_components": 0}, "num_components=0, must be an integer >= 1"),
    (lambda: nn.BatchNorm2d(3), {"alpha": 1.5}, "alpha=1.5, must be in"),
    (lambda: nn.BatchNorm2d(3), {"temperature": 0.0}, "temperature=0.0, must be"),
    (lambda: nn.BatchNorm2d(3), {"batch_size": 0}, "batch_size=0")])
def test_refused(make: Any, options: dict[str, Any], says: str) -> None:
    model = make()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=says):
        convert_unmix_tns(model, **options)
    assert kinds == [type(m) for m in model.modules()]


def test_split_norms_and_other_modes_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    convert_split_bn(model)
    with pytest.raises(ValueError, match="strip_split_bn"):
        convert_unmix_tns(model)
    layer = source()
    convert_unmix_tns(layer)
    with pytest.raises(ValueError, match="mode='eval', must be adapt, frozen or source"):
        layer.mode = "eval"
    with pytest.raises(ValueError, match="mode='eval'"), unmix_mode(layer, "eval"):  # type: ignore[arg-type]
        pass


@pytest.mark.distributed
@pytest.mark.rotated(1, 3)
def test_on_two_ranks(zygote: Zygote, tmp_path: Path) -> None:
    """Synchronised: as one process on the whole batch. Not: each its own, which evaluation and checkpoints do not average."""
    found = zygote.found(Path(__file__).with_name("unmix_ranks.py"), tmp_path / "found.json", ranks=2, limit=120)
    assert found.pop("own") is True
    assert len(found) == 3 and max(found.values()) < 1e-12, found


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    layer = source(dtype=torch.float32)
    convert_unmix_tns(layer, 8)
    twin, x = copy.deepcopy(layer), rows().float()
    compiled = torch.compile(layer, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.component_means, twin.component_means)
