"""Batches are a pure function of (seed, task, epoch, step), alike at every world size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from everbatch.data import Batch, Loader, Stream, TensorSource, class_incremental, evaluation_batches, iid
from everbatch.distributed import World


def stream() -> Stream:
    y = torch.arange(46) % 4
    train = TensorSource(torch.arange(46.0).reshape(46, 1), y)
    return class_incremental(train, TensorSource(-torch.arange(22.0).reshape(22, 1), torch.arange(22) % 4), tasks=2)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("inputs", "targets", "ids", "position"))


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(b, k) for b in batches]) for k in ("inputs", "targets", "ids", "position")))


def test_an_epoch_is_a_permutation_without_its_rest() -> None:
    data = stream()
    task = data.tasks[0]
    n = len(task.train_ids)
    loader = Loader(data, task, 5, 3, seed=7, world=World(), position0=100)
    assert len(loader) == 3 * (n // 5) and loader.end_position == 100 + 5 * len(loader)
    batches = list(loader)
    orders = []
    for epoch in range(3):
        ids = torch.cat([b.ids for b in batches[epoch * (n // 5) : (epoch + 1) * (n // 5)]])
        assert len(torch.unique(ids)) == 5 * (n // 5) and torch.isin(ids, task.train_ids).all()
        orders.append(ids.tolist())
    assert orders[0] != orders[1] != orders[2]
    assert torch.equal(torch.cat([b.position for b in batches]), torch.arange(100, loader.end_position))
    for b in batches:
        assert torch.equal(b.inputs, data.fetch(b.ids)) and torch.equal(b.targets, data.targets(b.ids))
        assert (b.task, b.part, b.weight) == (0, "stream", None)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_ranks_together_see_what_one_rank_sees(size: int) -> None:
    data = stream()
    one = Loader(data, data.tasks[1], 6, 2, 3, World())
    ranks = [Loader(data, data.tasks[1], 6, 2, 3, World(rank, size)) for rank in range(size)]
    for step in range(len(one)):
        whole = one.batch(step)
        assert same(joined([loader.batch(step) for loader in ranks]), whole)
        for loader in ranks:
            assert all(map(torch.equal, loader.global_rows(step), (whole.ids, whole.targets, whole.position)))


def test_resuming_continues_and_any_step_can_be_had() -> None:
    data = stream()
    whole = list(Loader(data, data.tasks[0], 4, 3, 1, World()))
    rest = list(Loader(data, data.tasks[0], 4, 3, 1, World(), start=7))
    assert len(rest) == len(whole) - 7 and all(map(same, rest, whole[7:]))
    loader = Loader(data, data.tasks[0], 4, 3, 1, World())
    assert all(same(loader.batch(step), whole[step]) for step in (9, 0, 14, 3))
    assert list(Loader(data, data.tasks[0], 4, 3, 1, World(), start=len(whole))) == []


def test_workers_change_nothing_and_global_randomness_is_untouched() -> None:
    data = stream()
    before = torch.get_rng_state()
    plain = list(Loader(data, data.tasks[0], 4, 2, 1, World()))
    ahead = list(Loader(data, data.tasks[0], 4, 2, 1, World(), workers=2, start=1))
    assert torch.equal(before, torch.get_rng_state())
    assert len(ahead) == len(plain) - 1 and all(map(same, ahead, plain[1:]))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"global_batch": 5, "world": World(0, 2)}, "global_batch=5 on 2 ranks"),
        ({"global_batch": 40}, "global_batch=40 and task 0 with"), ({"global_batch": 0}, "global_batch=0"),
        ({"epochs": 0}, "epochs=0"), ({"start": 99}, "start=99"), ({"workers": -1}, "workers=-1"),
    ],
)
def test_bad_sizes_are_named(change: dict[str, object], text: str) -> None:
    data = stream()
    kwargs = {"global_batch": 4, "epochs": 1, "seed": 0, "world": World()} | change
    with pytest.raises(ValueError, match=text):
        Loader(data, data.tasks[0], **kwargs)
    with pytest.raises(ValueError, match="step=99"):
        Loader(data, data.tasks[0], 4, 1, 0, World()).batch(99)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_counts_every_sample_once(size: int, batch_size: int) -> None:
    data = stream()
    ids = data.tasks[0].test_ids
    ranks = [list(evaluation_batches(data, data.tasks[0], batch_size, World(rank, size))) for rank in range(size)]
    assert len({tuple(len(b) for b in batches) for batches in ranks}) == 1
    real = [(b, b.weight > 0) for batches in ranks for b in batches]
    position = torch.cat([b.position[keep] for b, keep in real])
    assert torch.equal(position.sort().values, torch.arange(len(ids)))
    assert torch.equal(torch.cat([b.ids[keep] for b, keep in real])[position.argsort()], ids)
    assert sum(float(b.weight.sum()) for b, _ in real) == len(ids)
    assert max(len(b) for b, _ in real) <= batch_size
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluation_batches(data, data.tasks[0], 0, World())


@pytest.mark.parametrize("workers", [3000, 10**18, 1.0, True, "2"])
def test_workers_are_bounded_by_the_machine(workers: object) -> None:
    data = stream()
    with pytest.raises(ValueError, match=r"workers=.*, must be an integer in \[0, \d+\].* this machine has \d+ processors"):
        Loader(data, data.tasks[0], 4, 1, 0, World(), workers=workers)  # type: ignore[arg-type]


def test_data_that_cannot_be_sent_to_a_worker_are_named() -> None:
    data = stream()
    data.train.secret = lambda: 0  # type: ignore[attr-defined]
    method = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("spawn", force=True)  # what macOS and newer Pythons do by default
    try:
        with pytest.raises(ValueError, match=r"workers=1 with '.*' that cannot be sent to another process .*workers=0"):
            iter(Loader(data, data.tasks[0], 4, 1, 0, World(), workers=1))
    finally:
        torch.multiprocessing.set_start_method(method, force=True)


def test_what_a_worker_cannot_read_is_one_line() -> None:
    samples = Broken()
    data = iid(samples, Broken())
    samples.broken = True
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^Broken: cannot read sample 2 .OSError: no such cable., must [^\n]*$"):
            list(Loader(data, data.tasks[0], 4, 1, 0, World(), workers=workers))


class Broken(torch.utils.data.Dataset[Any]):
    """One of its samples cannot be read."""

    targets = [0, 1, 0, 1]
    broken = False

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 2 and self.broken:
            raise OSError("no such cable")
        return torch.zeros(1), index % 2


@pytest.mark.parametrize("prepare", [lambda raw: raw, lambda raw: raw.flatten(1), lambda raw: raw * 2.0])
def test_one_piece_copies_what_a_model_may_write_into_and_a_memory_keeps(prepare: Any) -> None:
    raw, numbers = torch.rand(4, 2, 3), torch.arange(4)
    batch = Batch(prepare(raw), numbers, numbers, numbers, extras={"raw": raw})
    [piece] = batch.split(1)
    assert isinstance(piece.inputs, torch.Tensor) and torch.equal(piece.inputs, prepare(raw))
    assert piece.extras["raw"] is raw and piece.targets is numbers and piece.weight.tolist() == [0.25] * 4  # type: ignore[union-attr]
    before = raw.clone()
    piece.inputs.zero_()
    assert torch.equal(raw, before)
