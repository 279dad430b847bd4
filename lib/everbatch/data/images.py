"""Sources that decode images on demand: class folders, and torchvision's data sets. Needs the vision extra."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from everbatch.data.arrays import as_labels, check_labels, numbered
from everbatch.data.folders import class_files
from everbatch.data.notes import tell
from everbatch.data.sources import Source, SubsetSource, digest, stratified_split, target_bytes
from everbatch.errors import check, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageSource", "Look", "Resize", "open_folder", "open_torchvision"]

Resize = Literal["crop", "square"]
THREADS = 4
"""Decoding releases the interpreter lock; more threads than this gain little beside loader workers."""
CACHE_BYTES = 2**28
"""Decoded images are kept when the whole source takes no more than this (CIFAR-10 takes 150 MB)."""
PROBES = 64
"""Files whose sizes a fingerprint looks at."""
LONGEST = 64
"""Times its shorter side; a longer image is cut before it is scaled."""


@dataclass(frozen=True)
class Look:
    """The shape every image is brought to; see `everbatch.data.load`."""

    image_size: int | None = None
    resize: Resize = "crop"
    channels: int | None = None

    def apply(self, image: Image, channels: int) -> np.ndarray:
        """The image as uint8 (channels, H, W): converted, scaled bilinearly, cut at the centre."""
        from PIL.Image import Resampling

        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours, and Pillow does not ask for it in a warning
        image = image.convert("L" if channels == 1 else "RGB")
        size = self.image_size
        if size is not None and image.size != (size, size):
            image = _middle(image)
            width, height = image.size
            if self.resize == "crop":
                scale = size / min(width, height)
                width, height = max(round(width * scale), size), max(round(height * scale), size)
                left, top = (width - size) // 2, (height - size) // 2
                image = image.resize((width, height), Resampling.BILINEAR)
                image = image.crop((left, top, left + size, top + size))
            else:
                image = image.resize((size, size), Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.uint8)
        return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _middle(image: Image) -> Image:
    """An image many times as long as wide, cut to its middle: scaling its shorter side alone could fill the memory."""
    short = min(image.size)
    width, height = (min(side, LONGEST * short) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))


def pixels_of(who: str, what: str, image: Image) -> np.ndarray:
    """An image as it is: uint8 (1, H, W) where it is grey, (3, H, W) where it has colours; the first of several frames.

    Raises:
        ValueError: more than 8 bits per channel, or what Pillow cannot convert.
    """
    check(not image.mode.startswith(("I", "F")), who, f"{what} has mode {image.mode!r}", "have 8 bits per channel",
          "convert it")
    return Look().apply(image, 1 if image.mode in ("1", "L", "LA") else 3)


class ImageSource:
    """N images, each opened by `read(i)` and brought to one shape; see `everbatch.data.Source`.

    Cost: a fetch decodes what it is asked for, in a few threads; small sources keep what they have decoded.
    """

    def __init__(
        self, name: str, read: Callable[[int], Image], labels: Sequence[str], targets: Tensor, classes: Sequence[str],
        look: Look, default_channels: int | None, *, files: _Files | None = None, identity: str | None = None,
    ) -> None:
        self.name, self.targets, self.classes = name, targets, tuple(classes)
        self._files, self._identity = files, name if identity is None else identity
        self._read, self._labels, self._look = read, labels, look
        check(len(targets) > 0, name, "no images", "hold at least one")
        check_labels(name, targets, len(self.classes))
        first = self._open(0)
        self._sizes = [] if files is None else files.some_sizes()
        channels = look.channels or default_channels or (1 if first.mode in ("1", "L") else 3)
        self._shape: tuple[int, ...] = self._shaped(0, first, channels).shape
        self._cache: Tensor | None = None
        self._have: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getstate__(self) -> dict[str, Any]:
        # A loader worker that is sent the source decodes for itself; sending the cache would cost more.
        return {**self.__dict__, "_cache": None, "_have": None}

    def _open(self, index: int) -> Image:
        try:
            image = self._read(index)
            image.load()
        except Exception as error:  # what Pillow raises for damaged and for huge files differs by format
            raise self._unreadable(index, error) from error
        check(not image.mode.startswith(("I", "F")), self.name,
              f"image {self._where(index)!r} has mode {image.mode!r}", "have 8 bits per channel", "convert it")
        return image

    def _unreadable(self, index: int, error: Exception) -> ValueError:
        return ValueError(f"{self.name}: cannot read image {self._where(index)!r} ({type(error).__name__}: {error}), must be "
                          "a readable image; replace or remove the file")

    def _where(self, index: int) -> str:
        """The path that a person can open; where an image has none of its own, its place in the data set."""
        return self._labels[index] if self._files is None else str(self._files.path(index))

    def _shaped(self, index: int, image: Image, channels: int) -> np.ndarray:
        try:
            return self._look.apply(image, channels)
        except Exception as error:  # a mode that Pillow cannot convert, or too little memory
            raise self._unreadable(index, error) from error

    def _decode(self, index: int) -> Tensor:
        image = self._open(index)
        grey = image.mode in ("1", "L", "LA") or self._look.channels is not None or self._shape[0] == 3
        check(grey, self.name, f"image {self._where(index)!r} has colours (mode {image.mode!r})", "be grey as the first",
              "pass channels=3, or channels=1 to drop the colours")
        pixels = self._shaped(index, image, self._shape[0])
        check(pixels.shape == self._shape, self.name, f"image {self._where(index)!r} is {pixels.shape[1:]}",
              f"be {self._shape[1:]} (height, width) as the first",
              "pass image_size (data.image_size in a recipe) to resize them all")
        return torch.from_numpy(pixels.copy(order="C"))

    def _decode_all(self, indices: list[int]) -> Tensor:
        if len(indices) > 2 * THREADS:
            # A pool per call: a pool that lives on would break in a forked loader worker.
            with ThreadPoolExecutor(THREADS) as pool:
                return torch.stack(list(pool.map(self._decode, indices)))
        rows = [self._decode(index) for index in indices]
        return torch.stack(rows) if rows else torch.empty((0, *self._shape), dtype=torch.uint8)

    def fetch(self, ids: Tensor) -> Tensor:
        """See `Source.fetch`: uint8 (n, C, H, W)."""
        if len(self) * int(np.prod(self._shape)) > CACHE_BYTES:
            return self._decode_all(ids.tolist())
        if self._cache is None or self._have is None:
            self._cache = torch.empty((len(self), *self._shape), dtype=torch.uint8)
            self._have = torch.zeros(len(self), dtype=torch.bool)
        missing = torch.unique(ids[~self._have[ids]])
        if len(missing):
            self._cache[missing] = self._decode_all(missing.tolist())
            self._have[missing] = True
        return self._cache[ids]

    def fingerprint(self) -> str:
        """See `Source.fingerprint`: paths below the folder, labels, shape, and the sizes of a few files, not pixels. A folder
        may be renamed or moved."""
        return digest(self._identity, str(self._shape), *self.classes, target_bytes(self.targets), *self._labels,
                      str(self._sizes))


@dataclass(frozen=True)
class _Files:
    """Opens image i of a list of files (a class, so that sources can be sent to loader workers)."""

    root: Path
    paths: tuple[str, ...]

    def path(self, index: int) -> Path:
        """Where image i is."""
        return self.root / self.paths[index]

    def some_sizes(self) -> list[int]:
        """Bytes of evenly spread files: a look at each would take minutes on a network's disk."""
        spread = torch.linspace(0, len(self.paths) - 1, min(len(self.paths), PROBES)).round().long()
        return [self.path(index).stat().st_size for index in spread.tolist()]

    def __call__(self, index: int) -> Image:
        from PIL import Image

        with Image.open(self.path(index)) as image:
            copy: Image.Image = image.copy()
            return copy


def _folder(name: str, part: str, root: Path, classes: dict[str, list[str]], look: Look) -> ImageSource:
    paths = tuple(path for paths in classes.values() for path in paths)
    targets = torch.tensor([label for label, paths in enumerate(classes.values()) for _ in paths])
    files = _Files(root, paths)
    return ImageSource(name, files, paths, targets, tuple(classes), look, default_channels=3, files=files,
                       identity=f"imagefolder/{part}")


def open_folder(
    root: Path, train: bool, look: Look, leaf_classes: bool, test_fraction: float, split_seed: int,
) -> Source:
    """The training or test part of a folder of class folders; see `everbatch.data.load`."""
    _require_pil("imagefolder")
    check(root.is_dir(), "imagefolder", f"no folder {str(root)!r}", "exist", "check the path")
    part = "train" if train else "test"
    name = f"imagefolder:{root.name}/{part}"
    if not (root / "train").is_dir():
        source = _folder(name, part, root, class_files(root, leaf_classes), look)
        parts = stratified_split(source.targets, test_fraction, split_seed, names=source.classes)
        return SubsetSource(source, parts[0 if train else 1], name=name)
    classes = class_files(root / "train", leaf_classes)
    if train:
        return _folder(name, part, root / "train", classes, look)
    held = next((root / other for other in ("test", "val") if (root / other).is_dir()), None)
    if held is None:
        raise ValueError(f"imagefolder: {str(root)!r} has 'train' and neither 'test' nor 'val', must have one of them; "
                         "add it, or put the class folders directly into the folder to have them split")
    tested = class_files(held, leaf_classes)
    odd = sorted(set(tested) ^ set(classes))
    check(not odd, "imagefolder", f"classes {odd[:5]} are in only one of {str(root / 'train')!r} and {str(held)!r}",
          "be in both")
    idle = sorted({path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."} - {"train", held.name})
    if idle:
        tell(f"imagefolder: {str(root)!r}: 'train' is trained on and {held.name!r} judged on; not used: {', '.join(idle)}")
    return _folder(name, part, held, tested, look)


def _require_pil(who: str) -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{who}: Pillow is not installed; pip install everbatch[vision]") from error


@dataclass(frozen=True)
class _Items:
    """Opens image i of a torchvision data set."""

    dataset: Any

    def __call__(self, index: int) -> Image:
        image: Image = self.dataset[index][0]
        return image


def open_torchvision(name: str, root: str, train: bool, look: Look, download: bool) -> Source:
    """One part of a torchvision classification data set by class name; see `everbatch.data.load`."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError("torchvision: it is not installed; pip install everbatch[vision]") from error
    kinds = {
        key: value for key, value in vars(datasets).items()
        if inspect.isclass(value) and issubclass(value, datasets.VisionDataset)
        and {"train", "split"} & set(inspect.signature(value).parameters)
    }
    check(name in kinds, "torchvision", f"data set {name!r}", "be a data set class with a train/test split",
          nearest(name, kinds))
    check(bool(root), "torchvision", f"no folder for {name}", "be 'torchvision:NAME:ROOT'")
    accepts = inspect.signature(kinds[name]).parameters
    options: dict[str, Any] = {"root": str(Path(root).expanduser())}
    if "download" in accepts:
        options["download"] = download
    dataset = _part_of(kinds[name], name, options, train, "train" in accepts)
    found = next((getattr(dataset, key) for key in ("targets", "labels", "_labels") if hasattr(dataset, key)), None)
    if found is None and hasattr(dataset, "_samples"):
        found = [target for _, target in dataset._samples]
    if found is None:
        found = [dataset[i][1] for i in range(len(dataset))]
    targets = as_labels(f"torchvision:{name}", "targets", found)
    classes = getattr(dataset, "classes", None) or numbered(f"torchvision:{name}", "targets", targets)
    part = "train" if train else "test"
    labels = [f"{name}/{part}[{index}]" for index in range(len(dataset))]
    return ImageSource(f"torchvision:{name}/{part}", _Items(dataset), labels, targets,
                       [str(c[0] if isinstance(c, tuple) else c) for c in classes], look, default_channels=None)


def _part_of(kind: Any, name: str, options: dict[str, Any], train: bool, by_flag: bool) -> Any:
    """The training or the test part, under the first of its usual names that the data set knows."""
    parts: tuple[Any, ...] = (train,) if by_flag else ("train", "trainval", "train-standard") if train else ("test", "val")
    for part in parts:
        try:
            return kind(**options, **{"train" if by_flag else "split": part})
        except RuntimeError as error:  # torchvision's "not found or corrupted"
            raise ValueError(f"torchvision: {name} in {options['root']!r}: {error}, must be there; pass download=True") from error
        except ValueError as error:
            if "for argument split" not in str(error):
                raise
            known = str(error)
    raise ValueError(f"torchvision: {name} has no part called {' or '.join(parts)} ({known}), must have one; open it yourself, "
                     "and wrap it in a source")
