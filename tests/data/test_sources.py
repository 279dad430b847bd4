"""Sources: the values they give, the splits they make, and what they say about broken data."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from everbatch.data import ConcatSource, Source, SubsetSource, TensorSource, load, stratified_split

Image = pytest.importorskip("PIL.Image")


def pixels(label: int, index: int, height: int = 6, width: int = 6) -> np.ndarray:
    return np.random.default_rng([label, index]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_folder(root: Path, classes: tuple[str, ...], count: int, height: int = 6, width: int = 6) -> None:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(pixels(label, index, height, width)).save(root / name / f"{index:03d}.png")


def test_folder_gives_the_pixels_that_were_written(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", ("ant", "bee"), 20)
    write_folder(tmp_path / "test", ("ant", "bee"), 2)
    train, test = (load(f"imagefolder:{tmp_path}", train=part) for part in (True, False))
    assert isinstance(train, Source)
    assert (len(train), len(test), train.classes) == (40, 4, ("ant", "bee"))
    assert train.targets.tolist() == [0] * 20 + [1] * 20
    ids = torch.tensor([21, 0, 21, *range(40)])
    want = torch.stack([torch.from_numpy(pixels(int(i) // 20, int(i) % 20).transpose(2, 0, 1).copy()) for i in ids])
    for _ in range(2):  # decoded, then kept
        assert torch.equal(train.fetch(ids), want)
    assert torch.equal(pickle.loads(pickle.dumps(train)).fetch(ids), want)
    assert train.fetch(ids[:0]).shape == (0, 3, 6, 6)
    assert train.fingerprint() == load(f"imagefolder:{tmp_path}", train=True).fingerprint() != test.fingerprint()


@pytest.mark.parametrize("split", [False, True])
def test_a_folder_that_moves_keeps_its_fingerprint(split: bool, tmp_path: Path) -> None:
    for part in ("train", "test") if split else (".",):
        write_folder(tmp_path / "pets" / part, ("ant", "bee"), 4)

    def prints(name: str) -> list[str]:
        return [load(tmp_path / name, train=part).fingerprint() for part in (True, False)]

    before = prints("pets")
    (tmp_path / "far").mkdir()
    (tmp_path / "pets").rename(tmp_path / "far" / "moved")
    assert prints("far/moved") == before and before[0] != before[1]
    image = next((tmp_path / "far" / "moved").rglob("bee/*.png"))
    kept = image.read_bytes()
    image.write_bytes(kept + b"more")  # another size
    changed = prints("far/moved")
    assert changed != before
    image.write_bytes(kept)
    image.rename(image.with_name("other.png"))
    assert prints("far/moved") not in (before, changed)


def test_large_folders_are_decoded_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everbatch.data.images.CACHE_BYTES", 0)
    write_folder(tmp_path / "train", ("ant",), 12)
    source = load(f"imagefolder:{tmp_path}", train=True)
    ids = torch.arange(11, -1, -1)
    want = torch.stack([torch.from_numpy(pixels(0, int(i)).transpose(2, 0, 1).copy()) for i in ids])
    assert torch.equal(source.fetch(ids), want)


def test_folder_without_split_is_split_by_class(tmp_path: Path) -> None:
    write_folder(tmp_path, ("ant", "bee"), 8)
    train, test = (load(f"imagefolder:{tmp_path}", train=part) for part in (True, False))
    assert torch.bincount(train.targets).tolist() == [6, 6]
    assert torch.bincount(test.targets).tolist() == [2, 2]
    both = torch.cat([train.fetch(torch.arange(12)), test.fetch(torch.arange(4))]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 16


def test_resize_crops_the_centre_or_squeezes(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", ("ant",), 1, height=4, width=10)
    whole = torch.from_numpy(pixels(0, 0, 4, 10).transpose(2, 0, 1).copy())
    ids = torch.tensor([0])
    assert torch.equal(load(f"imagefolder:{tmp_path}", train=True, image_size=4).fetch(ids)[0], whole[:, :, 3:7])
    square = load(f"imagefolder:{tmp_path}", train=True, image_size=4, resize="square", channels=1)
    assert square.fetch(ids).shape == (1, 1, 4, 4)


def test_leaf_folders_can_be_the_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "latin", ("a", "b"), 4)
    write_folder(tmp_path / "greek", ("a",), 4)
    assert load(f"imagefolder:{tmp_path}", train=True).classes == ("greek", "latin")
    leaves = load(f"imagefolder:{tmp_path}", train=True, leaf_classes=True)
    assert leaves.classes == ("greek/a", "latin/a", "latin/b")
    assert torch.bincount(leaves.targets).tolist() == [3, 3, 3]


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder '.*gone'"):
        load(f"imagefolder:{tmp_path}/gone", train=True)
    with pytest.raises(ValueError, match="no class folders"):
        load(f"imagefolder:{tmp_path}", train=True)
    write_folder(tmp_path / "train", ("ant", "bee"), 2)
    with pytest.raises(ValueError, match="neither 'test' nor 'val'"):
        load(f"imagefolder:{tmp_path}", train=False)
    write_folder(tmp_path / "val", ("ant", "cat"), 2)
    with pytest.raises(ValueError, match=r"classes \['bee', 'cat'\] are in only one"):
        load(f"imagefolder:{tmp_path}", train=False)
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"class folder \['dog'\]"):
        load(f"imagefolder:{tmp_path}", train=True)
    (tmp_path / "train" / "dog").rmdir()
    (tmp_path / "train" / "bee" / "001.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(ValueError, match=f"cannot read image '{tmp_path}/train/bee/001.png'"):
        load(f"imagefolder:{tmp_path}", train=True).fetch(torch.arange(4))
    Image.fromarray(pixels(1, 1, 6, 7)).save(tmp_path / "train" / "bee" / "001.png")
    with pytest.raises(ValueError, match=r"train/bee/001.png' is \(6, 7\), must be \(6, 6\).*\(data.image_size in"):
        load(f"imagefolder:{tmp_path}", train=True).fetch(torch.arange(4))
    Image.fromarray(np.zeros((6, 6), dtype=np.uint16)).save(tmp_path / "train" / "bee" / "001.png")
    with pytest.raises(ValueError, match="8 bits per channel"):
        load(f"imagefolder:{tmp_path}", train=True).fetch(torch.arange(4))


def test_digits() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    train, test = load("digits", train=True), load("digits", train=False)
    assert len(train) + len(test) == 1797
    counts = np.bincount(datasets.load_digits().target)
    assert torch.bincount(test.targets).tolist() == [round(n / 4) for n in counts]
    whole = torch.as_tensor(datasets.load_digits().images).to(torch.uint8).unsqueeze(1)
    got = torch.cat([s.fetch(torch.arange(len(s))) for s in (train, test)])
    assert got.dtype == torch.uint8 and got.shape[1:] == (1, 8, 8) and got.max() == 16
    def rows(images: torch.Tensor) -> list[list[int]]:
        return sorted(images.flatten(1).tolist())
    assert rows(got) == rows(whole)
    assert load("digits", train=True, image_size=12).fetch(torch.arange(2)).shape == (2, 1, 12, 12)
    assert train.fingerprint() == load("digits", train=True).fingerprint() != test.fingerprint()


def test_torchvision_by_class_name(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (7, 28, 28), dtype=np.uint8), np.arange(7, dtype=np.uint8)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 2051, 7, 28, 28) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, 7) + labels.tobytes())
    source = load(f"torchvision:MNIST:{tmp_path}", train=True)
    assert torch.equal(source.fetch(torch.tensor([3, 1])), torch.from_numpy(images[[3, 1]])[:, None])
    assert source.targets.tolist() == list(range(7)) and len(source.classes) == 10
    assert load(f"torchvision:MNIST:{tmp_path}", train=False, image_size=8, channels=3).fetch(
        torch.tensor([0])).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="data set 'MNITS'.*did you mean '.*MNIST'"):
        load(f"torchvision:MNITS:{tmp_path}", train=True)
    with pytest.raises(ValueError, match="CIFAR10 .* pass download=True"):
        load(f"torchvision:CIFAR10:{tmp_path}", train=True)
    with pytest.raises(ValueError, match="EMNIST has no part called train or trainval .*Valid values"):
        load(f"torchvision:EMNIST:{tmp_path}", train=True)


def test_torchvision_whose_test_part_is_called_val(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    for part, count in (("train", 2), ("val", 1)):
        for k, code in enumerate(datasets.Imagenette._WNID_TO_CLASS):
            folder = tmp_path / "imagenette2" / part / code
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (20 * k, i, 0)).save(folder / f"{i}.JPEG")
    train, test = (load(f"torchvision:Imagenette:{tmp_path}", train=t) for t in (True, False))
    assert (len(train), len(test)) == (20, 10) and train.classes == test.classes and test.classes[0] == "tench"
    assert test.targets.tolist() == list(range(10)) and abs(int(test.fetch(torch.tensor([5]))[0, 0, 0, 0]) - 100) < 3


def test_npz(tmp_path: Path) -> None:
    x, y = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3), np.asarray([0, 1, 2, 1, 0])
    np.savez(tmp_path / "split.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    train, test = (load(f"npz:{tmp_path}/split.npz", train=part) for part in (True, False))
    assert torch.equal(train.fetch(torch.arange(5)), torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    assert len(test) == 2 and test.classes == ("0", "1", "2")
    features = np.linspace(0, 1, 24, dtype=np.float32).reshape(8, 3)
    np.savez(tmp_path / "one.npz", inputs=features, targets=np.repeat([0, 1], 4), classes=["no", "yes"])
    part = load(f"npz:{tmp_path}/one.npz", train=False)
    assert part.classes == ("no", "yes") and part.targets.tolist() == [0, 1]
    assert part.fetch(torch.tensor([0])).dtype == torch.float32
    np.savez(tmp_path / "bad.npz", data=features)
    with pytest.raises(ValueError, match=r"holds \['data'\]"):
        load(f"npz:{tmp_path}/bad.npz", train=True)
    with pytest.raises(ValueError, match="no file"):
        load(f"npz:{tmp_path}/gone.npz", train=True)
    with pytest.raises(ValueError, match="resize before saving"):
        load(f"npz:{tmp_path}/split.npz", train=True, image_size=8)


@pytest.mark.parametrize(("spec", "text"), [("digit", "did you mean 'digits'"), ("digits:x", "must be 'digits'"),
                                            ("npz", "must be 'digits'"), ("torchvision:MNIST", "ROOT")])
def test_bad_specs(spec: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load(spec, train=True)


def test_tensors_and_their_errors() -> None:
    with pytest.raises(ValueError, match="label 3 of sample 1, must be in"):
        TensorSource(torch.zeros(2, 1), torch.tensor([0, 3]), classes=["a", "b"])
    with pytest.raises(ValueError, match="must be integers"):
        TensorSource(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match=r"must be \(N, ...\) and \(N,\)"):
        TensorSource(torch.zeros(2, 1), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="no samples"):
        TensorSource(torch.zeros(0, 1), torch.zeros(0, dtype=torch.long))


def test_concat_and_subset_agree_with_indexing() -> None:
    x, y = torch.arange(20.0).reshape(10, 2), torch.arange(10) % 3
    parts = [TensorSource(x[:4], y[:4], classes="abc"), TensorSource(x[4:], y[4:], classes="abc")]
    both = ConcatSource(parts)
    ids = torch.tensor([9, 0, 4, 3, 9])
    assert torch.equal(both.fetch(ids), x[ids]) and torch.equal(both.targets, y)
    assert both.fetch(ids[:0]).shape == (0, 2)
    some = SubsetSource(both, torch.tensor([5, 2]))
    assert torch.equal(some.fetch(torch.tensor([1, 0])), x[[2, 5]]) and some.targets.tolist() == [2, 2]
    with pytest.raises(ValueError, match="has classes"):
        ConcatSource([parts[0], TensorSource(x, y)])
    odd = ConcatSource([parts[0], TensorSource(torch.zeros(2, 3), y[:2], classes="abc")])
    with pytest.raises(ValueError, match=r"gives \(3,\)"):
        odd.fetch(torch.tensor([0, 5]))


def test_stratified_split() -> None:
    targets = torch.tensor([0] * 8 + [1] * 2 + [2] * 5)
    rest, held = stratified_split(targets, 0.25, seed=3)
    assert torch.equal(torch.cat([rest, held]).sort().values, torch.arange(15))
    assert torch.bincount(targets[held]).tolist() == [2, 1, 1]
    assert torch.equal(held, stratified_split(targets, 0.25, seed=3)[1])
    with pytest.raises(ValueError, match="1 sample of class 1"):
        stratified_split(torch.tensor([0, 0, 1]), 0.5, seed=0)
    with pytest.raises(ValueError, match="fraction"):
        stratified_split(targets, 1.0, seed=0)
