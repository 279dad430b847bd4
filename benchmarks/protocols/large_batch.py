"""One data set at several batch sizes, equal epochs: LARS alone, with ConAdv, with SAM, with augmentation.

Learning rate: lr(B) = lr * sqrt(B / smallest B) for all arms, warm-up and polynomial decay measured in epochs. Batch norm sees
micro-batches of the smallest batch at every batch size, as the ranks of a large job do. Held-out samples are training samples
outside the subset.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ledger.cells import Cell
from benchmarks.ledger.claim import Arm
from benchmarks.ledger.samples import opened, rows, top
from everbatch import compose, seeds
from everbatch.data import Batch, Source, TensorSource, iid, stratified_split
from everbatch.errors import check
from everbatch.optim import LARS, SAM, scaled_lr
from everbatch.train import ConAdv, Schedule, Trainer, TrainerMixin

__all__ = ["ARMS", "CropFlip", "Scale", "arms", "crop_flip", "train"]

ARMS = {"lars": "LARS", "conadv": "LARS + ConAdv", "sam": "LARS + SAM", "augment": "LARS + crop, flip"}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What all cells share."""

    data: str = "digits"
    """digits, or any source of everbatch.data.load."""
    image_size: int | None = 16
    samples: int = 16400
    """Training samples, a stratified share."""
    batches: tuple[int, ...] = (64, 256, 1024)
    """Multiples of the first."""
    epochs: int = 20
    warmup_epochs: float = 3.0
    power: float = 2.0
    lr: float = 2.0
    """At the smallest batch."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    width: int = 8
    rho: float = 0.05
    radius: float = 4.0
    """Of ConAdv, in 255ths of the pixel range."""
    tau: int = 1
    validation: bool = False
    """Test on training samples outside the subset: to choose a learning rate by, never on the test samples."""

    def __post_init__(self) -> None:
        for batch in self.batches:
            check(batch % self.batches[0] == 0, "large_batch", f"batch {batch}", f"be a multiple of {self.batches[0]}")
        # At width 4, oneDNN's backward of a strided 1x1 convolution over channels-last images writes where it may not on CPUs
        # with AVX2 alone (torch 2.14.1): glibc ends the process for it, or nobody does.
        check(self.width % 8 == 0, "large_batch", f"width {self.width}", "be a multiple of 8")


def arms(scale: Scale) -> dict[str, Arm]:
    """Every method at every batch size, as "conadv/256"."""
    return {f"{arm}/{batch}": Arm(options={"arm": arm, "batch": batch}, series=title, x=batch)
            for batch in scale.batches for arm, title in ARMS.items()}


class CropFlip(TrainerMixin):
    """Random crops from images padded by an eighth, and random horizontal flips, a whole batch at once."""

    def augment_batch(self, parts: list[Batch]) -> list[Batch]:
        """Both parts alike."""
        parts = super().augment_batch(parts)  # type: ignore[misc]
        g = seeds.generator(self.seed, "crop_flip", self.step)
        images: list[Any] = [part.inputs for part in parts]
        return [replace(part, inputs=crop_flip(x, g)) for part, x in zip(parts, images, strict=True)]


def crop_flip(x: Tensor, g: torch.Generator) -> Tensor:
    """Each image (n, C, H, H) cut at a random place from itself padded with zeros (the mean colour), half of them mirrored."""
    n, side = len(x), x.shape[-1]
    pad, at = max(1, side // 8), torch.arange(side)
    top, left = torch.randint(2 * pad + 1, (2, n, 1), generator=g)
    columns = torch.where(torch.rand(n, 1, generator=g) < 0.5, at.flip(0), at) + left
    wide = nn.functional.pad(x, [pad] * 4)
    return wide[torch.arange(n)[:, None, None], :, (top + at)[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def network(classes: int, channels: int, width: int, seed: int) -> nn.Module:
    """timm's residual net with one basic block per stage, stem and widths for small images."""
    from timm.models.resnet import BasicBlock, ResNet

    class SmallResNet(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.contiguous(memory_format=torch.channels_last))  # 1.5 times as fast on CPU

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "model"))
        block: Any = BasicBlock
        net: Any = SmallResNet(block, (1, 1, 1, 1), num_classes=classes, channels=tuple(width * 2**i for i in range(4)),
                          stem_type="deep", stem_width=width // 2)
        net.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    placed: nn.Module = net.to(memory_format=torch.channels_last)
    return placed


def train(cell: Cell, home: Path) -> dict[str, float | None]:
    """One cell. Options of an arm: `arm` of ARMS, `batch`.

    Returns:
        accuracy after the last step, None where training diverged; steps.
    """
    cell.never_held_out()
    scale = Scale(**{**cell.scale, "batches": tuple(cell.scale["batches"])})
    arm, batch = str(cell.options["arm"]), int(cell.options["batch"])
    learn, judge = _sources(cell, scale, home)
    pixels = top(cell, learn.inputs)
    sample = learn.inputs[:2000].float() / pixels
    mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3))
    learner, options = learner_of(arm, scale, mean, std)
    trainer = learner(
        network(len(learn.classes), len(mean), scale.width, cell.seed), _optimizer(arm, batch, scale), device="cpu",
        config=Trainer.Config(
            batch_size=batch, epochs=scale.epochs, seed=cell.seed, decay_vectors=False, max_bad_steps=3,
            accumulation=max(1, batch // scale.batches[0]), eval_batch=500,
            schedule=Schedule(kind="polynomial", warmup_epochs=scale.warmup_epochs, power=scale.power)),
        prepare=lambda x: (x.float() / pixels - mean[:, None, None]) / std[:, None, None], **options)
    try:
        accuracy: float | None = trainer.fit(iid(learn, judge))[0][0]
    except RuntimeError as error:
        if "not finite" not in str(error):
            raise
        accuracy = None  # diverged
    return {"accuracy": accuracy, "steps": float(trainer.step)}


def _optimizer(arm: str, batch: int, scale: Scale) -> functools.partial[Any]:
    """LARS, below SAM where the arm says so."""
    mixins, options = ((SAM,), {"rho": scale.rho}) if arm == "sam" else ((), {})
    lr = scaled_lr(scale.lr, batch=batch, reference_batch=scale.batches[0], rule="sqrt")
    return functools.partial(compose(*mixins, LARS, base=torch.optim.SGD), momentum=scale.momentum, lr=lr,
                             weight_decay=scale.weight_decay, **options)


def learner_of(arm: str, scale: Scale, mean: Tensor, std: Tensor) -> tuple[type, Mapping[str, Any]]:
    """Trainer class of an arm, and the options it takes."""
    if arm == "augment":
        return type("Learner", (CropFlip, Trainer), {}), {}
    if arm != "conadv":
        return Trainer, {}
    return type("Learner", (ConAdv, Trainer), {}), {
        "tau": scale.tau, "radius": scale.radius, "mean": tuple(mean.tolist()), "std": tuple(std.tolist()),
        "placement": "inline", "split_bn": True}


def _sources(cell: Cell, scale: Scale, home: Path) -> tuple[TensorSource, TensorSource]:
    """The share that is trained on, and what judges, both in memory."""
    train, test = opened(cell, home)
    ids, rest = torch.arange(len(train)), torch.arange(0)
    if scale.samples < len(train):
        rest, ids = stratified_split(train.targets, scale.samples / len(train), seed=0)
        rest = rest[torch.randperm(len(rest), generator=seeds.generator(0, "validation"))[:5000]]
    if scale.validation:
        check(len(rest) > 0, "large_batch", "validation=true on all training samples", "leave some for validation",
              "lower samples")
        return _held(train, ids, "train"), _held(train, rest, "validation")
    return _held(train, ids, "train"), _held(test, torch.arange(len(test)), "test")


def _held(source: Source, ids: Tensor, name: str) -> TensorSource:
    return TensorSource(rows(source, ids), source.targets[ids], name=name, classes=source.classes)
