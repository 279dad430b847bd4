"""Typed options for data, model, optimizer and engine, and how to build from them."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import operator
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from everbatch.composition import compose
from everbatch.config.deepspeed import deepspeed_config
from everbatch.data import Source, load
from everbatch.errors import check, check_real, check_whole
from everbatch.experiment.model import Factory, Model
from everbatch.optim import (
    ASAM,
    EMA,
    ESAM,
    EWC,
    GSAM,
    LAMB,
    LARS,
    MAS,
    SAM,
    SI,
    WSAM,
    ClipGradNorm,
    DynamicSparsity,
    GradientNorm,
    Ignite,
    LookSAM,
    OptimizerMixin,
    Refresh,
    ShrinkPerturb,
    StaleSAM,
)

__all__ = ["MEMORY", "MIXINS", "Data", "Engine", "Factory", "Optimizer", "check_together", "unused_together"]


MOST_PIXELS = 2**14
"""Side of an image; one of that size takes 800 MB."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where samples come from, and what is done to them."""

    source: str = "digits"
    """digits, the path of a folder of images or of an .npz file, or torchvision:NAME:ROOT; see `everbatch.data.load`."""
    image_size: int | None = None
    """Side of the images in pixels; by default the size the data has."""
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
        if self.image_size is not None:
            check_whole("data", "image_size", self.image_size, 1, MOST_PIXELS)
        check(not self.download or self.source.startswith("torchvision:"), "data", f"download=true with source={self.source!r}",
              "be left out", "torchvision's data sets alone are downloaded: torchvision:NAME:ROOT")
        check(1 in (len(self.means), len(self.stds)) or len(self.means) == len(self.stds), "data",
              f"mean={self.mean} and std={self.std}", "have as many channels")
        start = {"auto": ("original", "v0", "3a"), "rand": ("rand",)}.get(self.augment, ())
        check(self.policy is None or self.policy.startswith(start or "\n"), "data",
              f"policy={self.policy!r} with augment={self.augment}", f"begin with {' or '.join(start)}" if start else "be null",
              "" if start else "augment=auto or augment=rand follow a policy")

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
        options: dict[str, Any] = {"image_size": self.image_size, "download": self.download}
        return load(self.source, train=True, **options), load(self.source, train=False, **options)

    def scale(self, inputs: Tensor) -> float:
        """What such pixels are divided by before `mean` and `std`."""
        return 16.0 if self.source == "digits" else 255.0 if inputs.dtype == torch.uint8 else 1.0

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
        policy = Policy(name, image_size, self.means, top=16 if self.source == "digits" else 255)
        return lambda row: policy(flipped(row))


MIXINS: dict[str, type[OptimizerMixin]] = {
    "clip": ClipGradNorm, "ema": EMA, "dynamic_sparsity": DynamicSparsity, "refresh": Refresh, "ewc": EWC, "si": SI, "mas": MAS,
    "shrink_perturb": ShrinkPerturb, "sam": SAM, "asam": ASAM, "gsam": GSAM, "gradient_norm": GradientNorm, "wsam": WSAM,
    "look_sam": LookSAM, "esam": ESAM, "ignite": Ignite, "stale_sam": StaleSAM, "lars": LARS, "lamb": LAMB}
"""Key of each optimizer mixin, leftmost first: LARS and LAMB complete the base's update, so they stand next to it."""
MEMORY = ("ewc", "si", "mas", "refresh")
"""Those that want `everbatch.train.Consolidate` in the trainer."""


def _without_code(config: type) -> type:
    """A mixin's `Config` without what would take a function: no file and no command line may name code."""
    changed: list[Any] = []
    for name, hint in typing.get_type_hints(config).items():
        members = typing.get_args(hint) if not _is_code(hint) else (hint,)
        if any(_is_code(member) for member in members):
            rest = [member for member in members if not _is_code(member) and member is not type(None)]
            default = next(f.default for f in fields(config) if f.name == name)
            changed.append((name, functools.reduce(operator.or_, rest) if rest else Any, field(default=default, init=bool(rest))))
    return make_dataclass("Config", changed, bases=(config,), frozen=True, kw_only=True) if changed else config


def _is_code(hint: Any) -> bool:
    return typing.get_origin(hint) is collections.abc.Callable


def _summary(part: type) -> str:
    return (inspect.getdoc(part) or "").split("\n\n")[0]


@dataclass(frozen=True, kw_only=True)
class _Base:
    base: Literal["sgd", "adamw"] = "sgd"
    """torch.optim.SGD or torch.optim.AdamW."""
    lr: float = 0.03
    """Peak learning rate; > 0."""
    momentum: float | None = None
    """Of SGD alone; in [0, 1); null: 0."""
    weight_decay: float = 0.0
    """>= 0."""

    def __post_init__(self) -> None:
        check(0 < self.lr < math.inf, "optimizer", f"lr={self.lr}", "be > 0, and finite")
        check(0 <= self.weight_decay < math.inf, "optimizer", f"weight_decay={self.weight_decay}", "be >= 0, and finite")
        if self.momentum is not None:
            check_real("optimizer", "momentum", self.momentum, 0.0, 1.0, open_high=True)
            check(self.base == "sgd", "optimizer", f"momentum={self.momentum} with base={self.base}", "be null",
                  "it is SGD's; AdamW has betas of its own: optimizer.momentum=null")


_Options: Any = make_dataclass(
    "_Options", [(key, _without_code(part.Config) | None, field(default=None, metadata={"help": _summary(part)}))  # type: ignore[attr-defined]
                 for key, part in MIXINS.items()], bases=(_Base,), frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Optimizer(_Options):  # type: ignore[misc]
    """The base optimizer and the mixins over it; a mixin that is null is not composed."""

    @property
    def remembers(self) -> bool:
        """Whether a part wants to be called at a task's end, as `everbatch.train.Consolidate` does."""
        return any(getattr(self, key) is not None for key in MEMORY)

    def build(self, factory: Callable[[], nn.Module] | None = None) -> functools.partial[Any]:
        """The composed class with its options, for `Trainer`.

        Args:
            factory: builds the bare model on the CPU, for the mixins that take one (`Factory`).
        """
        base = torch.optim.SGD if self.base == "sgd" else torch.optim.AdamW
        used = {part: config for key, part in MIXINS.items() if (config := getattr(self, key)) is not None}
        options: dict[str, Any] = {}
        for part, config in used.items():
            values = {f.name: getattr(config, f.name) for f in fields(config)}
            if values.get("factory", ...) is None:
                values["factory"] = factory
            options |= {f"{part.__name__.lower()}_{name}": value for name, value in values.items()}
        if self.base == "sgd":
            options["momentum"] = self.momentum or 0.0
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
    ddp: dict[str, Any] | None = None
    """kind=ddp: options of torch's DistributedDataParallel by name: engine.ddp.bucket_cap_mb=100."""

    def __post_init__(self) -> None:
        if self.stage is not None:
            check_whole("engine", "stage", self.stage, 0, 3)

    def written(self) -> Engine:
        """The same engine with every default of DeepSpeed that changes numbers or memory written out, but for the batch sizes,
        which follow from other options and the number of ranks."""
        if self.kind != "deepspeed":
            return self
        whole = deepspeed_config(self.deepspeed, stage=self.stage, precision=self.precision)
        return replace(self, stage=whole["zero_optimization"].pop("stage"), deepspeed=whole,
                       precision="bf16" if whole["bf16"].pop("enabled") else "fp32")

    def build(self, batch_size: int, accumulation: int, world_size: int) -> str | Mapping[str, Any]:
        """The engine argument of `Trainer`."""
        check(self.ddp is None or self.kind == "ddp", "engine", f"ddp={self.ddp} with kind={self.kind}", "be left out, or null",
              "they are options of kind=ddp")
        if self.kind != "deepspeed":
            given = [f"{n}={v!r}" for n, v in vars(self).items() if n in ("stage", "precision", "deepspeed") and v is not None]
            check(not given, "engine", f"{', '.join(given)} with kind={self.kind}", "be left out, they are DeepSpeed's, or null",
                  "for bf16 set trainer.precision=bf16")
            return self.kind
        micro, rest = divmod(batch_size, world_size * accumulation)
        check(rest == 0 and micro > 0, "engine", f"batch_size={batch_size}",
              f"be divisible by {world_size} ranks * {accumulation} micro-batches")
        return deepspeed_config(self.deepspeed, micro_batch=micro, accumulation=accumulation, world_size=world_size,
                                stage=self.stage, precision=self.precision)


def check_together(recipe: Any) -> None:
    """Refuse options of a recipe's parts that cannot have an effect beside each other.

    Raises:
        ValueError: naming both, and the option to use instead.
    """
    engine, trainer = recipe.engine, recipe.trainer
    check(0 <= trainer.seed < 2**32, "trainer", f"seed={trainer.seed}", "be in [0, 2^32)", "numpy's generators take no other")
    check(engine.kind != "deepspeed" or trainer.precision == "fp32", "trainer", f"precision={trainer.precision} on DeepSpeed",
          "be left out", "set engine.precision=bf16")


def unused_together(recipe: Any) -> dict[str, str]:
    """Options of a recipe's parts that have no effect beside the others, by path, and why: what `config.parse` refuses where a
    user gives them, but not where a recipe's own file does."""
    found: dict[str, str] = {}
    schedule, kind = "trainer.schedule", recipe.trainer.schedule.kind
    if kind != "polynomial":
        found[f"{schedule}.power"] = f"it is of {schedule}.kind=polynomial"
    if kind != "steps":
        found |= dict.fromkeys((f"{schedule}.milestones", f"{schedule}.factor"), f"they are of {schedule}.kind=steps")
    replay = getattr(recipe, "replay", None)
    if replay is not None:
        if replay.capacity == 0:
            found |= dict.fromkeys((f"replay.{name}" for name in ("replay_batch", "alpha", "beta", "memory", "key", "reduction")),
                                   "replay.capacity=0 switches rehearsal off")
        if replay.method == "er":
            found |= dict.fromkeys(("replay.alpha", "replay.reduction"), "replay.method=er stores no logits")
        if replay.method == "dark_er":
            found["replay.beta"] = "replay.method=dark_er has no label term; dark_er_pp has both"
        if replay.memory == "ring":
            found["replay.key"] = "replay.memory=ring keeps the last samples of each task"
    return found
