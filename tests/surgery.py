"""Small runs of MOS over a vision transformer, on any engine, and what must hold of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import learning
from everbatch import compose
from everbatch.data import Batch, Task
from everbatch.distributed import World
from everbatch.engines.frozen import _whole
from everbatch.nn import AdapterLayout, grow_head, reading_adapters
from everbatch.train import MOS, GrowingHead, StepRecord, Trainer, TrainerMixin

BATCH, STEPS = 12, 4
"""Global batch, and steps of each of the three tasks."""
SGD = functools.partial(compose(base=torch.optim.SGD), lr=0.05, momentum=0.9, weight_decay=0.01)
ADAMW = functools.partial(compose(base=torch.optim.AdamW), lr=0.01, weight_decay=0.1)
SHAPE = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 2}
"""Of the network."""
OPTIONS = {"rank": 4, "scale": 1.0, "dropout": 0.0, "align_epochs": 3, "align_samples": 8, "align_lr": 0.1, "rows": 5,
           "head_rate": 0.5}


def vit(classes: int = 6, **options: Any) -> nn.Module:
    """timm's standard block, small."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(**{**SHAPE, "num_classes": classes, **options})


def growing(growths: Sequence[Any] = ()) -> nn.Module:
    """The same with a head of two classes, and a part for each growth."""
    return grow_head(vit(2), [g["classes"] for g in growths])


class Watch(TrainerMixin):
    """Leftmost: notes masters where MOS acts, and spoils or stills steps."""

    spoil: tuple[int, ...] = ()
    """Steps whose samples are not finite."""
    still = False
    """From the second task on the rate is 0."""
    noted: dict[str, Any]

    def on_task_start(self, task: Task) -> None:
        super().on_task_start(task)  # type: ignore[misc]
        self.noted[f"start/{task.id}"] = masters(self)

    def augment_batch(self, parts: list[Batch]) -> list[Batch]:
        if self.still and parts[0].task:
            for group in self.optimizer.param_groups:  # type: ignore[attr-defined]
                group["lr"] = 0.0
        parts = super().augment_batch(parts)  # type: ignore[misc]
        if self.step in self.spoil:
            assert isinstance(parts[0].inputs, Tensor)
            parts[0].inputs.fill_(torch.nan)
        return parts

    def after_step(self, record: StepRecord) -> None:
        before = masters(self) if record.step in self.spoil else {}
        super().after_step(record)  # type: ignore[misc]
        if record.step in self.spoil:
            self.noted[f"skipped/{record.step}"] = record.applied, before, masters(self)

    def consolidate(self, task: Task) -> None:
        self.noted[f"end/{task.id}"] = masters(self)
        super().consolidate(task)  # type: ignore[misc]
        self.noted[f"aligned/{task.id}"] = masters(self)


class Learner(Watch, MOS, Trainer):
    """MOS, watched."""


class Growing(GrowingHead, Watch, MOS, Trainer):
    """The same with a head that grows."""


def trainer(host: str, cls: type = Learner, *, folder: Path | None = None, recorder: Any = None, optimizer: Any = SGD,
            spoil: tuple[int, ...] = (), still: bool = False, **options: Any) -> Any:
    """Of MOS with OPTIONS and these."""
    world = World.current() if host != "plain" else World()
    config = Trainer.Config(batch_size=BATCH, epochs=2, seed=3, reset_optimizer=False, checkpoint_every=1)
    grown = growing if cls is Growing else None
    made = cls(growing() if grown else vit(), optimizer, learning.engine(host, BATCH, 1, world.size), config=config, device="cpu",
               prepare=learning.scale, folder=folder, recorder=recorder, grown=grown,
               **{f"mos_{name}": value for name, value in {**OPTIONS, **options}.items()})
    made.spoil, made.still, made.noted = spoil, still, {}
    return made


def masters(t: Any) -> dict[str, Tensor]:
    """Whole, on every rank. Collective."""
    host = t.optimizer.host
    return {n: v.clone() for n, v in host.gather([(s, s.data) for s in host.shards], host.names).items()}


def visible(t: Any) -> dict[str, Tensor]:
    """What the network computes with, whole. Collective."""
    return {n: _whole(p).detach().clone() for n, p in t.module.named_parameters() if p.requires_grad}


def head_rows(values: dict[str, Tensor], below: int) -> list[Tensor]:
    """Of the classes under `below`, of a head in one layer."""
    return [values["head.weight"][:below], values["head.bias"][:below]]


@torch.no_grad()
def by_hand(t: Any, images: Tensor) -> tuple[Tensor, list[list[int]]]:
    """Scores and paths of these images, one after the other, from a table of the features under every adapter. Collective where
    weights are sharded: the same images on every rank."""
    state = t.states[MOS]
    archive, bounds = state.archive, [0, *state.ends]
    of_class = [task for task in range(len(archive)) for _ in range(bounds[task], bounds[task + 1])]
    weights = masters(t)
    t.module.eval()
    table = []
    for values in archive:
        with reading_adapters(t.module, values):
            found: list[Tensor] = []
            hook = t.module.head.register_forward_pre_hook(lambda _layer, inputs, found=found: found.append(inputs[0]))
            t.engine.call(images)
            hook.remove()
            table.append(found[0])
    scores, paths = [], []
    for row in range(len(images)):
        cosines = functional.cosine_similarity(table[0][row : row + 1], state.prototypes)
        task, path = of_class[int(cosines.argmax())], []
        while True:
            path.append(task)
            z = functional.linear(table[task][row], weights["head.weight"], weights["head.bias"])[: bounds[-1]]
            following = of_class[int(z.argmax())]
            if following == task or len(path) == 4:
                break
            task = following
        scores.append(z.softmax(0) + (len(archive) * cosines).softmax(0))
        paths.append(path)
    return torch.stack(scores), paths


def fresh_vector(t: Any, task: int) -> Tensor:
    """What init="fresh" begins a task with."""
    from everbatch import seeds
    from everbatch.nn import BottleneckAdapter

    values = {}
    for name in ("blocks.0.adapter", "blocks.1.adapter"):
        made = BottleneckAdapter(8, OPTIONS["rank"], generator=seeds.generator(3, "adapter", name, task))  # type: ignore[arg-type]
        values |= {f"{name}.{part}": p for part, p in made.named_parameters()}
    return AdapterLayout.of(t.module).flat(values)


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names that are not in both, or under which other bits are. NaN is equal to itself."""
    def bits(value: Tensor) -> bytes:
        return value.detach().cpu().contiguous().numpy().tobytes()

    return sorted(one.keys() ^ other.keys()) + [n for n in one.keys() & other.keys() if bits(one[n]) != bits(other[n])]
