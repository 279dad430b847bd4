"""Checkpoints that survive `kill -9`, say when they are damaged, and never run code when they are read.

A checkpoint is one folder: a safetensors file per rank and a JSON manifest, written last, with the size and SHA-256 of
every file. Tensors are kept by name and by position in the flattened whole, so any world size reads what another wrote.

    root/step-00000012/rank-00000.safetensors   the pieces rank 0 gave, flat, under "name@start"
    root/step-00000012/rank-00001.safetensors
    root/step-00000012/manifest.json

`save` writes one, `latest` finds the newest good one, `open` takes an explicit folder, `export_weights` writes a plain
safetensors file for others to load. One job at a time may save to a root; any number may read.
"""

from __future__ import annotations

from everbatch.checkpoint.export import export_weights
from everbatch.checkpoint.files import Piece
from everbatch.checkpoint.reader import Checkpoint, open
from everbatch.checkpoint.store import failed, latest, save, try_writing, withdraw

__all__ = ["Checkpoint", "Piece", "export_weights", "failed", "latest", "open", "save", "try_writing", "withdraw"]
