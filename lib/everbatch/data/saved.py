"""A folder that Hugging Face's `DatasetDict.save_to_disk` wrote, as a source of images."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from everbatch.data.hugging_face import Columns
from everbatch.data.images import ImageSource, Look
from everbatch.data.sources import Source
from everbatch.errors import check

__all__ = ["open_saved"]


def open_saved(path: Path, train: bool, look: Look, columns: tuple[str, str] | None) -> Source:
    """One part of it; see `everbatch.data.load`. Nothing is downloaded."""
    if importlib.util.find_spec("datasets") is None:
        raise ImportError("huggingface: datasets is not installed; pip install everbatch[datasets]")
    from datasets import load_from_disk

    who = f"huggingface:{path}"
    check(path.is_dir(), "huggingface", f"no folder {str(path)!r}", "exist", "write it with DatasetDict.save_to_disk")
    try:
        whole = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{who}: cannot be opened ({str(error).splitlines()[0]}), must be a folder of save_to_disk") from error
    names = ("train",) if train else ("test", "validation", "valid", "val")
    parts = list(whole) if isinstance(whole, dict) else []
    part = next((name for name in names if name in parts), None)
    check(part is not None, who, f"parts {parts}", f"have {names[0]!r}", "save a DatasetDict of train and test")
    found = Columns(whole[part], columns)
    first = found[0][0] if len(found) else None
    check(type(first).__module__.startswith("PIL."), who, f"column {found.input!r} of {type(first).__name__}", "hold images",
          "in a script of your own: as_source(data, columns=...)")
    classes = found.classes or [str(label) for label in range(int(found.targets.max()) + 1)]
    labels = [f"{path.name}/{part}[{index}]" for index in range(len(found))]
    return ImageSource(f"huggingface:{path.name}/{part}", found.value, labels, found.targets, classes, look,
                       default_channels=None)
