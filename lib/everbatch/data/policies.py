"""timm's augmentation policies (AutoAugment, RandAugment) for one image tensor, drawn from torch's generator."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everbatch.errors import check

__all__ = ["Policy"]


class Policy:
    """A policy as a function of an image tensor and torch's global generator, like torchvision's transforms.

    timm draws from Python's and numpy's generators. A call seeds both from one draw of torch's, and puts their states back.

    Args:
        name: timm's text: "original", "v0", "3a" for AutoAugment, "rand-m9-mstd0.5" and the like for RandAugment.
        image_size: side of the images; bounds translations.
        mean: of the data in [0, 1], per channel or one; the colour that fills what moved out of sight.
        top: pixel value of white. Other tops than 255 are scaled for the policy, and come back as float32 in [0, top].

    Raises:
        ValueError: a text that timm does not know; in a call, an image that is not uint8 (1 or 3, H, W).
        ImportError: timm is not installed.

    Source: Cubuk et al. 2019, arXiv 1805.09501; Cubuk et al. 2020, arXiv 1909.13719; the operations are timm's.
    Cost: PIL on the host, one image at a time, inside the step: the trainer's workers fetch, they do not augment.
    """

    def __init__(self, name: str, image_size: int, mean: Sequence[float] = (0.5,), *, top: int = 255) -> None:
        try:
            from timm.data import auto_augment
        except ImportError as error:
            raise ImportError("augment: timm is not installed; pip install everbatch[vision]") from error
        fill = tuple(min(255, round(255 * m)) for m in mean)
        make: Any = auto_augment.rand_augment_transform if name.startswith("rand") else auto_augment.auto_augment_transform
        self._made: dict[int, Any] = {}
        try:
            for channels in (1, 3):
                colour = fill[0] if channels == 1 else fill if len(fill) == 3 else fill[:1] * 3
                self._made[channels] = make(name, {"translate_const": int(image_size * 0.45), "img_mean": colour})
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(f"augment: policy={name!r}, must be one that timm knows, as 'original' or 'rand-m9-mstd0.5' "
                             f"({error or type(error).__name__})") from error
        self.top = top

    def __call__(self, image: Tensor) -> Tensor:
        """The augmented image: same shape; uint8 with top=255, else float32."""
        from PIL import Image

        check(image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] in self._made, "augment",
              f"image of {image.dtype} and shape {tuple(image.shape)}", "be uint8 (1 or 3, H, W)", "use augment=crop_flip")
        pixels = image if self.top == 255 else (image.float() * (255.0 / self.top)).round().to(torch.uint8)
        array = pixels[0].numpy() if len(image) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
        seed = int(torch.randint(2**31, ()))
        kept = random.getstate(), np.random.get_state()  # noqa: NPY002  # the generator that timm draws from
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            moved = np.array(self._made[len(image)](Image.fromarray(array)))
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])  # noqa: NPY002
        result = torch.from_numpy(moved)[None] if len(image) == 1 else torch.from_numpy(moved).permute(2, 0, 1).contiguous()
        return result if self.top == 255 else result.float() * (self.top / 255.0)
