"""What cells import on their way, imported once by the process that they are forked from: 4 seconds of each cell."""

from __future__ import annotations

import contextlib
import importlib

for name in ("torch._dynamo", "everbatch.experiment", "sklearn.datasets", "matplotlib.figure"):
    with contextlib.suppress(ImportError):  # an extra that is not installed is told by the cell that needs it
        importlib.import_module(name)
