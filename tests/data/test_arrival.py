"""How samples arrive: blurry, online and task-free streams, PILOT's notation, streams of a hundred tasks."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from everbatch.data import (
    Loader,
    Stream,
    TensorSource,
    as_stream,
    blurry,
    class_incremental,
    domain_incremental,
    growing,
    iid,
    online,
    ordered,
    permuted,
    task_free,
    task_incremental,
    validation,
)
from everbatch.data.tasks import finished, manner
from everbatch.distributed import World
from everbatch.train.boundaries import begins, ends


def samples(classes: int, each: int, sign: float = 1.0) -> TensorSource:
    n = classes * each
    return TensorSource(sign * torch.arange(1.0, n + 1)[:, None], torch.arange(n) % classes, name=f"{sign:g}")


def split(tasks: int = 5, each: int = 40) -> Stream:
    return class_incremental(samples(10, each), samples(10, 4, -1), tasks=tasks, seed=3)


def test_a_blurry_stream_moves_a_share_of_every_task() -> None:
    plain = split()
    stream = blurry(plain, 0.2, seed=7)
    assert manner(stream) == "class, blurry 0.2" and stream.kind == "class"
    for before, task in zip(plain.tasks, stream.tasks, strict=True):
        own = torch.isin(task.train_ids, before.train_ids)
        assert len(task.train_ids) == 80 and int((~own).sum()) == 16  # 20 % of 80, dealt out evenly: four to each other task
        assert torch.equal(task.test_ids, before.test_ids) and task.classes == before.classes
        foreign = stream.targets(task.train_ids[~own])
        assert set(foreign.tolist()) == set(task.others) and not set(task.others) & set(task.classes)
        counts = torch.bincount(foreign // 2, minlength=5)
        assert counts[task.id] == 0 and (counts[torch.arange(5) != task.id] == 4).all()
    everything = torch.cat([task.train_ids for task in stream.tasks]).sort().values
    assert torch.equal(everything, torch.arange(400))  # none is lost, none comes twice
    assert set(stream.seen_classes(0)) == {*plain.tasks[0].classes, *stream.tasks[0].others}
    assert stream.seen_classes(4) == tuple(range(10))


def test_a_blurry_stream_is_a_function_of_its_seed_alone() -> None:
    first = blurry(split(), 0.3, seed=1)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    torch.rand(5)
    again, other = blurry(split(), 0.3, seed=1), blurry(split(), 0.3, seed=2)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert len({s.fingerprint() for s in (first, other, split(), online(split()), task_free(split()))}) == 5


def test_shares_up_to_i_i_d() -> None:
    stream = blurry(split(), 0.8)
    for task in stream.tasks:
        shares = torch.bincount(stream.targets(task.train_ids) // 2, minlength=5)
        assert (shares == 16).all()  # every task holds as much of each
    few = class_incremental(samples(4, 3), samples(4, 1), increments=[3, 1])
    with pytest.warns(UserWarning, match="blurry: task 0 has no training samples of classes"):
        moved = blurry(few, 0.9)
    assert sum(len(task.train_ids) for task in moved.tasks) == 12 and all(len(task.train_ids) for task in moved.tasks)


def test_domains_may_blur_too() -> None:
    train, test = samples(2, 20), samples(2, 4, -1)
    stream = blurry(domain_incremental([(train, test), (train, test)]), 0.25)
    assert [task.others for task in stream.tasks] == [(), ()]
    assert [int((task.train_ids >= 40).sum()) for task in stream.tasks] == [10, 30]


def test_tuning_on_a_blurry_stream_holds_out_by_class() -> None:
    stream = validation(blurry(split(), 0.2), 0.25, seed=1)
    shown = torch.cat([task.train_ids for task in stream.tasks])
    for task in stream.tasks:
        assert set(stream.targets(task.test_ids).tolist()) == set(task.classes) and len(task.test_ids) == 20
        assert not torch.isin(task.test_ids, shown).any() and (task.test_ids < 400).all()
    assert len(shown) == 300


@pytest.mark.parametrize(("make", "text"), [
    (lambda: blurry(split(), 0.0), r"share=0.0, must be in \(0, 1\)"), (lambda: blurry(split(), 1.0), "share=1.0"),
    (lambda: blurry(split(1)), "one task, must have two"), (lambda: blurry(blurry(split())), "blurry already, by 0.1"),
    (lambda: blurry(split(5, 1), 0.01), "share=0.01 of tasks of at most 2 samples"),
    (lambda: blurry(task_incremental(samples(4, 3), samples(4, 1), 2)), "kind 'task'"),
    (lambda: blurry(iid(samples(4, 3), samples(4, 1))), "kind 'iid'"),
    (lambda: online(growing(samples(4, 3), samples(4, 1))), "once; every round trains on all"),
    (lambda: task_free(task_incremental(samples(4, 3), samples(4, 1), 2)), "predictions are given the task"),
    (lambda: task_free(growing(samples(4, 3), samples(4, 1))), "its rounds repeat")])
def test_what_cannot_arrive_so_is_refused(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(("given", "text"), [
    ({"tasks": 2.0}, r"tasks has \[2.0\], must be of whole numbers"), ({"tasks": True}, r"tasks has \[True\]"),
    ({"increments": [5.0, 5.0]}, r"increments has \[5.0\]"), ({"increments": 5}, "increments=5, must be a list"),
    ({"seed": None}, "seed=None, must be an integer"), ({"seed": -1}, "seed=-1"),
    ({"class_order": ["a", "b"]}, r"class_order has \['a'\]"),
    ({"class_order": torch.tensor([1, 1])}, r"class_order has class \[1\] twice")])
def test_numbers_that_are_none_are_named(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"class_incremental: {text}"):
        class_incremental(samples(10, 2), samples(10, 1, -1), **given)


@pytest.mark.parametrize("change", [blurry, online, task_free])
def test_what_is_no_stream_has_no_manner(change: Any) -> None:
    with pytest.raises(ValueError, match=rf"{change.__name__}: a tuple, must be a stream; make one"):
        change((samples(2, 2), samples(2, 2)))


def test_manners_follow_each_other() -> None:
    stream = task_free(online(blurry(split(), 0.1)))
    assert manner(stream) == "class, blurry 0.1, online, task-free"
    assert [begins(stream, k) for k in range(5)] == [True, *[False] * 4]
    assert [ends(stream, k) for k in range(5)] == [*[False] * 4, True]
    assert all(begins(split(), k) and ends(split(), k) for k in range(5))
    batch = Loader(stream, stream.tasks[3], 8, 1, 0, World()).batch(1)
    assert batch.task == 0
    plain = replace(stream, boundaries=True)
    same = Loader(plain, plain.tasks[3], 8, 1, 0, World()).batch(1)
    assert same.task == 3 and torch.equal(batch.ids, same.ids)


def test_pilots_notation() -> None:
    train, test = samples(10, 4), samples(10, 1, -1)
    for text, sizes in (("B4-Inc2", [4, 2, 2, 2]), ("b0-inc3", [3, 3, 3, 1]), ("B5Inc4", [5, 4, 1]), ("B10-Inc1", [10])):
        assert [len(task.classes) for task in class_incremental(train, test, increments=text).tasks] == sizes
    for text, why in (("B11-Inc2", "initial=11"), ("B4-Inc0", "increment=0"), ("4,2,2,2", "be B<classes"), ("B0-Inc0", "=0")):
        with pytest.raises(ValueError, match=why):
            class_incremental(train, test, increments=text)


def test_classes_of_two_tasks_are_named() -> None:
    x = torch.zeros(4, 1)
    parts = [((x, torch.tensor(y)), (x, torch.tensor(y))) for y in ([0, 1, 0, 1], [2, 3, 2, 3], [4, 1, 4, 1])]
    assert as_stream(parts[:2], kind="class").num_classes == 4
    with pytest.raises(ValueError, match=r"class '1' in tasks 0 and 2, must be in one task"):
        as_stream(parts, kind="class")
    assert as_stream(parts).kind == "domain"


def test_a_sample_of_another_task_is_named() -> None:
    stream = split()
    first, second, *rest = stream.tasks
    mixed = replace(first, train_ids=torch.cat([first.train_ids, second.train_ids[:1]]))
    label, sample = int(stream.targets(second.train_ids[:1])), int(second.train_ids[0])
    with pytest.raises(ValueError, match=rf"label {label} of training sample {sample} in task 0 .*, must be of a class"):
        finished("own", replace(stream, tasks=(mixed, second, *rest)))


def test_a_hundred_tasks_are_made_in_no_time() -> None:
    """Of 200,000 samples: what looked at all of them for each task would take a hundred times as long."""
    train, test = samples(1000, 200), samples(1000, 20, -1)
    began = time.process_time()
    stream = blurry(class_incremental(train, test, tasks=100), 0.1)
    assert len(stream) == 100 and stream.fingerprint() and not stream.notes
    for seen in range(100):
        for _ in range(100):
            stream.seen_classes(seen)
    assert time.process_time() - began < 2
    odd = TensorSource(torch.zeros(600, 4), torch.arange(600) % 3)
    began = time.process_time()
    far = domain_incremental(permuted(odd, odd, 100))
    assert len(far) == 100 and far.fingerprint() and time.process_time() - began < 2


def test_an_ordered_stream_comes_as_it_is_named() -> None:
    plain = domain_incremental([(samples(2, 5), samples(2, 1)), (samples(2, 5, -1), samples(2, 1))])
    first, turned = list(range(10)), list(range(10))[::-1]
    stream = ordered(plain, [first, turned])
    assert manner(stream) == "domain, online, ordered" and stream.fingerprint() != plain.fingerprint()
    assert ordered(plain).tasks == plain.tasks and stream.fingerprint() != ordered(plain).fingerprint()
    for task, order in zip(stream.tasks, (first, turned), strict=True):
        ids = [Loader(stream, task, 4, 1, 0, World(rank, 2), start=1).batch(step).ids.tolist()
               for step in range(2) for rank in range(2)]
        expected = plain.tasks[task.id].train_ids[order].tolist()
        assert sum(ids, []) == expected[:8]  # the incomplete last batch is left out
    with pytest.raises(ValueError, match="ordered: 1 orders of 2 tasks, must be one for each"):
        ordered(plain, [first])
    with pytest.raises(ValueError, match="an order of 9 places for task 1, must be a permutation of .* 10 training samples"):
        ordered(plain, [first, first[:9]])
