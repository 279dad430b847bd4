"""Streams: what each task holds, how labels are numbered, and what is refused."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from everbatch.data import (
    Stream,
    TensorSource,
    class_incremental,
    domain_incremental,
    growing,
    iid,
    permuted,
    pilot_increments,
    rotated,
    task_incremental,
    validation,
)


def pair(classes: int = 6, each: int = 4) -> tuple[TensorSource, TensorSource]:
    n = classes * each
    y = torch.arange(n) % classes
    names = [chr(ord("a") + c) for c in range(classes)]
    return (TensorSource(torch.arange(float(n)).reshape(n, 1), y, name="train", classes=names),
            TensorSource(-1.0 - torch.arange(float(2 * classes)).reshape(-1, 1), torch.arange(2 * classes) % classes,
                         name="test", classes=names))


@pytest.mark.parametrize("seed", [0, 1, 1993])
def test_class_order_is_numpys_legacy_shuffle(seed: int) -> None:
    train, test = pair(6)
    stream = class_incremental(train, test, tasks=3, seed=seed)
    order = np.random.RandomState(seed).permutation(6)
    assert stream.classes == tuple(train.classes[c] for c in order)
    assert [task.classes for task in stream.tasks] == [(0, 1), (2, 3), (4, 5)]
    for task in stream.tasks:
        for ids, source, offset in ((task.train_ids, train, 0), (task.test_ids, test, len(train))):
            local = ids - offset
            assert torch.equal(stream.fetch(ids), source.fetch(local))
            old = source.targets[local]
            assert [int(order[new]) for new in stream.targets(ids)] == old.tolist()
            assert set(stream.targets(ids).tolist()) == set(task.classes)
    everything = torch.cat([torch.cat([t.train_ids, t.test_ids]) for t in stream.tasks])
    assert torch.equal(everything.sort().values, torch.arange(len(train) + len(test)))
    assert stream.seen_classes(1) == (0, 1, 2, 3)


def test_given_orders_increments_and_halves() -> None:
    train, test = pair(6)
    stream = class_incremental(train, test, class_order=[5, 0, 3], increments=[2, 1])
    assert stream.num_classes == 3 and stream.classes == ("f", "a", "d")
    assert stream.label_map.tolist() == [1, -1, -1, 2, -1, 0]
    half = class_incremental(train, test, tasks=3, seed=4, classes=[3, 4, 5])
    assert sorted(half.classes) == ["d", "e", "f"]
    assert [len(t.classes) for t in class_incremental(train, test, tasks=4).tasks] == [2, 2, 1, 1]
    assert task_incremental(train, test, tasks=2).kind == "task"
    assert pilot_increments(100, 10, 25) == (10, 25, 25, 25, 15) and pilot_increments(100, 50, 10) == (50, *[10] * 5)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"tasks": 7}, "7 tasks of 6 classes"), ({"tasks": 0}, "0 tasks"),
        ({"class_order": [0, 1, 1]}, r"class_order has class \[1\] twice"),
        ({"class_order": [0, 6]}, r"\[6\], must be in \[0, 6\)"),
        ({"class_order": [0], "classes": [0]}, "at most one"), ({"classes": []}, "at least one class"),
        ({"increments": [2, 3]}, "cover 5 classes"), ({"increments": [2, 0, 4]}, "at least one class each"),
        ({"increments": [3, 3], "tasks": 3}, "agree"),
    ],
)
def test_bad_class_streams_are_named(kwargs: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        class_incremental(*pair(6), **kwargs)


def test_missing_samples_are_named() -> None:
    train, test = pair(3)
    some = TensorSource(test.inputs[:2], test.targets[:2], classes=test.classes)
    with pytest.raises(ValueError, match=r"task 2 \(c\) has no test samples"):
        class_incremental(train, some, tasks=3, class_order=[0, 1, 2])
    fewer = TensorSource(train.inputs[:2], train.targets[:2], classes=test.classes)
    with pytest.raises(ValueError, match=r"task 1 \(c\) has no training samples"):
        class_incremental(fewer, test, class_order=[0, 1, 2], increments=[2, 1])
    with pytest.warns(UserWarning, match=r"no training samples of classes \['c'\]"):
        iid(fewer, test)
    train.targets[3] = 9
    with pytest.raises(ValueError, match="label 9 of sample 3, must be in"):
        iid(train, test)
    with pytest.raises(ValueError, match="same classes"):
        iid(test, pair(2)[1])


def test_domains_have_their_own_ids() -> None:
    train, test = pair(3)
    shifted = TensorSource(train.inputs + 100, train.targets, name="far", classes=train.classes)
    stream = domain_incremental([(train, test), (shifted, test)])
    assert stream.num_classes == 3 and [t.classes for t in stream.tasks] == [(0, 1, 2)] * 2
    first, second = stream.tasks
    assert torch.equal(stream.fetch(second.train_ids), shifted.inputs)
    assert torch.equal(stream.fetch(first.test_ids), stream.fetch(second.test_ids))
    everything = torch.cat([first.train_ids, second.train_ids, first.test_ids, second.test_ids])
    assert torch.equal(everything, torch.arange(2 * len(train) + 2 * len(test)))
    with pytest.raises(ValueError, match="no domains"):
        domain_incremental([])
    with pytest.raises(ValueError, match="has classes"):
        domain_incremental([(train, test), pair(2)])
    with pytest.raises(ValueError, match="a TensorSource in place 0, must be a .train, test. pair"):
        domain_incremental([train, test])  # type: ignore[list-item]


def images() -> TensorSource:
    values = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 5), dtype=np.uint8)
    return TensorSource(values, torch.arange(4) % 2)


def test_permuted_domains_keep_the_pixels() -> None:
    source = images()
    domains = permuted(source, source, tasks=3, seed=1)
    whole, ids = source.inputs.flatten(2), torch.arange(4)
    assert torch.equal(domains[0][0].fetch(ids), source.inputs)
    for train, test in domains[1:]:
        got = train.fetch(ids).flatten(2)
        assert not torch.equal(got, whole) and torch.equal(got.sort().values, whole.sort().values)
        assert torch.equal(got, test.fetch(ids).flatten(2))
        place = [int((whole[:, 0] == got[:, 0, i : i + 1]).all(0).nonzero()[0]) for i in range(25)]
        assert torch.equal(got, whole[..., place])  # one permutation for all channels
    prints = {train.fingerprint() for train, _ in domains}
    assert len(prints) == 3
    features = TensorSource(torch.rand(4, 7), torch.arange(4) % 2)
    assert permuted(features, features, 2, identity_first=False)[0][0].fetch(ids).shape == (4, 7)
    assert len(domain_incremental(domains)) == 3


@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
def test_rotation_by_quarters_is_exact(quarter: int) -> None:
    source = images()
    (train, _), = rotated(source, source, [90.0 * quarter])
    assert torch.equal(train.fetch(torch.arange(4)), torch.rot90(source.inputs, quarter, dims=(-2, -1)))


def test_rotation_needs_images() -> None:
    features = TensorSource(torch.rand(4, 7), torch.arange(4) % 2)
    with pytest.raises(ValueError, match="images"):
        rotated(features, features, [10.0])
    with pytest.raises(ValueError, match="degrees=nan"):
        rotated(images(), images(), [float("nan")])


def test_growing_rounds_begin_with_the_round_before() -> None:
    train, test = pair(3, each=7)
    stream = growing(train, test, rounds=4, seed=5)
    assert [len(t.train_ids) for t in stream.tasks] == [6, 11, 16, 21]
    for before, after in zip(stream.tasks, stream.tasks[1:], strict=False):
        assert torch.equal(after.train_ids[: len(before.train_ids)], before.train_ids)
        assert torch.equal(after.test_ids, torch.arange(21, 27))
    assert torch.equal(stream.tasks[-1].train_ids.sort().values, torch.arange(21))
    assert [len(t.train_ids) for t in growing(train, test, sizes=[10, 5]).tasks] == [10, 15]
    with pytest.raises(ValueError, match="22 rounds of 21 samples"):
        growing(train, test, rounds=22)
    with pytest.raises(ValueError, match="sum to 30"):
        growing(train, test, sizes=[15, 15])


@pytest.mark.parametrize("kind", ["class", "growing", "iid"])
def test_validation_never_shows_a_test_sample(kind: str) -> None:
    train, test = pair(4, each=8)
    make = {"class": class_incremental, "growing": growing, "iid": lambda a, b, _: iid(a, b)}
    stream = make[kind](train, test, 2)
    held = validation(stream, 0.25, seed=1)
    shown = torch.cat([t.train_ids for t in held.tasks])
    for task in held.tasks:
        assert (task.test_ids < len(train)).all()
        assert not torch.isin(task.test_ids, shown).any()
        assert torch.bincount(stream.targets(task.test_ids)).max() == 2


def test_fingerprints_tell_streams_apart() -> None:
    train, test = pair(6)

    def prints(*streams: Stream) -> set[str]:
        return {stream.fingerprint() for stream in streams}

    same = [class_incremental(train, test, tasks=3, seed=1) for _ in range(2)]
    assert len(prints(*same)) == 1
    others = [class_incremental(train, test, tasks=3, seed=2), class_incremental(train, test, tasks=2, seed=1),
              task_incremental(train, test, tasks=3, seed=1), iid(train, test), growing(train, test),
              validation(same[0], 0.25)]
    assert len(prints(same[0], *others)) == 7


def test_what_is_said_of_the_samples() -> None:
    x = torch.zeros(9, 1)
    names = ["cat", "dog", "eel", "fox", "gnu"]
    train = TensorSource(x[:7], torch.tensor([0, 0, 0, 1, 2, 2, 2]), classes=names)
    test = TensorSource(x[:4], torch.tensor([0, 1, 3, 3]), classes=names)
    with pytest.warns(UserWarning, match="no training samples"):
        stream = iid(train, test)
    assert stream.notes == (
        "1 class with a single training sample ('dog'): what they are cannot be learned from it",
        "1 class with test samples and no training sample ('fox'): they cannot be learned, and count as errors",
        "1 class with training samples and no test sample ('eel'): their accuracy is not measured",
        "1 class with no samples at all ('gnu'): the head is wider than need be")
    assert class_incremental(*pair(6)).notes == growing(*pair(6)).notes == domain_incremental([pair(6), pair(6)]).notes == ()
    single = TensorSource(x, torch.zeros(9, dtype=torch.long), classes=["cat"])
    assert iid(single, single).notes == ("one class only, 'cat': every prediction is right, and nothing is learned",)


def test_streams_without_kind_or_tasks_are_refused() -> None:
    stream = iid(*pair(2))
    with pytest.raises(ValueError, match="kind='classes', must be one of class, task, domain, growing, iid"):
        replace(stream, kind="classes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no tasks"):
        replace(stream, tasks=())


def test_sizes_are_bounded_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everbatch.data.memory.total_memory", lambda: 2**20)
    train, test = pair(6)
    with pytest.raises(ValueError, match="tasks=1000000000 takes 7.45 GiB"):
        permuted(train, test, 10**9)
    many = TensorSource(torch.zeros(2000, 1), torch.zeros(2000, dtype=torch.long))
    with pytest.raises(ValueError, match="2000 rounds takes"):
        growing(many, many, 2000)


def test_many_classes_are_ordered_in_no_time() -> None:
    labels = torch.arange(60_000)
    many = TensorSource(labels[:, None].float(), labels)
    began = time.process_time()
    assert class_incremental(many, many, tasks=2).num_classes == 60_000
    assert time.process_time() - began < 5
