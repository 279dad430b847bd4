"""Data sets of Hugging Face's `datasets` as pairs of (input, label). Nothing here imports the library."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from everbatch.data.arrays import as_labels
from everbatch.errors import check

__all__ = ["Columns", "is_hugging_face"]


def is_hugging_face(data: Any) -> bool:
    """Whether this is of the library `datasets`, which need not be imported to know."""
    return any(base.__module__.partition(".")[0] == "datasets" for base in type(data).__mro__)


class Columns:
    """Two columns of a `datasets.Dataset`, as a map-style data set of (input, label) pairs.

    Args:
        dataset: with a fixed number of rows. Images are decoded row by row, when they are read.
        columns: names of the input and of the label; None: the one column of images, and the one of `ClassLabel`.

    Class names are those of `ClassLabel`; labels that are texts are numbered in alphabetical order.

    Raises:
        ValueError: a `DatasetDict`, a stream, columns that are not there or cannot be guessed, labels that are no classes.

    Cost: the column of labels is read once.
    """

    def __init__(self, dataset: Any, columns: tuple[str, str] | None = None) -> None:
        kind = type(dataset).__name__
        check(not isinstance(dataset, dict), "as_source", f"a {kind} of {sorted(dataset) if isinstance(dataset, dict) else ()}",
              "be one of its parts", "give data['train']")
        check(hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"), "as_source", f"{kind}, an iterable data set",
              "be of map style", "samples are shuffled and replayed by index: load it without streaming=True")
        self.dataset = dataset
        self.input, self.label = _columns(dataset, columns)
        self.name = f"{getattr(dataset, 'builder_name', None) or kind}[{len(dataset)}]"
        values = list(dataset.select_columns([self.label]).with_format(None)[self.label])
        feature = dataset.features[self.label]
        names = getattr(feature, "names", None)
        if values and all(isinstance(value, str) for value in values):
            found, numbers = np.unique(np.asarray(values), return_inverse=True)
            names, values = found.tolist(), numbers.tolist()
        self.classes = [str(name) for name in names] if names is not None else None
        what = f"column {self.label!r}"
        self.targets = as_labels(self.name, what, values) if values else torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.value(index), int(self.targets[index])

    def value(self, index: int) -> Any:
        """One input, as the library decodes it."""
        return self.dataset[index][self.input]


def _columns(dataset: Any, given: tuple[str, str] | None) -> tuple[str, str]:
    """The names of the input and of the label."""
    known = list(dataset.column_names)
    if given is not None:
        check(isinstance(given, tuple | list) and len(given) == 2, "as_source", f"columns={given!r}", "be (input, label)")
        odd = [name for name in given if name not in known]
        check(not odd, "as_source", f"columns {odd}", f"be among {known}")
        return given[0], given[1]
    kinds = {name: type(feature).__name__ for name, feature in dataset.features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    check(len(images) == len(labels) == 1, "as_source", f"a Dataset of {kinds}", "have one column of Image and one of ClassLabel",
          "name them: as_source(data, columns=('input', 'label')); rows of other kinds: as_source(data, target=...)")
    return images[0], labels[0]
