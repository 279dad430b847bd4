"""The options that say where samples come from, and what is done to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from everbatch.data import Source, Stream, load
from everbatch.errors import check, check_whole
from everbatch.experiment.model import Model
from everbatch.rows import one_tensor

__all__ = ["Data", "sample_of"]

MOST_PIXELS = 2**14
"""Side of an image; one of that size takes 800 MB."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where samples come from, and what is done to them."""

    source: str = "digits"
    """digits, the path of a folder of images or of an .npz file, torchvision:NAME:ROOT, or huggingface:PATH of a folder of
    save_to_disk; see `everbatch.data.load`."""
    sources: tuple[str, ...] = ()
    """A data set for each task, in place of source, each as that; all digits or none."""
    columns: tuple[str, str] | None = None
    """huggingface:PATH: names of the image and of the label; null: its one column of images and its one of ClassLabel."""
    image_size: int | None = None
    """Side of the images in pixels; by default the size the data has."""
    leaf_classes: bool = False
    """Of a folder of images: a class is every folder that holds images itself, as Omniglot's alphabet/character."""
    channels: int | None = None
    """Of the images of a folder: 1 (grey) or 3 (colour); null: 3, and what they have in other data sets."""
    download: bool = False
    """Let torchvision download."""
    augment: Literal["none", "crop", "crop_flip", "auto", "rand"] = "none"
    """Random crop from an image padded by an eighth; and random horizontal flip; and after both a policy of timm, AutoAugment
    (auto) or RandAugment (rand)."""
    policy: str | None = None
    """augment=auto or rand: the policy as timm writes it; null: original, rand-m9-mstd0.5."""
    mean: float | tuple[float, ...] = 0.5
    """Subtracted from pixels scaled to [0, 1]; one number, or one for each channel."""
    std: float | tuple[float, ...] = 0.5
    """Divides pixels after that; > 0; one number, or one for each channel."""

    def __post_init__(self) -> None:
        for name, values in (("mean", self.means), ("std", self.stds)):
            check(bool(values), "data", f"{name}={values}", "be a number, or one for each channel")
            for value in values:
                check(math.isfinite(value) and (name == "mean" or value > 0), "data", f"{name}={value}",
                      "be finite" if name == "mean" else "be > 0, and finite")
        kinds = {source == "digits" for source in self.sources}
        check(len(kinds) < 2, "data", f"sources={list(self.sources)}", "be all digits or none",
              "they have another range of pixels")
        check(not self.sources or self.source in ("digits", self.sources[0]), "data", f"source={self.source!r} beside sources",
              "be left out", "each of sources is a task")
        if self.image_size is not None:
            check_whole("data", "image_size", self.image_size, 1, MOST_PIXELS)
        check(not self.download or self.first.startswith("torchvision:"), "data", f"download=true with source={self.first!r}",
              "be left out", "torchvision's data sets alone are downloaded: torchvision:NAME:ROOT")
        check(1 in (len(self.means), len(self.stds)) or len(self.means) == len(self.stds), "data",
              f"mean={self.mean} and std={self.std}", "have as many channels")
        start = {"auto": ("original", "v0", "3a"), "rand": ("rand",)}.get(self.augment, ())
        check(self.policy is None or self.policy.startswith(start or "\n"), "data",
              f"policy={self.policy!r} with augment={self.augment}", f"begin with {' or '.join(start)}" if start else "be null",
              "" if start else "augment=auto or augment=rand follow a policy")

    @property
    def first(self) -> str:
        """The data set, or the first of several."""
        return self.sources[0] if self.sources else self.source

    @property
    def means(self) -> tuple[float, ...]:
        """`mean` as a tuple."""
        return self.mean if isinstance(self.mean, tuple) else (self.mean,)

    @property
    def stds(self) -> tuple[float, ...]:
        """`std` as a tuple."""
        return self.std if isinstance(self.std, tuple) else (self.std,)

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must repeat beside the samples, which the stream's fingerprint covers."""
        return {f"data.{name}": getattr(self, name) for name in ("augment", "policy", "mean", "std")}

    def open(self) -> tuple[Source, Source]:
        """Training and test source."""
        check(len(self.sources) < 2, "data", f"{len(self.sources)} sources", "be one source",
              "several are tasks: see recipes/class_incremental.py")
        return self._opened(self.first)

    def open_all(self) -> list[tuple[Source, Source]]:
        """Training and test source of each data set."""
        return [self._opened(source) for source in self.sources or (self.source,)]

    def _opened(self, source: str) -> tuple[Source, Source]:
        options: dict[str, Any] = {"image_size": self.image_size, "download": self.download, "columns": self.columns,
                                   "leaf_classes": self.leaf_classes, "channels": self.channels}
        return load(source, train=True, **options), load(source, train=False, **options)

    def scale(self, inputs: Tensor) -> float:
        """What such pixels are divided by before `mean` and `std`."""
        return 16.0 if self.first == "digits" else 255.0 if inputs.dtype == torch.uint8 else 1.0

    def described(self, sample: Tensor, model: Model) -> dict[str, Any]:
        """What a weights file says of the input, and of the model, of a run on samples like `sample` (C, H, W)."""
        return {"model": model.name, "options": model.options or {}, "input_size": list(sample.shape), "mean": list(self.means),
                "std": list(self.stds), "scale": self.scale(sample)}

    def prepare(self, inputs: Tensor) -> Tensor:
        """Samples to model inputs: scaled to [0, 1] if they are bytes, then normalised."""
        channels = max(len(self.means), len(self.stds))
        check(channels in (1, inputs.shape[1]), "data",
              f"mean={self.mean} and std={self.std} for images of {inputs.shape[1]} channels",
              "be one number, or one for each channel")
        mean, std = (v if isinstance(v, float | int) else torch.tensor(v, device=inputs.device).view(-1, 1, 1)
                     for v in (self.mean, self.std))
        return (inputs.float() / self.scale(inputs) - mean) / std

    def augmentation(self, image_size: int) -> Callable[[Tensor], Tensor] | None:
        """The training augmentation of one image, or None."""
        if self.augment == "none":
            return None
        from torchvision.transforms import v2

        crop = v2.RandomCrop(image_size, padding=max(1, image_size // 8))
        if self.augment == "crop":
            return crop  # type: ignore[no-any-return]
        flipped = v2.Compose([crop, v2.RandomHorizontalFlip()])
        if self.augment == "crop_flip":
            return flipped  # type: ignore[no-any-return]
        from everbatch.data.policies import Policy

        name = self.policy or ("original" if self.augment == "auto" else "rand-m9-mstd0.5")
        policy = Policy(name, image_size, self.means, top=16 if self.first == "digits" else 255)
        return lambda row: policy(flipped(row))


def sample_of(stream: Stream) -> Tensor:
    """One sample (C, H, W) of a stream, as its source gives it."""
    return one_tensor("data", stream.fetch(stream.tasks[0].train_ids[:1]))[0]
