"""Rows by name, and sources whose targets come with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from everbatch.data import (
    Batch,
    ConcatSource,
    Loader,
    RowDataset,
    RowSource,
    as_source,
    class_incremental,
    domain_incremental,
    iid,
)
from everbatch.data.loader import evaluation_batches
from everbatch.distributed import World
from everbatch.rows import each, joined, named, rows_of, split, stacked, unnamed

ROWS = {"a": torch.arange(10).view(5, 2), "b": torch.arange(5.0)}


def test_rows_are_split_joined_and_named() -> None:
    for rows in (ROWS, ROWS["a"]):
        assert same(joined(split(rows, 3)), rows) and same(stacked(list(rows_of(rows))), rows)
        assert same(unnamed("raw", {**named("raw", rows), "other": torch.zeros(5)}), rows)
    assert sorted(named("raw", ROWS)) == ["raw/a", "raw/b"] and same(each(lambda v: v + 1, ROWS["b"]), ROWS["b"] + 1)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    return torch.equal(one, other)


@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_a_batch_of_rows_is_cut_and_moved(pieces: int) -> None:
    ids = torch.arange(5)
    batch = Batch(ROWS, torch.arange(15.0).view(5, 3), ids, ids, extras={"raw": ROWS, "z": ids})
    cut = batch.split(pieces)
    assert len(cut) == pieces and all(same(part.inputs, part.extras["raw"]) for part in cut)
    kept = joined([part.inputs for part in cut])
    assert same({k: v[:5] for k, v in kept.items()}, ROWS)  # type: ignore[union-attr]
    assert float(sum(part.weight.sum() for part in cut)) == pytest.approx(1.0)  # type: ignore[union-attr, misc]
    assert same(batch.to("cpu").inputs, ROWS) and same(batch.rows(torch.tensor([3])).inputs, {k: v[3:4] for k, v in ROWS.items()})


def test_a_source_gives_its_own_targets() -> None:
    source = RowSource(ROWS, targets=torch.arange(5) / 3)
    stream = iid(source, RowSource(ROWS, targets=torch.zeros(5)))
    inputs, targets = stream.rows(torch.tensor([4, 7]))
    assert same(inputs, {"a": ROWS["a"][[4, 2]], "b": ROWS["b"][[4, 2]]}) and targets.tolist() == [pytest.approx(4 / 3), 0.0]
    assert same(stream.fetch(torch.tensor([4, 7])), inputs) and stream.num_classes == 1
    batch = Loader(stream, stream.tasks[0], 4, 1, 0, World()).batch(0)
    assert batch.targets.dtype == torch.float32 and len(batch) == 4
    shown = list(evaluation_batches(stream, stream.tasks[0], 2, World(1, 2)))
    assert [len(b) for b in shown] == [2, 1] and shown[0].targets.tolist() == [0.0, 0.0]


def test_named_inputs_with_labels_are_classes() -> None:
    labels = np.array([1, 0, 1, 0, 1])
    source = RowSource(ROWS, labels=labels)
    stream = class_incremental(source, source, tasks=2, seed=0)
    inputs, targets = stream.rows(torch.arange(5))
    assert same(inputs, ROWS) and torch.equal(targets, stream.label_map[torch.from_numpy(labels)])


def test_fingerprints_see_rows_and_targets() -> None:
    prints = {RowSource(ROWS, targets=y, labels=z).fingerprint() for y, z in (
        (torch.zeros(5), None), (torch.ones(5), None), (torch.zeros(5), [0, 0, 0, 0, 1]))}
    for rows in ({"a": ROWS["a"]}, ROWS["a"]):
        prints.add(RowSource(rows, targets=torch.zeros(5)).fingerprint())
    assert len(prints) == 5


@pytest.mark.parametrize(("make", "text"), [
    (lambda: RowSource(ROWS), "neither targets nor labels"), (lambda: RowSource({}, [0]), "must be named"),
    (lambda: RowSource({"targets": ROWS["a"]}, labels=[0] * 5), "not 'targets'"),
    (lambda: RowSource(ROWS, [0.0] * 4), "be as many"), (lambda: RowSource(ROWS, labels=[0] * 4), "be as many"),
    (lambda: RowSource(torch.zeros(0, 2), torch.zeros(0)), "no samples"),
    (lambda: ConcatSource([RowSource(ROWS, [0.0] * 5), RowSource(ROWS["a"], [0.0] * 5)]).fetch(torch.tensor([0, 9])),
     "must be .* as the others"),
    (lambda: as_source(RowSource(ROWS, [0.0] * 5), target="a"), "target= beside 'rows'")])
def test_what_makes_no_rows_is_refused(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


class Dicts(Dataset[Any]):
    """Samples as tokenizers leave them."""

    def __init__(self, count: int = 6, *, ragged: bool = False) -> None:
        self.count, self.ragged = count, ragged

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        ids = [index, index + 1, 3] + [7] * (index * self.ragged)
        return {"input_ids": ids, "labels": np.array(ids), "noise": torch.rand(2)}


def test_a_data_set_of_dicts_is_a_source() -> None:
    source = as_source(Dicts(), target="labels")
    assert isinstance(source, RowDataset)
    rows: Any = source.fetch(torch.tensor([4, 1]))
    assert rows["input_ids"].tolist() == [[4, 5, 3], [1, 2, 3]] == rows["targets"].tolist()
    alone: Any = source.fetch(torch.tensor([4]))
    assert torch.equal(rows["noise"][:1], alone["noise"])  # what it draws belongs to the sample
    assert source.fingerprint() == as_source(Dicts(), target="labels").fingerprint()
    stream = domain_incremental([(source, source), (source, source)])
    assert stream.rows(torch.tensor([7]))[1].tolist() == [[1, 2, 3]]


def test_pairs_with_any_target_are_rows() -> None:
    data = TensorDataset(torch.arange(8.0).view(4, 2), torch.arange(4) / 7)
    source: Any = as_source(data, target="targets")
    assert torch.equal(source.fetch(torch.tensor([3]))["targets"], torch.tensor([3 / 7]))
    with pytest.raises(ValueError, match="be integers"):
        as_source(data)  # labels stored as floats are still refused
    grouped = as_source(Dicts(), labels=[0, 1, 2, 0, 1, 2], collate=lambda rows: torch.tensor([r["input_ids"] for r in rows]))
    assert isinstance(grouped.fetch(torch.tensor([0])), Tensor) and grouped.classes == ("0", "1", "2")


@pytest.mark.parametrize(("options", "text"), [
    ({"target": "label"}, "no 'label' among"), ({"labels": [0, 1]}, "2 labels of 6 samples"),
    ({"collate": lambda rows: (1, 2, 3)}, "samples of 3 values"), ({"collate": lambda rows: {"a": [1]}}, r"\['a'\] in a batch"),
    ({"collate": lambda rows: torch.zeros(len(rows), 2)}, "neither a target nor labels")])
def test_what_a_data_set_must_give_for_rows(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        as_source(Dicts(), **options)


def test_ragged_rows_say_what_to_do() -> None:
    source = as_source(Dicts(ragged=True), target="labels")
    with pytest.raises(ValueError, match="pad them to one length, or give collate="):
        source.fetch(torch.tensor([0, 2]))


def test_samples_with_other_keys_say_so() -> None:
    odd = as_source([{"x": [1.0], "y": 1.0}, {"x": [2.0]}], target="y")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"samples with \['x', 'y'\] and with \['x'\], must have the same keys"):
        odd.fetch(torch.arange(2))


def test_hugging_face_data_sets_are_sources() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [5, 6]], "labels": [[1, 2], [3, 4], [5, -100]]})
    source: Any = as_source(table, target="labels")
    assert source.fetch(torch.tensor([2]))["targets"].tolist() == [[5, -100]]
