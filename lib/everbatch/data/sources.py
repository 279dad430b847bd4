"""Where samples come from: fixed collections of un-augmented inputs with labels, fetched by index.

A source is deterministic and knows nothing of tasks, batches or ranks. `load.py` opens one from a short text; `images.py`
holds those that decode files. Nothing here needs the vision extra.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from everbatch.data.arrays import Array, as_inputs, as_labels, check_labels, numbered
from everbatch.errors import check
from everbatch.rows import Rows, named, unnamed
from everbatch.seeds import generator

__all__ = ["TARGETS", "ConcatSource", "Source", "SubsetSource", "TensorSource", "TransformedSource", "stratified_split"]

TARGETS = "targets"
"""The name under which a source gives targets that are no labels, among inputs by name."""


@runtime_checkable
class Source(Protocol):
    """A collection of N labelled samples of one shape."""

    @property
    def name(self) -> str:
        """What it is, for messages and fingerprints."""

    @property
    def targets(self) -> Tensor:
        """(N,) int64 labels in [0, len(classes))."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each label."""

    def fetch(self, ids: Tensor) -> Rows:
        """Un-augmented inputs of the samples `ids` (n,), shape (n, ...): uint8 (n, C, H, W) images or float tensors; or several
        by name, among which "targets" are what the loss compares outputs with, in place of the labels."""

    def fingerprint(self) -> str:
        """A short hash that differs when the samples differ; cheap, so it may look at a part of them."""

    def __len__(self) -> int: ...


def digest(*parts: str | bytes) -> str:
    """16 hexadecimal digits that identify a sequence of texts and bytes."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def target_bytes(targets: Tensor) -> bytes:
    """The labels as bytes, for `digest`."""
    return targets.to(torch.int64).contiguous().numpy().tobytes()


class TensorSource:
    """Samples held in memory.

    Args:
        inputs: (N, ...) tensor or array of numbers of any type, kept by reference where torch can work with the type.
        targets: (N,) integers of any width or bools, or a column (N, 1) of them, or exact one-hot rows (N, C).
        name: for messages and the fingerprint.
        identity: stands for the name in the fingerprint, where that may change and the samples not.
        classes: name of each label; by default "0", "1", ... up to the largest label. Names left out may be widened,
            or taken from the other source, where sources of one stream are put together.

    Raises:
        ValueError: no samples, lengths that differ, labels that are no integers or out of range.
    """

    def __init__(
        self, inputs: Array, targets: Array, *, name: str = "tensors", classes: Sequence[str] | None = None,
        identity: str | None = None,
    ) -> None:
        self.name, self._identity = name, name if identity is None else identity
        self.inputs = as_inputs(name, "inputs", inputs)
        self.targets = as_labels(name, "targets", targets)
        check(len(self.targets) == len(self.inputs), name,
              f"inputs {tuple(self.inputs.shape)} and targets {tuple(self.targets.shape)}", "be (N, ...) and (N,)")
        check(len(self.targets) > 0, name, "no samples", "hold at least one")
        self.implied = classes is None
        self.classes = tuple(classes) if classes is not None else numbered(name, "targets", self.targets)
        check_labels(name, self.targets, len(self.classes))

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, ids: Tensor) -> Tensor:
        """See `Source.fetch`."""
        return self.inputs[ids]

    def fingerprint(self) -> str:
        """See `Source.fingerprint`; looks at 64 evenly spread samples."""
        spread = torch.linspace(0, len(self) - 1, min(len(self), 64)).round().long()
        rows = self.inputs[spread].contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()
        shape = f"{tuple(self.inputs.shape)} {self.inputs.dtype}"
        return digest(self._identity, shape, *self.classes, target_bytes(self.targets), rows)


class SubsetSource:
    """The samples `ids` of another source, renumbered from 0; labels and class names stay."""

    def __init__(self, base: Source, ids: Tensor, *, name: str | None = None) -> None:
        self.base, self.ids = base, ids
        self.name = name or f"{base.name}[{len(ids)}]"
        self.targets, self.classes = base.targets[ids], base.classes

    def __len__(self) -> int:
        return len(self.ids)

    def fetch(self, ids: Tensor) -> Rows:
        """See `Source.fetch`."""
        return self.base.fetch(self.ids[ids])

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return digest(self.base.fingerprint(), target_bytes(self.ids))


class TransformedSource:
    """Another source whose inputs pass through a deterministic function of a batch of inputs, of each where they have names."""

    def __init__(self, base: Source, transform: Callable[[Tensor], Tensor], *, name: str) -> None:
        self.base, self.transform, self.name = base, transform, name
        self.targets, self.classes = base.targets, base.classes

    def __len__(self) -> int:
        return len(self.base)

    def fetch(self, ids: Tensor) -> Rows:
        """See `Source.fetch`."""
        rows = self.base.fetch(ids)
        if not isinstance(rows, dict):
            return self.transform(rows)
        return {name: value if name == TARGETS else self.transform(value) for name, value in rows.items()}

    def fingerprint(self) -> str:
        """See `Source.fingerprint`; the transform counts by `name`."""
        return digest(self.base.fingerprint(), self.name)


class ConcatSource:
    """Sources of one label set one after the other; sample i of source d is sample offset_d + i.

    Raises:
        ValueError: no sources, or class names that differ (names the source).
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        check(len(sources) > 0, "ConcatSource", "no sources", "be at least one")
        self.sources = tuple(sources)
        self.classes = self.sources[0].classes
        for source in self.sources:
            check(source.classes == self.classes, "ConcatSource",
                  f"{source.name!r} has classes {source.classes[:5]}",
                  f"be those of {self.sources[0].name!r}, {self.classes[:5]}")
        self.name = "+".join(source.name for source in self.sources)
        self.targets = torch.cat([source.targets for source in self.sources])
        self.ends = torch.tensor([len(source) for source in self.sources]).cumsum(0)

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, ids: Tensor) -> Rows:
        """See `Source.fetch`; one call of every source that holds some of `ids`."""
        home = torch.bucketize(ids, self.ends, right=True)
        result: dict[str, Tensor] = {}
        for index in torch.unique(home).tolist():
            rows = torch.nonzero(home == index).flatten()
            source = self.sources[index]
            parts = named("inputs", source.fetch(ids[rows] - (int(self.ends[index]) - len(source))))
            result = result or {name: part.new_empty((len(ids), *part.shape[1:])) for name, part in parts.items()}
            check(parts.keys() == result.keys(), self.name, f"{source.name!r} gives {sorted(parts)}",
                  f"be {sorted(result)} as the others")
            for name, got in parts.items():
                like = result[name]
                check(got.shape[1:] == like.shape[1:] and got.dtype == like.dtype, self.name,
                      f"{source.name!r} gives {tuple(got.shape[1:])} {got.dtype}",
                      f"be {tuple(like.shape[1:])} {like.dtype} as the others", "load them with one image_size")
                like[rows] = got
        return unnamed("inputs", result) if result else self.sources[0].fetch(ids)

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return digest(*(source.fingerprint() for source in self.sources))


def stratified_split(
    targets: Tensor, fraction: float, seed: int, *, names: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Split samples into (rest, held out), ascending ids, with round(fraction * n) of each class held out.

    At least one sample of a class is held out and at least one stays. A function of (targets, fraction, seed) alone. `names` of
    the classes are for messages.

    Raises:
        ValueError: fraction outside (0, 1), or a class with a single sample (names it).
    """
    check(0.0 < fraction < 1.0, "stratified_split", f"fraction={fraction!r}", "be in (0, 1)")
    held = torch.zeros(len(targets), dtype=torch.bool)
    for label in torch.unique(targets).tolist():
        rows = torch.nonzero(targets == label).flatten()
        check(len(rows) > 1, "stratified_split", f"1 sample of class {label if names is None else repr(names[label])}",
              "be at least 2 to be split", "add samples, leave the class out, or give a test part of its own")
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        held[rows[torch.randperm(len(rows), generator=generator(seed, "split", label))[:count]]] = True
    return torch.nonzero(~held).flatten(), torch.nonzero(held).flatten()
