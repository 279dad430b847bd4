"""Pairs of training and test data as a stream, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from everbatch.data.datasets import as_source
from everbatch.data.label_space import Pair, in_one_label_space, is_data, same_classes, tell_inputs
from everbatch.data.notes import tell
from everbatch.data.sources import ConcatSource, Source
from everbatch.data.streams import domain_incremental, iid
from everbatch.data.tasks import Stream, Task, finished
from everbatch.errors import check

__all__ = ["as_stream"]

_CURE = "give (train, test), or [(train, test), ...] with one pair of data sets per task"
_NEEDED = ("tasks", "train", "test", "num_classes", "kind", "classes", "targets", "fetch", "seen_classes", "fingerprint")


def as_stream(data: Any, *, kind: Literal["iid", "class", "task", "domain"] | None = None) -> Stream:
    """A stream of whatever holds training and test samples.

    Args:
        data: a `Stream` (returned as it is); a (train, test) pair; or a sequence of such pairs, one per task, in the
            order of training. Train and test may be anything that `as_source` takes: torch data sets, sources, pairs
            (inputs, targets) of arrays.
        kind: what tasks are, and so what a prediction may choose from: "class", the classes seen so far; "task", the
            task's own; "domain", all. By default "iid" for one pair, "class" for several of which no two share a label,
            else "domain", which is said where they do not share all.

    Labels share one space: where data sets name their classes, equal names are one class and others are put beside them
    in order of appearance; labels without names count as they are, in all pairs.

    Raises:
        ValueError: what is neither; a pair with an empty part; labels that are no class indices, or that cannot be
            brought into one space; what has tasks but is no whole stream.

    Pairs whose first inputs differ in shape or type are said.
    """
    who = "as_stream"
    if hasattr(data, "tasks"):
        lacking = [name for name in _NEEDED if not hasattr(data, name)]
        check(not lacking, who, f"{type(data).__name__} without {', '.join(lacking)}", "be a whole stream",
              "make it with as_stream, class_incremental, domain_incremental, growing or iid")
        check(kind in (None, data.kind), who, f"kind={kind!r} beside a stream of kind {data.kind!r}", "be left out")
        stream: Stream = data
        return stream
    check(kind in (None, "iid", "class", "task", "domain"), who, f"kind={kind!r}", "be iid, class, task or domain")
    pairs = pairs_of(who, data)
    if kind == "iid" or (kind is None and len(pairs) == 1):
        check(len(pairs) == 1, who, f"kind='iid' and {len(pairs)} pairs", "be one pair")
        return iid(*pairs[0])
    labels = [present(pair) for pair in pairs]
    every = set().union(*labels)
    if kind is None:
        kind = "class" if sum(map(len, labels)) == len(every) else "domain"
        if kind == "domain":
            _tell_shared(labels, pairs[0][0].classes)
    if kind == "domain" and all(own == every for own in labels):
        return domain_incremental(pairs)
    return _joined(who, pairs, labels, kind)


def _joined(
    who: str, pairs: Sequence[Pair], labels: Sequence[set[int]], kind: Literal["iid", "class", "task", "domain"],
) -> Stream:
    """Pairs with labels of their own, as tasks one after the other."""
    train, test = ConcatSource([pair[0] for pair in pairs]), ConcatSource([pair[1] for pair in pairs])
    if kind == "class":
        _check_disjoint(who, labels, train.classes)
    label_map = torch.arange(len(train.classes))
    if kind != "domain":
        order = list(dict.fromkeys(label for own in labels for label in sorted(own)))
        label_map = torch.full((len(train.classes),), -1)
        label_map[torch.tensor(order)] = torch.arange(len(order))
    tasks, start, test_start = [], 0, len(train)
    for index, (one, other) in enumerate(pairs):
        ids = torch.arange(start, start + len(one)), torch.arange(test_start, test_start + len(other))
        classes = tuple(sorted(label_map[torch.tensor(sorted(labels[index]))].tolist()))
        tasks.append(Task(index, one.name, classes, *ids))
        start, test_start = start + len(one), test_start + len(other)
    width = int(label_map.max()) + 1
    return finished(who, Stream(tuple(tasks), train, test, width, kind, label_map))


def _tell_shared(labels: Sequence[set[int]], names: Sequence[str]) -> None:
    """Say what tasks that share some classes, and not all, were taken for."""
    every, common = set().union(*labels), set.intersection(*labels)
    if every == common:
        return
    seen: set[int] = set()
    for own in labels:
        if own & seen:
            shared = names[min(own & seen)]
            tell(f"as_stream: tasks share some classes ({shared!r} among them) and not all: taken for domains, where a "
                 f"prediction is among all {len(every)}; say kind=\"domain\", or kind=\"task\" where the task is known at test")
            return
        seen |= own


def _check_disjoint(who: str, labels: Sequence[set[int]], names: Sequence[str]) -> None:
    """Refuse classes that come in two tasks; one look at each."""
    home: dict[int, int] = {}
    for index, own in enumerate(labels):
        twice = sorted(own & home.keys())
        place = home[twice[0]] if twice else index
        got = f"class {names[twice[0]]!r} in tasks {place} and {index}" if twice else ""
        check(not twice, who, got, "be in one task of a class-incremental stream",
              "say kind='domain', or make the tasks disjoint and mix them with everbatch.data.blurry")
        home |= dict.fromkeys(own, index)


def pairs_of(who: str, data: Any, *, domains: bool = False) -> list[Pair]:
    """A (train, test) pair, or a sequence of them, as sources of one label space.

    Raises:
        ValueError: anything else; names the place. With `domains`: pairs whose classes differ.
    """
    if isinstance(data, tuple) and len(data) == 2 and all(is_data(part) for part in data):
        data = [data]
    check(isinstance(data, list | tuple), who, f"a {type(data).__name__}", "be (train, test) pairs", _CURE)
    check(len(data) > 0, who, "no pairs", "be at least one", _CURE)
    flat: list[Source] = []
    for index, pair in enumerate(data):
        got = f"{len(pair)} values" if isinstance(pair, list | tuple) else f"a {type(pair).__name__}"
        check(isinstance(pair, list | tuple) and len(pair) == 2, who, f"{got} in place {index}", "be a (train, test) pair", _CURE)
        flat += [as_source(part) for part in pair]
    tell_inputs(who, list(zip(flat[::2], flat[1::2], strict=True)))
    if domains and len(data) > 1:
        given = in_one_label_space(who, flat)
        same_classes(who, list(zip(given[::2], given[1::2], strict=True)))
    flat = in_one_label_space(who, flat, match=True)
    return list(zip(flat[::2], flat[1::2], strict=True))


def present(pair: Pair) -> set[int]:
    """The labels that occur in a pair."""
    return set(torch.unique(torch.cat([source.targets for source in pair])).tolist())
