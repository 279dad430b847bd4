"""Map-style data sets whose samples are dicts, or pairs with targets that are no class indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from everbatch.data.arrays import Array, as_labels, as_tensor, check_labels, numbered
from everbatch.data.draws import drawing, seed_sample, seeded
from everbatch.data.row_source import plain, row_digest, spread
from everbatch.data.sources import TARGETS, digest
from everbatch.errors import check
from everbatch.rows import Rows

__all__ = ["RowDataset"]


class RowDataset:
    """A map-style data set of dicts, or of pairs with any target, as a source; `as_source(data, target=...)` makes it.

    Args:
        dataset: torch's, one of Hugging Face `datasets`, or anything with `__len__` and `__getitem__`. Samples are dicts, or
            pairs (input, target); numbers, lists of numbers, arrays or tensors, of one shape each.
        target: name of a dict's target; of pairs, "targets". None: dicts have none, and `labels` are it.
        labels: (N,) the class, or group, of each sample; None: all of one, "0".
        collate: makes rows of a list of samples, where the above does not: a tensor, a pair, or a dict with "targets".
        classes, name: as in `RowSource`.

    Raises:
        ValueError: no samples; later, from `fetch`, samples that do not make rows.
    """

    def __init__(
        self, dataset: Any, *, target: str | None = None, labels: Array | None = None,
        collate: Callable[[list[Any]], Any] | None = None, classes: Sequence[str] | None = None, name: str | None = None,
    ) -> None:
        self.dataset, self.target, self.collate = dataset, target, collate
        count = len(dataset)
        self.name = name or f"{type(dataset).__name__}[{count}]"
        check(count > 0, self.name, "no samples", "hold at least one")
        self.targets = torch.zeros(count, dtype=torch.int64) if labels is None else as_labels(self.name, "labels", labels)
        check(len(self.targets) == count, self.name, f"{len(self.targets)} labels of {count} samples", "be as many")
        self.implied = classes is None
        self.classes = tuple(classes) if classes is not None else numbered(self.name, "labels", self.targets)
        check_labels(self.name, self.targets, len(self.classes))
        first = self.fetch(torch.tensor([0]))
        check(labels is not None or (isinstance(first, dict) and TARGETS in first), self.name, "neither a target nor labels",
              "have one of them", "name the target: as_source(data, target=...), or give labels=")

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, ids: Tensor) -> Rows:
        """See `Source.fetch`."""
        keys = ids.tolist()
        samples = []
        with seeded():
            for key in keys:
                seed_sample(key)
                samples.append(self.dataset[key])
        rows = self.collate(samples) if self.collate is not None else stacked(self.name, samples)
        if isinstance(rows, Tensor):
            return rows
        if isinstance(rows, tuple | list):
            check(len(rows) == 2, self.name, f"samples of {len(rows)} values", "be (input, target), or dicts",
                  "collate= a dict with the names of the model's arguments")
            rows = {"inputs": rows[0], TARGETS: rows[1]}
        rows = dict(rows)
        if self.target is not None and self.target in rows:
            rows[TARGETS] = rows.pop(self.target)
        check(self.target is None or TARGETS in rows, self.name, f"no {self.target!r} among {sorted(rows)}", "be there")
        odd = [key for key, value in rows.items() if not isinstance(value, Tensor)]
        check(not odd, self.name, f"{odd} in a batch", "be tensors")
        return plain(rows)

    def fingerprint(self) -> str:
        """See `Source.fingerprint`; looks at 16 evenly spread samples, and takes that of Hugging Face's."""
        with drawing("fetch"):
            rows = self.fetch(spread(len(self)))
        own = str(getattr(self.dataset, "_fingerprint", ""))
        return digest(own, row_digest(self.name, self.classes, self.targets, rows))


def stacked(who: str, samples: Sequence[Any]) -> Any:
    """Samples one above the other: dicts entry by entry, pairs in both places, all else as numbers of one shape."""
    cure = "pad them to one length, or give collate="
    first = samples[0]
    if isinstance(first, Mapping):
        odd = next((sorted(sample) for sample in samples if sample.keys() != first.keys()), None)
        check(odd is None, who, f"samples with {sorted(first)} and with {odd}", "have the same keys", "give collate=")
        return {key: _stack(who, key, [sample[key] for sample in samples], cure) for key in first}
    if isinstance(first, tuple | list):
        check(len(first) == 2, who, f"samples of {len(first)} values", "be (input, target), or dicts", "give collate=")
        return tuple(_stack(who, key, [sample[i] for sample in samples], cure) for i, key in enumerate(("inputs", TARGETS)))
    return _stack(who, "inputs", list(samples), cure)


def _stack(who: str, key: str, values: list[Any], cure: str) -> Tensor:
    try:
        return as_tensor(who, f"{key!r} of its samples", values)
    except ValueError as error:
        raise ValueError(f"{error}; {cure}") from error
