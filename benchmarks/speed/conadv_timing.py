"""Times the arms of one launch against each other, on cores of their own, and holds them against their limits."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from conadv_arms import Net, learner
from conadv_costs import bytes_per_step, expected_flops, flops, lines
from timing import measure, paired, ratios

from everbatch.train import ConAdv

# arm: (the arm it is compared with, limit). The first three are expectations from the arithmetic, with 5 % for what is no FLOP.
LIMITS = {"mixed": ("vanilla", 2.0 * 1.05), "sequential": ("vanilla", 8 / 3 * 1.05), "inline": ("vanilla", 8 / 3 * 1.05),
          "process": ("mixed", 1.05), "ranks": ("mixed", 1.10), "process split": ("vanilla", 1.15),
          "ranks split": ("vanilla", 1.15)}


class Arm:
    """One arm as `measure` wants it, which also notes CPU time and page faults of a block's counted steps, and waits for a GPU
    where the clock is read."""

    def __init__(self, step: Callable[[], Any], steps: int, discard: int) -> None:
        self.step, self.steps, self.discard, self.calls = step, steps, discard, 0
        self.notes: list[list[float]] = []

    def __call__(self) -> None:
        self.step()
        at = self.calls % (self.discard + self.steps)
        self.calls += 1
        if at not in (self.discard - 1, self.discard + self.steps - 1):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = [time.thread_time(), time.process_time(), resource.getrusage(resource.RUSAGE_THREAD).ru_minflt]
        if at == self.discard - 1:
            self.began = now
        else:
            self.notes.append([(b - a) / self.steps for a, b in zip(self.began, now, strict=True)])


@contextlib.contextmanager
def pinned(place: int) -> Iterator[bool]:
    """This thread, and what it starts, on the place-th core that the process may use; gives whether that could be had."""
    before = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if place >= len(before):
        yield False
        return
    os.sched_setaffinity(0, {before[place]})
    try:
        yield True
    finally:
        os.sched_setaffinity(0, before)


def move_adversaries(cores: list[int]) -> bool:
    """Put the adversary processes beside this one on core 1; whether that could be had."""
    if len(cores) < 2:
        return False
    for child in multiprocessing.active_children():
        if child.name == "everbatch adversary":
            for task in os.listdir(f"/proc/{child.pid}/task"):
                os.sched_setaffinity(int(task), {cores[1]})
    return True


def run_arms(arms: tuple[str, ...], net: Net, blocks: int, steps: int, device: str = "cpu", discard: int = 2) -> dict[str, Any]:
    """Warm up until adversaries answer, count FLOPs and bytes, then time in alternating blocks."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    apart, steps = True, steps * net.more
    with pinned(0) as own:
        trainers = {arm: learner(arm, net, device) for arm in arms}
        try:
            counts: dict[str, Any] = {}
            for arm, t in trainers.items():
                for _ in range(3):  # the first answer of an adversary has come with the first step
                    t.training_step()
                if t.world.size == 1 and "process" in arm:
                    apart = move_adversaries(cores)
                counts[arm] = {"flops": flops(t.training_step), "expected": expected_flops(t.model, t.ring[0].inputs, arm)}
                t.before = (t.step, t.adversary_costs()["bytes_sent"]) if isinstance(t, ConAdv) else (t.step, 0)
            timed = {arm: Arm(t.training_step, steps, discard) for arm, t in trainers.items()}
            rows = ratios(measure(timed, blocks=blocks, steps=steps, discard=discard), "vanilla")
            for row in rows:
                t, arm = trainers[row["arm"]], row["arm"]
                row["thread_cpu"], row["process_cpu"], row["faults"] = (
                    statistics.median(column) for column in zip(*timed[arm].notes, strict=True))
                row |= counts[arm]
                row["samples"] = len(t.ring[0])
                if (kind := arm.removesuffix(" split")) in ("process", "ranks"):
                    row["bytes"] = (t.adversary_costs()["bytes_sent"] - t.before[1]) / (t.step - t.before[0])
                    whole = lines if kind == "ranks" else int
                    size, x = sum(whole(v.nbytes) for v in t.model.state_dict().values()), t.ring[0].inputs
                    modules = len(list(t.model.modules()))
                    row["bytes_expected"] = sum(bytes_per_step(kind, size, len(x), x[0].numel(), x.element_size(), modules))
        finally:
            for t in trainers.values():
                if isinstance(t, ConAdv):
                    t.close()
    return {"rows": rows, "pinned": own and apart and len(cores) > 1, "verdicts": verdicts(rows)}


def verdicts(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every limit that these rows can be held against, by the ratio of the least times and by `paired`: met or missed where the
    whole interval lies on that side of the limit, and the least times do."""
    found, by = {}, {row["arm"]: row for row in rows}
    for arm, (base, limit) in LIMITS.items():
        if arm in by and base in by:
            least = by[arm]["seconds_min"] / by[base]["seconds_min"]
            middle, low, high = paired(by[arm]["seconds"], by[base]["seconds"])
            verdict = "met" if max(least, high) <= limit else "MISSED" if min(least, low) > limit else "undecided"
            found[arm] = {"verdict": verdict, "base": base, "limit": limit, "minima": least, "paired": middle,
                          "interval": [low, high]}
    return found


def report(title: str, result: Mapping[str, Any]) -> None:
    """Print one launch. FLOPs: the trainer's as counted, its adversary's as expected; the ratio of their sum to plain training's
    with the trainer's as counted, as expected exactly, and by the model (6 + 2n) / 3."""
    rows = result["rows"]
    plain = next(row for row in rows if row["arm"] == "vanilla")
    print(f"\n{title}: {plain['blocks']} blocks, load {plain['load_average']:.1f}, trainer and adversary "
          f"{'on a core each' if result['pinned'] else 'NOT pinned: not possible here'}")
    heads = ("ms (min)", "median", "max", "ratio min", "median", "thread CPU", "process", "faults", "MFLOP", "adversary", "ratio",
             "exact", "model")
    print(f"{'arm':<18}" + "".join(f"{head:>11}" for head in heads))
    for row in rows:
        mine, other = row["expected"]
        model = {"vanilla": 3, "mixed": 6}.get(row["arm"].split()[0], 8) / 3 * row["samples"] / plain["samples"]
        ratio, exact = (row["flops"] + other) / plain["flops"], (mine + other) / sum(plain["expected"])
        values = [*(1e3 * row[f"seconds_{k}"] for k in ("min", "median", "max")), row["ratio_of_minima"], row["ratio_of_medians"],
                  1e3 * row["thread_cpu"], 1e3 * row["process_cpu"], row["faults"], row["flops"] / 1e6, other / 1e6, ratio, exact,
                  model]
        print(f"{row['arm']:<18}" + "".join(f"{value:>11.3f}" for value in values))
        if row["flops"] != mine or abs(ratio / model - 1) > 0.01:
            same = "exactly" if row["flops"] == mine else "NOT"
            print(f"{'':<18}FLOPs {same} as expected, {ratio / model - 1:+.2%} off the model")
        if "bytes" in row:
            equal = "equal" if row["bytes"] == row["bytes_expected"] else "NOT EQUAL"
            print(f"{'':<18}bytes per step {row['bytes']:.0f}, by the formula {row['bytes_expected']:.0f}: {equal}")
    for arm, v in result["verdicts"].items():
        print(f"{arm:<18}{v['verdict']}: {v['minima']:.3f} (least times) and {v['paired']:.3f} (pairs of blocks, "
              "{:.3f} to {:.3f})".format(*v["interval"]) + f" of {v['base']}, limit {v['limit']:.3f}")
