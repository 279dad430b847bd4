"""Omniglot as one file that `everbatch.data.load` takes: python -m benchmarks.ledger.omniglot SOURCE FILE [CHARACTERS] [SIDE]

SOURCE holds alphabets as the data set is published: ALPHABET/characterNN/*.png, 20 drawings each. The first CHARACTERS (50) in
the order of their names become classes; 15 drawings of each are for training, 5 for testing; ink is bright, SIDE (28) pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from everbatch.errors import check

__all__ = ["main"]

TRAINED = 15
"""Drawings of each character to learn from."""


def main(source: str, target: str, characters: str = "50", side: str = "28") -> None:
    """Write the file."""
    folders = sorted(folder for folder in Path(source).expanduser().glob("*/character*") if folder.is_dir())
    count = int(characters)
    check(len(folders) >= count, "omniglot", f"{len(folders)} characters in {source!r}", f"be at least {count}",
          "give the folder that holds the alphabets")
    arrays: dict[str, list[np.ndarray]] = {"x_train": [], "x_test": []}
    labels: dict[str, list[int]] = {"y_train": [], "y_test": []}
    for label, folder in enumerate(folders[:count]):
        for k, path in enumerate(sorted(folder.glob("*.png"))):
            part = "train" if k < TRAINED else "test"
            with Image.open(path) as image:
                ink = ImageOps.invert(image.convert("L")).resize((int(side), int(side)), Image.Resampling.BOX)
            arrays[f"x_{part}"].append(np.array(ink)[None])
            labels[f"y_{part}"].append(label)
    np.savez(target, **{k: np.stack(v) for k, v in arrays.items()}, **{k: np.array(v) for k, v in labels.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
