"""Sources in one .npz file: arrays as numpy, Keras and MedMNIST write them. Never unpickles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everbatch.data.arrays import as_inputs, as_labels, numbered
from everbatch.data.memory import check_memory
from everbatch.data.notes import tell
from everbatch.data.sources import Source, SubsetSource, TensorSource, stratified_split
from everbatch.errors import check

__all__ = ["open_npz"]

_SPLIT = (("x_{}", "y_{}"), ("X_{}", "y_{}"), ("{}_images", "{}_labels"))
_WHOLE = (("inputs", "targets"), ("images", "labels"), ("x", "y"), ("X", "y"))


def open_npz(path: Path, train: bool, image_size: int | None, test_fraction: float, split_seed: int) -> Source:
    """The training or test part of one file; see `everbatch.data.load`."""
    check(path.is_file(), "npz", f"no file {str(path)!r}", "exist")
    part = "train" if train else "test"
    name = f"npz:{path.name}/{part}"
    with _opened(path) as arrays:
        found = set(arrays.files)
        split = next(((x, y) for x, y in _SPLIT if {k.format(p) for k in (x, y) for p in ("train", "test")} <= found), None)
        whole = next((keys for keys in _WHOLE if set(keys) <= found), None)
        keys = whole if split is None else (split[0].format(part), split[1].format(part))
        if keys is None:
            raise ValueError(f"npz: {str(path)!r} holds {sorted(found)[:20]}, must hold x_train, y_train, x_test, y_test, or "
                             "inputs and targets")
        x, y = (_array(arrays, key, path) for key in keys)
        others = [_array(arrays, split[1].format("test" if train else "train"), path)] if split else []
        classes = [str(c) for c in _array(arrays, "classes", path)] if "classes" in found else None
    used = {key.format(p) for key in split for p in ("train", "test")} if split else set(keys)
    idle = sorted(found - used - {"classes"})
    if idle:
        tell(f"npz: {str(path)!r}: not used: {', '.join(idle[:10])}" + ", ..." * (len(idle) > 10))
    inputs = _pictures(path, keys[0], as_inputs("npz", f"{keys[0]} of {str(path)!r}", x))
    labels = [as_labels("npz", f"{keys[1]} of {str(path)!r}", y),
              *(as_labels("npz", f"the labels of the other part of {str(path)!r}", other) for other in others)]
    check(len(inputs) == len(labels[0]), "npz", f"{len(inputs)} {keys[0]} and {len(labels[0])} {keys[1]} in {str(path)!r}",
          "be as many")
    check(image_size is None or tuple(inputs.shape[-2:]) == (image_size, image_size), "npz",
          f"inputs of shape {tuple(inputs.shape[1:])}", f"be {image_size} x {image_size}", "resize before saving")
    names = classes if classes is not None else numbered("npz", f"{keys[1]} of {str(path)!r}", *labels)
    source = TensorSource(inputs, labels[0], name=name, classes=names, identity=f"npz/{part}")
    if split:
        return source
    return SubsetSource(source, stratified_split(source.targets, test_fraction, split_seed, names=names)[0 if train else 1],
                        name=name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:  # numpy leaves a damaged file open that it opened itself
        try:
            arrays = np.load(file, allow_pickle=False)
        except Exception as error:  # whatever numpy and zipfile raise for damaged files
            raise _damaged(repr(str(path)), error) from error
        if not hasattr(arrays, "files"):
            raise ValueError(f"npz: {str(path)!r} holds one array without a name, must hold several; write it with "
                             "numpy.savez")
        with arrays:
            yield arrays


def _array(arrays: Any, key: str, path: Path) -> np.ndarray[Any, Any]:
    what = f"{key} of {str(path)!r}"
    size = next((info.file_size for info in arrays.zip.infolist() if info.filename == f"{key}.npy"), 0)
    check_memory("npz", what, size, "use a folder of images, or a data set of your own that reads by index")
    try:
        array: np.ndarray[Any, Any] = arrays[key]
    except Exception as error:  # truncated or pickled members, absurd shapes: an error of zipfile, zlib or numpy each
        raise _damaged(what, error) from error
    return array


def _damaged(what: str, error: Exception) -> ValueError:
    said = (str(error).splitlines() or [""])[0]
    return ValueError(f"npz: cannot read {what} ({type(error).__name__}: {said}), must be whole arrays of numbers as "
                      "numpy.savez writes them; save them anew")


def _pictures(path: Path, key: str, inputs: Tensor) -> Tensor:
    """Images as (N, C, H, W), bytes where they are whole numbers up to 255; arrays of other shapes as they are."""
    what = f"{key} of {str(path)!r}"
    if inputs.is_floating_point():
        odd = torch.nonzero(~torch.isfinite(inputs).reshape(len(inputs), -1).all(1)).flatten()
        if len(odd):
            tell(f"npz: {len(odd)} samples in {what} hold numbers that are not finite, the first is sample {int(odd[0])}; "
                 "every step that meets one is skipped")
    elif inputs.ndim in (3, 4) and inputs.dtype != torch.uint8 and inputs.numel():
        inputs = _bytes(what, inputs)
    if inputs.dtype == torch.uint8 and inputs.ndim == 3:
        inputs = inputs.unsqueeze(1)
    elif inputs.ndim == 4 and inputs.shape[1] not in (1, 3):
        last = inputs.shape[3] in (1, 3)
        check(last or inputs.dtype != torch.uint8, "npz", f"images of shape {tuple(inputs.shape[1:])}", "have 1 or 3 channels")
        inputs = inputs.permute(0, 3, 1, 2).contiguous() if last else inputs
    if inputs.is_floating_point() and inputs.ndim == 4 and inputs.numel() and inputs.min() >= 0 and inputs.max() > 32:
        tell(f"npz: {what} are floats up to {inputs.max().item():g}; floats are not scaled, bytes (uint8) are, to [0, 1]")
    return inputs


def _bytes(what: str, images: Tensor) -> Tensor:
    """Integers and bools of images as uint8; True is white."""
    if images.dtype == torch.bool:
        return images.to(torch.uint8) * 255
    low, high = int(images.min()), int(images.max())
    check(low >= 0 and high <= 255, "npz", f"{what} are {images.dtype} from {low} to {high}", "be 0 to 255",
          f"save floats: ((x - {low}) / {high - low}).astype('float32')")
    return images.to(torch.uint8)
