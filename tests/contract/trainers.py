"""The contract of trainer mixins: any one of the table, at the options that it declares, in a small continual run.

    absent    at `off`, the bits of a trainer without it
    parity    the same run as in one process on the whole batch
    acts      at `example` it changes what is learned; one that only looks keeps what it saw, and leaves every bit
    resume    left in the middle and resumed by other objects: the bits of the run that was not

A mixin that only calls what the optimizer has gets the parts that are called by it, at `off` where it is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import Record
from torch import nn

import learning
from everbatch import methods
from everbatch.composition import compose
from everbatch.contract import Contract
from everbatch.distributed import World
from everbatch.nn import convert_unmix_tns
from everbatch.train import ContinualEvaluation, Trainer

LEFT_AFTER = 7
"""Steps of the twelve: the last checkpoint is of the sixth, two into the second task. A mixin that changes the
tasks may have another number of them."""
TOLERANCE = 1e-5
"""Of weights and moments after 12 steps: sums over ranks round otherwise, some units in the last place of 0.1."""


@dataclass(frozen=True)
class Bare:
    """Builds the net of `learning`, without what differs between numbers of ranks, from the ambient stream. A value: its text is
    the same on every rank."""

    def __call__(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 15), nn.Tanh(), nn.Linear(15, 6))


BARE = Bare()


@dataclass(frozen=True)
class Vit:
    """A vision transformer of timm."""

    def __call__(self) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2, num_classes=6)


@dataclass(frozen=True)
class Normed:
    """A net with a batch norm, or an UnMix-TNS layer whose components all ranks share."""

    unmix: bool

    def __call__(self) -> nn.Module:
        net = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 6))
        if self.unmix:
            convert_unmix_tns(net, 3, synchronised=True)
        return net


NETS = {"mos": Vit(), "tent": Normed(unmix=True), "cotta": Normed(unmix=True), "bn_adapt": Normed(unmix=False)}
"""Nets of those that ask for more."""


def callees(key: str) -> dict[type[Contract], dict[str, Any]]:
    """The optimizer mixins that a trainer mixin is there for, by class, and which options each has as an example."""
    return {part: methods.options(part, part.example, BARE) for part in methods.optimizer_mixins().values()
            if part.called_by == key}


def run(key: str, host: str, *, on: bool = True, listed: bool = True, folder: Path | None = None, leave: int = -1,
        resume: bool = False, seed: int = 0, watched: bool = False) -> Any:
    """Fit a trainer with the mixin; returns it, left after some step or at the end.

    Args:
        on: at `example`, else at `off`. listed: with the mixin, else a trainer without. seed: of the first weights.
        watched: under ContinualEvaluation, which evaluates after every step.
    """
    part = methods.load(key)
    told = {} if not listed else methods.options(part, part.example if on else part.off, BARE)
    inner = callees(key)
    options: dict[str, Any] = {}
    for callee in inner if listed else ():
        values = methods.options(callee, callee.example if on else callee.off, BARE)
        options |= {f"{callee.__name__.lower()}_{name}": value for name, value in values.items()}
    optimizer = functools.partial(compose(*(inner if listed else ()), base=torch.optim.SGD), lr=0.05, momentum=0.9, **options)
    watch = (ContinualEvaluation,) if watched else ()
    cls = type("Learner", (*watch, *((part,) if listed else ()), Trainer), {})
    ranks = World.current().size if host != "plain" else 1
    recorder = None if folder is None else learning.recorder(folder, leave)
    config = Trainer.Config(batch_size=8, epochs=1, checkpoint_every=2, seed=3, reset_optimizer=False)
    torch.manual_seed(seed)
    model = NETS.get(key, BARE)()
    made = cls(model, optimizer, learning.engine(host, 8, 1, ranks), config=config, prepare=learning.scale, device="cpu",
               folder=None if folder is None else folder / "checkpoints", recorder=recorder, num_tasks=3,
               **{f"{part.__name__.lower()}_{name}": value for name, value in told.items()})
    try:
        made.fit(learning.stream(), resume=resume)
    except learning.Abandoned:
        return made
    assert leave < 0, "the run was not left"
    if recorder is not None:
        recorder.close()
    return made


@functools.cache
def bare(host: str, key: str = "replay") -> tuple[int, dict[str, torch.Tensor]]:
    """Steps and end of a trainer without any mixin: the same run, whichever mixin of one net it is compared with."""
    t = run(key, host, listed=False)
    return t.step, learning.whole(t)


def live(record: Record, store: Path, key: str, host: str) -> None:
    """Every check of one mixin on one host; on "plain" first, which leaves in `store` what the others are compared with."""
    folder = store / f"{key}-{host}-{World.current().size}"
    steps, without = bare(host, key) if key in NETS else bare(host)
    with record.check(f"absent/{host}/{key}") as found:
        quiet = run(key, host, on=False)
        found.require(quiet.step == steps == 12, f"{quiet.step} and {steps} steps")
        found.same_bits(learning.whole(quiet), without, "at off, against a trainer without it")
    expected = run(key, host, folder=folder / "whole")
    with record.check(f"acts/{host}/{key}") as found:
        if methods.load(key).observes:
            found.same_bits(learning.whole(expected), without, "it only looks")
            found.require(any(bool(v.isfinite().any()) for v in learning.kept(expected).values()), "it saw nothing")
        else:
            learned = learning.whole(expected)
            moved = learned.keys() != without.keys() or any(not torch.equal(learned[n], without[n]) for n in without)
            found.require(moved, "its example does nothing")
    if host == "plain":
        torch.save((learning.whole(expected), learning.kept(expected)), store / f"{key}.pt")
    else:
        with record.check(f"parity/{host}/{key}", TOLERANCE) as found:
            (one, saw), many = torch.load(store / f"{key}.pt", weights_only=True), learning.whole(expected)
            if methods.load(key).observes:  # counts are equal, or apart by a sample at least
                found.same_bits(learning.kept(expected), saw, "what it saw", TOLERANCE)
            found.require(one.keys() == many.keys(), f"{sorted(one)} and {sorted(many)}")
            found.measure(max((one[n].double() - many[n].double()).abs().max().item() for n in one))
    with record.check(f"resume/{host}/{key}") as found:
        run(key, host, folder=folder / "left", leave=LEFT_AFTER)
        again = run(key, host, folder=folder / "left", resume=True, seed=99)
        done = again.step == expected.step > LEFT_AFTER and len(again.matrix) == 3
        found.require(done, f"{again.step} steps of {expected.step}, matrix {again.matrix}")
        found.same_bits(learning.everything(again), learning.everything(expected), "resumed")
