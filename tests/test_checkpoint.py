"""Checkpoint store in one process: bits, slices, damage, hostile folders, retention, every crash window of a save."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from everbatch import checkpoint
from everbatch.checkpoint import Piece
from everbatch.checkpoint.files import CODES
from everbatch.checkpoint.manifest import MANIFEST, dump
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch

ONE = World()
FILE = "rank-00000.safetensors"


def whole(name: str, tensor: Tensor) -> Piece:
    return Piece(name, tuple(tensor.shape), 0, tensor)


def bits(tensor: Tensor) -> list[int]:
    return tensor.reshape(-1).contiguous().view(torch.uint8).tolist()


def save_value(root: Path, step: int, value: float, keep_last: int = 2) -> Path:
    """A checkpoint whose every tensor and meta say `value`."""
    pieces = [whole("a", torch.full((3, 5), float(value))), whole("b", torch.full((7,), int(value)))]
    return checkpoint.save(root, step, pieces, {"value": value}, world=ONE, keep_last=keep_last)


def saved_value(found: checkpoint.Checkpoint | None) -> float:
    """The value in a checkpoint, which must be the same in all of its tensors."""
    assert found is not None
    values = {*found.whole("a").flatten().tolist(), *found.whole("b").tolist(), found.meta["value"]}
    assert len(values) == 1, f"mixed checkpoint {found}: {values}"
    return float(values.pop())


def latest_quietly(root: Path) -> checkpoint.Checkpoint | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return checkpoint.latest(root, world=ONE)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and sign it again, as somebody hostile would."""
    body = json.loads((folder / MANIFEST).read_bytes())
    body.pop("sha256")
    change(body)
    (folder / MANIFEST).write_bytes(dump(body))


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in CODES], ids=str)
def test_every_element_type_keeps_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.arange(48 * 7, dtype=torch.int64).mul(2654435761).to(torch.uint8)
    data = (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)
    data = data[: len(data) // 6 * 6].view(-1, 6)
    checkpoint.save(tmp_path, 0, [whole("x", data), whole("transposed", data.t()), whole("odd", torch.ones(3) > 0)], {},
                    world=ONE)
    found = latest_quietly(tmp_path)
    assert found is not None and found.dtype("x") == dtype
    assert found.whole("x").dtype == dtype and found.whole("x").shape == data.shape
    assert bits(found.whole("x")) == bits(data)
    assert found.shape("transposed") == (6, len(data)) and bits(found.whole("transposed")) == bits(data.t())
    assert bits(found.read("x", 3, 4)) == bits(data.flatten()[3:7])
    header = (found.path / FILE).read_bytes()
    length = int.from_bytes(header[:8], "little")
    for key, entry in json.loads(header[8 : 8 + length]).items():  # aligned, which readers that map the file rely on
        width = 1 if key.startswith("odd") else data.element_size()
        assert (8 + length + entry["data_offsets"][0]) % width == 0


def test_signed_zero_and_nan_payloads(tmp_path: Path) -> None:
    odd = torch.tensor([0x7FC00123, -0x7FFFFF, -(2**31), 0x7F800001, 1, 0x7F800000], dtype=torch.int32)
    half = torch.tensor([-(2**15), 0x7FC1, -3, 0x7F81, 1], dtype=torch.int16)
    pieces = [whole("f", odd.view(torch.float32)), whole("h", half.view(torch.bfloat16))]
    found = checkpoint.open(checkpoint.save(tmp_path, 3, pieces, {}, world=ONE))
    assert torch.equal(found.whole("f").view(torch.int32), odd)
    assert torch.equal(found.whole("h").view(torch.int16), half)
    assert torch.equal(found.read("f", 1, 3).view(torch.int32), odd[1:4])


def test_layouts_scalars_empties_and_parameters(tmp_path: Path) -> None:
    image = torch.arange(120.0).view(2, 3, 4, 5)
    tied = torch.nn.Parameter(torch.arange(6.0))
    tensors = {
        "image": image.to(memory_format=torch.channels_last), "strided": image[:, 1, ::2], "scalar": torch.tensor(7),
        "none": torch.zeros(0, 4), "tied": tied, "tied too": tied, "a@3": torch.ones(2),
        "conjugate": torch.tensor([1 + 2j]).conj(),
    }
    found = checkpoint.open(checkpoint.save(tmp_path, 1, [whole(n, t) for n, t in tensors.items()], {}, world=ONE))
    assert found.names() == tuple(sorted(tensors))
    for name, tensor in tensors.items():
        assert torch.equal(found.whole(name), tensor), name
    found.whole("tied").zero_()  # what is read belongs to the caller
    assert torch.equal(found.whole("tied"), tied)
    assert found.read("scalar", 1).shape == found.read("none").shape == (0,)


def test_any_slice_from_any_pieces(tmp_path: Path) -> None:
    data = torch.arange(13)
    cuts = [0, 1, 6, 6, 13]
    pieces = [Piece("x", (13,), a, data[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    found = checkpoint.open(checkpoint.save(tmp_path, 1, pieces[::-1], {}, world=ONE))
    for start in range(14):
        for stop in range(start, 14):
            assert torch.equal(found.read("x", start, stop - start), data[start:stop])
    for start, count in ((0, 14), (13, 1), (14, None)):
        with pytest.raises(CheckpointMismatch, match=r"x has 13 elements \(shape \[13\]\)"):
            found.read("x", start, count)
    with pytest.raises(ValueError, match="start=-1"):
        found.read("x", -1)
    with pytest.raises(CheckpointMismatch, match="no tensor 'weigth'"):
        found.whole("weigth")


def test_meta_comes_back(tmp_path: Path) -> None:
    meta = {"text": "\u00e9\ud800", "deep": [{"a": [1, -2.5e-320, True, None]}], "big": 2**80, "inf": float("-inf")}
    found = checkpoint.open(checkpoint.save(tmp_path, 1, [], {**meta, "nan": float("nan")}, world=ONE))
    assert found.meta.pop("nan") != 0 and found.meta == meta
    for bad, where in (({"a": {1: 2}}, "meta.a: key 1 is a int"), ({"a": [0, {1}]}, r"meta.a\[1\]: a set")):
        with pytest.raises(RuntimeError, match=where):
            checkpoint.save(tmp_path, 2, [], bad, world=ONE)


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert latest_quietly(tmp_path / "missing") is None
    (tmp_path / ".tmp-step-00000001").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert latest_quietly(tmp_path) is None


def test_retention_and_foreign_entries(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / ".tmp-step-00000009").mkdir()
    (tmp_path / ".tmp-step-00000009" / FILE).write_bytes(b"left over")
    for step in (1, 2, 3, 100000000, 3):
        save_value(tmp_path, step, step)
    assert sorted(os.listdir(tmp_path)) == ["best", "step-00000003", "step-100000000"]
    save_value(tmp_path, 2, 5, keep_last=1)  # an older step by hand: never deleted by its own save
    assert sorted(os.listdir(tmp_path)) == ["best", "step-00000002", "step-100000000"]
    for bad in (0, -1):
        with pytest.raises(ValueError, match="keep_last"):
            save_value(tmp_path, 4, 4, keep_last=bad)
    with pytest.raises(ValueError, match="step=-1"):
        save_value(tmp_path, -1, 4)


def test_retention_counts_no_damaged_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        save_value(tmp_path, step, step)
    (tmp_path / "step-00000002" / FILE).unlink()
    save_value(tmp_path, 3, 3)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002", "step-00000003"]


def test_same_step_twice(tmp_path: Path) -> None:
    first = save_value(tmp_path, 4, 1)
    assert save_value(tmp_path, 4, 2) == first and os.listdir(tmp_path) == ["step-00000004"]
    assert saved_value(latest_quietly(tmp_path)) == 2


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: os.truncate(f / FILE, 100), f"{FILE}: has 100 bytes, the manifest says"),
    "empty": (lambda f: os.truncate(f / FILE, 0), f"{FILE}: has 0 bytes"),
    "first byte": (lambda f: flip(f / FILE, 0), f"{FILE}: its content differs"),
    "last byte": (lambda f: flip(f / FILE, -1), f"{FILE}: its content differs"),
    "missing file": (lambda f: (f / FILE).unlink(), f"{FILE}: is missing"),
    "folder for file": (lambda f: ((f / FILE).unlink(), (f / FILE).mkdir()), f"{FILE}: is not a plain file"),
    "missing manifest": (lambda f: (f / MANIFEST).unlink(), f"{MANIFEST}: is missing"),
    "empty manifest": (lambda f: os.truncate(f / MANIFEST, 0), f"{MANIFEST}: is not JSON"),
    "truncated manifest": (lambda f: os.truncate(f / MANIFEST, 300), f"{MANIFEST}: is not JSON"),
    "nested manifest": (lambda f: (f / MANIFEST).write_text("[" * 100_000), f"{MANIFEST}: is not JSON"),
    "altered number": (
        lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text().replace('"value": 2', '"value": 3')),
        f"{MANIFEST}: sha256 is",
    ),
    "pipe": (lambda f: ((f / MANIFEST).unlink(), os.mkfifo(f / MANIFEST)), f"{MANIFEST}: is not a plain file"),
    "other version": (lambda f: rewrite(f, lambda body: body.update(version=2)), "version is 2, must be 1"),
    "renamed folder": (lambda f: rewrite(f, lambda body: body.update(step=7)), "its manifest is of step 7"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_previous_one_used(tmp_path: Path, kind: str) -> None:
    save_value(tmp_path, 1, 1)
    folder = save_value(tmp_path, 2, 2)
    damage, text = DAMAGE[kind]
    damage(folder)
    with pytest.warns(UserWarning) as caught:
        found = checkpoint.latest(tmp_path, world=ONE)
    assert saved_value(found) == 1 and found is not None and found.step == 1
    (warning,) = [str(one.message) for one in caught]
    assert text in warning and "step-00000002" in warning and f"{tmp_path / 'step-00000001'} is used" in warning
    if kind != "renamed folder":  # an explicit folder may have any name
        with pytest.raises(CheckpointMismatch) as error:
            checkpoint.open(folder)
        assert text in str(error.value)
    DAMAGE["truncated"][0](tmp_path / "step-00000001")
    with pytest.raises(CheckpointMismatch, match="none is good.*step-00000002.*step-00000001.*move them away"):
        checkpoint.latest(tmp_path, world=ONE)


TENSOR = "tensors.a"
WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "format": (lambda b: b.update(format="other"), "format is 'other'"),
    "version type": (lambda b: b.update(version=True), "version is True"),
    "step": (lambda b: b.update(step="1"), "step is '1', must be an integer >= 0"),
    "world": (lambda b: b.update(world_size=-1), "world_size is -1"),
    "meta": (lambda b: b.update(meta=[]), r"meta is \[\], must be an object"),
    "files": (lambda b: b.pop("files"), "files is None, must be an object"),
    "bytes": (lambda b: b["files"][FILE].update(bytes=1.5), "files.rank-00000.safetensors.bytes is 1.5"),
    "hash": (lambda b: b["files"][FILE].update(sha256="xyz"), "files.rank-00000.safetensors.sha256 is 'xyz'"),
    "dtype": (lambda b: b["tensors"]["a"].update(dtype="system"), f"{TENSOR}.dtype is 'system'"),
    "shape": (lambda b: b["tensors"]["a"].update(shape=[3, -5]), f"{TENSOR}.shape is -5"),
    "pieces": (lambda b: b["tensors"]["a"].update(pieces={}), f"{TENSOR}.pieces is {{}}, must be a list"),
    "piece": (lambda b: b["tensors"]["a"].update(pieces=[[FILE, 0]]), f"{TENSOR}.pieces is .*start, numel"),
    "foreign": (lambda b: b["tensors"]["a"].update(pieces=[["x", 0, 15]]), f"{TENSOR}.pieces is 'x', must be a name"),
    "beyond": (lambda b: b["tensors"]["a"].update(pieces=[[FILE, 0, 16]]), "inside 15 elements"),
    "overlap": (lambda b: b["tensors"]["a"].update(pieces=[[FILE, 0, 9], [FILE, 8, 7]]), "without overlap"),
    "other header": (lambda b: b["tensors"]["a"].update(dtype="int32"), "'a@0' is F32.*the manifest says I32"),
    "not in file": (lambda b: b["tensors"].update(c=b["tensors"]["a"]), "holds no 'c@0'"),
    "parent": (lambda b: b["files"].update({f"../{FILE}": b["files"][FILE]}), "a name in files is '../rank-00000"),
    "absolute": (lambda b: b["files"].update({f"/tmp/{FILE}": b["files"][FILE]}), "a name in files is '/tmp/rank"),
    "line end": (lambda b: b["files"].update({f"{FILE}\n": b["files"][FILE]}), "a name in files is"),
    "many ranks": (lambda b: b.update(world_size=10**17), "world_size is 100000000000000000, must be at most"),
    "other ranks": (lambda b: b.update(world_size=7), "world_size is 7, must be the number of files, 1"),
    "late": (lambda b: b.update(step=10**17), "step is 100000000000000000, must be at most"),
    "large": (lambda b: b["tensors"]["a"].update(shape=[10**17]), f"{TENSOR}.shape is 100000000000000000, must be at most"),
    "large in all": (lambda b: b["tensors"]["a"].update(shape=[2**31] * 60), f"{TENSOR}.shape is .*2147483648, .* elements"),
    "dimensions": (lambda b: b["tensors"]["a"].update(shape=[10**15] * 100_000), f"{TENSOR}.shape has 100000 dimensions"),
    "health": (lambda b: b.update(healthy=1), "healthy is 1, must be true or false"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_manifest_keys_are_checked_even_when_signed(tmp_path: Path, kind: str) -> None:
    folder = save_value(tmp_path, 1, 1)
    change, text = WRONG[kind]
    rewrite(folder, change)
    started = time.process_time()
    with pytest.raises(CheckpointMismatch, match=text):
        checkpoint.open(folder)
    assert time.process_time() - started < 1, "sizes that a manifest claims cost time"


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    folder = save_value(tmp_path, 1, 1)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"step": 1,', '"step": 1, "step": 1,'))
    with pytest.raises(CheckpointMismatch, match="key 'step' occurs twice"):
        checkpoint.open(folder)


def test_latest_passes_over_missing_elements(tmp_path: Path) -> None:
    save_value(tmp_path, 1, 1)
    folder = save_value(tmp_path, 2, 2)
    rewrite(folder, lambda body: body["tensors"]["b"].update(pieces=[]))
    with pytest.warns(UserWarning, match="b lacks elements 0 to 7; no file holds them"):
        assert saved_value(checkpoint.latest(tmp_path, world=ONE)) == 1


def save_sick(root: Path, step: int) -> Path:
    return checkpoint.save(root, step, [whole("a", torch.ones(2))], {}, world=ONE, keep_last=2, healthy=False)


def test_what_was_saved_while_steps_were_skipped_pushes_out_nothing(tmp_path: Path) -> None:
    save_value(tmp_path, 1, 1)
    save_value(tmp_path, 2, 2)
    for step in (3, 4, 5, 6):
        save_sick(tmp_path, step)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000005", "step-00000006"]
    newest = latest_quietly(tmp_path)
    assert newest is not None and (newest.step, newest.healthy) == (6, False)
    checkpoint.withdraw(tmp_path)
    assert saved_value(latest_quietly(tmp_path)) == 2 and checkpoint.failed(tmp_path) == [5, 6]
    checkpoint.withdraw(tmp_path)
    save_value(tmp_path, 3, 3)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000003"]


def test_a_manifest_without_health_is_healthy(tmp_path: Path) -> None:
    rewrite(save_sick(tmp_path, 1), lambda body: body.pop("healthy"))
    found = latest_quietly(tmp_path)
    assert found is not None and found.healthy


@pytest.mark.parametrize("left", [".del-step-00000001", ".old-step-00000002", "step-00000001"])
def test_what_cannot_be_deleted_is_a_warning(tmp_path: Path, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save_value(tmp_path, step, step)
    if left.startswith(".del"):
        (tmp_path / "step-00000001").rename(tmp_path / left)
    elif left.startswith(".old"):
        shutil.copytree(tmp_path / "step-00000002", tmp_path / left)
    whole_tree = shutil.rmtree

    def refusing(path: Path, *args: Any, **options: Any) -> None:
        if Path(path).name.endswith(left.removeprefix(".del-").removeprefix(".old-")):
            raise PermissionError(13, "Permission denied", str(path))
        whole_tree(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", refusing)
    with pytest.warns(UserWarning, match=r"step 3 is saved, but an old one could not be deleted: .*Permission denied"):
        save_value(tmp_path, 3, 3)
    assert saved_value(latest_quietly(tmp_path)) == 3


def test_a_folder_is_tried_before_it_is_needed(tmp_path: Path) -> None:
    checkpoint.try_writing(tmp_path / "a" / "b", world=ONE)
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RuntimeError, match=r"cannot be written to: rank 0: (NotADirectory|FileExists)Error"):
        checkpoint.try_writing(tmp_path / "file", world=ONE)


def test_missing_elements_are_named(tmp_path: Path) -> None:
    pieces = [Piece("a", (3, 5), start, torch.ones(5)) for start in (0, 5, 10)]
    folder = checkpoint.save(tmp_path, 1, pieces, {}, world=ONE)
    rewrite(folder, lambda body: body["tensors"]["a"]["pieces"].pop(1))
    found = checkpoint.open(folder)
    assert found.read("a", 0, 5).sum() + found.read("a", 10).sum() == 10
    for start, count, text in ((0, None, "5 to 10"), (6, 2, "6 to 8"), (3, 4, "5 to 7")):
        with pytest.raises(CheckpointMismatch, match=f"a lacks elements {text}"):
            found.read("a", start, count)


@pytest.mark.parametrize("what", ["file", "manifest", "folder"])
def test_symbolic_links_are_refused(tmp_path: Path, what: str) -> None:
    folder = save_value(tmp_path / "root", 1, 1)
    target = {"file": folder / FILE, "manifest": folder / MANIFEST, "folder": folder}[what]
    elsewhere = tmp_path / "elsewhere"
    target.rename(elsewhere)
    target.symlink_to(elsewhere)
    with pytest.raises(CheckpointMismatch, match=f"{target}: is a symbolic link"):
        checkpoint.open(folder)
    with pytest.raises(CheckpointMismatch, match="is a symbolic link"):
        checkpoint.latest(tmp_path / "root", world=ONE)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    folder, ran = save_value(tmp_path / "root", 1, 1), tmp_path / "ran"
    if form == "pickle":
        (folder / FILE).write_bytes(pickle.dumps(_Payload(ran)))
    else:
        torch.save({"a": _Payload(ran)}, folder / FILE)
    data = (folder / FILE).read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(folder, lambda body: body["files"].update({FILE: entry}))
    with pytest.raises(CheckpointMismatch, match=f"{FILE}: is not a safetensors file"):
        checkpoint.open(folder)
    (folder / MANIFEST).write_bytes(pickle.dumps(_Payload(ran)))
    with pytest.raises(CheckpointMismatch, match=f"{MANIFEST}: is not JSON"):
        checkpoint.latest(tmp_path / "root", world=ONE)
    assert not ran.exists()


X = torch.ones(4)
BAD_PIECES = {
    "gap": ([Piece("x", (9,), 0, X), Piece("x", (9,), 5, X)], "x: elements 4 to 5 were given by no rank"),
    "end": ([Piece("x", (9,), 0, X)], "x: elements 4 to 9 were given by no rank"),
    "overlap": ([Piece("x", (7,), 0, X), Piece("x", (7,), 3, X)], "x: elements 3 to 4 were given twice"),
    "twice": ([Piece("x", (4,), 0, X), Piece("x", (4,), 0, X)], "x: two pieces start at element 0"),
    "shape": ([Piece("x", (8,), 0, X), Piece("x", (2, 4), 4, X)], r"x: rank 0 gave float32 \[2, 4\], an earlier"),
    "beyond": ([Piece("x", (3,), 0, X)], "x: elements 0 to 4, must lie in the 3 elements"),
    "negative": ([Piece("x", (8,), -1, X)], "x: elements -1 to 3"),
    "sparse": ([Piece("x", (4,), 0, X.to_sparse())], "must be a plain dense tensor"),
    "meta": ([Piece("x", (4,), 0, X.to("meta"))], "must be a plain dense tensor"),
    "type": ([Piece("x", (4,), 0, X.to(torch.complex128))], "element type complex128, must be one of float64"),
    "name": ([Piece("", (4,), 0, X)], "name '', must be text"),
    "surrogate": ([Piece("\ud800", (4,), 0, X)], "must be text that UTF-8 can hold"),
}


@pytest.mark.parametrize("kind", BAD_PIECES)
def test_what_could_not_be_read_is_never_written(tmp_path: Path, kind: str) -> None:
    save_value(tmp_path, 1, 1)
    pieces, text = BAD_PIECES[kind]
    with pytest.raises(RuntimeError, match=f"step 2 was not saved, earlier.*rank 0: ValueError: .*{text}"):
        checkpoint.save(tmp_path, 2, pieces, {}, world=ONE)
    assert os.listdir(tmp_path) == ["step-00000001"]


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the store may run any clean-up on it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Die just before the `call`-th change of the file system."""
    calls = 0

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > call:
                raise Killed
            return None if name == "fsync" else real(*args, **kwargs)

        monkeypatch.setattr(os, name, counted)

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
        wrap(name)


def test_every_crash_window_of_a_save_and_of_the_save_after_it(tmp_path: Path) -> None:
    """Re-save step 2 and die before call k; save step 3 and die before call j; something good is always there."""
    start = tmp_path / "start"
    save_value(start, 1, 1)
    save_value(start, 2, 2)

    def die(root: Path, step: int, value: float, call: int) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, call)
            try:
                save_value(root, step, value, keep_last=1)
            except Killed:
                return True
        return False

    seen, first, windows = [], 0, 0
    while True:
        once = tmp_path / f"{first}"
        shutil.copytree(start, once)
        killed = die(once, 2, 3, first)
        seen.append(saved_value(latest_quietly(once)))
        second = 0
        while True:
            twice = tmp_path / f"{first}-{second}"
            shutil.copytree(once, twice)
            again = die(twice, 3, 4, second)
            assert saved_value(latest_quietly(twice)) in ((seen[-1], 4) if again else (4,))
            save_value(twice, 5, 5, keep_last=1)
            assert os.listdir(twice) == ["step-00000005"], "an interrupted save left something behind"
            shutil.rmtree(twice)
            second, windows = second + 1, windows + 1
            if not again:
                break
        first += 1
        if not killed:
            break
    assert seen == sorted(seen) and set(seen) == {2, 3}
    assert first > 15 and windows > 200  # the counting reached the calls it is about


def test_everything_is_on_the_disk_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).relative_to(tmp_path)}")
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        calls.append(f"rename {source.name} {target.name}")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save_value(tmp_path / "root", 1, 1)
    tmp = ".tmp-step-00000001"
    assert calls == ["fsync .", f"fsync root/{tmp}/{FILE}", f"fsync root/{tmp}/{MANIFEST}", f"fsync root/{tmp}",
                     f"rename {tmp} step-00000001", "fsync root"]


def test_old_copy_counts_only_while_its_successor_is_not_good(tmp_path: Path) -> None:
    folder = save_value(tmp_path, 2, 2)
    folder.rename(tmp_path / ".old-step-00000002")
    assert saved_value(latest_quietly(tmp_path)) == 2  # killed between the two renames
    save_value(tmp_path / "other", 2, 3).rename(folder)
    assert saved_value(latest_quietly(tmp_path)) == 3  # killed before the clean-up
    os.truncate(folder / FILE, 9)
    with pytest.warns(UserWarning, match="step-00000002.*has 9 bytes"):
        assert saved_value(checkpoint.latest(tmp_path, world=ONE)) == 2


def test_reading_a_file_that_vanished_is_an_error(tmp_path: Path) -> None:
    found = checkpoint.open(save_value(tmp_path, 1, 1))
    (tmp_path / "step-00000001" / FILE).unlink()
    with pytest.raises(CheckpointMismatch, match=f"{FILE}: was good when"):
        found.whole("a")


def test_export_weights(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    state = {**model.state_dict(), "tied": model[0].bias, "view": model[0].weight.detach()[1:, 0]}
    path = checkpoint.export_weights(tmp_path / "deep" / "model.safetensors", state, {"step": "3"})
    loaded = load_file(path)
    assert set(loaded) == set(state) and os.listdir(path.parent) == ["model.safetensors"]
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].shape == tensor.shape
    checkpoint.export_weights(path, {"only": X})
    assert set(load_file(path)) == {"only"}
    with pytest.raises(ValueError, match="element type complex128"):
        checkpoint.export_weights(path, {"x": X.to(torch.complex128)})
    with pytest.raises(ValueError, match="map strings to strings"):
        checkpoint.export_weights(path, {"x": X}, {"step": 3})  # type: ignore[dict-item]
    with pytest.raises(RuntimeError, match="was not written: .*an older file is untouched"):
        checkpoint.export_weights(path / "below a file", {"x": X})
    assert set(load_file(path)) == {"only"} and os.listdir(path.parent) == ["model.safetensors"]


def test_timm_loads_an_export(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    source, target = (timm.create_model("test_vit", pretrained=False, num_classes=3) for _ in range(2))
    path = checkpoint.export_weights(tmp_path / "model.safetensors", source.state_dict())
    timm.models.load_checkpoint(target, str(path), strict=True)
    assert all(torch.equal(target.state_dict()[name], tensor) for name, tensor in source.state_dict().items())
