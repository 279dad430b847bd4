"""Data sets of Hugging Face `datasets` as sources: built in memory, nothing is downloaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everbatch.data import as_source, as_stream, class_incremental, load
from everbatch.data.hugging_face import is_hugging_face
from everbatch.experiment import Data

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")


def pictures(count: int = 12, *, grey: bool = False, label: Any = None) -> Any:
    rng = np.random.default_rng(0)
    made = [Image.fromarray(rng.integers(0, 256, (6, 5) if grey else (6, 5, 3), dtype=np.uint8)) for _ in range(count)]
    kinds = {"img": datasets.Image(), "fine": label or datasets.ClassLabel(names=["eel", "cat", "dog", "fox"]),
             "id": datasets.Value("int64")}
    names = sorted(kinds["fine"].names) if hasattr(kinds["fine"], "names") else [f"k{i % 3}" for i in range(count)]
    values = [i % 4 for i in range(count)] if hasattr(kinds["fine"], "names") else names
    rows = {"img": made, "fine": values, "id": list(range(count))}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))


def test_images_and_class_labels_are_found() -> None:
    data = pictures()
    source = as_source(data)
    assert source.classes == ("eel", "cat", "dog", "fox") and source.targets.tolist() == [i % 4 for i in range(12)]
    rows = source.fetch(torch.tensor([3, 0]))
    assert isinstance(rows, torch.Tensor) and rows.shape == (2, 3, 6, 5) and rows.dtype == torch.uint8
    assert torch.equal(rows[1], torch.tensor(np.array(data[0]["img"])).permute(2, 0, 1))
    assert source.fingerprint() == as_source(pictures()).fingerprint() != as_source(data.select(range(11))).fingerprint()
    assert as_source(pictures(grey=True)).fetch(torch.tensor([0])).shape == (1, 1, 6, 5)  # type: ignore[union-attr]
    stream = class_incremental(data, data, tasks=2)
    assert len(stream.tasks) == 2 and set(stream.classes) == {"eel", "cat", "dog", "fox"}
    assert as_stream([(data, data), (data, data)]).kind == "domain"


def test_columns_by_name() -> None:
    rows = {"x": [[float(i), 0.0] for i in range(6)], "y": ["b", "a", "c"] * 2, "n": [i % 2 for i in range(6)]}
    data = datasets.Dataset.from_dict(rows)
    source = as_source(data, columns=("x", "y"), name="mine")
    assert source.classes == ("a", "b", "c") and source.targets.tolist() == [1, 0, 2] * 2 and source.name == "mine"
    assert torch.equal(source.fetch(torch.tensor([4])), torch.tensor([[4.0, 0.0]]).double())  # type: ignore[arg-type]
    assert as_source(data.with_format("torch"), columns=("x", "n")).targets.tolist() == [0, 1] * 3
    assert as_source(data.select_columns(["x", "n"]), target="n").fetch(torch.tensor([1]))["targets"].tolist() == [1]  # type: ignore[call-overload]


@pytest.mark.parametrize(("make", "given", "text"), [
    (lambda: datasets.DatasetDict(train=pictures(), test=pictures()), {}, r"DatasetDict of .*give data\['train'\]"),
    (lambda: pictures().to_iterable_dataset(), {}, "IterableDataset, an iterable data set, must be of map style"),
    (lambda: datasets.Dataset.from_dict({"x": [1.0], "y": [0]}), {}, r"'y': 'Value'}, must have one column of Image.*columns="),
    (pictures, {"columns": ("img", "coarse")}, r"columns \['coarse'\], must be among \['img', 'fine', 'id'\]"),
    (lambda: pictures().add_column("f", [0.5] * 12), {"columns": ("img", "f")}, "column 'f' of torch.float64, must be integers"),
    (lambda: pictures().select([]), {}, "no samples"), (lambda: torch.utils.data.TensorDataset(torch.zeros(2)),
                                                        {"columns": ("a", "b")}, "columns= beside a TensorDataset")])
def test_what_makes_no_source_is_refused(make: Any, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        as_source(make(), **given)


def test_a_saved_folder_is_a_source_of_the_recipe(tmp_path: Path) -> None:
    datasets.DatasetDict(train=pictures(12), validation=pictures(8)).save_to_disk(tmp_path / "saved")
    text = f"huggingface:{tmp_path / 'saved'}"
    train, test = load(text, train=True), load(text, train=False, image_size=8, columns=("img", "fine"))
    assert len(train) == 12 and train.classes == test.classes == ("eel", "cat", "dog", "fox")
    assert train.fetch(torch.tensor([1])).shape == (1, 3, 6, 5)  # type: ignore[union-attr]
    assert test.fetch(torch.tensor([1])).shape == (1, 3, 8, 8)  # type: ignore[union-attr]
    chosen = Data(source=text, image_size=8, columns=("img", "fine"))
    assert len(class_incremental(*chosen.open(), tasks=2)) == 2
    with pytest.raises(ValueError, match=r"columns \['image'\], must be among"):
        load(text, train=True, columns=("image", "fine"))
    with pytest.raises(ValueError, match="only huggingface:PATH has columns"):
        load("digits", train=True, columns=("img", "fine"))
    with pytest.raises(ValueError, match="no folder '/nowhere', must exist"):
        load("huggingface:/nowhere", train=True)
    pictures(4).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"parts \[\], must have 'train'; save a DatasetDict"):
        load(f"huggingface:{tmp_path / 'one'}", train=True)
    with pytest.raises(ValueError, match="cannot be opened"):
        load(f"huggingface:{tmp_path}", train=True)


def test_the_library_is_never_imported_here() -> None:
    assert not is_hugging_face([1]) and is_hugging_face(pictures(4))
    module = sys.modules["everbatch.data.hugging_face"]
    assert not hasattr(module, "datasets")
