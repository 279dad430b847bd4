"""Samples in memory with inputs by name, or with targets that are no class indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from everbatch.data.arrays import Array, as_inputs, as_labels, as_tensor, check_labels, numbered
from everbatch.data.sources import TARGETS, digest, target_bytes
from everbatch.errors import check
from everbatch.rows import Rows

__all__ = ["RowSource", "plain", "row_digest", "spread"]

PROBES = 16
"""Samples that a fingerprint looks at."""


class RowSource:
    """Samples held in memory, with inputs by name or with targets that are no class indices.

        RowSource(x, targets=y)                                                  regression
        RowSource(ids, targets=ids)                                              language
        RowSource({"input_ids": ids, "attention_mask": mask}, targets=ids)       named inputs: keyword arguments of the model
        RowSource({"image": x, "depth": d}, labels=y)                            classification with named inputs

    Args:
        inputs: (N, ...) numbers of any type, or several by name; kept by reference where torch can work with the type.
        targets: (N, ...) what the loss compares outputs with; None: the labels.
        labels: (N,) the class, or group, of each sample, by which streams divide and memories balance; None: all of one, "0".
        classes: name of each label.
        name: for messages and the fingerprint.

    Raises:
        ValueError: no samples, lengths that differ, neither targets nor labels, an input of the name "targets".
    """

    def __init__(
        self, inputs: Array | Mapping[str, Array], targets: Array | None = None, *, labels: Array | None = None,
        classes: Sequence[str] | None = None, name: str = "rows",
    ) -> None:
        self.name = name
        several = inputs if isinstance(inputs, Mapping) else {"inputs": inputs}
        check(bool(several) and TARGETS not in several, name, f"inputs {sorted(several)}", f"be named, and not {TARGETS!r}")
        check(targets is not None or labels is not None, name, "neither targets nor labels", "have one of them")
        self._rows = {key: as_inputs(name, key, value) for key, value in several.items()}
        if targets is not None:
            self._rows[TARGETS] = as_tensor(name, TARGETS, targets)
        lengths = {key: len(value) for key, value in self._rows.items()}
        count = next(iter(lengths.values()))
        self.targets = torch.zeros(count, dtype=torch.int64) if labels is None else as_labels(name, "labels", labels)
        check(set(lengths.values()) == {len(self.targets)}, name, f"{lengths} rows and {len(self.targets)} labels", "be as many")
        check(count > 0, name, "no samples", "hold at least one")
        self.implied = classes is None
        self.classes = tuple(classes) if classes is not None else numbered(name, "labels", self.targets)
        check_labels(name, self.targets, len(self.classes))

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, ids: Tensor) -> Rows:
        """See `Source.fetch`."""
        return plain({name: value[ids] for name, value in self._rows.items()})

    def fingerprint(self) -> str:
        """See `Source.fingerprint`; looks at 16 evenly spread samples."""
        return row_digest(self.name, self.classes, self.targets, self.fetch(spread(len(self))))


def plain(rows: dict[str, Tensor]) -> Rows:
    """Inputs without a name and without targets are one tensor."""
    return rows["inputs"] if rows.keys() == {"inputs"} else rows


def spread(count: int) -> Tensor:
    """Evenly spread samples, for a fingerprint."""
    return torch.linspace(0, count - 1, min(count, PROBES)).round().long()


def row_digest(name: str, classes: Sequence[str], labels: Tensor, rows: Rows) -> str:
    """A fingerprint of rows. Floats count too: nothing here transforms them."""
    parts: list[str | bytes] = [name, *classes, target_bytes(labels)]
    for key, value in (rows if isinstance(rows, dict) else {"inputs": rows}).items():
        content = value.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()
        parts += [f"{key} {tuple(value.shape[1:])} {value.dtype}", content]
    return digest(*parts)
