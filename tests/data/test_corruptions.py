"""Corruptions of images: repeatable, in range, worse with severity, and refused where they have no meaning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from everbatch.data import CORRUPTIONS, corrupt, dirichlet_order


def pictures(channels: int = 3, side: int = 16) -> Tensor:
    """Discs of several sizes and shades."""
    at = torch.linspace(-1, 1, side)
    far = (at[:, None].square() + at.square()).sqrt()
    shades = torch.linspace(0.2, 0.9, 4 * channels).view(4, channels, 1, 1)
    return torch.where(far < torch.tensor([0.3, 0.5, 0.7, 0.9]).view(4, 1, 1, 1), shades, 0.1 * shades)


@pytest.mark.parametrize("family", CORRUPTIONS)
def test_a_family(family: str) -> None:
    """The same again, another seed differs where there is a draw, pixels stay pixels, severity 5 is farther than 1."""
    x = pictures()
    weak, strong = corrupt(x, family, 1), corrupt(x, family, 5)
    assert strong.shape == x.shape and strong.dtype == x.dtype
    assert strong.min() >= 0 and strong.max() <= 1
    assert torch.equal(strong, corrupt(x, family, 5))
    assert (strong - x).abs().mean() > (weak - x).abs().mean() > 0
    fixed = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg"}
    assert torch.equal(strong, corrupt(x, family, 5, seed=1)) == (family in fixed)
    whole = corrupt((x * 255).round().to(torch.uint8), family, 5)
    assert whole.dtype == torch.uint8 and corrupt(pictures(1, 8), family).shape == (4, 1, 8, 8)
    assert corrupt(x[:0], family).shape == (0, 3, 16, 16)


def test_closed_forms() -> None:
    x = pictures()
    torch.testing.assert_close(corrupt(x, "brightness", 5), (x + 0.3).clamp(max=1))
    middle = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(corrupt(x, "contrast", 5), middle + 0.15 * (x - middle))
    flat = torch.full((2, 3, 16, 16), 0.4)
    for family in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic", "pixelate", "contrast"):
        torch.testing.assert_close(corrupt(flat, family), flat, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("x", "options", "says"), [
    (pictures(), {"family": "rain"}, "family='rain'"), (pictures(), {"severity": 6}, "severity=6, must be at most 5"),
    (pictures()[0], {}, r"shape \(3, 16, 16\), must be \(n, C, H, W\)"), (2 * pictures(), {}, "outside of"),
    (pictures().long(), {}, "images of torch.int64"),
    (pictures(2), {"family": "jpeg"}, "jpeg of 2 channels, must have 1 or 3")])
def test_refused(x: Tensor, options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        corrupt(x, **{"family": "snow", **options})  # type: ignore[arg-type]


def test_order_with_labels_in_runs() -> None:
    """Every sample once; neighbours share classes more often, the smaller the concentration."""
    labels = torch.arange(600) % 5
    shares = []
    for concentration in (0.1, 10.0):
        order = dirichlet_order(labels, concentration, seed=3)
        assert sorted(order) == list(range(600))
        run = labels[order]
        shares.append((run[1:] == run[:-1]).float().mean().item())
    assert shares[0] > shares[1] > 0.5


@pytest.mark.parametrize(("labels", "concentration", "says"), [
    ([0, 1] * 5, 0.1, "use more samples"), ([0, 1], 0.0, "concentration=0.0"), ([[0], [1]], 0.1, "must be a vector"),
    ([-1, 0], 0.1, "label -1")])
def test_orders_refused(labels: list[int], concentration: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        dirichlet_order(labels, concentration, 0, tries=20)
