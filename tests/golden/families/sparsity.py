"""`erk_densities*`, `itop_mask_updates*`, `rigl*`, `dst_isolation*`: densities, single changes of topology, whole sparse runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everbatch.optim.sparsity import DynamicSparsity, drop_fraction, erdos_renyi
from everbatch.optim.sparsity.grow import grow, grow_bernoulli
from everbatch.optim.sparsity.prune import Layer, num_dropped, prune
from golden.comparison import Array, Comparison, FormatError, Vectors

__all__ = ["check_densities", "check_isolation", "check_rigl", "check_updates"]

DENSITIES: dict[str, dict[str, Any]] = {
    "erk_real": {}, "erk_google_floor": {"whole_zeros": True}, "er_google_floor": {"whole_zeros": True, "kernel": False},
    "erk_google_power0.5": {"whole_zeros": True, "power": 0.5},
}
PRUNE = {"magnitude": "magnitude", "Taylor_FO": "taylor"}


# ------------------------------------------------------------------------------------------------------- densities
def check_densities(file: Vectors, compare: Comparison) -> None:
    """Densities of every network, fraction and rule; and the sizes they are of."""
    for net in file.groups():
        names = [str(n) for n in file[f"{net}/names"]]
        shapes = {n: tuple(int(d) for d in row if d) for n, row in zip(names, file[f"{net}/shapes"], strict=True)}
        compare.close(f"{net}/numel", [int(np.prod(s)) for s in shapes.values()], file[f"{net}/numel"])
        for folder in [g for g in file.groups(f"{net}/") if g.startswith("density")]:
            for rule, want in file.under(f"{net}/{folder}/").items():
                if rule not in DENSITIES:
                    raise FormatError(f"rule {rule!r}, must be one of {', '.join(DENSITIES)}")
                got = erdos_renyi(shapes, float(folder.removeprefix("density")), **DENSITIES[rule])
                compare.close(f"{net}/{folder}/{rule}", list(got.values()), want)


# ---------------------------------------------------------------------------------------------- one change each
def check_updates(file: Vectors, compare: Comparison) -> None:
    """Prune and grow once in every case, by the counting rule of the ITOP code, with its random draws."""
    for case in [g for g in file.groups() if "+" in g]:
        prune_by, grow_by, rate = case.split("+")
        _check_update(file, compare, case, PRUNE[prune_by], grow_by, float(rate.removeprefix("rate")))
    if "cosine_death_rate/values" in file:
        start, end, floor = file["cosine_death_rate/hp"].tolist()
        want = file["cosine_death_rate/values"]
        got = [drop_fraction(t, end, start, floor=floor) for t in range(1, len(want) + 1)]
        compare.close("cosine_death_rate/values", got, want)


def _check_update(file: Vectors, compare: Comparison, case: str, criterion: str, grow_by: str, rate: float) -> None:
    for kind in ("init_uniform_draw", "mask_init", "exp_avg_after", "exp_avg_sq_after"):  # not compared: see the README
        file.under(f"{case}/{kind}/")
    masks = _tensors(file.under(f"{case}/mask_before/"))
    names, layers, offset = list(masks), [], 0
    fired, momentum = _tensors(file.under(f"{case}/fired_before/")), _momentum(file, case)
    for i, (name, mask) in enumerate(masks.items()):
        weight = torch.from_numpy(file[f"{case}/weight_before/{name}"])
        gradient = torch.from_numpy(file[f"{case}/grad/{name}"])
        layers.append(Layer(name, i, 0, offset, weight, mask.bool(), gradient, momentum.get(name),
                            _keys(file, case, name, fired[name].bool())))
        offset += mask.numel()
    sizes, active = [m.numel() for m in masks.values()], [int(m.sum()) for m in masks.values()]
    drop = [num_dropped(n, rate, up=True) for n in active]
    dropped = prune(layers, drop, sizes, _alone, criterion=criterion, all_ties=criterion == "magnitude", dtype=torch.float64)
    left = [x.active & ~d for x, d in zip(layers, dropped, strict=True)]
    removed = [int(d.sum()) for d in dropped]
    if grow_by == "random":
        inactive = [int((~m).sum()) for m in left]
        grown = grow_bernoulli(layers, left, removed, inactive, key=())
    else:
        priority = [(~fired[n].bool()).reshape(-1).to(torch.uint8) for n in names] if grow_by == "random_unfired" else None
        grown = grow(layers, left, removed, sizes, _alone, criterion=grow_by, key=(), priority=priority, dtype=torch.float64)
    for i, name in enumerate(names):
        shape, key = masks[name].shape, f"{case}/{{}}/{name}"
        mask = (left[i] | grown[i]).view(shape)
        compare.close(key.format("num_removed"), removed[i], file[key.format("num_removed")])
        compare.close(key.format("mask_after"), mask.float(), file[key.format("mask_after")])
        compare.close(key.format("fired_after"), (mask | fired[name].bool()).to(torch.uint8), file[key.format("fired_after")])
        compare.close(key.format("weight_after"), layers[i].weight.view(shape) * mask, file[key.format("weight_after")])
        buffer = key.format("momentum_buffer_before")
        if buffer in file:
            compare.close(key.format("momentum_buffer_after"), torch.from_numpy(file[buffer]) * mask,
                          file[key.format("momentum_buffer_after")])


def _momentum(file: Vectors, case: str) -> dict[str, Tensor]:
    """What the reference grows by: SGD's momentum, or Adam's direction without bias correction."""
    first, second = file.under(f"{case}/exp_avg_before/"), file.under(f"{case}/exp_avg_sq_before/")
    if first:
        return {n: torch.from_numpy(m / (np.sqrt(second[n]) + 1e-8)) for n, m in first.items()}
    return _tensors(file.under(f"{case}/momentum_buffer_before/"))


def _keys(file: Vectors, case: str, name: str, fired: Tensor) -> Tensor | None:
    """Random numbers that make the library choose what the recorded draw chose."""
    if f"{case}/growth_uniform_draw/{name}" in file:
        return torch.from_numpy(file[f"{case}/growth_uniform_draw/{name}"])
    if f"{case}/growth_perm/{name}" not in file:
        return None
    order = torch.from_numpy(file[f"{case}/growth_perm/{name}"])
    keys = torch.zeros(fired.numel(), dtype=torch.float64)
    keys[(~fired).reshape(-1).nonzero().view(-1)[order]] = torch.linspace(1, 0.5, len(order), dtype=torch.float64)
    return keys


# ------------------------------------------------------------------------------------------------------- RigL runs
class Recording(DynamicSparsity, torch.optim.SGD):
    """The class under test, which also keeps the gradient that growth goes by."""

    running: Mapping[str, Tensor]

    def edit_gradient(self) -> None:
        gradient = {s.name: g.clone() for s, g in self.host.gradient()}
        super().edit_gradient()
        # The reference also notes the gradient of a step after the last change, which nothing uses.
        self.running = {n: t.clone() for n, t in (self.states[DynamicSparsity].scores or gradient).items()}


def check_rigl(file: Vectors, compare: Comparison) -> None:
    """Every step of a run of rigl-torch, through `opt.step(closure)`."""
    names = [str(n) for n in file["layer_names"]]
    sparse = [n for n, s in zip(names, file["layer_sparsity_target"], strict=True) if s > 0]
    model = _model({n: t for n, t in file.under("theta_init/").items()})
    hp = {k: file[f"hp_{k}"].item() for k in ("lr", "momentum", "alpha", "delta", "T_end", "dense_allocation",
                                             "grad_accumulation_n", "ignore_linear_layers")}
    opt = Recording(model, lr=hp["lr"], momentum=hp["momentum"], include=tuple(sparse), density=hp["dense_allocation"],
                    distribution="uniform", drop_fraction=hp["alpha"], update_every=hp["delta"], total_steps=hp["T_end"],
                    stop_fraction=1.0, score_steps=hp["grad_accumulation_n"])
    model.load_state_dict(_tensors(file.under("theta_init/")))
    opt.set_masks({n: torch.from_numpy(m) for n, m in file.under("start/mask/").items()})
    _compare(compare, "start/theta", dict(model.named_parameters()), file)
    updates, fractions = [], []
    for t, (x, y) in enumerate(zip(file["x"], file["y"], strict=True)):
        changes = opt.states[DynamicSparsity].changes
        loss = opt.step(_closure(opt, model, torch.from_numpy(x), torch.from_numpy(y)))
        updates.append(opt.states[DynamicSparsity].changes > changes)
        fractions.append(opt._schedule().fraction(t + 1) if updates[-1] else 0.0)
        compare.close(f"step{t}/loss", loss, file[f"step{t}/loss"])
        _compare(compare, f"step{t}/theta", dict(model.named_parameters()), file)
        _compare(compare, f"step{t}/mask", opt.whole_masks(), file)
        _compare(compare, f"step{t}/momentum", {s.name: s.moments["momentum_buffer"] for s in opt.host.shards}, file)
        for name in file.under(f"step{t}/dense_grad_running/"):
            compare.close(f"step{t}/dense_grad_running/{name}", opt.running[name], file[f"step{t}/dense_grad_running/{name}"])
    compare.close("is_mask_update", updates, file["is_mask_update"])
    compare.close("drop_fraction", fractions, file["drop_fraction"])


# ---------------------------------------------------------------------------------------------- isolated tasks
def _recorded_ties(base: type) -> type:
    """The class under test over `base`. Among growth scores of exactly zero the reference takes what torch's unstable sort gives,
    the library goes by position. Such a choice, and only such, is replaced by the recorded one before the run goes on."""

    class Tasks(DynamicSparsity, base):  # type: ignore[misc]
        recorded: Mapping[str, Tensor]
        """Masks at the end of the epoch."""
        epoch_end: int

        def _change(self, step: int, fraction: float) -> None:
            state = self.states[DynamicSparsity]
            used, masks, dense = self._masks.used(state) or {}, dict(state.masks), self._scores.dense
            shards = self._masks.shards(self.host, state)
            kept = {s.name: (s.data.clone(), {k: m.clone() for k, m in s.moments.items()}) for s in shards}
            super()._change(step, fraction)
            if step + self.configs[DynamicSparsity].update_every <= self.epoch_end:
                return  # not the change that left the recorded masks
            for shard in shards:
                name, want = shard.name, self.recorded[shard.name]
                score = dense[name] * ~used[name] if name in used else dense[name]
                odd = state.masks[name] != want
                if not odd.any() or (odd & (score != 0)).any():
                    continue
                weight, moments = kept[name]
                shard.data.copy_(weight * want)
                for key, moment in shard.moments.items():
                    seen = self.configs[DynamicSparsity].dense_moments
                    moment.copy_(moments[key] if seen else moments[key] * (want & masks[name]))
                state.masks = type(state.masks)({**state.masks, name: want})
                state.active[name] = int(want.sum())

    return Tasks


def check_isolation(file: Vectors, compare: Comparison) -> None:
    """The whole run of CL-DST: tasks in turn, changes of topology, the best epoch kept, and predictions for each task."""
    hp = {k.removeprefix("hp_"): file[k].tolist() for k in file.arrays if k.startswith("hp_")}
    model = _model(file.under("theta_init/"))
    tasks = [g for g in file.groups() if g.startswith("task")]
    steps = hp["epochs"] * hp["batches_per_epoch"]
    rules: dict[str, Any] = {
        "density": hp["density"], "distribution": "erk" if hp["init"] == "ERK" else "uniform", "bernoulli": True,
        "prune": hp["death"], "grow": hp["growth"], "drop_fraction": hp["death_rate"],
        "drop_floor": hp["death_rate_eta_min"], "total_steps": steps,
        "update_every": hp["update_frequency"], "stop_fraction": 1.0, "topology_step": "after", "as_released": True,
        "fresh_init": "zeros", "per_task_params": False,
    }
    rules |= {"dense_moments": True} if hp["optimizer"] == "adam" else {"momentum": 0.9, "nesterov": True}
    base = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[hp["optimizer"]]
    opt: Any = _recorded_ties(base)(model, lr=hp["lr"], weight_decay=hp["l2"], **rules)
    model.load_state_dict(_tensors(file.under("theta_init/")))
    width = file["theta_init/c.weight"].shape[0] // len(tasks)
    for k, task in enumerate(tasks):
        with warnings.catch_warnings():  # the nets are too small for their tasks, and the file has no shared parameters
            warnings.simplefilter("ignore", UserWarning)
            opt.begin_task(k + 1, masks={n: m.bool() for n, m in _tensors(file.under(f"{task}/mask_at_start/")).items()})
        _compare(compare, f"{task}/theta_at_start", dict(model.named_parameters()), file)
        for epoch in range(hp["epochs"]):
            for group in opt.param_groups:
                group["lr"] = hp["lr"] * hp["lr_gamma"] ** sum(epoch >= m for m in hp["lr_milestones_epochs"])
            opt.epoch_end = (epoch + 1) * hp["batches_per_epoch"]
            opt.recorded = {n: m.bool() for n, m in _tensors(file.under(f"{task}/epoch{epoch}/mask/")).items()}
            accuracy = _epoch(opt, model, file[f"{task}/x"], file[f"{task}/y"], k * width, width)
            where = f"{task}/epoch{epoch}"
            compare.close(f"{where}/train_acc", accuracy, file[f"{where}/train_acc"])
            _compare(compare, f"{where}/theta", dict(model.named_parameters()), file)
            _compare(compare, f"{where}/mask", opt.whole_masks(), file)
            opt.keep_best(accuracy)
        opt.end_task(select="best")
        _compare(compare, f"{task}/mask_saved", opt.whole_masks(), file)
        _compare(compare, f"{task}/dense_store", opt.states[DynamicSparsity].store, file)
        with torch.no_grad(), opt.task(k + 1):
            got = model(torch.from_numpy(file[f"{task}/x_test"]))
        compare.close(f"{task}/logits_test_after_task", got, file[f"{task}/logits_test_after_task"])
    full, sliced = [], []
    for k, task in enumerate(tasks):
        with torch.no_grad(), opt.task(k + 1):
            logits = model(torch.from_numpy(file[f"{task}/x_test"]))
        y = torch.from_numpy(file[f"{task}/y_test"])
        compare.close(f"{task}/logits_test_final", logits, file[f"{task}/logits_test_final"])
        full.append((logits.argmax(1) == y).double().mean().item())
        sliced.append((logits[:, k * width : (k + 1) * width].argmax(1) + k * width == y).double().mean().item())
    compare.close("acc_full_head", full, file["acc_full_head"])
    compare.close("acc_task_slice", sliced, file["acc_task_slice"])


def _epoch(opt: Any, model: nn.Module, xs: Array, ys: Array, first: int, width: int) -> float:
    """Train one epoch on a task's slice of the head; the percentage that the whole head gets right, before each step."""
    right = total = 0
    for x, y in zip(torch.from_numpy(xs), torch.from_numpy(ys), strict=True):
        with torch.no_grad():
            right += int((model(x).argmax(1) == y).sum())
        total += len(y)
        opt.step(_closure(opt, lambda x: model(x)[:, first : first + width], x, y - first))
    return 100.0 * right / total


# ------------------------------------------------------------------------------------------------------------ both
def _model(weights: Mapping[str, Array]) -> nn.Module:
    """Linear and convolution layers in the order of their names, tanh between; after a convolution, a linear one sees it flat."""
    layers = sorted({n.rpartition(".")[0] for n in weights})
    model = nn.Sequential()
    for i, name in enumerate(layers):
        shape, bias = weights[f"{name}.weight"].shape, f"{name}.bias" in weights
        if i:
            model.add_module(f"act{i}", nn.Tanh())
        if len(shape) == 2 and i and weights[f"{layers[i - 1]}.weight"].ndim == 4:
            model.add_module("flat", nn.Flatten())
        model.add_module(name, nn.Linear(shape[1], shape[0], bias=bias) if len(shape) == 2 else
                         nn.Conv2d(shape[1], shape[0], shape[2:], bias=bias))
    model.double()
    model.load_state_dict(_tensors(weights))
    return model


def _closure(opt: Any, forward: Any, x: Tensor, y: Tensor) -> Any:
    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(forward(x), y)
        opt.backward(loss)
        return loss

    return closure


def _compare(compare: Comparison, prefix: str, got: Mapping[str, Tensor], file: Vectors) -> None:
    for name, want in file.under(f"{prefix}/").items():
        if name not in got:
            raise FormatError(f"{prefix}/{name}: the library has {sorted(got)}")
        compare.close(f"{prefix}/{name}", got[name].detach().to(getattr(torch, want.dtype.name)), want)


def _tensors(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    return {n: torch.from_numpy(a.copy()) for n, a in arrays.items()}


def _alone(value: Tensor) -> Tensor:
    return value
