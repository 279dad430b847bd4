"""The files of a folder of class folders: links are followed, as torchvision does; hidden names never count."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from everbatch.data.notes import tell
from everbatch.errors import check

__all__ = ["EXTENSIONS", "class_files"]

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_PARTS = {"train", "training", "test", "testing", "val", "valid", "validation"}


@dataclass
class Found:
    """What a walk through a folder met."""

    files: list[str] = field(default_factory=list)
    """Images, relative to the root, in the order of their path's parts."""
    folders: list[str] = field(default_factory=list)
    """Names directly below the root."""
    hidden: int = 0
    """Files and folders whose name begins with a dot; what is in such a folder is not looked at."""
    broken: int = 0
    """Links to nothing."""
    loops: int = 0
    """Links to a folder that they are in."""
    other: Counter[str] = field(default_factory=Counter)
    """Files with other endings, by ending."""

    def left_out(self, beside: int) -> str:
        """What does not count, in words; empty if everything does."""
        kinds = ", ".join(ending or "without ending" for ending in sorted(self.other)[:5])
        parts = ((self.hidden, "hidden files or folders"), (sum(self.other.values()), f"files of other kinds ({kinds})"),
                 (self.broken, "broken links"), (self.loops, "links to a folder that they are in"),
                 (beside, "images outside of the class folders"))
        return ", ".join(f"{count} {what}" for count, what in parts if count)


def walk(root: Path) -> Found:
    """Every image below `root`.

    Raises:
        ValueError: a folder that cannot be read.

    Cost: one look at every folder.
    """
    found = Found()
    stack: list[tuple[str, bool, tuple[tuple[int, int], ...]]] = [("", True, ())]
    while stack:
        name, is_folder, above = stack.pop()
        if not is_folder:
            found.files.append(name)
            continue
        path = root / name
        try:
            info = os.stat(path)
            inode = (info.st_dev, info.st_ino)
            with os.scandir(path) as entries:
                inside = sorted(entries, key=lambda entry: entry.name, reverse=True)  # the stack turns it round
        except OSError as error:
            raise ValueError(f"imagefolder: cannot read folder {str(path)!r} ({error.strerror}), must be readable") from error
        if inode in above:
            found.loops += 1
            found.folders = [folder for folder in found.folders if folder != name]
            continue
        for entry in inside:
            inner = f"{name}/{entry.name}" if name else entry.name
            if entry.name.startswith("."):
                found.hidden += 1
            elif _is_dir(entry):
                stack.append((inner, True, (*above, inode)))
                if not name:
                    found.folders.append(entry.name)
            elif not _is_file(entry):
                found.broken += 1
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                stack.append((inner, False, ()))
            else:
                found.other[os.path.splitext(entry.name)[1].lower()] += 1
    found.folders.sort()
    return found


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def class_files(root: Path, leaf_classes: bool) -> dict[str, list[str]]:
    """Images under `root`, relative to it and sorted, by class name in sorted order; says what it leaves out.

    Args:
        root: the folder of class folders.
        leaf_classes: see `everbatch.data.load`.

    Raises:
        ValueError: no class folders, one without images, or folders that look like parts of a split.
    """
    found = walk(root)
    classes: dict[str, list[str]] = {} if leaf_classes else {name: [] for name in found.folders}
    beside = 0
    for file in found.files:
        folder = file.rpartition("/")[0]
        if not folder:
            beside += 1
        else:
            classes.setdefault(folder if leaf_classes else file.partition("/")[0], []).append(file)
    classes = dict(sorted(classes.items()))
    out = found.left_out(beside)
    check(bool(classes), "imagefolder", f"no class folders in {str(root)!r}" + f" ({out})" * bool(out),
          "hold one folder of images per class")
    parts = [name for name in classes if name.split("/")[0].lower() in _PARTS]
    check(len(parts) < len(classes), "imagefolder", f"{str(root)!r} holds {parts[:4]} in place of classes",
          "hold class folders, or 'train' beside 'test' or 'val'", "rename them")
    empty = [name for name, paths in classes.items() if not paths]
    check(not empty, "imagefolder", f"class folder {empty[:5]} in {str(root)!r} holds no image",
          f"hold files ending in {', '.join(EXTENSIONS)}")
    if len(classes) == 1 and all(file.count("/") > 1 for file in found.files) and not leaf_classes:
        only = next(iter(classes))
        tell(f"imagefolder: {str(root)!r}: one class, {only!r}; if the folders in it are the classes, open {str(root / only)!r}")
    if out:
        tell(f"imagefolder: {str(root)!r}: left out are {out}")
    return classes
