"""Tensors to safetensors files: the one place that writes tensor bytes, and the one that checks them again."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from everbatch.errors import CheckpointMismatch

__all__ = [
    "CODES", "Piece", "check_file", "flat_key", "fsync_folder", "plain_size", "write_bytes", "write_pieces",
    "write_tensors",
]

CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64", "bool": "BOOL",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16",
    "uint8": "U8", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}
"""What can be stored: names of torch's element types, and their codes in the safetensors format."""

CHUNK = 1 << 24
"""Bytes hashed or written at once: far above the cost of a system call, small beside any tensor worth streaming."""

MAX_HEADER = 100_000_000
"""Bytes of header that the safetensors library accepts when reading (0.8.0); longer ones must not be written."""


@dataclass(frozen=True, eq=False)
class Piece:
    """One rank's contiguous slice of one named tensor.

    A replicated tensor is start=0 with all its elements, given by one rank only.
    """

    name: str
    """Of the whole tensor; unique in the checkpoint."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """Index of the first element of `data` in the flattened (row-major) whole."""
    data: Tensor
    """A plain tensor on any device, in any shape and memory format; its elements count in logical order; it is only
    read. It may be empty (a tensor smaller than the world): it still records name, shape and element type."""

    def problem(self) -> str | None:
        """What makes this piece impossible to store, or None."""
        kind, dtype, total = type(self.data), str(self.data.dtype).removeprefix("torch."), math.prod(self.shape)
        stop = self.start + self.data.numel()
        if not self.name or self.name.encode(errors="replace").decode() != self.name:
            return f"name {self.name!r}, must be text that UTF-8 can hold, and not empty"
        if kind not in (Tensor, torch.nn.Parameter) or self.data.layout is not torch.strided or self.data.is_meta:
            return (f"{self.name}: data is a {kind.__name__} ({self.data.layout}, {self.data.device}), must be a plain "
                    "dense tensor; pass the local shard")
        if dtype not in CODES:
            return f"{self.name}: element type {dtype}, must be one of {', '.join(CODES)}"
        if min(self.shape, default=0) < 0 or self.start < 0 or stop > total:
            return (f"{self.name}: elements {self.start} to {stop}, must lie in the {total} elements of shape "
                    f"{tuple(self.shape)}")
        return None


def flat_key(name: str, start: int) -> str:
    """Name of a piece inside its file; unique because what follows the last @ is always the number."""
    return f"{name}@{start}"


def fsync_folder(path: Path) -> None:
    """Make the entries of a folder durable: without it a rename may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such call (some network ones)
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: Path, fill: Callable[[Callable[[memoryview], None]], None]) -> tuple[int, str]:
    """Write a new file through to the disk; returns its size in bytes and its SHA-256.

    Args:
        path: must not exist yet (so a link planted there is not followed).
        fill: is called with the function that appends bytes.

    Raises:
        OSError: with the path in its text, whichever call failed (a full disk is reported without it).

    Cost: the bytes once to the disk, hashed on the way; one fsync.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("xb") as file:

            def append(data: memoryview) -> None:
                nonlocal size
                for begin in range(0, len(data), CHUNK):
                    part = data[begin : begin + CHUNK]
                    digest.update(part)
                    file.write(part)
                size += len(data)

            fill(append)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return size, digest.hexdigest()


def write_tensors(
    path: Path, tensors: Sequence[tuple[str, Sequence[int], Tensor]], metadata: Mapping[str, str]
) -> tuple[int, str]:
    """Write (name, shape, data) as a safetensors file: header length, JSON header, then the bytes without gaps.

    Why not safetensors' own writer: it wants all tensors at once, on the CPU and unshared, and leaves hash and fsync to
    a second reading. Here one tensor at a time is copied off its device, and a full disk is an OSError with its number.

    Returns:
        Size in bytes and SHA-256.

    Raises:
        ValueError: so many names that no reader would accept the header; nothing is written.
        OSError: see `write_bytes`.
    """
    # widest elements first keeps each tensor aligned to its element size, as the format's own writer does
    ordered = sorted(tensors, key=lambda item: (-item[2].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key, shape, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        dtype = CODES[str(tensor.dtype).removeprefix("torch.")]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"{path}: the header has {len(text)} bytes, must be at most {MAX_HEADER}; write fewer tensors")

    def fill(append: Callable[[memoryview], None]) -> None:
        append(memoryview(struct.pack("<Q", len(text)) + text))
        for _, _, tensor in ordered:
            flat = tensor.detach().resolve_conj().resolve_neg().cpu().reshape(-1).contiguous()
            append(flat.view(torch.uint8).numpy().data)

    return write_bytes(path, fill)


def write_pieces(path: Path, pieces: Sequence[Piece]) -> tuple[int, str]:
    """Write this rank's pieces, each flat under `flat_key`; returns size in bytes and SHA-256.

    Raises:
        ValueError: a piece that cannot be stored, or two of one name and start; nothing is written.
        OSError: the disk refused; the text names the file.

    Cost: the pieces' bytes once, one fsync, one piece at a time in CPU memory.
    """
    flat: dict[str, tuple[str, Sequence[int], Tensor]] = {}
    for piece in pieces:
        problem = piece.problem()
        if problem is not None:
            raise ValueError(problem)
        if piece.data.numel():
            key = flat_key(piece.name, piece.start)
            if key in flat:
                raise ValueError(f"{piece.name}: two pieces start at element {piece.start}, must be one")
            flat[key] = (key, [piece.data.numel()], piece.data)
    return write_tensors(path, list(flat.values()), {})


def plain_size(path: Path) -> int:
    """Size in bytes of a plain file; raises CheckpointMismatch if it is missing, a link, a pipe or out of reach."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise CheckpointMismatch(f"{path}: is missing") from None
    except OSError as error:
        raise CheckpointMismatch(f"{path}: cannot be read: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a plain file"
        raise CheckpointMismatch(f"{path}: is {kind}, must be a file of the folder itself")
    return status.st_size


def check_file(path: Path, size: int, sha256: str, keys: Mapping[str, tuple[str, int]]) -> None:
    """Check a file against its manifest entry: a plain file, its size, its hash, then that its header holds `keys`.

    Args:
        keys: (name of the element type, number of elements) of each flat tensor that must be in it.

    Raises:
        CheckpointMismatch: naming the file and what is wrong. Nothing is ever unpickled: bytes are hashed and parsed
            as safetensors, so a file of any other format ends here.

    Cost: one streamed reading of the file (SHA-256 runs at 0.4 to 2 GB/s on one core, by processor).
    """
    found = plain_size(path)
    if found != size:
        raise CheckpointMismatch(f"{path}: has {found} bytes, the manifest says {size}")
    try:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(CHUNK):
                digest.update(part)
        if digest.hexdigest() != sha256:
            raise CheckpointMismatch(f"{path}: its content differs from the SHA-256 in the manifest")
        with safe_open(path, framework="pt") as tensors:
            present = set(tensors.keys())
            for key, (dtype, numel) in keys.items():
                if key not in present:
                    raise CheckpointMismatch(f"{path}: holds no {key!r}, which the manifest names")
                piece = tensors.get_slice(key)
                if piece.get_dtype() != CODES[dtype] or list(piece.get_shape()) != [numel]:
                    raise CheckpointMismatch(f"{path}: {key!r} is {piece.get_dtype()} {list(piece.get_shape())}, the "
                                             f"manifest says {CODES[dtype]} [{numel}]")
    except OSError as error:
        raise CheckpointMismatch(f"{path}: cannot be read: {error}") from error
    except SafetensorError as error:
        raise CheckpointMismatch(f"{path}: is not a safetensors file: {error}") from error
