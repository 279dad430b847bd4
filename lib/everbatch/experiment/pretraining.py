"""A network that has learned something before the run: weights that are given, or trained here once and kept.

Where there is no internet, "pretrained" means trained by this machine on a part of the run's own data set first. What comes of
it is kept under a name made of everything that went in, so that the next run finds it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from everbatch import checkpoint, seeds
from everbatch.checkpoint.folder import whoever_holds
from everbatch.data import Source
from everbatch.data.notes import tell
from everbatch.data.sources import digest
from everbatch.distributed import World
from everbatch.errors import check, check_real, check_whole
from everbatch.experiment import pretraining_loop
from everbatch.experiment.data import Data
from everbatch.experiment.model import Model
from everbatch.nn.heads import head_of
from everbatch.train.begin import begin_from
from everbatch.version import __version__

__all__ = ["Pretrained", "Pretraining", "begin_pretrained", "pretrained"]

WHO = "pretraining"


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """What the network has learned before the run."""

    weights: str | None = None
    """Weights to begin with, in place of training here: a .safetensors file, or the folder of a run."""
    classes: float = 0.5
    """Share of the data set's classes that the network is trained on first, at random; in (0, 1]. Where it is below 1, the run
    itself is on the others."""
    samples: int | None = None
    """At most so many training samples of each class; null: all."""
    epochs: int = 30
    """>= 1."""
    batch_size: int = 64
    """>= 1."""
    lr: float = 2e-3
    """Peak of AdamW's one cycle; > 0."""
    weight_decay: float = 0.05
    """>= 0."""
    rotations: bool = True
    """Every class turned by a quarter, by a half and by three is three more classes."""
    jitter: float = 0.1
    """Images are turned by up to so many radians, scaled and shifted by up to this share; in [0, 0.5]; 0: not."""
    seed: int = 0
    """Of the classes, the network and the order of samples."""
    cache: str | None = None
    """Folder of what was trained; null: EVERBATCH_CACHE, else ~/.cache/everbatch."""

    def __post_init__(self) -> None:
        check_real(WHO, "classes", self.classes, 0.0, 1.0, open_low=True)
        check_real(WHO, "lr", self.lr, 0.0, open_low=True)
        check_real(WHO, "weight_decay", self.weight_decay, 0.0)
        check_real(WHO, "jitter", self.jitter, 0.0, 0.5)
        for name in ("epochs", "batch_size", *(["samples"] if self.samples is not None else [])):
            check_whole(WHO, name, getattr(self, name), 1)
        check_whole(WHO, "seed", self.seed, 0, 2**32 - 1)

    @property
    def folder(self) -> Path:
        """Where what was trained is kept."""
        told = self.cache or os.environ.get("EVERBATCH_CACHE") or "~/.cache/everbatch"
        return Path(told).expanduser() / "pretrained"

    def labels(self, source: Source) -> tuple[int, ...]:
        """The classes of `source` that the network is trained on first, in rising order; the rest, where there is one, is the
        run's. At least one."""
        count = max(1, round(self.classes * len(source.classes)))
        order = torch.randperm(len(source.classes), generator=seeds.generator(self.seed, WHO, "classes"))
        return tuple(sorted(order[:count].tolist()))

    def rest(self, source: Source) -> tuple[int, ...]:
        """The classes of `source` that are left for the run: all, where `classes` is 1.

        Raises:
            ValueError: none is left.
        """
        if self.classes == 1.0:
            return tuple(range(len(source.classes)))
        known = set(self.labels(source))
        left = tuple(label for label in range(len(source.classes)) if label not in known)
        check(bool(left), WHO, f"classes={self.classes} of {len(source.classes)}", "leave one for the run", "lower it")
        return left


@dataclass(frozen=True)
class Pretrained:
    """A network's weights, trained on a part of a data set."""

    state: dict[str, Tensor]
    """By the bare network's names, its head too: a row for each class, first as they are, then turned."""
    path: Path
    """Where rank 0 keeps them."""
    classes: tuple[int, ...]
    """Labels of the source that they were trained on, in the order of the head's rows."""
    seconds: float
    """That it took now; 0.0 where they were kept."""

    @torch.no_grad()
    def put_into(self, net: nn.Module, *, head: bool) -> nn.Module:
        """Give a bare network these weights and buffers, all but those of its head, or (`head`) all; returns it.

        Raises:
            ValueError: another network, by the first name that does not fit.
        """
        own = net.state_dict()
        last = f"{head_of(net)}."
        for name, value in own.items():
            if name.startswith(last) and not head:
                continue
            given = self.state.get(name)
            fits = given is not None and given.shape == value.shape
            theirs = "nothing" if given is None else f"shape {tuple(given.shape)}"
            check(fits, WHO, f"{name!r} has shape {tuple(value.shape)} and {theirs} in {str(self.path)!r}", "be the same")
            assert given is not None
            value.copy_(given)
        return net


def pretrained(options: Pretraining, model: Model, source: Source, data: Data, world: World) -> Pretrained:
    """A network trained on the classes `options.labels(source)` of a training source, or what an earlier run kept of the same.

    Rank 0 trains, with all cores of its machine (or one where that is faster, or its GPU) and AdamW under one cycle of rates,
    while the others wait; of several runs at once, one trains. The file is named by a hash of the samples, of all options, of
    the network and of this code, and appears whole or not at all.

    Args:
        options: all but `weights`.
        model: the network; without timm's weights, and with a fixed head.
        source: training samples (C, H, W).
        data: what makes model inputs of samples.

    Raises:
        ValueError: on every rank, what rank 0 met: a folder that cannot be written, a network that does not take the data, a
            loss that is not finite.

    Collective. Cost: the training, once; then a file is read by rank 0 and sent to the others.
    """
    made: Pretrained | None = None
    work = _made(options, replace(model, pretrained=False, head="fixed"), source, data) if world.rank == 0 else None
    while True:  # a beat for each epoch: no rank waits in one collective for longer than its limit
        problem, done = "", False
        try:
            made = next(work) if work is not None else None
            done = made is not None
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            problem = str(error)
        found: Any = world.gather((problem, done))[0]
        if found[0]:
            raise ValueError(found[0] if found[0].startswith(("pretraining", "model", "data")) else f"{WHO}: {found[0]}")
        if found[1]:
            break
    result: Any = world.gather(made)[0]
    assert isinstance(result, Pretrained)
    return result


def begin_pretrained(
    options: Pretraining, model: Model, net: nn.Module, source: Source, data: Data, world: World, *, head: bool = False,
) -> nn.Module:
    """A run's network with what it has learned before: `options.weights` where they are given, what timm has loaded where
    `model.pretrained` says so, else `pretrained`; returns it.

    Args:
        net: the run's own, bare, on the CPU.
        head: with the head too, which must have as many classes. Without, it stays as it is.

    Raises:
        ValueError: as `pretrained` and `everbatch.train.begin.begin_from`.

    Collective.
    """
    if options.weights is not None:
        begin_from(net, options.weights, world, skip=() if head else (f"{head_of(net)}.*",))
        return net
    if model.pretrained:
        return net
    found = pretrained(options, model, source, data, world)
    taken = f"in {found.seconds:.0f} s and kept as" if found.seconds else "before: it is"
    tell(f"{WHO}: {model.name} was trained on {len(found.classes)} of {len(source.classes)} classes of {source.name} {taken} "
         f"{found.path}")
    return found.put_into(net, head=head)


def _made(options: Pretraining, model: Model, source: Source, data: Data) -> Iterator[Pretrained | None]:
    """On rank 0: None for every beat while there is something to wait for, then the weights."""
    labels = options.labels(source)
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"{_hash(options, model, source, data)}.safetensors"
    if (kept := _kept(path, labels)) is not None:
        yield kept
        return
    with whoever_holds(path.with_suffix(".lock")) as turn:
        for mine in turn:  # another run may be training the same
            if mine:
                break
            yield None
        if (kept := _kept(path, labels)) is not None:
            yield kept
            return
        training = pretraining_loop.Training(options, model, source, data, labels)
        for _ in training.epochs():
            yield None
        about = {"everbatch_version": __version__, "classes": json.dumps([source.classes[label] for label in labels]),
                 "pretraining": json.dumps(asdict(options)), "accuracy": json.dumps(training.accuracy)}
        checkpoint.export_weights(path, training.state, about)
    yield Pretrained(training.state, path, labels, training.seconds)


def _kept(path: Path, labels: tuple[int, ...]) -> Pretrained | None:
    """What the file holds; None where there is none, or none that can be read."""
    try:
        with safe_open(path, framework="pt"):
            return Pretrained(load_file(path), path, labels, 0.0)
    except (OSError, SafetensorError):
        return None


def _hash(options: Pretraining, model: Model, source: Source, data: Data) -> str:
    """Of everything that the weights follow from."""
    told = {k: v for k, v in asdict(options).items() if k not in ("weights", "cache")}
    inputs = {name: getattr(data, name) for name in ("mean", "std", "image_size")}
    code = [Path(module).read_bytes() for module in (__file__, str(pretraining_loop.__file__))]
    return digest(source.fingerprint(), json.dumps([told, asdict(model), inputs], sort_keys=True, default=str), __version__,
                  torch.__version__, *code)
