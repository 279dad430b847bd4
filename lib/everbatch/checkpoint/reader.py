"""Reading a checkpoint: verified once when it is opened, then any slice of any tensor, at any world size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from everbatch.checkpoint.files import flat_key
from everbatch.checkpoint.manifest import Manifest, Stored, load
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch, check, nearest

__all__ = ["Checkpoint", "open", "verify"]


class Checkpoint:
    """A verified checkpoint. Reading is local to a rank (no collective) and touches only the bytes asked for.

    Files are mapped when first read and stay mapped as long as the object lives: a `save` that retires the folder in
    the meantime takes away only files that were not read yet, and that is an error, never wrong numbers.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._manifest = manifest
        self._mapped: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, step={self.step}, world_size={self.world_size})"

    @property
    def step(self) -> int:
        """The step it was saved at."""
        return self._manifest.step

    @property
    def meta(self) -> dict[str, Any]:
        """What `save` was given; tuples have become lists."""
        return self._manifest.meta

    @property
    def healthy(self) -> bool:
        """Whether it was saved after a step that was applied; False while steps were being skipped."""
        return self._manifest.healthy

    @property
    def world_size(self) -> int:
        """Ranks that wrote it."""
        return self._manifest.world_size

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._manifest.tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Element type as it was saved."""
        dtype = getattr(torch, self._stored(name).dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def whole(self, name: str) -> Tensor:
        """The whole tensor in its shape: a new contiguous CPU tensor. Cost: its bytes."""
        return self.read(name).view(self.shape(name))

    def read(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """Elements `start` to `start + count` of the flattened tensor, put together from whichever files hold them.

        Args:
            count: how many; None means up to the end.

        Returns:
            A new CPU tensor of shape (count,), in the saved element type, with the saved bits (-0.0, NaN payloads).

        Raises:
            CheckpointMismatch: no such tensor, elements beyond its end, or elements that no file holds.

        Cost: the bytes of the slice; no other tensor data is read.
        """
        stored = self._stored(name)
        total = math.prod(stored.shape)
        check(start >= 0 and (count or 0) >= 0, "Checkpoint.read", f"start={start}, count={count}", "be >= 0")
        stop = max(start, total) if count is None else start + count
        if max(start, stop) > total:
            raise CheckpointMismatch(f"{self.path}: {name} has {total} elements (shape {list(stored.shape)}), elements "
                                     f"{start} to {stop} were asked for")
        found, reached = [], start
        for file, begin, numel in stored.pieces:
            low, high = max(begin, start), min(begin + numel, stop)
            if low < high:
                if low > reached:
                    raise self._lacks(name, reached, low)
                found.append((file, begin, low, high))
                reached = high
        if reached < stop:
            raise self._lacks(name, reached, stop)
        result = torch.empty(stop - start, dtype=self.dtype(name))
        for file, begin, low, high in found:
            part = self._part(file, flat_key(name, begin), low - begin, high - begin)
            result[low - start : high - start].copy_(part)
        return result

    def _part(self, file: str, key: str, low: int, high: int) -> Tensor:
        try:
            if file not in self._mapped:
                self._mapped[file] = safe_open(self.path / file, framework="pt")
            part = self._mapped[file].get_slice(key)[low:high]
        except (OSError, SafetensorError) as error:
            raise CheckpointMismatch(f"{self.path / file}: was good when the checkpoint was opened and cannot be read "
                                     f"now: {error}") from error
        assert isinstance(part, Tensor)
        return part

    def _lacks(self, name: str, start: int, stop: int) -> CheckpointMismatch:
        return CheckpointMismatch(f"{self.path}: {name} lacks elements {start} to {stop}; no file holds them")

    def _stored(self, name: str) -> Stored:
        if name not in self._manifest.tensors:
            raise CheckpointMismatch(f"{self.path}: holds no tensor {name!r}; {nearest(name, self.names())}")
        return self._manifest.tensors[name]


def verify(folder: Path, world: World) -> Manifest | str:
    """The manifest if all ranks find it and every file good, otherwise what is wrong; the same outcome on every rank.

    Cost: every file is read and hashed once, file k by rank k mod size; one gather.
    """
    manifest, problem = None, None
    try:
        manifest = load(folder)
        manifest.check_files(folder, sorted(manifest.files)[world.rank :: world.size])
    except CheckpointMismatch as error:
        problem = str(error)
    except Exception as error:  # whatever it is, the other ranks wait in the gather below
        problem = f"{folder}: {type(error).__name__}: {error}"
    outcomes: list[Any] = world.gather((manifest.digest if manifest else "", problem))
    problems = dict.fromkeys(text for _, text in outcomes if text is not None)
    if problems:
        return "; ".join(problems)
    if manifest is None or len(set(outcomes)) > 1:
        return f"{folder}: ranks see different manifests; it must be on a file system that all ranks share"
    return manifest


def open(path: str | Path, *, world: World | None = None) -> Checkpoint:
    """The checkpoint in one explicit folder, verified.

    Args:
        path: a folder that `save` returned, or a copy of one under any name.
        world: if given, this is a collective: the ranks share out the hashing, and all of them raise or none.
            Otherwise this process checks everything by itself.

    Raises:
        CheckpointMismatch: naming the file that is missing, damaged, foreign or a link.

    Cost: every byte of the checkpoint is read and hashed once (here, and never again when tensors are read), divided
    by the ranks of `world`; one gather with it.
    """
    outcome = verify(Path(path), World() if world is None else world)
    if isinstance(outcome, str):
        raise CheckpointMismatch(f"checkpoint cannot be used: {outcome}")
    return Checkpoint(Path(path), outcome)
