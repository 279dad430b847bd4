"""What recipes share: typed options for data, model, optimizer and engine, and how to build from them, report and fail."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from everbatch import seeds
from everbatch.compose import compose
from everbatch.data import Source, load
from everbatch.errors import CheckpointMismatch, CompositionError, UnsupportedHost, check, nearest
from everbatch.nn import SmallConv
from everbatch.optim import EMA, SAM, ClipGradNorm
from everbatch.zero_config import deepspeed_config

__all__ = ["Data", "Engine", "Model", "Optimizer", "guard"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where samples come from, and what is done to them."""

    source: str = "digits"
    """digits, imagefolder:PATH, torchvision:NAME:ROOT or npz:PATH."""
    image_size: int | None = None
    """Side of the images in pixels; by default the size the data has."""
    download: bool = False
    """Let torchvision download."""
    augment: Literal["none", "crop", "crop_flip"] = "none"
    """Random crop from an image padded by an eighth, and random horizontal flip."""
    mean: float = 0.5
    """Subtracted from pixels scaled to [0, 1]."""
    std: float = 0.5
    """Divides pixels after that; > 0."""

    def __post_init__(self) -> None:
        check(self.std > 0, "data", f"std={self.std}", "be > 0")

    def open(self) -> tuple[Source, Source]:
        """Training and test source."""
        options: dict[str, Any] = {"image_size": self.image_size, "download": self.download}
        return load(self.source, train=True, **options), load(self.source, train=False, **options)

    def prepare(self, inputs: Tensor) -> Tensor:
        """Samples to model inputs: scaled to [0, 1] if they are bytes, then normalised."""
        top = 16.0 if self.source == "digits" else 255.0 if inputs.dtype == torch.uint8 else 1.0
        return (inputs.float() / top - self.mean) / self.std

    def augmentation(self, image_size: int) -> Callable[[Tensor], Tensor] | None:
        """The training augmentation of one image, or None."""
        if self.augment == "none":
            return None
        from torchvision.transforms import v2

        crop = v2.RandomCrop(image_size, padding=max(1, image_size // 8))
        return v2.Compose([crop, v2.RandomHorizontalFlip()]) if self.augment == "crop_flip" else crop  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The network."""

    name: str = "small_conv"
    """small_conv, or any model of timm."""
    pretrained: bool = False
    """Load timm's pretrained weights."""

    def build(self, sample: Tensor, num_classes: int, seed: int) -> nn.Module:
        """A model for inputs like `sample` (C, H, W), initialised under `seed`, the same on every rank."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive(seed, "model"))
            if self.name == "small_conv":
                return SmallConv(sample.shape[0], num_classes, sample.shape[-1])
            try:
                import timm
            except ImportError as error:
                raise ImportError("model: timm is not installed; pip install everbatch[vision]") from error
            check(timm.is_model(self.name), "model", f"name={self.name!r}", "be small_conv or a model of timm",
                  nearest(self.name, [*timm.list_models(), "small_conv"]))
            return timm.create_model(self.name, pretrained=self.pretrained, num_classes=num_classes,
                                     in_chans=sample.shape[0])


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The base optimizer and the mixins over it; a mixin that is null is not composed."""

    base: Literal["sgd", "adamw"] = "sgd"
    """torch.optim.SGD or torch.optim.AdamW."""
    lr: float = 0.03
    """Peak learning rate; > 0."""
    momentum: float = 0.0
    """Of SGD; in [0, 1)."""
    weight_decay: float = 0.0
    """>= 0."""
    sam: SAM.Config | None = None
    """Sharpness-aware minimisation."""
    clip: ClipGradNorm.Config | None = None
    """Clipping by the global norm."""
    ema: EMA.Config | None = None
    """Moving average of the weights."""

    def __post_init__(self) -> None:
        check(self.lr > 0, "optimizer", f"lr={self.lr}", "be > 0")
        check(0 <= self.momentum < 1, "optimizer", f"momentum={self.momentum}", "be in [0, 1)")
        check(self.weight_decay >= 0, "optimizer", f"weight_decay={self.weight_decay}", "be >= 0")

    def build(self) -> functools.partial[Any]:
        """The composed class with its options, for `Trainer`."""
        mixins = {ClipGradNorm: self.clip, EMA: self.ema, SAM: self.sam}
        base = torch.optim.SGD if self.base == "sgd" else torch.optim.AdamW
        used = {part: config for part, config in mixins.items() if config is not None}
        options = {f"{part.__name__.lower()}_{k}": v for part, config in used.items() for k, v in vars(config).items()}
        if self.base == "sgd":
            options["momentum"] = self.momentum
        return functools.partial(compose(*used, base=base), lr=self.lr, weight_decay=self.weight_decay, **options)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What runs the model."""

    kind: Literal["deepspeed", "plain", "ddp", "fsdp2"] = "deepspeed"
    """plain is for one rank."""
    stage: int | None = None
    """ZeRO stage, 0 to 3; 1 by default."""
    precision: Literal["fp32", "bf16"] | None = None
    """Working precision on DeepSpeed; fp32 by default."""
    deepspeed: dict[str, Any] | None = None
    """Raw DeepSpeed configuration: a tree here, or the path of a JSON file; merged under the options above."""

    def build(self, batch_size: int, accumulation: int, world_size: int) -> str | Mapping[str, Any]:
        """The engine argument of `Trainer`."""
        if self.kind != "deepspeed":
            return self.kind
        micro, rest = divmod(batch_size, world_size * accumulation)
        check(rest == 0 and micro > 0, "engine", f"batch_size={batch_size}",
              f"be divisible by {world_size} ranks * {accumulation} micro-batches")
        return deepspeed_config(self.deepspeed, micro_batch=micro, accumulation=accumulation, world_size=world_size,
                                stage=self.stage, precision=self.precision)


EXPECTED = (ValueError, CompositionError, UnsupportedHost, CheckpointMismatch, RuntimeError, ImportError, OSError)


@contextmanager
def guard(prog: str) -> Iterator[None]:
    """End the process with one line and exit code 1 on an error that a user can mend, whatever other ranks wait for.

    Where all ranks fail alike, rank 0 speaks; a rank that fails on its own speaks itself; ranks that fail only because
    another ended speak if that one could not. EVERBATCH_TRACEBACK=1 shows where.
    """
    try:
        yield
    except EXPECTED as error:
        if os.environ.get("EVERBATCH_TRACEBACK") == "1":
            raise
        rank = int(os.environ.get("RANK", "0"))
        lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
        text = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        if lost:
            text = "another rank ended without a word (killed, or out of memory?); resume=true goes on from the newest checkpoint"
        if _speaks(rank, text, lost):
            print(f"{prog}: rank {rank}: {text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # not sys.exit: tearing down a process group may wait for ranks that never come


def _speaks(rank: int, text: str, lost: bool) -> bool:
    """Whether this rank tells its error; the launcher's store remembers what others told."""
    if not dist.is_initialized():
        return rank == 0
    store = dist.distributed_c10d._get_default_store()
    try:
        for _ in range(0 if lost or rank == 0 else 10):  # rank 0 may be about to say the same
            if store.check(["everbatch/error"]):
                break
            time.sleep(0.1)
        told = store.compare_set("everbatch/error", "", text).decode()
        return store.add(f"everbatch/error/{text}", 1) == 1 and (told == text or not lost)
    except RuntimeError:  # the store's owner is gone already: better twice than never
        return True
