"""Whether a file of samples is what was prepared, and none of them is evaluation data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from everbatch.errors import check
from everbatch.tune.ledger import sha256
from everbatch.tune.seal import Seal, guard

__all__ = ["check_npz"]


def check_npz(path: Path, data_sha256: str, seal: str | None) -> None:
    """Guard this process by `seal`, then look at every sample of the file.

    Raises:
        ValueError: the file is another than was prepared. LeakageError: samples of the evaluation data.
    """
    sealed = None if seal is None else Seal.read(seal)
    if sealed is not None:
        guard(sealed)
    check(path.is_file(), "tune", f"no file {str(path)!r} on this machine", "exist", "every node must see the same folders")
    if sealed is not None:
        with np.load(path, allow_pickle=False) as arrays:
            for name in ("x_train", "x_test"):
                sealed.check_samples(arrays[name])
    real = sha256(path.read_bytes())
    check(real == data_sha256, "tune", f"{str(path)!r} with SHA-256 {real[:12]}", f"be {data_sha256[:12]}, as prepared")
