"""Fifteen families of image corruptions at five severities, made here and seeded."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from everbatch import seeds
from everbatch.errors import check, check_whole, nearest

__all__ = ["CORRUPTIONS", "corrupt"]

BASE_SIDE = 32
"""Side in pixels at which lengths below are meant; other images have them in proportion."""


def corrupt(images: Tensor, family: str, severity: int = 5, *, seed: int = 0) -> Tensor:
    """Images with one corruption: (n, C, H, W), same dtype.

    The families of Hendrycks and Dietterich 2019 (arXiv 1903.12261): noise (gaussian, shot, impulse), blur (defocus, glass,
    motion, zoom), weather (snow, frost, fog, brightness) and digital (contrast, elastic, pixelate, jpeg). They are built from
    their descriptions for small images: strengths are near those of CIFAR-10-C, frost and snow are drawn in place of pasted
    photographs, so accuracies compare within this library only.

    Args:
        images: uint8 in [0, 255], or floating in [0, 1], on any device; 1 or 3 channels for jpeg. The work is done on the CPU.
        family: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of all random numbers; the same images, family, severity and seed give the same result.

    Raises:
        ValueError: another family or severity, images of another shape, dtype or range.
        ImportError: jpeg without Pillow.

    Cost: some copies of the images; jpeg runs image by image.
    """
    who = "corrupt"
    check(family in CORRUPTIONS, who, f"family={family!r}", "be one of CORRUPTIONS", nearest(family, CORRUPTIONS))
    check_whole(who, "severity", severity, 1, 5)
    check(images.ndim == 4, who, f"images of shape {tuple(images.shape)}", "be (n, C, H, W)")
    pictures = family != "jpeg" or images.shape[1] in (1, 3)
    check(pictures, who, f"jpeg of {images.shape[1]} channels", "have 1 or 3")
    whole = images.dtype == torch.uint8
    check(whole or images.is_floating_point(), who, f"images of {images.dtype}", "be uint8 or floating")
    x = images.cpu().float() / 255 if whole else images.cpu().float()
    if not len(x):
        return images
    inside = bool((x.min() >= 0) & (x.max() <= 1))
    check(inside, who, "floating images outside of [0, 1]", "be pixels in [0, 1], before normalisation")
    drawn = seeds.generator(seed, who, family, severity)
    made = CORRUPTIONS[family](x, severity - 1, drawn).clamp(0, 1)
    made = (made * 255).round() if whole else made
    return made.to(images.device, images.dtype)


# ------------------------------------------------------------------------------------------------------------------------ noise
def _gaussian_noise(x: Tensor, level: int, drawn: torch.Generator) -> Tensor:
    return x + (0.04, 0.06, 0.08, 0.09, 0.10)[level] * _normal(x, drawn)


def _shot_noise(x: Tensor, level: int, drawn: torch.Generator) -> Tensor:
    photons = (500, 250, 100, 75, 50)[level]
    return torch.poisson(x * photons, generator=drawn) / photons


def _impulse_noise(x: Tensor, level: int, drawn: torch.Generator) -> Tensor:
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[level]
    at = torch.rand(x.shape, generator=drawn)
    return torch.where(at < share / 2, 0.0, torch.where(at > 1 - share / 2, 1.0, x))


# ------------------------------------------------------------------------------------------------------------------------- blur
def _defocus_blur(x: Tensor, level: int, drawn: torch.Generator) -> Tensor:
    radius = (0.5, 0.7, 0.9, 1.2, 1.6)[level] * _scale(x)
    half = max(1, math.ceil(radius))
    far = torch.arange(-half, half + 1.0)
    # A soft edge, or small images would stay as they are.
    disk = (radius + 1 - (far[:, None].square() + far.square()).sqrt()).clamp(0, 1)
    return _filtered(x, (disk / disk.sum()).expand(len(x), -1, -1))


def _glass_blur(x: Tensor, level: int, drawn: torch.Generator) -> Tensor:
    """Pixels change places with near ones, several times, then a light blur."""
    for _ in range((1, 1, 2, 2, 3)[level]):
        moves = torch.randint(-1, 2, (len(x), x.shape[2], x.shape[3], 2), generator=drawn)
        x = _moved(x, moves.float(), nearest_pixel=True)
    return _filtered(x, _bell((0.3, 0.4, 0.4, 0.5, 0.5)[level] * _scale(x)).expand(len(x), -1, -1))


def _motion_blur(x: Tensor, level: int, drawn: torch.Generator) -> Tensor:
    return _streaked(x, (3.0, 4.0, 5.0, 6.0, 7.0)[level] * _scale(x), drawn)


def _zoom_blur(x: Tensor, level: int, drawn: torch.Generator) -> Tensor:
    """The mean over magnifications from one on."""
    most = (1.06, 1.11, 1.16, 1.21, 1.26)[level]
    factors = [1 + (most - 1) * i / 5 for i in range(6)]
    views = []
    for factor in factors:
        matrix = torch.tensor([[1 / factor, 0, 0], [0, 1 / factor, 0]]).expand(len(x), -1, -1)
        grid = functional.affine_grid(matrix, list(x.shape), align_corners=False)
        views.append(functional.grid_sample(x, grid, padding_mode="reflection", align_corners=False))
    return torch.stack(views).mean(0)


# ---------------------------------------------------------------------------------------------------------------------- weather
def _snow(x: Tensor, level: int, drawn: torch.Generator) -> Tensor:
    """Streaks of bright flakes before a lighter, greyer image."""
    share, white = ((0.02, 0.1), (0.03, 0.15), (0.04, 0.2), (0.05, 0.25), (0.07, 0.3))[level]
    flakes = (torch.rand(len(x), 1, *x.shape[2:], generator=drawn) < share).float()
    falling = _streaked(flakes, 3 * _scale(x), drawn) * 3
    grey = x.mean(1, keepdim=True)
    paler = (1 - white) * x + white * torch.maximum(x, grey * 0.5 + 0.5)
    return paler + falling.clamp(0, 1)


def _frost(x: Tensor, level: int, drawn: torch.Generator) -> Tensor:
    """Rough, bright crystals over a darker image."""
    kept, ice = ((1.0, 0.2), (0.95, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[level]
    crystals = _clouds(x, drawn, decay=0.9).square()
    return kept * x + ice * crystals


def _fog(x: Tensor, level: int, drawn: torch.Generator) -> Tensor:
    """Smooth clouds, then as bright as before."""
    thick = (0.2, 0.5, 0.75, 1.0, 1.5)[level]
    top = x.amax((1, 2, 3), keepdim=True)
    return (x + thick * _clouds(x, drawn, decay=0.5)) * top / (top + thick)


def _brightness(x: Tensor, level: int, drawn: torch.Generator) -> Tensor:
    return x + (0.05, 0.1, 0.15, 0.2, 0.3)[level]


# ---------------------------------------------------------------------------------------------------------------------- digital
def _contrast(x: Tensor, level: int, drawn: torch.Generator) -> Tensor:
    middle = x.mean((2, 3), keepdim=True)
    return middle + (0.75, 0.5, 0.4, 0.3, 0.15)[level] * (x - middle)


def _elastic(x: Tensor, level: int, drawn: torch.Generator) -> Tensor:
    """Positions move along a smooth random field."""
    far = (0.8, 1.2, 1.6, 2.0, 2.4)[level] * _scale(x)
    field = torch.randn(len(x), 2, *x.shape[2:], generator=drawn)
    field = _filtered(field, _bell(2.5 * _scale(x)).expand(len(x), -1, -1))
    field = field / field.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-6)
    return _moved(x, far / math.sqrt(2) * field.permute(0, 2, 3, 1))


def _pixelate(x: Tensor, level: int, drawn: torch.Generator) -> Tensor:
    share = (0.85, 0.75, 0.65, 0.55, 0.45)[level]
    size = [max(1, round(share * side)) for side in x.shape[2:]]
    return functional.interpolate(functional.interpolate(x, size=size, mode="area"), size=x.shape[2:], mode="nearest")


def _jpeg(x: Tensor, level: int, drawn: torch.Generator) -> Tensor:
    from PIL import Image

    quality = (80, 65, 58, 50, 40)[level] // 2  # small images lose little at the usual ones
    made = []
    for image in (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        written = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(written, "jpeg", quality=quality)
        read = torch.from_numpy(np.array(Image.open(written)))
        made.append(read.view(image.shape).permute(2, 0, 1))
    return torch.stack(made).float() / 255


# ---------------------------------------------------------------------------------------------------------- what they are made of
def _scale(x: Tensor) -> float:
    return min(x.shape[2:]) / BASE_SIDE


def _normal(x: Tensor, drawn: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=drawn)


def _bell(width: float) -> Tensor:
    """A Gaussian kernel of this standard deviation in pixels."""
    half = max(1, math.ceil(3 * width))
    far = torch.arange(-half, half + 1.0)
    line = torch.exp(-far.square() / (2 * max(width, 1e-3) ** 2))
    kernel = line[:, None] * line
    return kernel / kernel.sum()


def _filtered(x: Tensor, kernels: Tensor) -> Tensor:
    """Each image by its own kernel (n, k, k), the same on every channel; edges are repeated."""
    count, channels, height, width = x.shape
    half = kernels.shape[-1] // 2
    padded = functional.pad(x, (half, half, half, half), mode="replicate").flatten(0, 1)[None]
    each = kernels.repeat_interleave(channels, 0)[:, None]
    return functional.conv2d(padded, each, groups=count * channels).view(count, channels, height, width)


def _streaked(x: Tensor, length: float, drawn: torch.Generator) -> Tensor:
    """A mean along a line of this length in pixels, of a direction of its own for each image."""
    half = max(1, math.ceil(length / 2))
    far = torch.arange(-half, half + 1.0)
    angle = torch.rand(len(x), 1, 1, generator=drawn) * math.pi
    along = far * angle.cos() + far[:, None] * angle.sin()
    across = far[:, None] * angle.cos() - far * angle.sin()
    line = (1 - across.abs()).clamp(min=0) * (along.abs() <= max(length, 1.0) / 2)
    return _filtered(x, line / line.sum((1, 2), keepdim=True))


def _moved(x: Tensor, moves: Tensor, *, nearest_pixel: bool = False) -> Tensor:
    """Each position looks up another, (n, H, W, 2) pixels away."""
    height, width = x.shape[2:]
    identity = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]).expand(len(x), -1, -1)
    grid = functional.affine_grid(identity, list(x.shape), align_corners=False)
    grid = grid + moves * torch.tensor([2 / width, 2 / height])
    mode = "nearest" if nearest_pixel else "bilinear"
    return functional.grid_sample(x, grid, mode=mode, padding_mode="reflection", align_corners=False)


def _clouds(x: Tensor, drawn: torch.Generator, decay: float) -> Tensor:
    """Noise of every scale in [0, 1], (n, 1, H, W): the smaller `decay`, the smoother."""
    total = x.new_zeros(len(x), 1, *x.shape[2:])
    strength, size = 1.0, 2
    while size <= 2 * max(x.shape[2:]):
        layer = torch.rand(len(x), 1, size, size, generator=drawn)
        total = total + strength * functional.interpolate(layer, size=x.shape[2:], mode="bilinear", align_corners=False)
        strength, size = strength * decay, size * 2
    least, most = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    return (total - least) / (most - least).clamp(min=1e-6)


CORRUPTIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "gaussian_noise": _gaussian_noise, "shot_noise": _shot_noise, "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur, "glass_blur": _glass_blur, "motion_blur": _motion_blur, "zoom_blur": _zoom_blur,
    "snow": _snow, "frost": _frost, "fog": _fog, "brightness": _brightness,
    "contrast": _contrast, "elastic": _elastic, "pixelate": _pixelate, "jpeg": _jpeg}
"""The families by name."""
