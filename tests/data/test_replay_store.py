"""The payload of a memory on 1, 2 and 3 ranks: together, and in what they draw, the ranks are the single process."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import multiprocessing
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from everbatch.data import Buffer, ClassBalanced, ReplayStore, Reservoir, Ring, Stream, class_incremental, load, share
from everbatch.data.own_memory import OwnMemory
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch
from everbatch.train.memory.herding import Herded
from everbatch.train.memory.offer import offer

STEPS, GLOBAL = 12, 12
PAYLOAD = ("raw", "logits", "flag")


def batch(step: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Ids, targets, positions, task of a global batch: 60 samples met about two and a half times, in 3 tasks."""
    task = step // 4
    ids = torch.from_numpy(np.random.default_rng([step % 4, task]).permutation(20)[:GLOBAL]) + 20 * task
    return ids, ids % 2 + 2 * task, step * GLOBAL + torch.arange(GLOBAL), task


def payload(ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """Rows that tell whose they are: images by id, logits by visit."""
    raw = (ids[:, None, None, None] * 3 + torch.arange(8).reshape(2, 2, 2)).to(torch.uint8)
    return {"raw": raw, "logits": positions[:, None] + torch.tensor([0.0, 0.25, 0.5]), "flag": positions % 2 == 0}


class Rotating:
    """A user's memory: slots in turn. What it counts is its own, and nobody else can put it back."""

    def __init__(self) -> None:
        self.offered = 0

    def add(self, held: Buffer, offered: Any, rng: np.random.Generator) -> Any:
        self.offered += 1
        return (self.offered + np.arange(len(offered.ids))) % held.capacity

    def draw(self, held: Buffer, count: int, rng: np.random.Generator) -> Any:
        return rng.permutation(held.filled)[:count]


def memory(kind: str, capacity: int = 17) -> Buffer:
    if kind == "own":
        return OwnMemory(Rotating, capacity, seed=5)
    if kind == "ring":
        return Ring(capacity, tasks=3, seed=5)
    return ClassBalanced(capacity, seed=5) if kind == "class" else Reservoir(capacity, seed=5, key=kind)


def add(store: ReplayStore, step: int) -> None:
    ids, targets, positions, task = batch(step)
    bounds = share(GLOBAL, store.world.size)
    mine = slice(int(bounds[store.world.rank]), int(bounds[store.world.rank + 1]))
    store.add(ids, targets, positions, task, payload(ids[mine], positions[mine]))


DRAWS = ((5, "a"), (2, "b"), (100, "c"))
SKIPPED = (0, 4, 7)
"""Steps that leave no trace; the first of a task is among them."""


def run(
    kind: str, world: World, resume: list[dict[str, Any]] | None = None, start: int = 0, *, ahead: bool | None = None,
) -> dict[str, Any]:
    """Feed the memory and draw from it; what the rank saw. `ahead`: with skipped steps and a draw in between, and whether what
    the next step draws is drawn before the batch's rows are there."""
    store = ReplayStore(memory(kind), world, seed=1)
    if resume is not None:
        store.load_state_dict(resume)
    draws = []
    for step in range(start, STEPS):
        draws.append([store.draw(count, step, purpose) for count, purpose in DRAWS])
        if ahead:
            store.ahead(*batch(step), step=step + 1, wanted=DRAWS)
        if ahead is not None and step == 5:  # it sees what was there before the batch
            draws.append([store.draw(9, step, "in between")])
        if ahead is not None and step in SKIPPED:
            store.take_back()
        else:
            add(store, step)
            assert len(store._ready) == (len(DRAWS) if ahead and step != 5 and kind != "own" else 0)
        if step == STEPS // 2 - 1:
            half = store.state_dict()
    return {"draws": draws, "half": half if start == 0 else None, "end": store.state_dict()}


def worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size,
                            timeout=datetime.timedelta(seconds=60))
    try:
        kinds = ("stream", "sample", "class")
        single = torch.load(f"{folder}/single.pt", weights_only=False)
        results = {kind: run(kind, World.current()) for kind in kinds}
        resumed = {kind: run(kind, World.current(), [single[kind]["half"]], STEPS // 2) for kind in kinds}
        for kind in (*kinds, "ring"):
            check_ahead(kind, World.current())
        torch.save((results, resumed), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(np.asarray(a[k]), np.asarray(b[k])) for k in a)


def check_ahead(kind: str, world: World) -> None:
    """Drawn ahead or not, a rank sees the same bits and holds the same rows."""
    one, other = (run(kind, world, ahead=ahead) for ahead in (False, True))
    assert len(one["draws"]) == len(other["draws"])
    for theirs, mine in zip(one["draws"], other["draws"], strict=True):
        for a, b in zip(theirs, mine, strict=True):
            assert (a is None and b is None) or same(a, b)
    for moment in ("half", "end"):
        assert same(one[moment]["index"], other[moment]["index"]) and same(one[moment]["rows"], other[moment]["rows"])


def check_widened(world: World) -> None:
    """A head that grew: what was on its way is of the old width, and is fetched anew."""
    found = []
    for ahead in (False, True):
        store = ReplayStore(memory("sample"), world, seed=1)
        for step in range(4, 7):
            ids, targets, positions, task = batch(step)
            if ahead:
                store.ahead(ids, targets, positions, task, step=step + 1, wanted=DRAWS)
            bounds = share(GLOBAL, world.size)
            mine = slice(int(bounds[world.rank]), int(bounds[world.rank + 1]))
            rows = payload(ids[mine], positions[mine])
            if step >= 5:
                store.widen("logits", 5)
                rows["logits"] = torch.cat([rows["logits"], rows["logits"][:, :2]], 1)
            store.add(ids, targets, positions, task, rows)
            assert len(store._ready) == (len(DRAWS) if ahead and step != 5 else 0)
            drawn = store.draw(5, step + 1, "a")
            assert drawn is not None
            found.append({name: value.nan_to_num(-1.0) for name, value in drawn.items()})
    for one, other in zip(found[:3], found[3:], strict=True):
        assert same(one, other)


def check_draws(single: list[list[Any]], ranks: list[list[list[Any]]]) -> None:
    size = len(ranks)
    for step, draws in enumerate(single):
        for index, whole in enumerate(draws):
            parts = [rank[step][index] for rank in ranks]
            if whole is None:
                assert parts == [None] * size
                continue
            m = len(whole["weight"])
            assert all(len(part["weight"]) >= 1 for part in parts)
            real = [{k: v[part["weight"] > 0] for k, v in part.items()} for part in parts]
            got = joined(real)
            assert torch.equal(got.pop("weight"), torch.full((m,), size / m))
            assert same(got, {k: v for k, v in whole.items() if k != "weight"})


def test_one_rank_gives_back_what_was_stored() -> None:
    for kind in ("stream", "sample", "class"):
        result = run(kind, World())
        assert result["draws"][0] == [None, None, None]
        for draws in result["draws"][1:]:
            for drawn, most in zip(draws, (5, 2, 17), strict=True):
                want = payload(drawn["ids"], drawn["position"])
                assert all(torch.equal(drawn[name], want[name]) for name in PAYLOAD)
                assert torch.equal(drawn["targets"], drawn["ids"] % 2 + 2 * drawn["task"])
                assert len(drawn["ids"]) <= most and drawn["weight"].sum() == pytest.approx(1.0)
                assert drawn["raw"].dtype == torch.uint8 and drawn["flag"].dtype == torch.bool


@pytest.mark.parametrize("kind", ["stream", "sample", "class", "ring", "own"])
def test_draws_made_ahead_are_the_same(kind: str) -> None:
    """Also after skipped steps, and where something else is drawn in between; on several ranks see `worker`."""
    check_ahead(kind, World())


@dataclasses.dataclass(frozen=True)
class Seat(World):
    """A rank that is a thread of this process: what a store asks of a world, without a process group."""

    desk: dict[Any, Any] = dataclasses.field(default_factory=dict)
    barrier: threading.Barrier = dataclasses.field(default_factory=lambda: threading.Barrier(1, timeout=30))

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        for to, piece in enumerate(rows.split(list(send))):
            self.desk[self.rank, to] = piece
        self.barrier.wait()
        found = [self.desk[source, self.rank] for source in range(self.size)]
        self.barrier.wait()
        assert [len(piece) for piece in found] == list(receive) and sum(send) == len(rows)
        return torch.cat(found)

    def exchange_meanwhile(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Callable[[], Tensor]:
        found = self.exchange(rows, send, receive)
        return lambda: found


@pytest.mark.parametrize("size", [2, 5])
def test_draws_made_ahead_are_the_same_on_several_ranks(size: int) -> None:
    """Whose rows are routed: of five ranks some get none. Over real process groups see `worker`."""
    desk: dict[Any, Any] = {}
    barrier = threading.Barrier(size, timeout=30)
    with concurrent.futures.ThreadPoolExecutor(size) as ranks:
        waiting = [ranks.submit(check_ahead, kind, Seat(rank, size, desk, barrier))
                   for kind in ("stream", "sample", "class", "ring", "own") for rank in range(size)]
        waiting += [ranks.submit(check_widened, Seat(rank, size, desk, barrier)) for rank in range(size)]
        for found in waiting:
            found.result()


def offered(world: World, stream: Stream, kind: str) -> list[dict[str, Any]]:
    """What is drawn from, and kept in, a memory that each task's samples are offered to when it has ended."""
    memory_ = Herded(150, seed=5, key="sample") if kind == "class" else ClassBalanced(150, seed=5, key="sample", by="task")
    store, found = ReplayStore(memory_, world, seed=1), []
    for task in stream.tasks:
        ids = task.train_ids[:130]  # two pieces of 64 and one of 2, of which one of three ranks has none
        if kind == "class":  # as herding lists them: class by class, the rest of a list after its beginning
            ids = ids[torch.argsort(stream.targets(ids), stable=True)]
        offer(store, types.SimpleNamespace(world=world, stream=stream), task, ids, positions=torch.arange(len(ids)) % 31)
        found += [store.draw(40, task.id, "reference") or {}, store.state_dict()]
    return found


@pytest.mark.parametrize("kind", ["task", "class"])
def test_what_a_task_leaves_has_the_same_slots_on_any_number_of_ranks(kind: str) -> None:
    stream = class_incremental(load("digits", train=True), load("digits", train=False), tasks=3)
    single = offered(World(), stream, kind)
    for size in (2, 3):
        desk: dict[Any, Any] = {}
        barrier = threading.Barrier(size, timeout=30)
        with concurrent.futures.ThreadPoolExecutor(size) as ranks:
            waiting = [ranks.submit(offered, Seat(rank, size, desk, barrier), stream, kind) for rank in range(size)]
            parts = [found.result() for found in waiting]
        check_draws([[drawn] for drawn in single[::2]], [[[drawn] for drawn in part[::2]] for part in parts])
        for k, saved in enumerate(single[1::2]):
            assert all(same(part[2 * k + 1]["index"], saved["index"]) for part in parts)
            assert same(joined([part[2 * k + 1]["rows"] for part in parts]), saved["rows"])


def test_another_batch_than_was_begun_is_added_as_it_is() -> None:
    plain, store = (ReplayStore(memory("class"), World(), seed=1) for _ in range(2))
    store.ahead(*batch(3), step=1, wanted=DRAWS)
    for memory_ in (plain, store):
        add(memory_, 0)
    assert same(plain.state_dict()["index"], store.state_dict()["index"])
    store.ahead(*batch(1), step=2, wanted=DRAWS)
    assert same(plain.state_dict()["index"], store.state_dict()["index"])  # a checkpoint in between
    store.ahead(*batch(1), step=2, wanted=DRAWS)
    store.load_state_dict(plain.state_dict())
    assert same(plain.draw(5, 2, "a") or {}, store.draw(5, 2, "a") or {})


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_are_the_single_process(size: int, tmp_path: Path) -> None:
    single = {kind: run(kind, World()) for kind in ("stream", "sample", "class")}
    torch.save(single, tmp_path / "single.pt")
    # A server imports torch once and forks every rank; without effect where one runs already.
    multiprocessing.set_forkserver_preload(["torch", "everbatch.data"])
    context = mp.start_processes(worker, (size, str(tmp_path)), nprocs=size, join=False, start_method="forkserver")
    try:
        for _ in range(24):
            if context.join(timeout=5):
                break
        else:
            pytest.fail("the ranks did not finish in 120 seconds")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(size)]
    for kind, want in single.items():
        results, resumed = ([rank[part][kind] for rank in ranks] for part in (0, 1))
        check_draws(want["draws"], [rank["draws"] for rank in results])
        for moment in ("half", "end"):
            assert all(same(rank[moment]["index"], want[moment]["index"]) for rank in results)
            assert same(joined([rank[moment]["rows"] for rank in results]), want[moment]["rows"])
        # One rank's checkpoint resumed on many, and many ranks' checkpoint on one.
        check_draws(want["draws"][STEPS // 2 :], [rank["draws"] for rank in resumed])
        assert same(joined([rank["end"]["rows"] for rank in resumed]), want["end"]["rows"])
        back = run(kind, World(), [rank["half"] for rank in reversed(results)], STEPS // 2)
        check_draws(want["draws"][STEPS // 2 :], [back["draws"]])
        assert same(back["end"]["rows"], want["end"]["rows"])


def test_smaller_and_larger_memories_take_over_the_payload() -> None:
    half = run("sample", World())["half"]
    for capacity in (6, 40):
        store = ReplayStore(memory("sample", capacity), World(), seed=1)
        store.load_state_dict(half)
        drawn = store.draw(100, 0)
        want = payload(drawn["ids"], drawn["position"])
        assert len(drawn["ids"]) == min(capacity, 17)
        assert all(torch.equal(drawn[name], want[name]) for name in PAYLOAD)
        add(store, 6)
        assert len(store) == min(capacity, len({*half["index"]["ids"].tolist(), *batch(6)[0].tolist()}))


def test_nothing_is_kept_without_capacity() -> None:
    store = ReplayStore(Reservoir(0), World())
    add(store, 0)
    assert store.draw(4, 0) is None and len(store) == 0 and store.num_bytes == 0
    other = ReplayStore(Reservoir(0), World())
    other.load_state_dict(store.state_dict())


def test_memory_is_allocated_once() -> None:
    store = ReplayStore(memory("stream"), World(), seed=1)
    add(store, 0)
    size = store.num_bytes
    assert size == 17 * (8 + 12 + 1)
    for step in range(1, STEPS):
        add(store, step)
    assert store.num_bytes == size and store.names == PAYLOAD


def test_damaged_and_foreign_states_are_refused() -> None:
    half = run("stream", World())["half"]
    rows = half["rows"]
    one, two = ({**half, "start": start, "rows": {k: v[start:stop] for k, v in rows.items()}}
                for start, stop in ((0, 9), (9, 17)))
    ReplayStore(memory("stream"), World(), seed=1).load_state_dict([two, one])
    for parts, text in (
        ([one], "9 rows for 17 saved samples"), ([two], "from row 9"), ([one, one, two], "from row 0"),
        ([one, {**two, "rows": {"raw": two["rows"]["raw"]}}], "same names"),
        ([one, {**two, "rows": {**two["rows"], "raw": rows["raw"]}}], "must be equal"),
    ):
        with pytest.raises(CheckpointMismatch, match=text):
            ReplayStore(memory("stream"), World(), seed=1).load_state_dict(parts)


def test_bad_payloads_are_named() -> None:
    store = ReplayStore(memory("stream"), World())
    ids, targets, positions, task = batch(0)
    rows = payload(ids, positions)
    for bad, text in (({}, "no payload"),
                      ({"ids": ids}, r"payload named \['ids'\]"), ({"raw": ids[:3]}, "3 rows of 'raw'")):
        with pytest.raises(ValueError, match=text):
            store.add(ids, targets, positions, task, bad)
    store.add(ids, targets, positions, task, rows)
    for bad, text in (({"raw": rows["raw"]}, r"be \['flag', 'logits', 'raw'\]"),
                      ({**rows, "logits": rows["logits"][:, :2]}, r"'logits' of \(2,\)")):
        with pytest.raises(ValueError, match=text):
            store.add(ids, targets, positions, task, bad)


@pytest.mark.parametrize("capacity", [10**12, 10**18, 10**30])
def test_a_capacity_beyond_memory_is_refused_at_once(capacity: int) -> None:
    began = time.process_time()
    for kind in (Reservoir, ClassBalanced, lambda n: Ring(n, tasks=2)):
        with pytest.raises(ValueError, match=f"capacity={capacity} takes .* GiB, must fit into .* lower the capacity"):
            kind(capacity)
    assert time.process_time() - began < 0.5


def test_a_payload_beyond_memory_is_refused_when_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ReplayStore(Reservoir(1000), World())
    monkeypatch.setattr("everbatch.data.memory.total_memory", lambda: 2**20)
    ids = np.arange(2)
    with pytest.raises(ValueError, match=r"capacity=1000 with 40000 bytes per sample on 1 rank\(s\) takes"):
        store.add(ids, ids, ids, 0, {"raw": torch.zeros(2, 100, 100)})
