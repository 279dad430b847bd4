"""Arrays of every type as sources, and what is said of files and numbers that cannot be one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everbatch.data import TensorSource, load
from everbatch.data.notes import tell

Y = np.arange(24) % 3


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path / "x.npz", **arrays)
    return path / "x.npz"


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", ">i4", "<u2"])
def test_labels_of_every_width(kind: str, tmp_path: Path) -> None:
    for labels in (Y.astype(kind), Y.astype(kind)[:, None], np.eye(3, dtype=kind)[Y], np.eye(3, dtype=np.float32)[Y]):
        source = load(saved(tmp_path, inputs=np.zeros((24, 8, 8), np.uint8), targets=labels), train=True)
        assert source.classes == ("0", "1", "2") and torch.bincount(source.targets).tolist() == [6, 6, 6]
        assert torch.equal(TensorSource(np.zeros((24, 1)), labels).targets, torch.from_numpy(Y))
    assert TensorSource(np.zeros((24, 1)), torch.from_numpy(Y.astype("uint8")).to(torch.uint16)).targets.tolist() == Y.tolist()


def test_bools_are_two_classes(tmp_path: Path) -> None:
    source = load(saved(tmp_path, inputs=np.zeros((24, 2)), targets=Y == 1), train=True)
    assert source.classes == ("0", "1") and source.targets.sum() == 6


@pytest.mark.parametrize(("labels", "text"), [
    (Y.astype(float), "targets of '.*x.npz' of torch.float64, must be integers; convert them"),
    (Y.astype(np.float16)[:, None], "must be integers"), (np.ones((24, 3)), "must be .N,. class indices, or one-hot rows"),
    (np.zeros((24, 2, 2), int), r"shape \(24, 2, 2\)"), (Y.astype(str), "numpy.unique"), (Y - 1, "label -1 of sample 0"),
    (Y.astype(complex), "must be numbers"), (np.asarray(Y, object), "cannot read targets of .*ValueError: Object arrays"),
    (Y.astype(np.uint64) + np.uint64(2**63), r"beyond 2\^63"), (Y[:7], "24 inputs and 7 targets"), (np.int64(3), r"shape \(\)")])
def test_labels_that_are_none(labels: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text) as error:
        load(saved(tmp_path, inputs=np.zeros((24, 2)), targets=labels), train=True)
    assert "x.npz" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("label", [2**31, 2**62, 10**6])
def test_a_label_that_is_no_class_is_refused_at_once(label: int, tmp_path: Path) -> None:
    labels = Y.astype(np.int64)
    labels[5] = label
    path = saved(tmp_path, inputs=np.zeros((24, 2)), targets=labels)
    for make in (lambda: load(path, train=True), lambda: TensorSource(np.zeros((24, 2)), labels)):
        began = time.process_time()
        with pytest.raises(ValueError, match=f"label {label} of sample 5 .* must be below 65536"):
            make()
        assert time.process_time() - began < 0.5
    assert len(TensorSource(np.zeros((24, 2)), np.minimum(labels, 60_000)).classes) == 60_001


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int16", "int32", "int64", ">u2"])
@pytest.mark.parametrize("shape", [(24, 4, 5), (24, 4, 5, 3), (24, 3, 4, 5)])
def test_images_of_whole_numbers_become_bytes(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(kind)
    source = load(saved(tmp_path, x_train=pixels, y_train=Y, x_test=pixels, y_test=Y), train=True)
    got = source.fetch(torch.arange(24))
    want = pixels[:, None] if len(shape) == 3 else pixels.transpose(0, 3, 1, 2) if shape[-1] == 3 else pixels
    assert got.dtype == torch.uint8 and np.array_equal(got.numpy(), want.astype(np.uint8))
    assert len(source.fingerprint()) == 16


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "longdouble", ">f4"])
def test_floats_stay_and_channels_come_first(kind: str, tmp_path: Path) -> None:
    for shape, want in (((24, 4, 5, 3), (3, 4, 5)), ((24, 3, 4, 5), (3, 4, 5)), ((24, 7), (7,)), ((24, 6, 7), (6, 7))):
        values = np.random.default_rng(0).random(shape).astype(kind)
        got = load(saved(tmp_path, x_train=values, y_train=Y, x_test=values, y_test=Y), train=True).fetch(torch.tensor([3]))
        assert got.is_floating_point() and got.shape == (1, *want)
        first = values[3].transpose(2, 0, 1) if shape[-1] == 3 else values[3]
        assert np.array_equal(got[0].numpy(), first.astype(got.numpy().dtype))


def test_bools_and_features(tmp_path: Path) -> None:
    white = load(saved(tmp_path, inputs=np.ones((24, 4, 4), bool), targets=Y), train=True).fetch(torch.tensor([0]))
    assert white.dtype == torch.uint8 and white.shape == (1, 1, 4, 4) and int(white.min()) == 255
    for kind, want in (("bool", torch.bool), ("int64", torch.int64), ("uint16", torch.int32), ("uint64", torch.int64)):
        source = load(saved(tmp_path, inputs=np.full((24, 4), 1).astype(kind), targets=Y), train=True)
        assert source.fetch(torch.tensor([0])).dtype == want


def test_floats_that_are_not_scaled_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell.cache_clear()
    load(saved(tmp_path, inputs=np.full((24, 1, 2, 2), 255.0), targets=Y), train=True)
    assert "are floats up to 255; floats are not scaled" in capsys.readouterr().err
    for bad in (np.nan, -np.inf):
        tell.cache_clear()
        for inputs in (np.where(Y > 0, bad, 0.0), np.where(Y > 0, bad, 0.0)[:, None]):
            load(saved(tmp_path, inputs=inputs, targets=Y), train=True)
            assert "16 samples in inputs of " in (said := capsys.readouterr().err) and "the first is sample 1" in said
            tell.cache_clear()


@pytest.mark.parametrize(("inputs", "text"), [
    (np.full((24, 4, 4), 4095, np.uint16), "int32 from 4095 to 4095, must be 0 to 255"),
    (np.full((24, 4, 4), -1), "from -1 to -1"),
    (np.zeros((24, 2), complex), "must be numbers"), (np.zeros((24, 2), "U3"), "must be numbers"), (np.float32(1), r"shape \(\)"),
    (np.zeros((24, 4, 5, 7), np.uint8), "1 or 3 channels"), (np.zeros((24, 2), "datetime64[s]"), "must be numbers")])
def test_inputs_that_are_none(inputs: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        load(saved(tmp_path, inputs=inputs, targets=Y), train=True)


@pytest.mark.parametrize("keys", [("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("X_{}", "y_{}")])
def test_the_names_that_others_write(keys: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell.cache_clear()
    arrays = {key.format(part): value for part in ("train", "val", "test")
              for key, value in zip(keys, (np.zeros((24, 4, 4, 3), np.uint8), Y[:, None].astype(np.uint8)), strict=True)}
    train, test = (load(saved(tmp_path, **arrays), train=part) for part in (True, False))
    assert (len(train), len(test), train.classes) == (24, 24, ("0", "1", "2"))
    unused = ", ".join(key.format("val") for key in keys)
    assert capsys.readouterr().err == f"npz: {str(tmp_path / 'x.npz')!r}: not used: {unused}\n"


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    good = saved(tmp_path, inputs=np.random.default_rng(0).random((24, 50)), targets=Y).read_bytes()
    np.savez_compressed(tmp_path / "c.npz", inputs=np.random.default_rng(0).random((24, 50)), targets=Y)
    packed = (tmp_path / "c.npz").read_bytes()
    flipped = bytearray(packed)
    flipped[300:340] = b"\xff" * 40
    header = good.replace(b"(24, 50)", b"(24, 99)")
    absurd = good.replace(b"'shape': (24, 50), }" + b" " * 12, b"'shape': (24, 50000000000), }   ")
    bad = tmp_path / "bad.npz"
    for content in (b"", b"PK\3\4", good[:100], good[:-30], good[:2000], bytes(flipped), header, absurd, b"\x80\x04N.", b"text"):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"npz: cannot read .*bad.npz' \(\w+: .*save them anew") as error:
            load(bad, train=True)
        assert "\n" not in str(error.value)
    np.save(tmp_path / "one.npy", Y)
    (tmp_path / "one.npy").rename(bad)
    with pytest.raises(ValueError, match="holds one array without a name"):
        load(bad, train=True)


def test_arrays_beyond_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everbatch.data.memory.total_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"inputs of '.*x.npz' takes .* GiB, must fit into"):
        load(saved(tmp_path, inputs=np.zeros((24, 50)), targets=Y), train=True)


def test_arrays_in_a_file_stay_there(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(48.0).reshape(24, 2))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    source = TensorSource(mapped, Y)
    assert source.inputs.data_ptr() == mapped.ctypes.data
    assert source.fetch(torch.tensor([3])).tolist() == [[6.0, 7.0]]
    assert TensorSource(mapped[::-1], Y).fetch(torch.tensor([0])).tolist() == [[46.0, 47.0]]


def test_tensors_of_every_kind() -> None:
    y = torch.from_numpy(Y)
    learned = TensorSource(torch.zeros(24, 2, requires_grad=True), y)
    assert not learned.fetch(torch.tensor([0])).requires_grad and len(learned.fingerprint()) == 16
    half = TensorSource(torch.ones(24, 2, dtype=torch.bfloat16), y)
    assert half.fetch(torch.tensor([0])).dtype == torch.bfloat16 and len(half.fingerprint()) == 16
    listed = TensorSource([torch.zeros(3)] * 24, [torch.tensor(int(label)) for label in Y])
    assert listed.inputs.shape == (24, 3) and torch.equal(listed.targets, y)
    for bad, text in (([[1], [2, 3]], "inputs are no array"), ([torch.zeros(1), torch.zeros(2)], r"of shapes \[\(1,\), \(2,\)\]"),
                      (torch.eye(24).to_sparse(), "must be dense"), ([None] * 24, "type object, must be numbers")):
        with pytest.raises(ValueError, match=text):
            TensorSource(bad, y)
