"""Jobs of runs on FSDP2 that are evaluated before they begin, or go on: FOLDER; see worker.py and test_resume.py."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import Job, Record
from torch import Tensor

import learning
from everbatch import compose
from everbatch.evaluate.evaluator import accuracies
from everbatch.evaluate.export import whole_state
from everbatch.nn import SmallConv
from everbatch.optim import ShrinkPerturb
from everbatch.train import Trainer, WarmStart
from learning import Abandoned, stream


def net(seed: int = 0, frozen: bool = False) -> SmallConv:
    torch.manual_seed(seed)
    model = SmallConv(1, 6, 8, 4)
    model.head.requires_grad_(not frozen)
    return model


def scale(inputs: Tensor) -> Tensor:
    return inputs.float().view(-1, 1, 8, 8) / 16


def build(folder: Path, *, after: int = -1, **options: Any) -> Any:
    return learning.trainer("fsdp2", cls=Trainer, optimizer=learning.PLAIN, folder=folder, prepare=scale, augment=None,
                            recorder=learning.recorder(folder, after), **options)


def evaluated(t: Any) -> Any:
    accuracies(t, stream(), 0, list(stream().tasks))
    return t


def odd(one: Any, other: Any) -> list[str]:
    a, b = whole_state(one), whole_state(other)
    return [n for n in a if not torch.equal(a[n], b[n])]


def resumed(folder: Path, frozen: bool, decay_vectors: bool) -> list[str]:
    """Names that differ from the uninterrupted run after an evaluation of other weights and a resume."""
    whole = build(folder / "whole", model=net(0, frozen), decay_vectors=decay_vectors)
    whole.fit(stream())
    try:
        build(folder / "cut", after=5, model=net(0, frozen), decay_vectors=decay_vectors).fit(stream())
    except Abandoned:
        again = evaluated(build(folder / "cut", model=net(9, frozen), decay_vectors=decay_vectors))
    again.fit(stream(), resume=True)
    return odd(whole, again)


class Warm(WarmStart, Trainer):
    """Changes weights before the first step."""


def begun(decay_vectors: bool) -> list[str]:
    """Names that differ from the run without an evaluation before it."""
    optimizer = functools.partial(compose(ShrinkPerturb, base=torch.optim.SGD), lr=0.1, factory=functools.partial(net, 5),
                                  buffers="keep")
    config = Trainer.Config(batch_size=8, decay_vectors=decay_vectors)
    one, other = (Warm(net(), optimizer, "fsdp2", config=config, prepare=scale, device="cpu", first=True) for _ in range(2))
    one.fit(stream())
    evaluated(other).fit(stream())
    return odd(one, other)


def jobs(record: Record, folder: str) -> Iterator[Job]:
    for decay_vectors in (True, False):
        for frozen in (True, False):
            own = Path(folder) / f"{frozen}-{decay_vectors}"
            yield record.noted(f"resumed/{frozen}/{decay_vectors}", resumed, own, frozen, decay_vectors)
        yield record.noted(f"begun/{decay_vectors}", begun, decay_vectors)
