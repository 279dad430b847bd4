"""What three ranks of a launch do with MOS; every check compares with another run, or with a closed form."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import Job, Record
from torch import Tensor

import learning
import surgery
from everbatch.distributed import World
from everbatch.train import MOS
from learning import stream
from surgery import SGD, STEPS

TOLERANCE = {"term": 5e-4, "plain": 2e-5}
"""Of what is trained, kept and predicted, against one process, in parts of the largest entry: sums over ranks round otherwise.
The contrast is of sharp softmaxes: with it, weights that begin apart by 3e-8 of their size end so by 3e-5, without it by 1e-6."""


def hashed(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def images(count: int = 40) -> Tensor:
    return learning.scale(stream().test.fetch(torch.arange(count)))  # type: ignore[arg-type]


def found_by(t: Any) -> dict[str, Tensor]:
    """What a run has learned, keeps and predicts."""
    state = t.states[MOS]
    kept = {name: getattr(state, name) for name in ("archive", "prefix", "means", "spread", "prototypes")}
    return {**surgery.masters(t), **kept, "scores": t.predict(images())}


def run(record: Record, store: Path, host: str) -> None:
    """On "plain" first, which leaves what the others are compared with. The optimizer has decay and momentum."""
    folder = store / f"{host}-{World.current().size}"
    t = surgery.trainer(host, spoil=(9,))
    kept: dict[int, list[str]] = {}

    def noted(task: Any, inner: Any = t.on_task_end) -> None:
        inner(task)
        kept[task.id] = [hashed(row) for row in t.states[MOS].archive]

    t.on_task_end = noted
    t.fit(stream())
    parity(record, store, host, "term", t)
    without = surgery.trainer(host, orthogonality=0.0)
    without.fit(stream())
    parity(record, store, host, "plain", without)
    bits(record, host, t)
    visible(record, host, t)
    archive(record, host, t, kept)
    retrieval(record, host, t)
    resumed(record, host, folder, t)


def parity(record: Record, store: Path, host: str, kind: str, t: Any) -> None:
    """Against the same run in one process."""
    learned = found_by(t)
    if host == "plain":
        torch.save(learned, store / f"{kind}.pt")
        return
    with record.check(f"parity/{host}/{kind}") as found:
        alone = torch.load(store / f"{kind}.pt", weights_only=True)
        found.require(alone.keys() == learned.keys(), f"{alone.keys() ^ learned.keys()}")
        errors = {n: ((alone[n] - learned[n]).abs().max() / alone[n].abs().max()).item() for n in alone}
        worst = max(errors, key=lambda name: errors[name])
        found.require(errors[worst] <= TOLERANCE[kind], f"{worst} is off by {errors[worst]:.2g} of its largest entry")


def bits(record: Record, host: str, t: Any) -> None:
    """Old rows of the head through a task's steps; and a step that was skipped."""
    with record.check(f"rows/{host}") as found:
        for task in (1, 2):
            start, end, aligned = (t.noted[f"{when}/{task}"] for when in ("start", "end", "aligned"))
            for one, other in zip(surgery.head_rows(start, 2 * task), surgery.head_rows(end, 2 * task), strict=True):
                found.require(torch.equal(one, other), f"old rows moved in task {task}")
            moved = not torch.equal(end["head.weight"][: 2 * task], aligned["head.weight"][: 2 * task])
            found.require(moved, "alignment moved no old row")
            own = slice(2 * task, 2 * task + 2)
            found.require(not torch.equal(start["head.weight"][own], end["head.weight"][own]), "the task's rows did not learn")
    with record.check(f"skipped/{host}") as found:
        applied, before, after = t.noted["skipped/9"]
        found.require(not applied, "the step was applied")
        found.same_bits(after, before, "merged, or put back")


def visible(record: Record, host: str, t: Any) -> None:
    """The network computes with the masters, and every rank has the same."""
    with record.check(f"visible/{host}") as found:
        masters, seen = surgery.masters(t), surgery.visible(t)
        found.same_bits(seen, masters, "what the network has")
        text = [hashed(value) for value in masters.values()]
        found.require(len({str(other) for other in World.current().gather(text)}) == 1, "ranks have other weights")


def archive(record: Record, host: str, t: Any, kept: dict[int, list[str]]) -> None:
    """Rows that are there stay: through training, alignment, evaluation; on every rank the same."""
    with record.check(f"archive/{host}") as found:
        now = [hashed(row) for row in t.states[MOS].archive]
        found.require([len(rows) for rows in kept.values()] == [1, 2, 3], f"{kept}")
        found.require(all(rows == now[: len(rows)] for rows in kept.values()), "a row changed")
        everywhere = World.current().gather([now, hashed(t.states[MOS].means), hashed(t.states[MOS].spread)])
        found.require(len({str(other) for other in everywhere}) == 1, "ranks keep other things")


def retrieval(record: Record, host: str, t: Any) -> None:
    """Each rank predicts samples of its own, so that ranks need other numbers of rounds; against one sample after the other."""
    world = World.current()
    x = images()
    with record.check(f"retrieval/{host}", 1e-5) as found:
        wanted, paths = surgery.by_hand(t, x)
        order = sorted(range(len(x)), key=lambda row: len(paths[row]))
        mine = order[: 3 + world.rank] if world.rank + 1 < world.size else order[-9:]
        scores = t.predict(x[mine])
        found.measure((scores - wanted[mine]).abs().max().item())
        walked = [[task for task in row if task >= 0] for row in t.last_paths.tolist()]
        found.require(walked == [paths[row] for row in mine], f"{walked}")
        longest = world.gather(max(map(len, walked)))
        found.require(len(set(longest)) > 1 or world.size == 1, f"all ranks took {longest[0]} evaluations")


def merging(record: Record, store: Path, host: str) -> None:
    """At rate 0, fresh adapters are pulled to the stored ones' mean by the closed form."""
    t = surgery.trainer(host, init="fresh", still=True, align_epochs=0, orthogonality=0.0, merge_every=2)
    t.fit(stream())
    with record.check(f"merging/{host}", 1e-6) as found:
        rows = t.states[MOS].archive
        for task in (1, 2):
            keep = 0.9 ** (STEPS // 2)
            wanted = keep * surgery.fresh_vector(t, task) + (1 - keep) * rows[:task].mean(0)
            found.measure((rows[task] - wanted).abs().max().item())
    visible(record, f"{host}/merged", t)


def resumed(record: Record, host: str, folder: Path, expected: Any) -> None:
    """Left in the second task, and resumed by other objects: bit for bit."""
    after = STEPS + 2
    with record.check(f"resumed/{host}") as found:
        cut = surgery.trainer(host, folder=folder, recorder=learning.recorder(folder, after), spoil=(9,))
        try:
            cut.fit(stream())
            found.require(False, "the run was not left")
        except learning.Abandoned:
            rows = [hashed(row) for row in cut.states[MOS].archive]
        again = surgery.trainer(host, folder=folder, spoil=(9,))
        again.fit(stream(), resume=True)
        found.same_bits(learning.everything(again), learning.everything(expected), "resumed")
        found.require([hashed(row) for row in again.states[MOS].archive[: len(rows)]] == rows, "the archive changed")
        mine = images()[World.current().rank :: World.current().size]
        found.same_bits({"scores": again.predict(mine)}, {"scores": expected.predict(mine)}, "predictions")


def grown(record: Record, store: Path, host: str) -> None:
    """A head that grows by launching anew: old parts keep their bits, one group for each growth, and it resumes in mid-task."""
    folder = store / f"grown-{host}-{World.current().size}"
    t = surgery.trainer(host, surgery.Growing, optimizer=SGD)
    t.fit(stream())
    with record.check(f"grown/{host}") as found:
        found.require(t.growths == [{"classes": 2}, {"classes": 2}] and len(t.optimizer.param_groups) == 3, f"{t.growths}")
        for task in (1, 2):
            start, end = t.noted[f"start/{task}"], t.noted[f"end/{task}"]
            old = [f"head.parts.{k}.{p}" for k in range(task) for p in ("weight", "bias")]
            found.same_bits({n: end[n] for n in old}, {n: start[n] for n in old}, "old parts")
        cut = surgery.trainer(host, surgery.Growing, optimizer=SGD, folder=folder, recorder=learning.recorder(folder, STEPS + 2))
        try:
            cut.fit(stream())
            found.require(False, "the run was not left")
        except learning.Abandoned:
            pass
        again = surgery.trainer(host, surgery.Growing, optimizer=SGD, folder=folder)
        again.fit(stream(), resume=True)
        found.same_bits(learning.everything(again), learning.everything(t), "resumed")
        found.require(again.predict(images()).shape == (40, 6), "scores of another width")


def half(record: Record, store: Path, host: str) -> None:
    """In bf16: masters are merged, held and archived in fp32, the network computes with what they round to."""
    t = surgery.trainer(f"{host}-bf16")
    t.fit(stream())
    with record.check(f"half/{host}") as found:
        masters, seen = surgery.masters(t), surgery.visible(t)
        found.require({value.dtype for value in masters.values()} == {torch.float32}, "masters of another type")
        found.same_bits(seen, {name: value.bfloat16() for name, value in masters.items()}, "what the network has")
        for task in (1, 2):
            pairs = zip(*(surgery.head_rows(t.noted[f"{when}/{task}"], 2 * task) for when in ("start", "end")), strict=True)
            found.require(all(torch.equal(one, other) for one, other in pairs), f"old rows moved in task {task}")
        scores = t.predict(images())
        found.require(scores.dtype == torch.float32 and bool(scores.isfinite().all()), f"scores {scores.dtype}")
        found.require(t.states[MOS].archive.dtype == torch.float32, "an archive of another type")


def jobs(record: Record, store: str, *names: str) -> Iterator[Job]:
    """STORE NAME:HOST ...: functions of this module."""
    Path(store).mkdir(parents=True, exist_ok=True)
    for name in names:
        job, _, host = name.partition(":")
        yield name, functools.partial(globals()[job], record, Path(store), host)
