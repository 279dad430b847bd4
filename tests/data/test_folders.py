"""Folders of images as people have them: links, hidden names, odd and broken pictures."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
import torch

from everbatch.data import load
from everbatch.data.notes import tell

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    tell.cache_clear()


def fill(folder: Path, count: int = 4) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (6, 6), (index, 0, 0)).save(folder / f"{index}.png")


def number(root: Path | str, **options: bool) -> tuple[tuple[str, ...], int]:
    train, test = (load(root, train=part, **options) for part in (True, False))  # type: ignore[arg-type]
    return train.classes, len(train) + len(test)


def test_linked_folders_and_files_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("ant/day", "ant/night", "bee/day", "bee/night"):
        fill(tmp_path / "store" / name)
    root = tmp_path / "root"
    (root / "bee" / "day").mkdir(parents=True)
    (root / "ant").symlink_to(tmp_path / "store" / "ant")
    (root / "bee" / "night").symlink_to(tmp_path / "store" / "bee" / "night")
    for file in (tmp_path / "store" / "bee" / "day").iterdir():
        (root / "bee" / "day" / file.name).symlink_to(file)
    assert number(f"imagefolder:{root}") == (("ant", "bee"), 16)
    assert number(root, leaf_classes=True) == (("ant/day", "ant/night", "bee/day", "bee/night"), 16)
    (tmp_path / "linked").symlink_to(root)
    assert number(tmp_path / "linked") == (("ant", "bee"), 16)
    folders = pytest.importorskip("torchvision.datasets")
    assert len(folders.ImageFolder(root)) == 16
    assert capsys.readouterr().err == ""


def test_links_in_circles_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "ant")
    fill(tmp_path / "bee")
    (tmp_path / "ant" / "up").symlink_to(tmp_path)
    (tmp_path / "ant" / "here").symlink_to(tmp_path / "ant")
    (tmp_path / "bee" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "bee" / "self").symlink_to(tmp_path / "bee" / "self")
    (tmp_path / "all").symlink_to(tmp_path)
    assert number(tmp_path) == (("ant", "bee"), 8)
    assert "left out are 2 broken links, 3 links to a folder that they are in" in capsys.readouterr().err
    (tmp_path / "ant" / "bee").symlink_to(tmp_path / "bee")  # no circle: counts twice, as in torchvision
    assert number(tmp_path) == (("ant", "bee"), 12)


def test_hidden_names_never_count_and_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / ".data"
    fill(root / "ant" / "deep")
    fill(root / "bee")
    fill(root / ".ipynb_checkpoints")
    fill(root / "bee" / ".thumbs" / "small")
    (root / "bee" / "._0.png").write_bytes(b"\0\5\26\7")
    (root / "ant" / "deep" / ".DS_Store").write_bytes(b"")
    (root / "ant" / "deep" / "0.heic").write_bytes(b"")
    (root / "list.csv").write_text("")
    Image.new("L", (6, 6)).save(root / "cover.png")
    assert number(root) == (("ant", "bee"), 8)
    assert number(root, leaf_classes=True) == (("ant/deep", "bee"), 8)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"imagefolder: {str(root)!r}: left out are 4 hidden files or folders, 2 files of other kinds "
                    "(.csv, .heic), 1 images outside of the class folders"]


def test_only_rank_0_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "ant")
    fill(tmp_path / ".hidden")
    monkeypatch.setenv("RANK", "1")
    assert number(tmp_path) == (("ant",), 4)
    assert capsys.readouterr().err == ""


def test_a_path_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "pets" / "ant")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in (tmp_path / "pets", str(tmp_path / "pets"), "pets", "./pets", "~/pets", "pets/", Path("pets")):
        assert number(spec) == (("ant",), 4)
    (tmp_path / "digits").symlink_to(tmp_path / "pets")
    assert load("./digits", train=True).classes == load(Path("digits"), train=True).classes == ("ant",)


@pytest.mark.parametrize(("spec", "text"), [
    ("", "must be one of digits"), ("gone/pets", "no folder 'gone/pets', must exist"), ("/gone", "no folder"),
    ("pets", "or a path that exists"), ("imagefoldr:/x/y", "did you mean 'imagefolder'"), ("npy:x.npz", "did you mean 'npz'"),
    ("gone.npz", "no file 'gone.npz'")])
def test_paths_that_are_not_there(spec: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=text):
        load(spec, train=True)


def test_folders_without_classes_are_named(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"class folder \['a'\] .* holds no image"):
        load(tmp_path, train=True)
    fill(tmp_path / "flat")
    with pytest.raises(ValueError, match=r"no class folders in .*flat' \(4 images outside"):
        load(tmp_path / "flat", train=True)
    fill(tmp_path / "split" / "Training" / "ant")
    fill(tmp_path / "split" / "valid" / "ant")
    with pytest.raises(ValueError, match=r"holds \['Training', 'valid'\] in place of classes"):
        load(tmp_path / "split", train=True)
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(ValueError, match=r"file .*file.txt', must be an .npz file or a folder"):
        load(tmp_path / "file.txt", train=True)


def test_folders_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "ant")
    scan = os.scandir

    def refuse(path: Path) -> object:
        if path.name == "ant":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("everbatch.data.folders.os.scandir", refuse)  # the rights themselves do not stop root
    with pytest.raises(ValueError, match="cannot read folder '.*ant' .Permission denied"):
        load(tmp_path, train=True)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("content", [
    b"", b"<html>", png(20_000, 20_000), png(2**31 - 1, 2**31 - 1), png(0, 6), png(6, 6, b"no zlib"),
    png(6, 6, zlib.compress(b"\0" * 20)), b"GIF89a", b"\xff\xd8\xff\xe0", b"II*\0\xff\xff\xff\xff", b"P6 6 6 255 x", b"P6 x",
    b"BM" + b"\0" * 60, b"RIFF\0\0\0\0WEBPVP8 "],
    ids="empty html bomb larger flat zlib short gif jpeg tiff ppm ppm-header bmp webp".split())
def test_a_picture_that_cannot_be_read_is_named_by_its_path(content: bytes, tmp_path: Path) -> None:
    fill(tmp_path / "train" / "ant")
    (tmp_path / "train" / "ant" / "1.png").write_bytes(content)
    for picked in (tmp_path, f"imagefolder:{tmp_path}"):
        with pytest.raises(ValueError, match=rf"cannot read image '{tmp_path}/train/ant/1.png' \(\w+: "):
            load(picked, train=True, image_size=6).fetch(torch.arange(4))


def test_odd_pictures_are_read(tmp_path: Path) -> None:
    fill(tmp_path / "train" / "ant", 1)
    folder = tmp_path / "train" / "ant"
    palette = Image.new("P", (6, 6), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(folder / "1.png", transparency=b"\0\x80")
    palette.save(folder / "2.gif", save_all=True, append_images=[Image.new("P", (6, 6), 0)])
    Image.new("CMYK", (6, 6)).save(folder / "3.jpg")
    Image.new("LA", (6, 6), (7, 9)).save(folder / "4.png")
    Image.new("RGBA", (6, 6), (10, 20, 30, 0)).save(folder / "5.png")
    Image.new("1", (6, 6), 1).save(folder / "6.png")
    Image.new("RGB", (6, 6), (10, 20, 30)).save(folder / "7.bmp")
    (folder / "7.bmp").rename(folder / "7.png")  # the ending lies
    Image.new("L", (3, 3000), 9).save(folder / "8.png")
    source = load(tmp_path, train=True, image_size=6)
    got = source.fetch(torch.arange(9))
    assert got.shape == (9, 3, 6, 6) and got[:, :, 3, 3].tolist() == [
        [0, 0, 0], [10, 20, 30], [10, 20, 30], [255, 255, 255], [7, 7, 7], [10, 20, 30], [255, 255, 255], [10, 20, 30], [9, 9, 9]]


@pytest.mark.parametrize("size", [0, 16_385, 10**18, 1.5, True, "32"])
def test_the_size_of_images_is_bounded(size: object) -> None:
    with pytest.raises(ValueError, match=r"image_size=.*, must be an integer in \[1, 16384\]"):
        load("digits", train=True, image_size=size)  # type: ignore[arg-type]


def test_a_folder_too_deep_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "pets" / "cat")
    fill(tmp_path / "pets" / "dog")
    assert load(tmp_path, train=True).classes == ("pets",)
    assert f"if the folders in it are the classes, open {str(tmp_path / 'pets')!r}" in capsys.readouterr().err
    fill(tmp_path / "one" / "cat", 1)
    with pytest.raises(ValueError, match="1 sample of class 'cat', must be at least 2"):
        load(tmp_path / "one", train=True)


def test_a_part_that_is_not_used_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            fill(tmp_path / part / name)
    number(tmp_path)
    assert capsys.readouterr().err == ""  # val is judged on
    for name in ("cat", "dog"):
        fill(tmp_path / "test" / name)
    number(tmp_path)
    line = f"imagefolder: {str(tmp_path)!r}: 'train' is trained on and 'test' judged on; not used: val\n"
    assert capsys.readouterr().err == line
