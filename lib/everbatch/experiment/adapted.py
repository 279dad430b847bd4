"""Class-incremental learning on a network that has learned other classes before, with an adapter for each task."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
from torch import nn

from everbatch.data import Stream
from everbatch.distributed import World
from everbatch.errors import check
from everbatch.experiment.base import Finished
from everbatch.experiment.class_incremental import ClassIncremental
from everbatch.experiment.model import Model
from everbatch.experiment.pretraining import Pretraining, begin_pretrained
from everbatch.experiment.timm_cache import check_cached
from everbatch.train import MOS, Replay

__all__ = ["AdaptedTasks", "Pretrained", "small_vit"]


def small_vit() -> Model:
    """A vision transformer for small images: patches of 2 pixels, width 64, four blocks."""
    return Model(name="vit_tiny_patch16_224", options={"patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4})


@dataclass(frozen=True, kw_only=True)
class Pretrained(ClassIncremental):
    """A class-incremental run that begins with a network that knows other classes: trained here on a part of the data set's,
    which the run then leaves out; or given, and the run is on all."""

    pretraining: Pretraining = field(default_factory=Pretraining)
    """What the network has learned before. Where the run leaves a part of the classes to it, `tasks` divide the others."""
    replay: Replay.Config | None = None
    """Rehearsal; null for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.init is None, self.title, f"init={self.init!r}", "be left out", "set pretraining.weights")
        check(not self.trained_here or len(self.data.sources) < 2, self.title, f"{len(self.data.sources)} data.sources",
              "be one data set, of which a part is trained on before", "or give pretraining.weights")
        check(not self.trained_here or self.scenario not in ("domain", "growing", "iid"), self.title,
              f"scenario={self.scenario}", "divide classes, of which a part is trained on before",
              "or give pretraining.weights")

    @property
    def trained_here(self) -> bool:
        """Whether the network is trained by this machine first."""
        return self.pretraining.weights is None and not self.model.pretrained

    def unused(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why."""
        found = super().unused()
        given = "pretraining.weights are given" if self.pretraining.weights else "model.pretrained=true"
        if not self.trained_here:
            names = (f.name for f in fields(Pretraining) if f.name != "weights")
            found |= {f"pretraining.{name}": given for name in names}
        return found

    def stream(self) -> Stream:
        """The samples of the classes that the network has not been trained on, as tasks."""
        pairs = self.data.open_all()
        if not self.trained_here:
            return self.split.make(self.scenario, pairs, self.tasks, self.trainer.seed)
        rest = self.pretraining.rest(pairs[0][0])
        seed = self.trainer.seed if self.split.order_seed is None else self.split.order_seed
        order = self.split.class_order
        if order is None:
            order = tuple(np.random.RandomState(seed).permutation(np.array(rest)).tolist())
        both = sorted(set(order) - set(rest))
        check(not both, self.title, f"split.class_order has {both[:5]}", "be of classes that pretraining leaves",
              f"they are {list(rest)[:20]}")
        return replace(self.split, class_order=order).make(self.scenario, pairs, self.tasks, self.trainer.seed)

    def check_stream(self, stream: Stream, world: World) -> None:
        """Refuse weights of timm that are not on this machine."""
        super().check_stream(stream, world)
        if self.model.pretrained:
            check_cached(self.model.name, "or give pretraining.weights, or leave out model.pretrained to train a network here")

    def begun(self, model: nn.Module, stream: Stream, world: World) -> nn.Module:
        """With what it has learned before; its head is fresh."""
        source = self.data.open_all()[0][0]
        return begin_pretrained(self.pretraining, self.model, model, source, self.data, world)


@dataclass(frozen=True, kw_only=True)
class AdaptedTasks(Pretrained):
    """Options of this recipe."""

    title: ClassVar[str] = "mos"

    model: Model = field(default_factory=small_vit)
    mos: MOS.Config | None = field(default_factory=MOS.Config)
    """An adapter for each task; null: the network and its head are trained on, as they are."""
    output: str = "runs/mos"
    """Folder of this run: model.safetensors, result.json, config.yaml, figures, TensorBoard, checkpoints."""

    def finish(self, done: Finished) -> tuple[dict[str, Any], list[str]]:
        """As every class-incremental run, and the adapters that are stored."""
        own, lines = super().finish(done)
        trainer: Any = done.trainer
        if self.mos is not None and self.mos.active:
            state = trainer.states[MOS]
            own["adapters"] = len(state.archive)
            lines.append(f"{'adapters':<30} {len(state.archive)} of {state.archive.shape[1]} weights")
        return own, lines
