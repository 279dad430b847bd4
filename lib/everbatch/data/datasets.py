"""Map-style torch data sets as sources: torchvision's, `ImageFolder`, `Subset`, `ConcatDataset`, one's own.

Nothing is loaded but what is fetched. What a data set draws at random (a transform that crops or flips) is drawn under a
seed of (run, task, step, sample) while a `Loader` fetches, so that a resumed run repeats it at any number of ranks; in
evaluation, under a seed of the sample alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from everbatch.data.arrays import Array, as_labels, as_tensor, check_labels, numbered
from everbatch.data.draws import drawing, seed_sample, seeded
from everbatch.data.hugging_face import Columns, is_hugging_face
from everbatch.data.notes import tell
from everbatch.data.row_dataset import RowDataset
from everbatch.data.sources import Source, TensorSource, digest, target_bytes
from everbatch.errors import check

__all__ = ["DatasetSource", "Samples", "as_source", "drawing"]

Samples: TypeAlias = "Source | Dataset[Any] | tuple[Tensor | np.ndarray[Any, Any], Tensor | np.ndarray[Any, Any]]"
"""What `as_source` takes."""

PROBES = 8
"""Samples whose label is compared, at the start, with the list that the data set keeps."""
MANY = 10_000
"""Samples that take a while to be read for their labels."""
_PAIR = "give (input, label): an array, a tensor or a PIL image, and a class index"


def as_source(
    data: Samples | Any, *, name: str | None = None, classes: Sequence[str] | None = None, target: str | None = None,
    labels: Array | None = None, collate: Callable[[list[Any]], Any] | None = None, columns: tuple[str, str] | None = None,
) -> Source:
    """A source of whatever holds labelled samples.

    Args:
        data: a `Source` (returned as it is); a map-style torch `Dataset`, or anything with `__len__` and
            `__getitem__`, of (input, label) pairs; or a pair (inputs, targets) of arrays or tensors.
        name: for messages and the fingerprint.
        classes: name of each label; by default the data set's own `classes`, and numbers where it has none.
        target, labels, collate: any of them makes a `RowDataset`: of dicts, whose target has this name, or of pairs whose target
            is no class index.
        columns: names of the input and the label in a data set of Hugging Face `datasets`; by default its one column of images
            and its one of `ClassLabel`, whose names are the classes'.

    Raises:
        ValueError: what is no data set (a DataLoader, an iterable data set, a path), what gives no (input, label) pairs,
            labels that are no class indices.

    Cost: see `DatasetSource`.
    """
    who = "as_source"
    given = {"target": target, "labels": labels, "collate": collate}
    rows = [option for option, value in given.items() if value is not None]
    if isinstance(data, Source):
        check(classes is None, who, f"classes= beside {data.name!r}", "be left out", "the source has names")
        check(not rows, who, f"{', '.join(rows)}= beside {data.name!r}", "be left out", "give the data set itself")
        return data
    if not rows and isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in data):
        return TensorSource(data[0], data[1], name=name or "tensors", classes=classes)
    foreign = is_hugging_face(data)
    check(columns is None or foreign, who, f"columns= beside a {type(data).__name__}", "be left out",
          "only data sets of Hugging Face have columns")
    if foreign and not rows:
        data = Columns(data, columns)
        return DatasetSource(data, name=name or data.name, classes=classes)
    check(not isinstance(data, DataLoader), who, "a DataLoader", "be a data set",
          "give its .dataset; the trainer makes the batches")
    check(not isinstance(data, IterableDataset), who, f"{type(data).__name__}, an iterable data set",
          "be of map style", "samples are shuffled and replayed by index")
    check(not isinstance(data, str | Path), who, repr(data), "be a data set", "open a path with everbatch.data.load")
    check(not isinstance(data, Tensor | np.ndarray), who, "one array", "be a data set",
          "give (inputs, targets), or TensorSource(inputs, targets)")
    check(hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, dict), who,
          type(data).__name__, "be a map-style data set, with __len__ and __getitem__", _PAIR)
    if rows:
        return RowDataset(data, target=target, labels=labels, collate=collate, classes=classes, name=name)
    if isinstance(data, TensorDataset) and len(data.tensors) == 2:
        return TensorSource(*data.tensors, name=name or "TensorDataset", classes=classes or class_names(data))
    return DatasetSource(data, name=name, classes=classes)


class DatasetSource:
    """A map-style data set of (input, label) pairs as a source; see `as_source`.

    PIL images become uint8 (C, H, W), grey or colour; arrays and tensors stay as the data set gives them, but that
    grey and channels-last bytes become (C, H, W).

    Args:
        dataset: anything with `__len__` and `__getitem__`. Its transforms run at every fetch; all samples must come out
            of one shape.
        name: for messages and the fingerprint; by default the class's.
        classes: name of each label; by default the data set's own `classes`, and numbers where it has none.

    Raises:
        ValueError: no samples, samples that are no (input, label) pairs, labels that are no class indices; later, from
            `fetch`, a sample that cannot be read, or of another shape or label than before.

    Cost: labels are taken from the list that the data set keeps (`targets`, `labels`, `samples`) where it agrees with a
    few samples; where there is none, every sample is read once to learn its label. A fetch reads one sample after the
    other: let the loader's workers share the work.
    """

    def __init__(
        self, dataset: Any, *, name: str | None = None, classes: Sequence[str] | None = None,
    ) -> None:
        self.dataset, self.name = dataset, name or _name(dataset)
        count = len(dataset)
        check(count > 0, self.name, "no samples", "hold at least one")
        with seeded():
            first, _ = self._sample(0)
            self._shape, self._dtype = first.shape, first.dtype
            kept = kept_labels(dataset, self.name)
            spread = torch.linspace(0, count - 1, min(count, PROBES)).round().long().tolist()
            if kept is None or any(self._sample(index)[1] != int(kept[index]) for index in spread):
                if count >= MANY:
                    tell(f"{self.name}: reads all {count} samples once for their labels; an attribute `targets` spares that")
                kept = torch.tensor([self._sample(index)[1] for index in range(count)])
        self.targets = kept
        names = classes if classes is not None else class_names(dataset)
        self.implied = names is None
        self.classes = tuple(names) if names is not None else numbered(self.name, "its labels", kept)
        check_labels(self.name, kept, len(self.classes))

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, ids: Tensor) -> Tensor:
        """See `Source.fetch`."""
        rows = []
        with seeded():
            for index in ids.tolist():
                row, label = self._sample(index)
                check(row.shape == self._shape and row.dtype == self._dtype, self.name,
                      f"{self._where(index)} is {tuple(row.shape)} {row.dtype}",
                      f"be {tuple(self._shape)} {self._dtype} as the first",
                      "resize or convert in the data set's transform, say Resize((64, 64)) or convert('RGB')")
                check(label == int(self.targets[index]), self.name, f"label {label} of {self._where(index)}",
                      f"be {int(self.targets[index])} as before", "labels may not change between reads")
                rows.append(row)
        return torch.stack(rows) if rows else torch.empty((0, *self._shape), dtype=self._dtype)

    def fingerprint(self) -> str:
        """See `Source.fingerprint`: labels, names and shape, and of a few samples the integers and the files' names.

        Floats are left out: a transform may round differently on another processor.
        """
        spread = torch.linspace(0, len(self) - 1, min(len(self), PROBES)).round().long()
        files = [Path(path).name for i in spread.tolist() if (path := path_of(self.dataset, i)) is not None]
        with drawing("fetch"):
            rows = self.fetch(spread) if not self._dtype.is_floating_point else torch.empty(0)
        pixels = rows.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()
        shape = f"{tuple(self._shape)} {self._dtype}"
        return digest(self.name, shape, *self.classes, target_bytes(self.targets), *files, pixels)

    def _where(self, index: int) -> str:
        path = path_of(self.dataset, index)
        return f"sample {index}" if path is None else f"sample {index} ({path})"

    def _sample(self, index: int) -> tuple[Tensor, int]:
        """One (input, label) pair, drawn under its own seed."""
        seed_sample(index)
        try:
            pair = self.dataset[index]
        except Exception as error:  # whatever a data set of one's own, or the decoder behind it, raises
            raise ValueError(f"{self.name}: cannot read {self._where(index)} ({type(error).__name__}: {error}), must be "
                             "readable; replace it or leave it out") from error
        good = isinstance(pair, tuple | list) and len(pair) == 2
        got = f"{len(pair)} values" if isinstance(pair, tuple | list) else type(pair).__name__
        check(good, self.name, f"{got} from {self._where(index)}", "be an (input, label) pair", _PAIR)
        return self._input(pair[0], index), self._label(pair[1], index)

    def _input(self, value: Any, index: int) -> Tensor:
        if type(value).__module__.startswith("PIL."):
            from everbatch.data.images import pixels_of

            return torch.from_numpy(pixels_of(self.name, self._where(index), value).copy(order="C"))
        what = f"input of {self._where(index)}"
        numbers = isinstance(value, Tensor | np.ndarray | np.generic | list | int | float)
        check(numbers, self.name, f"{what} is a {type(value).__name__}", "be an array, a tensor or a PIL image", _PAIR)
        row = as_tensor(self.name, what, value)
        if row.dtype == torch.uint8 and row.ndim == 2:
            return row[None]
        if row.dtype == torch.uint8 and row.ndim == 3 and row.shape[0] not in (1, 3) and row.shape[2] in (1, 3):
            return row.permute(2, 0, 1)
        return row

    def _label(self, value: Any, index: int) -> int:
        if isinstance(value, int):  # bool included
            return int(value)
        what = f"label of {self._where(index)}"
        check(isinstance(value, Tensor | np.ndarray | np.generic | list), self.name,
              f"{what} is {value!r}" if isinstance(value, str | float) else f"{what} is a {type(value).__name__}",
              "be a class index", "number the classes from 0, and name them in an attribute `classes`")
        row = as_tensor(self.name, what, value)
        return int(as_labels(self.name, what, row.reshape(1, -1) if row.numel() > 1 else row.reshape(1))[0])


def _name(dataset: Any) -> str:
    if isinstance(dataset, Subset):
        return f"{_name(dataset.dataset)}[{len(dataset)}]"
    if isinstance(dataset, ConcatDataset):
        return "+".join(_name(part) for part in dataset.datasets)
    return type(dataset).__name__


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """The names that a data set, or the one inside a subset, gives its classes; None without any.

    Raises:
        ValueError: a concatenation of data sets whose labels mean different things.
    """
    if isinstance(dataset, Subset):
        return class_names(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        found = [class_names(part) for part in dataset.datasets]
        named = [names for names in found if names is not None]
        odd = next((names for names in named if names != named[0]), None)
        check(odd is None, _name(dataset), f"classes {named[0][:5] if named else ()} and {(odd or ())[:5]}",
              "be the same in the same order", "their labels mean different things")
        return named[0] if len(named) == len(found) else None
    names = getattr(dataset, "classes", None)
    if names is None or callable(names) or isinstance(names, str) or not len(names):
        return None
    return tuple(str(n[0] if isinstance(n, tuple | list) and len(n) else n) for n in names)


def kept_labels(dataset: Any, who: str) -> Tensor | None:
    """The labels that a data set keeps in a list, without reading a sample; None where it keeps none that fits."""
    if isinstance(dataset, Subset):
        inner = kept_labels(dataset.dataset, who)
        return None if inner is None else inner[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [kept_labels(part, who) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for name in ("targets", "labels", "_labels"):
        found = getattr(dataset, name, None)
        if isinstance(found, Tensor | np.ndarray | list | tuple) and len(found) == len(dataset):
            return _integers(found, who)
    pairs = getattr(dataset, "samples", getattr(dataset, "_samples", None))
    if isinstance(pairs, list) and len(pairs) == len(dataset) and all(
            isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        return _integers([label for _, label in pairs], who)
    return None


def _integers(values: Array, who: str) -> Tensor | None:
    """The labels as int64, or None where they are something else, which the samples themselves may turn into labels."""
    try:
        return as_labels(who, "labels", values)
    except ValueError:
        return None


def path_of(dataset: Any, index: int) -> str | None:
    """The file of a sample, where the data set keeps a list of (path, label) as torchvision's folders do."""
    if isinstance(dataset, Subset):
        return path_of(dataset.dataset, int(dataset.indices[index]))
    if isinstance(dataset, ConcatDataset):
        part = int(np.searchsorted(dataset.cumulative_sizes, index, side="right"))
        start = dataset.cumulative_sizes[part - 1] if part else 0
        return path_of(dataset.datasets[part], index - start)
    pairs = getattr(dataset, "samples", None)
    if isinstance(pairs, list) and index < len(pairs) and isinstance(pairs[index], tuple) and isinstance(
            pairs[index][0], str | Path):
        return str(pairs[index][0])
    return None
