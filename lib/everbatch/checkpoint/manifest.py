"""The manifest: what a checkpoint holds, where, and the sizes and hashes that prove it. JSON, checked key by key."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everbatch.checkpoint.files import CODES, Piece, check_file, flat_key, plain_size
from everbatch.errors import CheckpointMismatch
from everbatch.version import __version__

__all__ = ["MANIFEST", "Manifest", "Report", "Stored", "build", "dump", "json_problem", "load", "rank_file", "report"]

MANIFEST = "manifest.json"
FORMAT = "everbatch-checkpoint"
VERSION = 1
MOST = 2**53
"""Above it no JSON reader need keep an integer exactly; no size, place or step comes near."""
MAX_DIMENSIONS = 64

Report = tuple[int, str, list[tuple[str, tuple[int, ...], str, int, int]]]
"""What a rank tells of its file: bytes, SHA-256, and (name, whole shape, element type, start, numel) of its pieces."""


@dataclass(frozen=True)
class Stored:
    """One tensor: its whole shape, element type, and (file, start, numel) of its pieces, by start, not overlapping."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Manifest:
    """A parsed manifest. `files` maps a file's name to (bytes, SHA-256); `digest` is the manifest's own SHA-256."""

    step: int
    world_size: int
    files: dict[str, tuple[int, str]]
    tensors: dict[str, Stored]
    meta: dict[str, Any]
    digest: str
    healthy: bool = True
    """False: saved while steps were being skipped."""

    def gap(self) -> str | None:
        """The first elements that no file holds, or None where every tensor is whole."""
        for name, stored in self.tensors.items():
            reached = 0
            for _, start, numel in [*stored.pieces, ("", math.prod(stored.shape), 0)]:
                if start > reached:
                    return f"{name} lacks elements {reached} to {start}; no file holds them"
                reached = start + numel
        return None

    def check_files(self, folder: Path, names: Sequence[str]) -> None:
        """Check some of the files: size, hash, header. Raises CheckpointMismatch naming the first bad one."""
        keys: dict[str, dict[str, tuple[str, int]]] = {file: {} for file in self.files}
        for name, stored in self.tensors.items():
            for file, start, numel in stored.pieces:
                keys[file][flat_key(name, start)] = (stored.dtype, numel)
        for file in names:
            check_file(folder / file, *self.files[file], keys[file])


def rank_file(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def report(written: tuple[int, str], pieces: Sequence[Piece]) -> Report:
    """The report on `pieces`, which were written as a file of `written` = (bytes, SHA-256)."""
    return (*written, [(piece.name, tuple(piece.shape), str(piece.data.dtype).removeprefix("torch."), piece.start,
                        piece.data.numel()) for piece in pieces])


_PLAIN = frozenset((bool, int, float, str, type(None)))
"""Types that come back from JSON as they are."""


def json_problem(value: object, where: str) -> str | None:
    """Where and why `value` would not come back from JSON as it is, or None. Tuples pass, and come back as lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                return f"{where}: key {key!r} is a {type(key).__name__}, must be a string, as JSON would make it one"
            problem = None if type(inner) in _PLAIN else json_problem(inner, f"{where}.{key}")
            if problem is not None:
                return problem
        return None
    if isinstance(value, (list, tuple)):
        if all(type(inner) in _PLAIN for inner in value):  # a row of numbers needs no name for each
            return None
        return next((text for i, inner in enumerate(value) if (text := json_problem(inner, f"{where}[{i}]"))), None)
    if value is None or isinstance(value, (bool, int, float, str)):
        return None
    return f"{where}: a {type(value).__name__}, must be a JSON value; tensors go into pieces"


def build(step: int, reports: Sequence[Report], meta: Mapping[str, Any], healthy: bool = True) -> dict[str, Any]:
    """The manifest of what all ranks wrote, as a JSON object.

    Raises:
        ValueError: ranks disagree on a tensor's shape or type, or its pieces overlap or leave elements out. Found here,
            before the checkpoint counts, and not on the day it is needed.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for rank, (_, _, rows) in enumerate(reports):
        for name, shape, dtype, start, numel in rows:
            entry = tensors.setdefault(name, {"shape": list(shape), "dtype": dtype, "pieces": []})
            if (entry["shape"], entry["dtype"]) != (list(shape), dtype):
                raise ValueError(f"{name}: rank {rank} gave {dtype} {list(shape)}, an earlier piece is "
                                 f"{entry['dtype']} {entry['shape']}, must be the same")
            if numel:
                entry["pieces"].append([rank_file(rank), start, numel])
    for name, entry in tensors.items():
        entry["pieces"].sort(key=lambda piece: piece[1])
        reached = 0
        for _, start, numel in [*entry["pieces"], ["", math.prod(entry["shape"]), 0]]:
            if start != reached:
                what = "given twice" if start < reached else "given by no rank"
                raise ValueError(f"{name}: elements {min(start, reached)} to {max(start, reached)} were {what}, must "
                                 "be given once over all ranks; pass a replicated tensor on one rank only")
            reached = start + numel
    files = {rank_file(rank): {"bytes": size, "sha256": digest} for rank, (size, digest, _) in enumerate(reports)}
    return {
        "format": FORMAT, "version": VERSION, "everbatch": __version__, "step": step, "world_size": len(reports),
        "healthy": healthy, "files": files, "tensors": {name: tensors[name] for name in sorted(tensors)}, "meta": dict(meta),
    }


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def dump(body: Mapping[str, Any]) -> bytes:
    """The manifest file: `body`, and the SHA-256 of its canonical form, so that an altered number shows.

    That proves that nothing was damaged, not who wrote it. A line for each entry, and for each tensor: with an indent Python
    leaves its fast encoder, and the accuracy matrix of a hundred tasks would take longer than the weights.
    """
    return _lines({**body, "sha256": _digest(body)}, depth=2).encode()


def _lines(value: Mapping[str, Any], depth: int) -> str:
    """An object with a line for each entry, down to `depth` objects inside each other."""
    texts = {key: _lines(inner, depth - 1) if depth > 1 and isinstance(inner, dict) and inner else json.dumps(inner)
             for key, inner in value.items()}
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {text}" for key, text in texts.items()) + "\n}"


def load(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint folder; the files it names are not looked at yet.

    Raises:
        CheckpointMismatch: naming the manifest and the key. A file name that is not a rank's file in this folder (a
            path, an absolute one, one with "..") is refused, and so is a folder or manifest that is a symbolic link.
    """
    path = folder / MANIFEST
    if folder.is_symlink():
        raise CheckpointMismatch(f"{folder}: is a symbolic link, must be the folder itself")
    plain_size(path)
    try:
        body = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointMismatch(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointMismatch(f"{path}: is not JSON: {error}") from error
    return _Parser(str(path)).manifest(body)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; readers differ in which of two equal keys they take, so there may be none."""
    result = dict(pairs)
    if len(result) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {twice[:80]!r} occurs twice in one object")
    return result


@dataclass(frozen=True)
class _Parser:
    """Turns a JSON value into a Manifest whose types and ranges may be trusted, or names the key that is wrong."""

    where: str

    def wrong(self, key: str, value: object, must: str) -> CheckpointMismatch:
        return CheckpointMismatch(f"{self.where}: {key} is {repr(value)[:80]}, must be {must}")

    def table(self, value: object, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        return value

    def rows(self, value: object, key: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.wrong(key, value, "a list")
        return value

    def whole(self, value: object, key: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(key, value, "an integer >= 0")
        if value > MOST:
            raise self.wrong(key, value, f"at most {MOST}")
        return value

    def shape(self, value: object, key: str) -> tuple[int, ...]:
        rows = self.rows(value, key)
        if len(rows) > MAX_DIMENSIONS:
            raise CheckpointMismatch(f"{self.where}: {key} has {len(rows)} dimensions, must have at most {MAX_DIMENSIONS}")
        shape = tuple(self.whole(n, key) for n in rows)
        if math.prod(shape) > MOST:
            raise self.wrong(key, rows, f"of at most {MOST} elements")
        return shape

    def sha(self, value: object, key: str) -> str:
        if not isinstance(value, str) or re.fullmatch("[0-9a-f]{64}", value) is None:
            raise self.wrong(key, value, "64 hexadecimal digits")
        return value

    def manifest(self, value: object) -> Manifest:
        body = dict(self.table(value, "the manifest"))
        if body.get("format") != FORMAT:
            raise self.wrong("format", body.get("format"), repr(FORMAT))
        if self.whole(body.get("version"), "version") != VERSION:
            raise self.wrong("version", body["version"], f"{VERSION}, the one that this everbatch reads")
        digest = self.sha(body.pop("sha256", None), "sha256")
        files: dict[str, tuple[int, str]] = {}
        for file, entry in self.table(body.get("files"), "files").items():
            if re.fullmatch(r"rank-[0-9]{5,}\.safetensors", file) is None:
                raise self.wrong("a name in files", file, "like rank-00000.safetensors, in the folder itself")
            key, entry = f"files.{file}", self.table(entry, f"files.{file}")
            files[file] = self.whole(entry.get("bytes"), f"{key}.bytes"), self.sha(entry.get("sha256"), f"{key}.sha256")
        tensors = {name: self.stored(entry, f"tensors.{name}", files)
                   for name, entry in self.table(body.get("tensors"), "tensors").items()}
        step, size = self.whole(body.get("step"), "step"), self.whole(body.get("world_size"), "world_size")
        if size != len(files):
            raise self.wrong("world_size", size, f"the number of files, {len(files)}")
        healthy = body.get("healthy", True)
        if not isinstance(healthy, bool):
            raise self.wrong("healthy", healthy, "true or false")
        meta = self.table(body.get("meta"), "meta")
        # last, so that a wrong type is named by its key; what is left is a value altered within its type
        if _digest(body) != digest:
            raise self.wrong("sha256", digest, "the hash of the rest: the manifest was altered after it was written")
        return Manifest(step, size, files, tensors, meta, digest, healthy)

    def stored(self, value: object, key: str, files: Mapping[str, object]) -> Stored:
        entry = self.table(value, key)
        shape = self.shape(entry.get("shape"), f"{key}.shape")
        dtype, total, reached, pieces = entry.get("dtype"), math.prod(shape), 0, []
        if not isinstance(dtype, str) or dtype not in CODES:
            raise self.wrong(f"{key}.dtype", dtype, f"one of {', '.join(CODES)}")
        for row in self.rows(entry.get("pieces"), f"{key}.pieces"):
            if not isinstance(row, list) or len(row) != 3:
                raise self.wrong(f"{key}.pieces", row, "[file, start, numel]")
            if not isinstance(row[0], str) or row[0] not in files:
                raise self.wrong(f"{key}.pieces", row[0], "a name in files")
            start, numel = self.whole(row[1], f"{key}.pieces"), self.whole(row[2], f"{key}.pieces")
            if start < reached or start + numel > total:
                raise self.wrong(f"{key}.pieces", row, f"in order, without overlap, inside {total} elements")
            reached = start + numel
            pieces.append((row[0], start, numel))
        return Stored(shape, dtype, tuple(pieces))
