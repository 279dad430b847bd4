"""Where samples come from: fixed collections of un-augmented inputs with labels, fetched by index.

A source is deterministic and knows nothing of tasks, batches or ranks. `load` opens one from a short text; `images.py`
holds those that decode files. Nothing here needs the vision extra until a source that does is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from everbatch.data.arrays import Array, as_inputs, as_labels, check_labels, numbered
from everbatch.data.memory import check_memory
from everbatch.errors import check, nearest
from everbatch.seeds import generator

__all__ = ["ConcatSource", "Source", "SubsetSource", "TensorSource", "TransformedSource", "load", "stratified_split"]

Resize = Literal["crop", "square"]


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

    def fetch(self, ids: Tensor) -> Tensor:
        """Un-augmented inputs of the samples `ids` (n,), shape (n, ...): uint8 (n, C, H, W) images or float tensors."""

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

    def fetch(self, ids: Tensor) -> Tensor:
        """See `Source.fetch`."""
        return self.base.fetch(self.ids[ids])

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return digest(self.base.fingerprint(), target_bytes(self.ids))


class TransformedSource:
    """Another source whose inputs pass through a deterministic function of a batch of inputs."""

    def __init__(self, base: Source, transform: Callable[[Tensor], Tensor], *, name: str) -> None:
        self.base, self.transform, self.name = base, transform, name
        self.targets, self.classes = base.targets, base.classes

    def __len__(self) -> int:
        return len(self.base)

    def fetch(self, ids: Tensor) -> Tensor:
        """See `Source.fetch`."""
        return self.transform(self.base.fetch(ids))

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

    def fetch(self, ids: Tensor) -> Tensor:
        """See `Source.fetch`; one call of every source that holds some of `ids`."""
        home = torch.bucketize(ids, self.ends, right=True)
        result: Tensor | None = None
        for index in torch.unique(home).tolist():
            rows = torch.nonzero(home == index).flatten()
            source = self.sources[index]
            got = source.fetch(ids[rows] - (int(self.ends[index]) - len(source)))
            if result is None:
                result = got.new_empty((len(ids), *got.shape[1:]))
            check(got.shape[1:] == result.shape[1:] and got.dtype == result.dtype, self.name,
                  f"{source.name!r} gives {tuple(got.shape[1:])} {got.dtype}",
                  f"be {tuple(result.shape[1:])} {result.dtype} as the others", "load them with one image_size")
            result[rows] = got
        return self.sources[0].fetch(ids) if result is None else result

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


def _digits(train: bool, image_size: int | None) -> Source:
    """scikit-learn's 1,797 handwritten digits, grey 8x8; see `load`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits: scikit-learn is not installed; pip install everbatch[vision]") from error
    bunch = load_digits()
    images = torch.as_tensor(np.asarray(bunch.images), dtype=torch.uint8).unsqueeze(1)
    targets = torch.as_tensor(np.asarray(bunch.target), dtype=torch.int64)
    if image_size is not None and image_size != 8:
        check_memory("digits", f"image_size={image_size}", 8 * len(images) * image_size**2, "lower it")
        wide = torch.nn.functional.interpolate(images.float(), size=image_size, mode="bilinear", antialias=True)
        images = wide.round().clamp(0, 16).to(torch.uint8)
    keep = stratified_split(targets, 0.25, seed=0)[0 if train else 1]
    return TensorSource(images[keep], targets[keep], name=f"digits/{'train' if train else 'test'}",
                        classes=tuple(map(str, range(10))))


LARGEST_IMAGE = 16_384
"""Side in pixels: one such image takes 800 MB."""
_KINDS = ("digits", "imagefolder", "npz", "torchvision")


def _named(spec: str | Path) -> tuple[str, str]:
    """Kind and rest of a text; a path on its own is a folder of images, or an .npz file."""
    text = str(spec)
    kind, colon, rest = text.partition(":")
    if kind in _KINDS and not isinstance(spec, Path):
        return kind, rest
    check(bool(text.strip()), "load", repr(text), f"be one of {', '.join(_KINDS)}, or a path")
    path = Path(text).expanduser()
    if path.is_dir():
        return "imagefolder", text
    if path.suffix == ".npz" and (path.is_file() or not colon):
        return "npz", text
    check(not path.is_file(), "load", f"file {text!r}", "be an .npz file or a folder of images")
    check("/" not in text or bool(colon), "load", f"no folder {text!r}", "exist", "check the path")
    raise ValueError(f"load: kind {kind!r} in {text!r}, must be one of {', '.join(_KINDS)}, or a path that exists; "
                     f"{nearest(kind, _KINDS)}")


def load(
    spec: str | Path, *, train: bool, image_size: int | None = None, resize: Resize = "crop", channels: int | None = None,
    leaf_classes: bool = False, download: bool = False, test_fraction: float = 0.25, split_seed: int = 0,
) -> Source:
    """Open the data set that a short text names: a path, or a kind and what it needs.

    - "digits": scikit-learn's handwritten digits, uint8 (1, 8, 8) with values 0 to 16 (not 255), a fixed stratified
      quarter held out for testing; other sizes by bilinear resizing.
    - "imagefolder:PATH", or the path of a folder alone: PATH/train/CLASS/... and PATH/test (or PATH/val)/CLASS/..., or
      PATH/CLASS/... with a seeded stratified split. Images are decoded on demand to uint8 (C, H, W). Linked folders
      count, hidden files and folders do not; what else is left out is said once on stderr, by rank 0.
    - "torchvision:NAME:ROOT": any classification data set of torchvision by its class name.
    - "npz:PATH", or a path that ends in .npz: arrays x_train, y_train, x_test, y_test (or train_images, train_labels and
      so on), or inputs and targets (or images and labels, x and y) with a seeded stratified split. Labels as in
      `TensorSource`. Images of whole numbers, 0 to 255, or bools may be (N, H, W), (N, H, W, C) or (N, C, H, W) and
      become bytes (N, C, H, W); floats may be (N, H, W, C) or (N, C, H, W); other arrays stay as they are. Never
      unpickles.

    Args:
        spec: the text.
        train: the training part or the test part.
        image_size: side of the square images in pixels. None keeps the size the data has, which must be one.
        resize: "crop" scales the shorter side to `image_size` and takes the centre; "square" scales both sides.
        channels: 1 (grey) or 3 (colour); by default 3 for folders, and what the first image has for torchvision.
        leaf_classes: a class is every folder that holds images itself, named by its path below the root (Omniglot's
            alphabet/character), not every top folder.
        download: let torchvision download.
        test_fraction: share of each class held out where the data brings no split.
        split_seed: seed of that split.

    Raises:
        ValueError: an unknown kind or data set (with the nearest name), a missing folder or file, an empty class
            folder, a damaged file, numbers out of range, and later, from `fetch`, an unreadable image or one of another
            size (each with its path).
        ImportError: the vision extra is needed and not installed.
    """
    kind, rest = _named(spec)
    check((kind == "digits") == (not rest), "load", f"{str(spec)!r}", "be 'digits' or 'kind:path'")
    whole = isinstance(image_size, int) and not isinstance(image_size, bool)
    check(image_size is None or (whole and 1 <= image_size <= LARGEST_IMAGE), "load", f"image_size={image_size!r}",
          f"be an integer in [1, {LARGEST_IMAGE}]")
    check(resize in ("crop", "square"), "load", f"resize={resize!r}", "be 'crop' or 'square'")
    check(channels in (None, 1, 3), "load", f"channels={channels!r}", "be 1 or 3")
    if kind == "digits":
        return _digits(train, image_size)
    if kind == "npz":
        from everbatch.data.npz import open_npz

        return open_npz(Path(rest).expanduser(), train, image_size, test_fraction, split_seed)
    from everbatch.data import images

    look = images.Look(image_size=image_size, resize=resize, channels=channels)
    if kind == "imagefolder":
        return images.open_folder(Path(rest).expanduser(), train, look, leaf_classes, test_fraction, split_seed)
    name, _, root = rest.partition(":")
    return images.open_torchvision(name, root, train, look, download)
