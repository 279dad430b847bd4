"""What the tuning phase is given of the evaluation data: hashes, by which it refuses it, and nothing that names it.

`guard` is a promise against mistakes. Whoever owns the data can get at it: by C++ readers and child processes, which no hook of
Python sees. Hence the evaluation data lies sealed under a nonce, which is not on the tuning side, until `evaluate` opens it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everbatch.errors import check
from everbatch.tune.hashes import keyed, row_hashes
from everbatch.tune.ledger import canonical, write_atomically

__all__ = ["LeakageError", "Seal", "ciphered", "guard", "scrub"]

FORMAT = 2
CHUNK = 2**24
KEPT = re.compile(r"PATH|HOME|USER|LOGNAME|SHELL|TERM|LANG|TZ|TMPDIR|VIRTUAL_ENV|CI|LC_.*|PYTHON.*|OMP_.*|MKL_.*|CUDA_.*|NCCL_.*"
                  r"|GLOO_.*|LD_LIBRARY_PATH|RAY_.*|TUNE_.*|EVERBATCH_.*|DS_.*|TORCH.*|HF_.*|SLURM_.*|XDG_.*")
"""Variables that a tuning process keeps; nothing else of its environment reaches a trial."""


class LeakageError(RuntimeError):
    """The tuning phase reached for evaluation data."""


def ciphered(nonce: bytes, content: bytes) -> bytes:
    """Content under a nonce, and back again: xor with SHAKE-256 of it, chunk by chunk. A nonce serves for one content."""
    sealed = bytearray(content)
    for number, start in enumerate(range(0, len(content), CHUNK)):
        part = np.frombuffer(content, np.uint8, min(CHUNK, len(content) - start), start)
        stream = hashlib.shake_256(b"everbatch two-phase" + nonce + number.to_bytes(8, "little")).digest(len(part))
        sealed[start:start + len(part)] = (part ^ np.frombuffer(stream, np.uint8)).tobytes()
    return bytes(sealed)


@dataclass(frozen=True)
class Seal:
    """The contents of seal.json, beside the tuning data.

    Attributes:
        salt: of all hashes here.
        roots: hashes of the places where the evaluation data lies.
        samples: hashes of its samples, of every kind; see `everbatch.tune.hashes`.
        body: scenario, orders, SHA-256 of the tuning data, commitment to the evaluation data.
    """

    salt: bytes
    roots: frozenset[str]
    samples: frozenset[str]
    body: Mapping[str, Any]

    @classmethod
    def made(
        cls, places: Iterable[str | os.PathLike[str]], salt: bytes, samples: frozenset[str], body: Mapping[str, Any],
    ) -> Seal:
        """Of places, and of what samples are known by."""
        roots = frozenset(keyed(salt, os.path.realpath(place).encode()) for place in places)
        return cls(salt, roots, samples, dict(body))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Seal:
        """From seal.json.

        Raises:
            ValueError: no such file, not one that `prepare` wrote, or one of an earlier version, whose hashes do not tell the
                same image in another encoding.
        """
        path = Path(path)
        check(path.is_file(), "tune", f"no {path.name} in {str(path.parent)!r}", "be a folder that `prepare` wrote for tuning")
        try:
            found = json.loads(path.read_text())
            version = found["format"]
            made = cls(bytes.fromhex(found["salt"]), frozenset(found["roots"]), frozenset(found["samples"]), found["body"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"tune: {str(path)!r} cannot be read ({type(error).__name__}), must be of `prepare`") from None
        check(version == FORMAT, "tune", f"{str(path)!r} of format {version}, from another version of everbatch",
              f"be of format {FORMAT}", "prepare again with another output, so that samples are compared as they are now")
        return made

    def write(self, path: Path) -> None:
        """To seal.json."""
        write_atomically(path, canonical({"format": FORMAT, "salt": self.salt.hex(), "roots": sorted(self.roots),
                                          "samples": sorted(self.samples), "body": self.body}))

    def holds(self, text: str) -> bool:
        """Whether a path leads to the evaluation data: by any name, relative, or through links."""
        path = os.path.realpath(text)
        while True:
            if keyed(self.salt, path.encode("utf-8", "surrogateescape")) in self.roots:
                return True
            above = os.path.dirname(path)
            if above == path:
                return False
            path = above

    def check_samples(self, inputs: NDArray[Any]) -> None:
        """Refuse samples of the evaluation data, wherever they were found.

        Raises:
            LeakageError: with how many.
        """
        found = sum(not self.samples.isdisjoint(row) for row in row_hashes(self.salt, inputs, asking=True))
        if found:
            raise LeakageError(f"tune: {found} of {len(inputs)} samples are evaluation data, must be none; see `prepare`")


_guarded: set[bytes] = set()
WATCHED = ("open", "os.listdir", "os.scandir", "os.chdir", "os.link", "os.rename", "os.symlink", "os.truncate")


def guard(seal: Seal) -> None:
    """Refuse, from now on and for good in this process, to open what the seal names: open, os.open, numpy, torch, PIL, pathlib.

    Not seen: readers in C++ (torchvision.io), child processes, file descriptors that others opened. Cost: some 35 us an `open`.
    """
    if seal.salt in _guarded:
        return
    _guarded.add(seal.salt)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in WATCHED:
            return
        for name in args[:2]:
            if isinstance(name, str | bytes | os.PathLike) and seal.holds(os.fsdecode(name)):
                raise LeakageError(f"tune: {event} of evaluation data in the tuning phase, must wait for `evaluate`")

    sys.addaudithook(hook)


def scrub(seal: Seal) -> list[str]:
    """Take from the environment what a trial does not need, and what names evaluation data; says which variables went."""
    gone = []
    for name, value in list(os.environ.items()):
        pieces = [piece for piece in re.split(r"[:;,=\s]", value) if "/" in piece]
        if not KEPT.fullmatch(name) or any(seal.holds(piece) for piece in pieces):
            del os.environ[name]
            gone.append(name)
    return sorted(gone)
