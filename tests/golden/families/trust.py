"""`lb_lars*`, `lb_lamb*`: layer-wise optimizers: timm's runs of a small net, and TensorFlow's with given gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from everbatch.optim import LAMB, LARS, groups
from golden.comparison import Comparison, FormatError, Tolerance, Vectors
from golden.families.nets import build

__all__ = ["check"]


class LayerwiseSGD(LARS, torch.optim.SGD):
    pass


class LayerwiseAdamW(LAMB, torch.optim.AdamW):
    pass


CLASSES: dict[str, tuple[type, dict[str, str], dict[str, Any]]] = {
    "timm.Lars": (LayerwiseSGD, {"eps": "trust_eps"}, {"lr": 1.0}),
    "timm.Lamb": (LayerwiseAdamW, {}, {"lr": 1e-3, "eps": 1e-6, "max_grad_norm": 1.0, "weight_decay": 0.01}),
    "lars_tf": (LayerwiseSGD, {"eeta": "trust_coeff", "epsilon": "trust_eps"}, {"lr_in_buffer": True}),
}
"""By the file's optimizer: our class, the options it names otherwise, and its defaults where ours differ."""


def check(file: Vectors, compare: Comparison) -> None:
    """Take all steps; compare the weights after each, and the losses and gradients where the file has them."""
    init = file.under("init/")
    if not init:
        raise FormatError("no initial parameters")
    compare.floats = Tolerance.of(next(iter(init.values())).dtype)
    if "skip_list" in file.hp():
        _given_gradients(file, compare)
    else:
        _net(file, compare)


def _net(file: Vectors, compare: Comparison) -> None:
    """Steps on a net, through a closure."""
    model = build(file.under("init/"))
    hp = file.hp()
    dtype = str(hp.pop("dtype", "")).removeprefix("torch.")
    if dtype and dtype != file["x"].dtype.name:
        raise FormatError(f"hp_json says dtype {dtype}, x is {file['x'].dtype.name}")
    kind = hp.pop("optimizer", None)
    if kind not in CLASSES:
        raise FormatError(f"optimizer {kind!r} in hp_json, must be one of {', '.join(CLASSES)}")
    hp = {**CLASSES[kind][2], **hp}
    decay = hp.pop("weight_decay", 0.0)
    named = groups(model, weight_decay=decay)
    if not hp.pop("no_decay_1d", False):
        named = [{"params": list(model.named_parameters()), "weight_decay": decay}]
    opt, rates = _optimizer(named, kind, hp, len(file["x"]))
    batches = (torch.from_numpy(file[key].copy()) for key in ("x", "y"))
    for t, (x, y) in enumerate(zip(*batches, strict=True), start=1):
        _set_rate(opt, rates, t)

        def closure(x: Tensor = x, y: Tensor = y, t: int = t) -> Tensor:
            loss = nn.functional.cross_entropy(model(x), y)
            opt.backward(loss)
            for shard, g in opt.host.gradient():
                if f"step{t}/g1/{shard.name}" in file:
                    compare.close(f"step{t}/g1/{shard.name}", g.numpy(), file[f"step{t}/g1/{shard.name}"])
            return loss

        loss = opt.step(closure)
        if f"step{t}/loss1" in file:
            compare.close(f"step{t}/loss1", loss.numpy(), file[f"step{t}/loss1"])
        _compare(compare, file, t, dict(model.named_parameters()))


def _given_gradients(file: Vectors, compare: Comparison) -> None:
    """Steps with the file's gradients, the learning rate inside the momentum buffer."""
    hp = file.hp()
    weights = {name: nn.Parameter(torch.from_numpy(value.copy())) for name, value in file.under("init/").items()}
    skipped, decay = hp.pop("skip_list"), hp.pop("weight_decay", 0.0)
    for name in ("dtype", "order", "semantics"):
        hp.pop(name, None)
    kept: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    for name, p in weights.items():
        kept[not any(text in name for text in skipped)].append((name, p))
    named = [{"params": params, "weight_decay": decay if decays else 0.0} for decays, params in kept.items() if params]
    steps = sum(key.startswith("step") and key.endswith(f"/param/{next(iter(weights))}") for key in file.arrays)
    opt, rates = _optimizer(named, "lars_tf", {**CLASSES["lars_tf"][2], **hp}, steps)
    for t in range(1, steps + 1):
        _set_rate(opt, rates, t)
        for name, p in weights.items():
            p.grad = torch.from_numpy(file[f"step{t}/grad/{name}"].copy())
        opt.step()
        _compare(compare, file, t, weights)


def _optimizer(named: list[dict[str, Any]], kind: str, hp: dict[str, Any], steps: int) -> tuple[Any, list[float]]:
    """The optimizer that a file is about, and its learning rate at each step."""
    cls, names, _ = CLASSES[kind]
    schedule = hp.pop("lr_schedule", None)
    rates = schedule if schedule is not None else [hp.get("lr")] * steps
    if len(rates) != steps or not all(isinstance(rate, int | float) for rate in rates):
        raise FormatError(f"learning rates {rates} for {steps} steps, must be lr, or lr_schedule with one for each")
    hp["lr"] = rates[0] if rates else 0.0
    # What is left are options of the mixin and of the base; either refuses what it does not know.
    options = {names.get(name, name): tuple(value) if isinstance(value, list) else value for name, value in hp.items()}
    return cls(named, **options), rates


def _set_rate(opt: Any, rates: list[float], t: int) -> None:
    for group in opt.param_groups:
        group["lr"] = rates[t - 1]


def _compare(compare: Comparison, file: Vectors, t: int, weights: dict[str, nn.Parameter]) -> None:
    for name, p in weights.items():
        compare.close(f"step{t}/param/{name}", p.detach().numpy(), file[f"step{t}/param/{name}"])
