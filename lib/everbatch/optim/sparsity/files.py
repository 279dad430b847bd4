"""Sparse weights in a file that is smaller for it: a bit for each place and the values, or CSR with int32 indices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from everbatch.checkpoint import export_weights
from everbatch.errors import CheckpointMismatch, check

__all__ = ["load_sparse", "save_sparse"]

KEY = "sparse"
"""Of the metadata: form and shape of each masked tensor, as JSON."""


def save_sparse(
    path: str | Path, state: Mapping[str, Tensor], masks: Mapping[str, Tensor], *, form: Literal["packed", "csr"] = "packed",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a state dict to one safetensors file, of masked tensors only what the masks leave.

        packed    NAME.mask    uint8, one bit for each place, row by row, first in the highest bit;  NAME.values  in that order
        csr       NAME.crow, NAME.col  int32, of the tensor as a matrix (first dimension, all others);   NAME.values  row by row

    Args:
        path: the file; replaced in one step. Call it on one rank.
        state: whole tensors by name, as `model.state_dict()` or `everbatch.evaluate.export.whole_state` give them.
        masks: bool masks by name, as `opt.whole_masks()` gives them; all else is kept dense. What a mask leaves out is read as 0.
        metadata: further texts for the file.

    Raises:
        ValueError: an unknown form, a mask of no tensor or of another shape, or one too large for int32 indices.
        RuntimeError: the disk refused; an older file is untouched.

    Cost: bytes of float32 at density d: (d + 1/32) of dense packed, about 2d in CSR. Bits once in CPU memory.
    """
    check(form in ("packed", "csr"), "save_sparse", f"form={form!r}", "be packed or csr")
    odd = [n for n in masks if n not in state or state[n].shape != masks[n].shape]
    check(not odd, "save_sparse", f"masks of {odd[:5]}", "have the names and shapes of tensors of the state")
    clash = [f"{n}.{end}" for n in masks for end in ("mask", "values", "crow", "col") if f"{n}.{end}" in state]
    check(not clash, "save_sparse", f"tensors {clash[:5]} of the state", "have other names: they are those of parts here")
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if name not in masks:
            tensors[name] = value
            continue
        value, mask = value.detach().cpu(), masks[name].cpu()
        tensors[f"{name}.values"] = value[mask]
        if form == "packed":
            tensors[f"{name}.mask"] = torch.from_numpy(np.packbits(mask.reshape(-1).numpy()))
            continue
        check(value.numel() < 2**31, "save_sparse", f"{value.numel()} elements of {name}", "be below 2^31 for int32 indices",
              "use form='packed'")
        rows = mask.reshape(mask.shape[0] if mask.dim() else 1, -1)
        counts = torch.cat([torch.zeros(1, dtype=torch.int64), rows.sum(1).cumsum(0)])
        tensors[f"{name}.crow"] = counts.to(torch.int32)
        tensors[f"{name}.col"] = rows.nonzero()[:, 1].to(torch.int32)
    shapes = {name: {"form": form, "shape": list(masks[name].shape)} for name in masks}
    return export_weights(path, tensors, {**(metadata or {}), KEY: json.dumps(shapes)})


def load_sparse(path: str | Path) -> dict[str, Tensor]:
    """The dense state dict of a file that `save_sparse` wrote, bit for bit; zeros where a mask left nothing. On the CPU.

    Raises:
        CheckpointMismatch: not such a file, or parts that do not fit each other.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return _whole(tensors, shapes)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
        raise CheckpointMismatch(f"{path}: is not a file of save_sparse, or damaged: {type(error).__name__}: {error}") from error


def _whole(tensors: dict[str, Tensor], shapes: dict[str, dict[str, object]]) -> dict[str, Tensor]:
    result = {}
    parts = {f"{name}.{end}" for name in shapes for end in ("mask", "values", "crow", "col")}
    for name, kept in shapes.items():
        shape = torch.Size(kept["shape"])  # type: ignore[arg-type]
        values = tensors[f"{name}.values"]
        if kept["form"] == "packed":
            bits = tensors[f"{name}.mask"].numpy()
            if len(bits) != -(-shape.numel() // 8):
                raise ValueError(f"{name} has {len(bits)} bytes of mask for shape {list(shape)}")
            mask = torch.from_numpy(np.unpackbits(bits, count=shape.numel())).bool()
            places = mask.nonzero()[:, 0]
        else:
            crow, col = tensors[f"{name}.crow"].long(), tensors[f"{name}.col"].long()
            width = shape.numel() // max(1, len(crow) - 1)
            places = torch.repeat_interleave(torch.arange(len(crow) - 1), crow.diff()) * width + col
        if len(places) != len(values) or shape.numel() > 2**40:
            raise ValueError(f"{name} has {len(values)} values for {len(places)} places")
        dense = torch.zeros(shape.numel(), dtype=values.dtype)
        dense[places] = values
        result[name] = dense.view(shape)
    return {**{name: value for name, value in tensors.items() if name not in parts}, **result}
