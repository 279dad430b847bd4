"""The options that say what runs the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from everbatch.config.deepspeed import deepspeed_config
from everbatch.errors import check, check_whole

__all__ = ["Engine"]


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
