"""One label space for the sources of a stream: equal names are one class, and numbers without names go on as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from everbatch.data.datasets import as_source
from everbatch.data.notes import tell
from everbatch.data.sources import TARGETS, Source, digest, target_bytes
from everbatch.errors import check
from everbatch.rows import Rows, named

__all__ = ["Pair", "RelabelledSource", "as_pair", "in_one_label_space", "is_data", "same_classes", "tell_inputs"]

Pair: TypeAlias = tuple[Source, Source]


class RelabelledSource:
    """The samples of another source under other class names.

    Args:
        base: the samples.
        classes: the new names.
        mapping: (base classes,) new label of each old one; by default labels stay.
    """

    def __init__(self, base: Source, classes: Sequence[str], mapping: Tensor | None = None) -> None:
        self.base, self.name, self.classes = base, base.name, tuple(classes)
        self.mapping = torch.arange(len(base.classes)) if mapping is None else mapping
        self.targets = self.mapping[base.targets]

    def __len__(self) -> int:
        return len(self.base)

    def fetch(self, ids: Tensor) -> Rows:
        """See `Source.fetch`."""
        return self.base.fetch(ids)

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return digest(self.base.fingerprint(), *self.classes, target_bytes(self.mapping))


def in_one_label_space(who: str, sources: Sequence[Source], *, match: bool = False) -> list[Source]:
    """The sources with the same classes.

    Where a source's classes have no names of their own, its labels count as they are: they take the names of the others,
    or all go up to the largest label of any.

    Args:
        who: for messages.
        sources: of one stream.
        match: put classes of other names side by side, in order of appearance: equal names are one class. Otherwise
            sources whose names differ come back as they are, for the caller to refuse.

    Raises:
        ValueError: a source without names beside some whose names differ, or with more classes than there are names.
    """
    named = [source.classes for source in sources if not getattr(source, "implied", False)]
    same = all(names == named[0] for names in named)
    if same:
        longest = max((source.classes for source in sources), key=len)
        classes = named[0] if named else longest
    elif match:
        classes = tuple(dict.fromkeys(name for names in named for name in names))
    else:
        return list(sources)
    result: list[Source] = []
    for source in sources:
        if source.classes == classes:
            result.append(source)
        elif getattr(source, "implied", False):
            check(same, who, f"{source.name!r} without class names beside data of other names", "have names",
                  "give it an attribute `classes`, or as_source(data, classes=...)")
            check(len(source.classes) <= len(classes), who,
                  f"label {len(source.classes) - 1} in {source.name!r}", f"be below {len(classes)}, the number of classes")
            result.append(RelabelledSource(source, classes))
        else:
            place = {name: label for label, name in enumerate(classes)}
            result.append(RelabelledSource(source, classes, torch.tensor([place[name] for name in source.classes])))
    return result


def same_classes(who: str, pairs: Sequence[Pair]) -> None:
    """Refuse domains that have not all the same classes, each in training or test, in whatever order.

    Raises:
        ValueError: names the first that differs, and classes of it.
    """
    names = [list(dict.fromkeys((*train.classes, *test.classes))) for train, test in pairs]
    first, known = pairs[0][0].name, set(names[0])
    for (train, _), own in zip(pairs[1:], names[1:], strict=True):
        here = set(own)
        more, less = [name for name in own if name not in known], [name for name in names[0] if name not in here]
        got = f"{train.name!r} has classes {more[:5]} that {first!r} has not" if more else (
            f"{train.name!r} has classes {own[:5]} without {less[:5]} of {first!r}")
        check(not more and not less, who, got, "be the same classes in every domain",
              "tasks of other classes are a class-incremental stream")


def tell_inputs(who: str, pairs: Sequence[Pair]) -> None:
    """Say once where the inputs of a pair have other names, shapes or types than the first one's, as far as first samples tell:
    few networks take both. Training data is compared with training data, and test data, which may be of another size, with test
    data.

    Cost: one sample of each source is read; none of a single pair.
    """
    for sources in zip(*pairs, strict=True) if len(pairs) > 1 else ():
        kinds = {k: _kind(source) for k, source in enumerate(sources) if len(source)}  # what is empty is refused elsewhere
        first = min(kinds, default=0)
        odd = next((k for k, kind in kinds.items() if kind != kinds[first]), None)
        if odd is not None:
            tell(f"{who}: inputs of {sources[odd].name!r} in pair {odd} are {kinds[odd]}, those of {sources[first].name!r} "
                 f"{kinds[first]}: the network has to take both; load images with one image_size, and convert types")


def _kind(source: Source) -> str:
    """Names, shapes and types of a source's inputs."""
    first = named("", source.fetch(torch.tensor([0])))
    return ", ".join(f"{name[1:]} {tuple(rows.shape[1:])} {rows.dtype}".lstrip() for name, rows in first.items()
                     if name[1:] != TARGETS)


def as_pair(who: str, train: Any, test: Any) -> Pair:
    """Training and test data, whatever they are, as sources; see `as_source`."""
    one, other = in_one_label_space(who, [as_source(train), as_source(test)])
    return one, other


def is_data(value: Any) -> bool:
    """Whether a value is one data set, and not a pair or a list of pairs."""
    if isinstance(value, tuple):
        return len(value) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in value)
    if isinstance(value, list):
        first = value[0] if value else None
        if not isinstance(first, tuple | list) or len(first) != 2:
            return False
        label = first[1]
        return isinstance(label, int | np.integer) or (isinstance(label, Tensor | np.ndarray) and label.ndim == 0)
    return not isinstance(value, str | dict | Tensor | np.ndarray)
