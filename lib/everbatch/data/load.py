"""`load`: a source from a short text, a path or a kind and what it needs.

Nothing here needs the vision extra until a source that does is opened.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from everbatch.data.images import Look, Resize, open_folder, open_torchvision
from everbatch.data.memory import check_memory
from everbatch.data.npz import open_npz
from everbatch.data.saved import open_saved
from everbatch.data.sources import Source, TensorSource, stratified_split
from everbatch.errors import check, nearest

__all__ = ["load"]


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
_KINDS = ("digits", "huggingface", "imagefolder", "npz", "torchvision")


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
    columns: tuple[str, str] | None = None,
) -> Source:
    """Open the data set that a short text names: a path, or a kind and what it needs.

    - "digits": scikit-learn's handwritten digits, uint8 (1, 8, 8) with values 0 to 16 (not 255), a fixed stratified
      quarter held out for testing; other sizes by bilinear resizing.
    - "imagefolder:PATH", or the path of a folder alone: PATH/train/CLASS/... and PATH/test (or PATH/val)/CLASS/..., or
      PATH/CLASS/... with a seeded stratified split. Images are decoded on demand to uint8 (C, H, W). Linked folders
      count, hidden files and folders do not; what else is left out is said once on stderr, by rank 0.
    - "torchvision:NAME:ROOT": any classification data set of torchvision by its class name.
    - "huggingface:PATH": the folder that `DatasetDict.save_to_disk` wrote, with parts train and test (or validation); its one
      column of images and its one of `ClassLabel`, or `columns`.
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
        columns: names of the image and of the label, of "huggingface".

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
    check(columns is None or kind == "huggingface", "load", f"columns={columns!r} of {str(spec)!r}", "be left out",
          "only huggingface:PATH has columns")
    if kind == "digits":
        return _digits(train, image_size)
    if kind == "npz":
        return open_npz(Path(rest).expanduser(), train, image_size, test_fraction, split_seed)
    look = Look(image_size=image_size, resize=resize, channels=channels)
    if kind == "huggingface":
        return open_saved(Path(rest).expanduser(), train, look, columns)
    if kind == "imagefolder":
        return open_folder(Path(rest).expanduser(), train, look, leaf_classes, test_fraction, split_seed)
    name, _, root = rest.partition(":")
    return open_torchvision(name, root, train, look, download)
