"""Every kind of stream by name, and one function that makes any of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from everbatch.data.arrival import blurry, online, task_free
from everbatch.data.domains import permuted, rotated
from everbatch.data.label_space import Pair
from everbatch.data.pairs import as_stream, pairs_of
from everbatch.data.streams import class_incremental, domain_incremental, growing, iid, task_incremental
from everbatch.data.tasks import Kind, Stream
from everbatch.errors import check, nearest

__all__ = ["STREAMS", "StreamKind", "StreamName", "make_stream"]

StreamName = Literal["class", "task", "domain", "growing", "iid", "blurry", "online", "task_free"]


@dataclass(frozen=True)
class StreamKind:
    """What a name stands for: what tasks are, and how their samples arrive."""

    base: Kind
    about: str
    blur: float = 0.0
    one_pass: bool = False
    boundaries: bool = True

    @property
    def of_classes(self) -> bool:
        """Whether its tasks are sets of classes."""
        return self.base in ("class", "task")


STREAMS: dict[StreamName, StreamKind] = {
    "class": StreamKind("class", "disjoint classes, no task id at test"),
    "task": StreamKind("task", "disjoint classes, the task id is given at test"),
    "domain": StreamKind("domain", "the same classes, other inputs in each task"),
    "growing": StreamKind("growing", "each round trains on all that has arrived"),
    "iid": StreamKind("iid", "everything in one task"),
    "blurry": StreamKind("class", "class, a share of each task's samples comes in other tasks", blur=0.1),
    "online": StreamKind("class", "class, in a single pass", one_pass=True),
    "task_free": StreamKind("class", "class, and no method sees where a task begins or ends", boundaries=False),
}
"""Every kind by name."""
assert tuple(STREAMS) == get_args(StreamName)


def make_stream(
    kind: StreamName, data: Any, *, tasks: int | None = None, seed: int = 0, increments: Sequence[int] | str | None = None,
    class_order: Sequence[int] | None = None, blur: float | None = None, one_pass: bool = False, hidden: bool = False,
    domains: Literal["permuted", "rotated"] = "permuted", degrees: Sequence[float] | None = None,
) -> Stream:
    """A stream of a kind by its name, over one pair of data sets or over one for each task.

    Args:
        kind: a name of `STREAMS`.
        data: (train, test), to be divided; or a list of such pairs, one for each task, see `as_stream`.
        tasks: number of tasks, rounds or domains; by default 5.
        seed: of the class order, the permutations, the order of arrival, and of what a blurry stream moves.
        increments, class_order: see `class_incremental`.
        blur: share of `blurry`; by default the kind's.
        one_pass, hidden: also `online`, also `task_free`, whatever the kind says.
        domains: how a domain stream of one pair makes its domains: by a permutation of pixels each, or a rotation.
        degrees: the angle of each rotated domain; by default `tasks` even steps over half a turn.

    Raises:
        ValueError: an unknown kind, with the nearest; options of another kind; what the functions that it calls refuse.

    >>> from everbatch.data import load, make_stream
    >>> digits = load("digits", train=True), load("digits", train=False)
    >>> [len(task.classes) for task in make_stream("blurry", digits, increments="B4-Inc3").tasks]
    [4, 3, 3]
    """
    who = "make_stream"
    check(kind in STREAMS, who, f"kind={kind!r}", f"be one of {', '.join(STREAMS)}", nearest(str(kind), STREAMS))
    about = STREAMS[kind]
    pairs: list[Pair] = pairs_of(who, data, domains=about.base == "domain")
    whole = len(pairs) == 1
    _check_options(kind, whole, {
        "increments": increments, "class_order": class_order, "tasks": tasks, "degrees": degrees,
        "domains": None if domains == "permuted" else domains})
    if not whole:
        check(about.base != "growing", who, f"{len(pairs)} pairs with kind='growing'", "be one pair, whose samples arrive")
        stream = as_stream(pairs, kind="class" if about.base == "class" else about.base)  # type: ignore[arg-type]
    elif about.of_classes:
        split = class_incremental if about.base == "class" else task_incremental
        stream = split(*pairs[0], tasks, seed, class_order, increments=increments)
    elif about.base == "domain":
        stream = domain_incremental(_domains(pairs[0], domains, tasks, seed, degrees))
    else:
        stream = growing(*pairs[0], tasks, seed) if about.base == "growing" else iid(*pairs[0])
    share = about.blur if blur is None else blur
    stream = blurry(stream, share, seed) if share else stream
    stream = online(stream) if about.one_pass or one_pass else stream
    return stream if about.boundaries and not hidden else task_free(stream)


def _domains(pair: Pair, how: str, tasks: int | None, seed: int, degrees: Sequence[float] | None) -> list[Pair]:
    """The domains of one pair."""
    train, test = pair
    count = 5 if tasks is None else tasks
    check(how in ("permuted", "rotated"), "make_stream", f"domains={how!r}", "be 'permuted' or 'rotated'")
    check(degrees is None or how == "rotated", "make_stream", f"degrees with domains={how!r}", "go with domains='rotated'")
    if how == "permuted":
        return permuted(train, test, count, seed)
    return rotated(train, test, [180.0 * k / count for k in range(count)] if degrees is None else degrees)


def _check_options(kind: StreamName, whole: bool, given: dict[str, Any]) -> None:
    """Refuse options that the kind does not use."""
    about = STREAMS[kind]
    used = {"class": {"increments", "class_order", "tasks"}, "task": {"increments", "class_order", "tasks"},
            "domain": {"tasks", "degrees", "domains"}, "growing": {"tasks"}, "iid": set()}[about.base] if whole else set()
    odd = [name for name, value in given.items() if value is not None and name not in used]
    reason = "" if whole else "; each pair is a task"
    check(not odd, "make_stream", f"{', '.join(odd)} with kind={kind!r}", f"be left out{reason}")
    twice = given["degrees"] is not None and given["tasks"] is not None
    check(not twice or len(given["degrees"]) == given["tasks"], "make_stream",
          f"tasks={given['tasks']} and {len(given['degrees'] or ())} degrees", "agree")
