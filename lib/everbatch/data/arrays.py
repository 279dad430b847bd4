"""Inputs and labels as people have them, made into tensors that torch can work with, or refused with a cure."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from everbatch.errors import check

__all__ = ["Array", "as_inputs", "as_labels", "check_labels", "numbered"]

Array: TypeAlias = "Tensor | np.ndarray[Any, Any] | Sequence[Any]"

IMPLIED_CLASSES = 65_536
"""Without names, a label beyond this and beyond the number of samples is an identifier, not a class."""
_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64}
"""Types that torch stores and cannot compare or reduce."""


def as_tensor(who: str, what: str, values: Array) -> Tensor:
    """A tensor of numbers, sharing memory where it can.

    Raises:
        ValueError: what holds no numbers (texts, objects, complex numbers), or whole numbers beyond int64.
    """
    if isinstance(values, Tensor):
        tensor = values.detach()
    elif isinstance(values, list | tuple) and values and all(isinstance(value, Tensor) for value in values):
        shapes = sorted({tuple(value.shape) for value in values})
        check(len(shapes) == 1, who, f"{what} of shapes {shapes[:3]}", "be of one shape")
        tensor = torch.stack(list(values)).detach()
    else:
        tensor = _from_numpy(who, what, values)
    check(tensor.layout == torch.strided, who, f"{what} of layout {tensor.layout}", "be dense")
    check(not tensor.is_complex(), who, f"{what} of {tensor.dtype}", "be real numbers")
    if tensor.dtype == torch.uint64:
        signed = tensor.to(torch.int64)
        check(not bool((signed < 0).any()), who, f"{what} beyond 2^63 - 1", "be smaller")
        return signed
    return tensor.to(_WIDER.get(tensor.dtype, tensor.dtype))


def _from_numpy(who: str, what: str, values: Any) -> Tensor:
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of several lengths
        raise ValueError(f"{who}: {what} are no array ({str(error).splitlines()[0]}), must be numbers of one shape") from error
    names = array.dtype.kind in "US"
    check(array.dtype.kind in "biuf", who, f"{what} of type {array.dtype}", "be numbers",
          "number them: names, numbers = numpy.unique(values, return_inverse=True)" if names else "convert them")
    if array.dtype.itemsize > 8:  # numpy's long double
        array = array.astype(np.float64)
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        # A file mapped into memory cannot be written to; nothing here writes, and a copy would load it whole.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(array)


def as_inputs(who: str, what: str, values: Array) -> Tensor:
    """(N, ...) inputs: numbers of any type; unsigned integers that torch cannot work with become wider ones.

    Raises:
        ValueError: see `as_tensor`; a single number.
    """
    inputs = as_tensor(who, what, values)
    check(inputs.ndim >= 1, who, f"{what} of shape ()", "be (N, ...)")
    return inputs


def as_labels(who: str, what: str, values: Array) -> Tensor:
    """(N,) int64 class indices from integers of any width, bools, a column (N, 1), or exact one-hot rows (N, C).

    Raises:
        ValueError: other shapes, fractions and whole numbers stored as floats, rows with several ones, negative numbers.
    """
    labels = as_tensor(who, what, values)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    elif labels.ndim == 2 and labels.shape[1] > 1:
        hot = ((labels == 0) | (labels == 1)).all() and ((labels == 1).sum(1) == 1).all()
        check(bool(hot), who, f"{what} of shape {tuple(labels.shape)}", "be (N,) class indices, or one-hot rows",
              "several labels of one sample, and soft ones, are not classification")
        labels = (labels == 1).to(torch.int64).argmax(1)
    check(labels.ndim == 1, who, f"{what} of shape {tuple(labels.shape)}", "be (N,) class indices")
    check(not labels.is_floating_point(), who, f"{what} of {labels.dtype}", "be integers",
          "convert them: .long() of a tensor, .astype('int64') of an array; what is no class goes into "
          "everbatch.data.RowSource(inputs, targets=...)")
    labels = labels.to("cpu", torch.int64)
    negative = torch.nonzero(labels < 0).flatten()
    if len(negative):
        first = int(negative[0])
        check(False, who, f"label {int(labels[first])} of sample {first} in {what}", "be a class index >= 0",
              "leave such samples out")
    return labels


def numbered(who: str, what: str, *labels: Tensor) -> tuple[str, ...]:
    """Names "0", "1", ... up to the largest label.

    Raises:
        ValueError: a label that would make more classes than could be meant; names it and its sample.
    """
    count = 0
    for part in labels:
        top = int(part.max()) if len(part) else -1
        limit = max(IMPLIED_CLASSES, len(part))
        if top >= limit:
            check(False, who, f"label {top} of sample {int(part.argmax())} in {what}",
                  f"be below {limit} where classes have no names",
                  "number the classes from 0: numpy.unique(values, return_inverse=True)")
        count = max(count, top + 1)
    return tuple(map(str, range(count)))


def check_labels(who: str, targets: Tensor, classes: int) -> None:
    """Raise unless every label is in [0, classes); names the first that is not."""
    wrong = torch.nonzero((targets < 0) | (targets >= classes)).flatten()
    if len(wrong):
        first = int(wrong[0])
        check(False, who, f"label {int(targets[first])} of sample {first}", f"be in [0, {classes})")
