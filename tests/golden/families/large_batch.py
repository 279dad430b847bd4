"""`lb_sam*`, `lb_asam*`, `lb_gsam*`, `lb_eq_gnp*`, `lb_*looksam*`, `lb_esam*`: sharpness-aware steps, plain and under DDP.

The keys of what a step did are those of the file, so comparing is looking up: `step{t}/perturbed/fc1.weight`, ...
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from everbatch.optim import ASAM, ESAM, GSAM, SAM, GradientNorm, LookSAM
from golden.comparison import Array, Comparison, FormatError, Tolerance, Vectors
from golden.families.nets import build
from golden.families.ranks import on_ranks

__all__ = ["check"]

BASES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
NOT_COMPARED = "num_batches_tracked"
"""The reference freezes statistics in pass 2 by momentum = 0, which still counts the batch; the library does not."""


def check(file: Vectors, compare: Comparison) -> None:
    """Run all steps; compare the weights after each, and whatever else the file recorded inside it."""
    hp, x = file.hp(), file["x"]
    if str(hp.get("dtype", x.dtype.name)).removeprefix("torch.") != x.dtype.name:
        raise FormatError(f"hp_json says dtype {hp['dtype']}, x is {x.dtype.name}")
    compare.floats = Tolerance.of(x.dtype)
    if "looksam_perparam" in file.path.name:  # that reference keeps alpha in float32
        compare.floats = Tolerance(compare.floats.rtol, 1e-7)
    world = hp.get("world_size")
    if world is None:
        records = [_run(file)]
    else:
        if x.ndim < 2 or x.shape[1] != world:
            raise FormatError(f"x of shape {x.shape} for world_size {world}, must be (steps, ranks, batch, ...)")
        records = on_ranks(_on_rank, file.path, world)
        for part in ("x", "y", "init/", "init_buf/"):  # used by the ranks
            file.under(part)
    names = list(file.under("init/"))
    for rank, record in enumerate(records):
        where = "" if world is None else f"rank {rank}: "
        for t in range(1, len(x) + 1):
            for name in names:
                file[f"step{t}/param/{name}"]  # may not be missing, whatever else is
            for key in [k for k in file.arrays if k.startswith(f"step{t}/") and not k.endswith(NOT_COMPARED)]:
                if key in record:
                    compare.close(where + key, record[key], file[key])


def _on_rank(path: Path, rank: int, world: int) -> dict[str, Array]:
    return _run(Vectors(path), rank)


def _run(file: Vectors, rank: int | None = None) -> dict[str, Array]:
    """Take the file's steps and record them; with a rank: on its rows, under DDP."""
    hp = file.hp()
    eps, momentum = hp.pop("bn_eps", 1e-5), hp.pop("bn_momentum", 0.1)
    model = build(file.under("init/"), file.under("init_buf/"), eps=eps, momentum=momentum)
    part, translated = _method(file.path.name, hp)
    base = hp.pop("base", "sgd")
    if base not in BASES:
        raise FormatError(f"base {base!r} in hp_json, must be one of {', '.join(BASES)}")
    outer = model if rank is None else DistributedDataParallel(model)
    # What is left are options of SAM and of the base; either refuses what it does not know.
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in {**hp, **translated}.items()}
    opt = _recording(part, BASES[base])(outer, **options)
    record: dict[str, Array] = {}
    for t, (x, y) in enumerate(zip(file["x"], file["y"], strict=True), start=1):
        rows = (x, y) if rank is None else (x[rank], y[rank])
        step = _step(opt, outer, model, *(torch.from_numpy(v.copy()) for v in rows))
        if rank is not None:  # losses and statistics are those of a rank; the format has one value for all
            step = {key: value for key, value in step.items() if not key.startswith("loss") and "_buf/" not in key}
        record.update({f"step{t}/{key}": value for key, value in step.items()})
    return record


def _method(name: str, hp: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    """The mixin a file is about, and its options under our names; what is translated leaves `hp`."""
    for key in ("dtype", "world_size", "provenance"):
        hp.pop(key, None)
    scope, adaptive = hp.pop("perturbation", "global"), hp.pop("adaptive", False)
    if name.startswith("lb_asam_official"):
        return ASAM, {"adaptive": "official"}
    if name.startswith("lb_asam_elementwise") or (name.startswith("lb_sam") and adaptive):
        return ASAM, {"adaptive": "elementwise", "eta": hp.pop("eta", 0.0)}
    if name.startswith("lb_gsam"):
        return GSAM, {"adaptive": bool(adaptive)}
    if name.startswith("lb_eq_gnp"):
        return GradientNorm, {"radius": hp.pop("r"), "mix": hp.pop("alpha")}
    if "looksam" in name:
        return LookSAM, {"every": hp.pop("k"), "norms": "tensor" if "perparam" in name else "model"}
    if name.startswith("lb_esam"):
        return ESAM, {}
    return SAM, {"scope": scope}


def _recording(part: type, base: type) -> Any:
    """The class under test, which also keeps the gradient that its base gets."""

    class Recording(part, base):  # type: ignore[misc]
        def update(self) -> None:
            self.final_gradient = _named("final_grad", ((s.name, g) for s, g in self.host.gradient()))
            super().update()

    return Recording


def _step(opt: Any, forward: nn.Module, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Array]:
    """One step; what is seen inside its passes, by the file's keys."""
    seen: dict[str, Array] = {}
    passes = 0

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        if passes == 2:
            seen.update(_named("perturbed", ((s.name, w) for s, w in opt.host.weights())))
            seen.update(_named("perturbed_buf", model.named_buffers()))
        loss = nn.functional.cross_entropy(forward(x), y)
        opt.backward(loss)
        gradient = opt.host.local_gradient() if opt.host.local else opt.host.gradient()
        seen.update(_named(f"g{passes}", ((s.name, g) for s, g in gradient)))
        seen[f"loss{passes}"] = _array(loss)
        if passes == 1:
            # Of the elementwise adaptive variant, the reference records the norm it divides by.
            scaled = ASAM in opt.configs and opt.configs[ASAM].adaptive == "elementwise"
            size = gradient.clone().map_(lambda s, g: g * s.data.abs()) if scaled else gradient
            seen["gradnorm1"] = _array(size.norm())
        return loss

    def per_sample(rows: Tensor | None) -> Tensor:
        chosen = slice(None) if rows is None else rows
        return nn.functional.cross_entropy(forward(x[chosen]), y[chosen], reduction="none")

    loss = opt.step(closure, per_sample=per_sample)
    return {**seen, **opt.final_gradient, "loss1": _array(loss), **_named("param", model.named_parameters()),
            **_named("param_buf", model.named_buffers())}


def _named(kind: str, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Array]:
    return {f"{kind}/{name}": _array(tensor) for name, tensor in tensors}


def _array(tensor: Tensor) -> Array:
    return copy.deepcopy(tensor.detach().numpy())
