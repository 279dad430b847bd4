"""The options that say how a data set becomes a stream of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from everbatch.data import STREAMS, Stream, StreamName, make_stream, pilot_increments
from everbatch.errors import check, check_real, check_whole

__all__ = ["Split"]

WHO = "split"


@dataclass(frozen=True, kw_only=True)
class Split:
    """How samples become tasks, beside `scenario` and `tasks`; see `everbatch.data.make_stream`."""

    increments: tuple[int, ...] | None = None
    """Classes of each task, in place of `tasks`; they may differ, and sum to all."""
    first: int | None = None
    """Classes of the first task, where increment says those of each later one; null: as many."""
    increment: int | None = None
    """Classes of each task after the first, in place of `tasks`; the last takes the rest. B50-Inc10 is first=50 increment=10."""
    class_order: tuple[int, ...] | None = None
    """Labels of the data set in the order in which they come, in place of a seed; those left out are not in the stream."""
    order_seed: int | None = None
    """Seed of the class order, the permutations and what a blurry stream moves; null: trainer.seed. PILOT's is 1993."""
    blur: float | None = None
    """Share of each task's training samples that comes in other tasks; in (0, 1); null: 0.1 with scenario=blurry, else none."""
    online: bool = False
    """A single pass over each task, whatever trainer.epochs says; scenario=online is scenario=class with it."""
    task_free: bool = False
    """No method sees where tasks begin and end; scenario=task_free is scenario=class with it."""
    domains: Literal["permuted", "rotated"] = "permuted"
    """scenario=domain: each task permutes the pixels of the data set, or rotates its images."""
    degrees: tuple[float, ...] | None = None
    """domains=rotated: the angle of each task, in place of `tasks`; null: even steps over half a turn."""

    def __post_init__(self) -> None:
        for name in ("first", "increment"):
            if getattr(self, name) is not None:
                check_whole(WHO, name, getattr(self, name), 1)
        if self.order_seed is not None:
            check_whole(WHO, "order_seed", self.order_seed, 0, 2**32 - 1)
        if self.blur is not None:
            check_real(WHO, "blur", self.blur, 0.0, 1.0, open_low=True, open_high=True)
        check(self.first is None or self.increment is not None, WHO, f"first={self.first}", "go with increment",
              "or give the classes of every task as increments")
        check(self.increments is None or self.increment is None, WHO, "increments and increment", "be one of them")
        for size in self.increments or ():
            check_whole(WHO, "increments", size, 1)
        check(self.degrees is None or self.domains == "rotated", WHO, "degrees with domains=permuted", "go with domains=rotated")
        for angle in self.degrees or ():
            check_real(WHO, "degrees", angle)

    def make(self, scenario: StreamName, pairs: Any, tasks: int, seed: int) -> Stream:
        """The stream of one (train, test) pair of sources, or of one for each task."""
        several = len(pairs) > 1
        sizes = self.increments
        check(not several or self.increment is None, WHO, f"increment={self.increment} with {len(pairs)} data sets",
              "be left out", "each of them is a task")
        if self.increment is not None:
            classes = len(self.class_order or pairs[0][0].classes)
            sizes = pilot_increments(classes, self.first or self.increment, self.increment)
        count = None if several or sizes is not None or self.degrees is not None or STREAMS[scenario].base == "iid" else tasks
        return make_stream(
            scenario, pairs, tasks=count, seed=seed if self.order_seed is None else self.order_seed, increments=sizes,
            class_order=self.class_order, blur=self.blur, one_pass=self.online, hidden=self.task_free, domains=self.domains,
            degrees=self.degrees)

    def count(self, scenario: StreamName, sources: int) -> int | None:
        """Number of tasks, where something else than `tasks` says it, whatever the data; else None."""
        if sources > 1:
            return sources
        if STREAMS[scenario].base == "iid":
            return 1
        sizes = self.increments if self.increments is not None else self.degrees
        return None if sizes is None else len(sizes)

    def passes_once(self, scenario: StreamName) -> bool:
        """Whether samples come once."""
        return self.online or STREAMS[scenario].one_pass

    def hides(self, scenario: StreamName) -> bool:
        """Whether methods see no boundary."""
        return self.task_free or not STREAMS[scenario].boundaries

    def unused(self, scenario: StreamName, sources: int) -> dict[str, str]:
        """Options without an effect beside the others, by path, and why."""
        found: dict[str, str] = {}
        about, whole = STREAMS[scenario], sources <= 1
        if not whole:
            given = dict.fromkeys(("tasks", "split.increments", "split.first", "split.increment", "split.class_order",
                                   "split.domains", "split.degrees"), "each of data.sources is a task")
            return given | ({} if self.blur or about.blur else {"split.order_seed": "each of data.sources is a task"})
        if not about.of_classes:
            found |= dict.fromkeys(("split.increments", "split.first", "split.increment", "split.class_order"),
                                   f"scenario={scenario} does not divide classes")
        if about.base != "domain":
            found |= dict.fromkeys(("split.domains", "split.degrees"), "they are of scenario=domain")
        if about.base == "iid":
            found |= {"tasks": "scenario=iid is one task", "split.order_seed": "scenario=iid draws nothing"}
        elif self.increments is not None or self.increment is not None:
            found["tasks"] = "split.increment, or increments, says the classes of each"
        elif self.degrees is not None:
            found["tasks"] = "split.degrees has one for each task"
        if self.class_order is not None and not (self.blur or about.blur):
            found["split.order_seed"] = "split.class_order says the order"
        return found
