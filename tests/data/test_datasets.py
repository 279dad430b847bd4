"""Torch data sets as sources and streams: the samples they give, the label space they share, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

from everbatch.data import (
    DatasetSource,
    Loader,
    RowSource,
    Source,
    TensorSource,
    as_source,
    as_stream,
    class_incremental,
    domain_incremental,
    growing,
    iid,
    load,
    make_stream,
    permuted,
)
from everbatch.data.notes import tell
from everbatch.distributed import World

Image = pytest.importorskip("PIL.Image")


class Own(Dataset[Any]):
    """A data set of one's own: pairs made by a function of the index."""

    def __init__(self, make: Callable[[int], Any], count: int, **attributes: Any) -> None:
        self.make, self.count = make, count
        vars(self).update(attributes)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.make(index)


def plain(index: int) -> tuple[Tensor, int]:
    return torch.full((2,), float(index)), index % 3


def noisy(index: int) -> tuple[Tensor, int]:
    """What a random transform gives, whichever generator it draws from."""
    return torch.cat([torch.rand(2), torch.from_numpy(np.random.rand(2)).float()]), index % 3  # noqa: NPY002


class Ten(Dataset[Any]):
    """Ten of one class, pickled by name."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([float(index)]), index % 2


def image_folder(root: Path, classes: Sequence[str], count: int = 3) -> Any:
    datasets = pytest.importorskip("torchvision.datasets")
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (5, 4), (40 * label, index, 7)).save(root / name / f"{index}.png")
    return datasets.ImageFolder(root)


def test_the_samples_come_by_index_and_only_then() -> None:
    read: list[int] = []

    def make(index: int) -> tuple[Tensor, int]:
        read.append(index)
        return plain(index)

    data = Own(make, 1000, targets=[i % 3 for i in range(1000)])
    source = as_source(data)
    assert isinstance(source, Source) and isinstance(source, DatasetSource)
    assert len(set(read)) <= 8 and len(source) == 1000 and source.classes == ("0", "1", "2")
    read.clear()
    ids = torch.tensor([7, 0, 999, 7])
    assert torch.equal(source.fetch(ids), ids[:, None].expand(4, 2).float()) and read == ids.tolist()
    assert source.fetch(ids[:0]).shape == (0, 2)
    assert source.targets.tolist() == data.targets


def test_image_folder_is_the_same_as_its_path(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "train", ("ant", "bee"))
    image_folder(tmp_path / "test", ("ant", "bee"))
    source, other = as_source(data), load(f"imagefolder:{tmp_path}", train=True)
    assert source.classes == other.classes == ("ant", "bee") and torch.equal(source.targets, other.targets)
    ids = torch.tensor([5, 0])
    assert torch.equal(source.fetch(ids), other.fetch(ids)) and source.fetch(ids).dtype == torch.uint8
    some = as_source(Subset(data, [4, 1]))
    assert some.targets.tolist() == [1, 0] and some.classes == source.classes
    assert torch.equal(some.fetch(torch.tensor([1])), source.fetch(torch.tensor([1])))
    both = as_source(ConcatDataset([Subset(data, [4, 1]), data]))
    assert both.targets.tolist() == [1, 0, 0, 0, 0, 1, 1, 1] and both.classes == source.classes
    bad = tmp_path / "train" / "bee" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    for broken, index in ((source, 4), (some, 0), (both, 0), (both, 6)):
        with pytest.raises(ValueError, match=r"cannot read sample \d \(.*bee/1.png\)"):
            broken.fetch(torch.tensor([index]))


@pytest.mark.parametrize("label", [
    int, np.uint8, np.int16, np.uint64, torch.tensor, lambda y: torch.tensor([y], dtype=torch.int16), lambda y: [y],
    lambda y: np.eye(3, dtype=np.float32)[y], lambda y: torch.eye(3)[y]])
def test_labels_of_every_kind(label: Callable[[int], Any]) -> None:
    source = as_source(Own(lambda i: (np.zeros(2), label(i % 3)), 7))
    assert source.targets.tolist() == [0, 1, 2, 0, 1, 2, 0] and source.fetch(torch.tensor([3])).dtype == torch.float64


@pytest.mark.parametrize(("value", "shape"), [
    (np.zeros((4, 5), np.uint8), (1, 4, 5)), (np.zeros((4, 5, 3), np.uint8), (3, 4, 5)),
    (torch.zeros(3, 4, 5), (3, 4, 5)), (torch.zeros(9, dtype=torch.bfloat16), (9,)), ([1.0, 2.0], (2,)),
    (np.zeros(3, np.uint16), (3,)), (np.zeros(3, ">i4"), (3,)), (np.zeros(4)[::-1], (4,)), (np.float32(3), ()),
    (Image.new("L", (5, 4)), (1, 4, 5)), (Image.new("P", (5, 4)), (3, 4, 5)), (Image.new("CMYK", (5, 4)), (3, 4, 5)),
    (Image.new("RGBA", (5, 4)), (3, 4, 5)), (Image.new("LA", (5, 4)), (1, 4, 5)), (Image.new("1", (5, 4)), (1, 4, 5))])
def test_inputs_of_every_kind(value: Any, shape: tuple[int, ...]) -> None:
    source = as_source(Own(lambda i: (value, i), 2))
    assert source.fetch(torch.tensor([1, 0])).shape == (2, *shape)


def test_labels_are_those_that_the_samples_have() -> None:
    changed = Own(plain, 9, targets=[0] * 9)  # say, what a target transform was applied to
    assert as_source(changed).targets.tolist() == [i % 3 for i in range(9)]
    moved = Own(lambda i: (torch.zeros(1), 5), 9, targets=list(range(9)), target_transform=lambda y: 5)
    assert as_source(moved).targets.tolist() == [5] * 9
    hidden = Own(lambda i: (torch.zeros(1), 0 if i == 2 else 1), 40, targets=[1] * 40)
    with pytest.raises(ValueError, match="label 0 of sample 2, must be 1"):
        as_source(hidden).fetch(torch.tensor([2]))


def test_random_transforms_follow_run_step_and_sample() -> None:
    source = as_source(Own(noisy, 12))
    stream = iid(source, as_source(Own(plain, 3)))
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state()
    whole = [Loader(stream, stream.tasks[0], 4, 2, 0, World()).batch(step) for step in range(6)]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    again = Loader(stream, stream.tasks[0], 4, 2, 0, World()).batch(5)
    assert torch.equal(again.inputs, whole[5].inputs)
    half = Loader(stream, stream.tasks[0], 4, 2, 0, World(1, 2)).batch(5)
    assert torch.equal(half.inputs, whole[5].inputs[2:])
    epochs = [torch.cat([b.inputs[b.ids == 0] for b in part]) for part in (whole[:3], whole[3:])]
    assert not torch.equal(*epochs)  # another crop in another epoch
    assert torch.equal(source.fetch(torch.tensor([0])), source.fetch(torch.tensor([0])))  # and none in evaluation
    assert len({float(x) for x in epochs[0].flatten()}) == 4


def test_workers_fetch_the_same() -> None:
    stream = iid(Ten(), Ten())
    one, two = (list(Loader(stream, stream.tasks[0], 2, 1, 0, World(), workers=w)) for w in (0, 2))
    assert all(torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) for a, b in zip(one, two, strict=True))
    assert pickle.loads(pickle.dumps(stream)).fingerprint() == stream.fingerprint()


def test_every_stream_takes_data_sets() -> None:
    train, test = Own(plain, 12, classes=["a", "b", "c"]), Own(plain, 6, classes=["a", "b", "c"])
    for stream in (iid(train, test), growing(train, test, 2), class_incremental(train, test, 3),
                   domain_incremental([(train, test)]), domain_incremental(permuted(train, test, 2)), as_stream((train, test))):
        assert stream.num_classes == 3 and set(stream.classes) == {"a", "b", "c"}
        ids = stream.tasks[-1].train_ids[:2]
        assert stream.fetch(ids).shape == (2, 2)


def test_numbers_without_names_share_the_widest_space() -> None:
    train = TensorDataset(torch.zeros(4, 1), torch.tensor([0, 1, 2, 1]))
    test = TensorDataset(torch.zeros(2, 1), torch.tensor([0, 1]))
    stream = class_incremental(train, test, 2, class_order=[0, 1])
    assert stream.num_classes == 2
    assert as_stream([(train, test)]).num_classes == 3
    with pytest.warns(UserWarning, match=r"no training samples of classes \['2'\]"):
        assert iid(test, train.tensors).num_classes == 3
    named = Own(plain, 6, classes=["a", "b", "c"])
    assert iid(named, TensorDataset(torch.zeros(2, 2), torch.tensor([2, 0]))).classes == ("a", "b", "c")
    with pytest.raises(ValueError, match="label 4 in 'TensorDataset', must be below 3"):
        iid(named, TensorDataset(torch.zeros(2, 2), torch.tensor([4, 0])))
    with pytest.raises(ValueError, match="same classes in the same order"):
        iid(named, Own(plain, 6, classes=["b", "a", "c"]))


def test_pairs_of_new_classes_are_class_incremental_by_name() -> None:
    animals, cars = (Own(lambda i: (torch.zeros(1), i % 2), 4, classes=names) for names in (["cat", "dog"], ["van", "bus"]))
    stream = as_stream([(cars, cars), (animals, animals)])
    assert stream.kind == "class" and stream.classes == ("van", "bus", "cat", "dog")
    assert [task.classes for task in stream.tasks] == [(0, 1), (2, 3)]
    assert stream.targets(stream.tasks[1].train_ids).tolist() == [2, 3, 2, 3]
    assert stream.targets(stream.tasks[1].test_ids).tolist() == [2, 3, 2, 3]
    assert as_stream([(cars, cars), (animals, animals)], kind="task").kind == "task"
    turned = Own(lambda i: (torch.zeros(1), i % 2), 4, classes=["dog", "cat"])
    assert as_stream([(animals, turned)]).targets(torch.arange(8)).tolist() == [0, 1, 0, 1, 1, 0, 1, 0]
    assert as_stream(stream) is stream


def test_pairs_of_the_same_classes_are_domains(capsys: pytest.CaptureFixture[str]) -> None:
    tell.cache_clear()
    x, y = torch.arange(6.0)[:, None], torch.tensor([0, 1, 2, 0, 1, 2])
    pairs = [((x, y), (x, y)), ((x + 10, y), (x, y))]
    stream = as_stream(pairs)
    sources = [tuple(TensorSource(*part) for part in pair) for pair in pairs]
    assert stream.kind == "domain" and stream.fingerprint() == domain_incremental(sources).fingerprint()
    overlapping = as_stream([((x[:2], y[:2]), (x[:2], y[:2])), ((x[1:3], y[1:3]), (x[1:3], y[1:3]))])
    assert overlapping.kind == "domain" and [t.classes for t in overlapping.tasks] == [(0, 1), (1, 2)]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "as_stream: tasks share some classes ('1'" in said and "taken for domains" in said
    apart = as_stream([((x[:1], y[:1] + 7), (x[:1], y[:1] + 7)), ((x[1:3], y[1:3]), (x[1:3], y[1:3]))])
    assert apart.kind == "class" and apart.classes == ("7", "1", "2") and apart.label_map.tolist() == [-1, 1, 2, *[-1] * 4, 0]


@pytest.mark.parametrize(("others", "said"), [
    (torch.zeros(2, 1, 5, 5), "(1, 5, 5) torch.float32, those of 'tensors' (1, 4, 4) torch.float32: the network has"),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "(1, 4, 4) torch.uint8, those of"),
    (torch.zeros(2, 16), "(16,) torch.float32, those of")])
def test_inputs_of_another_shape_or_type_are_said_at_once(
    others: Tensor, said: str, capsys: pytest.CaptureFixture[str],
) -> None:
    y, x = torch.tensor([0, 1]), torch.zeros(2, 1, 4, 4)
    for k, wrong in enumerate([((others, y + 2), (others, y + 2)), ((x, y + 2), (others, y + 2))]):
        for make in (as_stream, lambda pairs: make_stream("class", pairs)):
            tell.cache_clear()
            make([((x, y), (x, y)), *[((x, y + 4), (x, y + 4))] * (1 - k), wrong])
            assert f"_stream: inputs of 'tensors' in pair {2 - k} are {said}" in capsys.readouterr().err
    assert as_stream(((x, y), (others, y))).kind == "iid"  # tested at another size
    assert capsys.readouterr().err == ""
    by_name = [RowSource({"a": x}, y), RowSource({"b": x}, y)]
    as_stream([(source, source) for source in by_name])
    assert "are b (1, 4, 4) torch.float32, those of 'rows' a (1, 4, 4)" in capsys.readouterr().err


class Endless(IterableDataset[Any]):
    """No indices."""

    def __iter__(self) -> Any:
        return iter([(torch.zeros(1), 0)])


@pytest.mark.parametrize(("data", "text"), [
    (DataLoader(Own(plain, 4)), "a DataLoader, must be a data set; give its .dataset"),
    (Endless(), "iterable data set"), ("digits", "everbatch.data.load"),
    (torch.zeros(3), r"one array, must .*\(inputs, targets\)"), (3, "int, must be a map-style"),
    ({"a": 1}, "dict, must be a map-style"), (Own(plain, 0), "no samples"),
    (ConcatDataset([Own(plain, 3, classes=["a", "b", "c"]), Own(plain, 3, classes=["c", "b", "a"])]),
     "mean different things")])
def test_what_is_no_data_set_is_refused(data: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        as_source(data)


@pytest.mark.parametrize(("sample", "text"), [
    (torch.zeros(2), "Tensor from sample 0"), ((1, 2, 3), "3 values from sample 0"),
    (({}, 2), "input of sample 0 is a dict"), ((torch.zeros(1, dtype=torch.complex64), 0), "real numbers"),
    ((torch.zeros(1), "cat"), "label of sample 0 is 'cat'"), ((torch.zeros(1), 1.0), "label of sample 0 is 1.0"),
    ((torch.zeros(1), None), "label of sample 0 is a NoneType"), ((torch.zeros(1), torch.tensor(1.5)), "be integers"),
    ((torch.zeros(1), [1, 1]), "one-hot"), ((torch.zeros(1), -1), "be in"),
    ((torch.zeros(1), 2**31), "label 2147483648 of sample 0")])
def test_samples_that_are_no_pairs_are_refused(sample: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        as_source(Own(lambda i: sample, 3))


def test_what_a_data_set_raises_is_told_with_its_sample() -> None:
    with pytest.raises(ValueError, match=r"cannot read sample 0 \(ZeroDivisionError"):
        as_source(Own(lambda i: 1 / 0, 3))


def test_samples_of_several_shapes_are_named() -> None:
    source = as_source(Own(lambda i: (torch.zeros(2 + i // 3), 0), 5))
    with pytest.raises(ValueError, match=r"sample 3 is \(3,\) .*must be \(2,\) .*resize"):
        source.fetch(torch.tensor([1, 3]))


@pytest.mark.parametrize(("data", "text"), [
    (Own(plain, 3), "a Own, must be .train, test. pairs"), ([Own(plain, 3)], "a Own in place 0"), ([], "no pairs"),
    ((torch.zeros(2, 2), torch.zeros(2)), "a Tensor in place 0"), ("digits", "a str"),
    ([(Own(plain, 3), DataLoader(Own(plain, 3)))], "give its .dataset"),
    ([(Own(plain, 3),)], "1 values in place 0")])
def test_what_is_no_stream_is_refused(data: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        as_stream(data)


def test_a_stream_of_ones_own_must_be_whole() -> None:
    stream = iid(Own(plain, 6), Own(plain, 6))
    half = type("Half", (), {name: getattr(stream, name) for name in ("tasks", "train", "test", "num_classes", "fetch")})()
    with pytest.raises(ValueError, match="Half without kind, classes, targets, seen_classes, fingerprint"):
        as_stream(half)
    with pytest.raises(ValueError, match="kind='class' beside a stream of kind 'iid'"):
        as_stream(stream, kind="class")


def test_lists_of_samples_are_data_too() -> None:
    for label in (int, torch.tensor, np.int32):
        samples = [(torch.full((2,), float(i)), label(i % 2)) for i in range(6)]
        stream = as_stream((samples, samples[:2]))
        assert stream.kind == "iid" and stream.tasks[0].test_ids.tolist() == [6, 7]
        assert as_stream([(samples, samples)] * 2).kind == "domain"


def test_reading_many_samples_for_their_labels_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    tell.cache_clear()
    assert len(as_source(Own(plain, 10_000, targets=[i % 3 for i in range(10_000)]))) == 10_000
    assert capsys.readouterr().err == ""
    as_source(Own(plain, 10_000))
    assert capsys.readouterr().err == "Own: reads all 10000 samples once for their labels; an attribute `targets` spares that\n"
