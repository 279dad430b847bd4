"""Whole weights to one plain safetensors file, for other programs to load."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from everbatch.checkpoint.files import Piece, fsync_folder, write_tensors
from everbatch.errors import check

__all__ = ["export_weights"]


def export_weights(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write whole tensors under their plain names to one safetensors file, which timm and others load as it is.

    Args:
        path: the file; replaced in one step if it exists; its folder is created. Call it on one rank.
        tensors: names as in `model.state_dict()`, shapes kept. Views and tied tensors each become a copy in the file.
        metadata: strings for the file's header; "format": "pt" is added, which some loaders want.

    Returns:
        `path` as a Path.

    Raises:
        ValueError: a name, element type or metadata entry that the format cannot hold.
        RuntimeError: the disk refused; the old file, if any, is untouched.

    Cost: the tensors' bytes once, one tensor at a time in CPU memory; 2 fsyncs; no collective.
    """
    path, header = Path(path), {"format": "pt", **(metadata or {})}
    check(all(isinstance(text, str) for pair in header.items() for text in pair), "export_weights",
          f"metadata={header!r}", "map strings to strings", "write numbers as text")
    for name, tensor in tensors.items():
        check(name != "__metadata__", "export_weights", f"name {name!r}", "be another", "the format reserves it")
        problem = Piece(name, tuple(tensor.shape), 0, tensor).problem()
        if problem is not None:
            raise ValueError(f"export_weights: {problem}")
    partial = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        write_tensors(partial, [(name, tensor.shape, tensor) for name, tensor in tensors.items()], header)
        os.replace(partial, path)
        fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # a read-only disk refuses this too; the first error is the one to tell
            partial.unlink(missing_ok=True)
        raise RuntimeError(f"export_weights: {path} was not written: {error}; an older file is untouched") from error
    return path
