"""Images per second of MOS's retrieval against the released form, against one adapter at a time, and against a plain pass.

python benchmarks/speed/mos.py [--rounds 3] [--json FILE]

A vision transformer of ViT-Tiny's width and depth on images of 32 pixels, with archives of 1, 5, 10 and 50 adapters. Adapters and
head are trained briefly on classes of noisy patterns, so that samples go to where their class is; the mean number of rows that a
sample costs is printed. A random head sends samples to and fro: told without a limit.

- released form: the features of all samples under every adapter and once more under the first, then sample by sample
- one at a time: only the adapters that are asked for, each on its samples, from the images on
- ours: `everbatch.nn.retrieve`, each sample its own adapter in one batch, behind a start that is computed once
- plain: the network without adapters, once

Limits: at T = 50 at least 20x the released form; at any T at least 0.4 of a plain pass; from T = 10 at least 1.1x one at a time.
Medians of the ratios within a round, with 95 % bootstrap intervals. Processor time of one thread, so that what else runs on the
machine counts little.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from timing import paired

from everbatch.nn import (
    AdapterTrunk,
    Retrieved,
    adapters_of,
    attach_adapters,
    detach_adapters,
    flat_adapters,
    load_adapters,
    reading_adapters,
    retrieve,
)
from everbatch.nn.retrieval import MOST
from everbatch.report.recorder import versions

TASKS = (1, 5, 10, 50)
CHEAP = 4
"""Rounds of the forms that take a few passes, for each of the one that takes T + 1."""
EACH = 2
"""Classes of a task."""
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 12, "num_heads": 3}


@dataclass
class Setting:
    """What is asked: a network with adapters, its archive, and what was learned of the classes."""

    model: VisionTransformer
    archive: Tensor
    weight: Tensor
    prototypes: Tensor
    images: Tensor
    labels: Tensor

    @property
    def cls2task(self) -> Tensor:
        return torch.arange(len(self.prototypes)) // EACH

    def head(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features, dim=1), self.weight)

    def first(self, tasks: int, batch: int) -> Setting:
        """The same with the first tasks alone, and a batch of their classes."""
        classes = EACH * tasks
        rows = torch.nonzero(self.labels < classes).flatten()
        taken = rows[torch.arange(batch) * len(rows) // batch % len(rows)]
        return Setting(self.model, self.archive[:tasks], self.weight[:classes], self.prototypes[:classes],
                       self.images[taken], self.labels[taken])


def patterns(classes: int, each: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Smooth patterns, one for each class, under noise."""
    made = torch.Generator().manual_seed(0)
    coarse = torch.randn(classes, 3, 6, 6, generator=made)
    drawn = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(each)
    clean = F.interpolate(coarse, size=side, mode="bilinear")[labels]
    return 2.0 * clean + 0.5 * torch.randn(clean.shape, generator=drawn), labels


def made(tasks: int, size: dict[str, int], *, steps: int = 1, each: int = 4, rank: int = 16) -> Setting:
    """Adapters trained for some steps each on their own classes, every one from where the last one ended; then the head on
    features of all classes, each under its own adapter."""
    torch.manual_seed(0)
    model = VisionTransformer(**size, num_classes=0)  # type: ignore[arg-type]
    attach_adapters(model, rank, scale=1.0, dropout=0.0)
    model.requires_grad_(False)
    live = [p.requires_grad_() for adapter in adapters_of(model).values() for p in adapter.parameters()]
    x, y = patterns(EACH * tasks, each, size["img_size"], seed=1)
    archive, own, first = [], torch.empty(len(x), size["embed_dim"]), torch.empty(len(x), size["embed_dim"])
    optimizer = torch.optim.SGD(live, lr=0.3, momentum=0.9)
    for task in range(tasks):
        rows = torch.nonzero(y // EACH == task).flatten()
        for _ in range(steps):
            z = F.normalize(model(x[rows]), dim=1)
            means = torch.stack([z[y[rows] % EACH == k].mean(0) for k in range(EACH)])
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(z @ means.T / 0.1, y[rows] % EACH))
            optimizer.step()
        archive.append(flat_adapters(model))
        with torch.no_grad():
            own[rows] = model(x[rows])
            with reading_adapters(model, archive[0]):
                first[rows] = model(x[rows])
    prototypes = torch.stack([first[y == c].mean(0) for c in range(EACH * tasks)])
    return Setting(model.eval(), torch.stack(archive), head_of(own, y), prototypes,
                   *patterns(EACH * tasks, 2, size["img_size"], seed=2))


def head_of(features: Tensor, labels: Tensor, steps: int = 300) -> Tensor:
    """A linear classifier of normalised features."""
    weight = torch.zeros(int(labels.max()) + 1, features.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(F.linear(F.normalize(features, dim=1), weight), labels))
        optimizer.step()
    return weight.detach()


# ------------------------------------------------------------------------------------------------- the forms
def ours(s: Setting) -> tuple[Retrieved, AdapterTrunk]:
    """The library's."""
    trunk = AdapterTrunk(s.model, s.archive)
    return retrieve(trunk, s.images, s.head, s.prototypes, s.cls2task, len(s.archive)), trunk


def released(s: Setting) -> Tensor:
    """T + 1 passes, then a loop over samples."""
    tables = []
    for vector in (s.archive[0], *s.archive):
        load_adapters(s.model, vector)
        tables.append(s.model(s.images))
    scores = []
    for row in range(len(s.images)):
        cosines = F.cosine_similarity(tables[0][row], s.prototypes)
        task, evaluated = int(s.cls2task[cosines.argmax()]), 0
        while True:
            z = s.head(tables[1 + task][row:row + 1])[0]
            evaluated += 1
            following = int(s.cls2task[z.argmax()])
            if following == task or evaluated == MOST:
                break
            task = following
        scores.append(z.softmax(0) + (len(s.archive) * cosines).softmax(0))
    return torch.stack(scores)


def one_at_a_time(s: Setting) -> Tensor:
    """Only the adapters that are asked for, each on the samples that ask, which are remembered."""
    def under(task: int, rows: Tensor) -> Tensor:
        load_adapters(s.model, s.archive[task])
        return s.head(s.model(s.images[rows]))

    load_adapters(s.model, s.archive[0])
    features = s.model(s.images)
    cosines = F.normalize(features, dim=1) @ F.normalize(s.prototypes, dim=1).T
    known = {(row, 0): z for row, z in enumerate(s.head(features))}
    tasks: list[int] = s.cls2task[cosines.argmax(1)].tolist()
    logits, active = s.head(features), set(range(len(tasks)))
    for evaluated in range(MOST):
        asked: dict[int, list[int]] = {}
        for row in sorted(active):
            if (row, tasks[row]) not in known:
                asked.setdefault(tasks[row], []).append(row)
        for task, rows in asked.items():
            known |= {(row, task): z for row, z in zip(rows, under(task, torch.tensor(rows)), strict=True)}
        for row in sorted(active):
            logits[row] = known[row, tasks[row]]
            following = int(s.cls2task[logits[row].argmax()])
            if following == tasks[row] or evaluated + 1 == MOST:
                active.remove(row)
            tasks[row] = following
    return logits.softmax(1) + (len(s.archive) * cosines).softmax(1)


@torch.no_grad()
def measured(setting: Setting, rounds: int, *, limits: bool = True) -> dict[str, Any]:
    """Times of one number of tasks; all forms give the same scores."""
    found, trunk = ours(setting)
    for form in (released, one_at_a_time) if limits else (one_at_a_time,):
        far = (form(setting) - found.scores).abs().max().item()
        assert far < 1e-3, f"{form.__name__} differs by {far}"
    bare = copy.deepcopy(setting.model)
    detach_adapters(bare)
    arms: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(setting), "one at a time": lambda: one_at_a_time(setting), "plain": lambda: bare(setting.images)}
    times = measure(arms, CHEAP * rounds if limits else rounds)
    beside: dict[str, list[float]] = {}
    if limits:
        beside = measure({"ours": arms["ours"], "released": lambda: released(setting)}, rounds)
        times["released"] = beside["released"]
    n = len(setting.images)
    return {
        "tasks": len(setting.archive), "passes": trunk.passes, "rounds": found.rounds, "rows_per_sample": trunk.rows / n,
        "evaluations": (found.path >= 0).sum().item() / n,
        "right": (found.scores.argmax(1) == setting.labels).float().mean().item(),
        "per_second": {name: n / sorted(t)[len(t) // 2] for name, t in times.items()},
        "of_plain": paired(times["plain"], times["ours"]),
        "over_one_at_a_time": paired(times["one at a time"], times["ours"]),
        "over_released": paired(beside["released"], beside["ours"]) if limits else None}


def measure(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each arm, in turn, there and back."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms)[:: 1 if number % 2 else -1]:
            started = time.process_time()
            arms[name]()
            times[name].append(time.process_time() - started)
    return times


def told(row: dict[str, Any]) -> str:
    """One line."""
    def ratio(name: str, limit: float | None) -> str:
        middle, low, high = row[name]
        met = "" if limit is None or not row["limits"] else f" (limit {limit:g}: {'met' if middle >= limit else 'NOT met'})"
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]{met}"

    tasks, speed = row["tasks"], row["per_second"]
    text = (f"T = {tasks:<3} {row['head']:<8} {speed['ours']:6.1f} images/s: {ratio('of_plain', 0.4)} of a plain pass, "
            f"{ratio('over_one_at_a_time', 1.1 if tasks >= 10 else None)} of one at a time")
    text += f", {ratio('over_released', 20.0 if tasks == 50 else None)} of the released form" if row["over_released"] else ""
    return (f"{text}; {row['passes']} passes, {row['rows_per_sample']:.2f} rows and {row['evaluations']:.2f} evaluations per "
            f"sample, {100 * row['right']:.0f} % right, load {row['load']:.1f}")


def main() -> None:
    """Measure every number of tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    setting = made(max(TASKS), SIZE)
    rows = []
    for head in ("trained", "random"):
        if head == "random":
            setting.weight = torch.randn(setting.weight.shape, generator=torch.Generator().manual_seed(3))
        for tasks in TASKS:
            limits = head == "trained"
            row = {"head": head, "limits": limits, "load": os.getloadavg()[0],
                   **measured(setting.first(tasks, args.batch), args.rounds, limits=limits)}
            rows.append(row)
            print(told(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"rounds": args.rounds, "rows": rows, "versions": versions()}, indent=1))


if __name__ == "__main__":
    main()
