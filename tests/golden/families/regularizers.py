"""`regularizers*`, `si_path*`: EWC (with CPR), SI by both rules, and the distillation and entropy terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from everbatch.objective import bregman as objectives
from everbatch.objective.table import cpr, lwf
from everbatch.optim import EWC, SI
from golden.comparison import Array, Comparison, FormatError, Tolerance, Vectors
from golden.families.nets import build

__all__ = ["check", "check_path"]


def check(file: Vectors, compare: Comparison) -> None:
    """Every method that the file holds; a file may hold some of them only."""
    parts: dict[str, Callable[[Vectors, Comparison, str], None]] = {
        "ewc_on": _ewc, "ewc_on_cpr": _ewc, "si_repo": _si_squares, "lwf": _lwf, "cpr": _cpr}
    here = [part for part in file.groups() if part in parts]
    if not here:
        raise FormatError(f"none of the methods {', '.join(parts)}")
    for part in here:
        parts[part](file, compare, part)


def check_path(file: Vectors, compare: Comparison) -> None:
    """SI by the path integral; the whole file is one run."""
    _si(file, compare, "", "path_integral", "loss_ce")


def _ewc(file: Vectors, compare: Comparison, part: str) -> None:
    at = f"{part}/"
    strength, beta = float(file[f"{at}hp_e_lambda"]), float(file[f"{at}hp_cpr_beta"])
    model = build(file.under(f"{at}theta_init/"))
    opt: Any = _EwcSGD(model, lr=float(file[f"{at}hp_lr"]), strength=strength, gamma=float(file[f"{at}hp_gamma"]),
                       estimator="reference", denominator="loader", form="online")
    for task, x, y in _tasks(file, compare, at):
        for i, rows in enumerate(zip(x, y, strict=True)):
            step = f"{task}step{i}/"
            penalty = opt.ewc_penalty()
            compare.close(f"{step}penalty_before", (penalty / strength).numpy(), file[f"{step}penalty_before"])
            loss = _step(opt, model, *rows, bonus=beta if part.endswith("cpr") else 0.0)
            compare.close(f"{step}loss", (loss + penalty).numpy(), file[f"{step}loss"])
            _weights_after(file, compare, step, model)
        opt.consolidate_ewc(zip(x, y, strict=True))
        for name, kept in opt.states[EWC].importance.items():
            compare.close(f"{task}fisher/{name}", kept.numpy(), file[f"{task}fisher/{name}"])


def _si_squares(file: Vectors, compare: Comparison, part: str) -> None:
    _si(file, compare, f"{part}/", "grad_square", "loss")


def _si(file: Vectors, compare: Comparison, at: str, rule: str, loss_key: str) -> None:
    model = build(file.under(f"{at}theta_init/"))
    opt: Any = _SiSGD(model, lr=float(file[f"{at}hp_lr"]), strength=float(file[f"{at}hp_c"]), xi=float(file[f"{at}hp_xi"]),
                      rule=rule)
    opt.bound = float(file[f"{at}hp_grad_clip_value"])
    for task, x, y in _tasks(file, compare, at):
        for i, rows in enumerate(zip(x, y, strict=True)):
            step = f"{task}step{i}/"
            penalty = opt.si_penalty() if loss_key == "loss" else 0.0  # that file's loss is the total, the other's the data's
            loss = _step(opt, model, *rows) + penalty
            compare.close(f"{step}{loss_key}", loss.numpy(), file[f"{step}{loss_key}"])
            _weights_after(file, compare, step, model)
        opt.consolidate_si()
        for name, kept in opt.states[SI].importance.items():
            compare.close(f"{task}big_omega/{name}", kept.numpy(), file[f"{task}big_omega/{name}"])


def _lwf(file: Vectors, compare: Comparison, part: str) -> None:
    for case in file.groups(f"{part}/"):
        at = f"{part}/{case}/"
        new = torch.from_numpy(file[f"{at}new_logits"].copy()).requires_grad_()
        old = torch.from_numpy(file[f"{at}old_logits"].copy())
        heat = float(file[f"{at}temperature"])
        loss = objectives.distillation(new, old, heat).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        assert new.grad is not None
        compare.close(f"{at}loss", loss.detach().numpy(), file[f"{at}loss"])
        compare.close(f"{at}grad_new_logits", new.grad.numpy(), file[f"{at}grad_new_logits"])
        # As the table has it: the gradient from the generator alone. Its losses are in float32.
        (term,) = lwf(1.0, heat, ((0, old.shape[1]),))
        compare.close(f"{at}grad_new_logits (table)", term.gradient(new.detach(), old).numpy(), file[f"{at}grad_new_logits"])


def _cpr(file: Vectors, compare: Comparison, part: str) -> None:
    logits = torch.from_numpy(file[f"{part}/logits"].copy())
    mean = objectives.entropy(logits).mean()
    compare.close(f"{part}/mean_entropy", mean.numpy(), file[f"{part}/mean_entropy"])
    (term,) = cpr(1.0)
    divergence = term.divergence.definition(logits, logits.new_zeros(len(logits)).long()).mean()
    mean = math.log(logits.shape[1]) - divergence
    compare.close(f"{part}/mean_entropy (table)", mean.numpy(), file[f"{part}/mean_entropy"])


def _tasks(file: Vectors, compare: Comparison, at: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Key prefix, inputs (steps, batch, ...) and targets of each task."""
    tasks = sorted(name for name in file.groups(at) if name.startswith("task"))
    if not tasks:
        raise FormatError(f"no key {at}task0/x")
    for name in tasks:
        x: Array = file[f"{at}{name}/x"]
        compare.floats = Tolerance.of(x.dtype)
        yield f"{at}{name}/", torch.from_numpy(x.copy()), torch.from_numpy(file[f"{at}{name}/y"].copy())


def _step(opt: Any, model: nn.Module, x: Tensor, y: Tensor, bonus: float = 0.0) -> Tensor:
    """One step on cross-entropy minus `bonus` times the mean entropy; returns its loss, without penalties."""

    def closure() -> Tensor:
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, y)
        if bonus:
            loss = loss - bonus * objectives.entropy(logits).mean()
        opt.backward(loss)
        return loss

    return opt.step(closure)  # type: ignore[no-any-return]


def _weights_after(file: Vectors, compare: Comparison, step: str, model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        compare.close(f"{step}theta_after/{name}", weight.detach().numpy(), file[f"{step}theta_after/{name}"])


class _EwcSGD(EWC, torch.optim.SGD):
    pass


class _SiSGD(SI, torch.optim.SGD):
    """The references clip every element of the total gradient."""

    bound: float

    def edit_gradient(self) -> None:
        super().edit_gradient()
        for _, g in self.host.gradient():
            g.clamp_(-self.bound, self.bound)
