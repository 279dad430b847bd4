"""State by name: saved whole, loaded anywhere, refused before anything is touched."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quadratics import closure_of, same, small_net, train, weights
from torch import nn

from everbatch import checkpoint, compose
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch
from everbatch.optim import EMA, SAM, ClipGradNorm, DynamicSparsity, ShrinkPerturb
from everbatch.optim.state import load_pieces, pieces

BASES: dict[str, tuple[type, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd without momentum": (torch.optim.SGD, {"lr": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
    "radam": (torch.optim.RAdam, {"lr": 0.01}),
}


def build(base: str = "sgd", seed: int = 0, **options: Any) -> tuple[nn.Module, Any]:
    cls, defaults = BASES[base]
    model = small_net(seed)
    composed = type("Mixed", (ClipGradNorm, EMA, ShrinkPerturb, SAM, cls), {})
    return model, composed(model, **defaults, rho=0.3, max_norm=0.5, ema_decay=0.5, noise="gaussian", sigma=0.05, **options)


def life(pair: tuple[nn.Module, Any], begin: int, end: int) -> None:
    for i in range(begin, end):
        if i in (1, 4):
            pair[1].shrink_perturb()
        train(*pair, i, i + 1)


@pytest.mark.parametrize("base", BASES)
def test_state_dict_resumes_bitwise(base: str) -> None:
    pair, twin = build(base), build(base, seed=9)
    life(pair, 0, 3)
    saved = copy.deepcopy(pair[1].state_dict(weights=True))
    twin[1].load_state_dict(saved)
    assert same(weights(twin[0]), weights(pair[0]))
    life(pair, 3, 6)
    life(twin, 3, 6)
    ends = [p[1].state_dict(weights=True)["everbatch"] for p in (pair, twin)]
    assert same(list(ends[0]["tensors"].values()), list(ends[1]["tensors"].values())) and ends[0]["meta"] == ends[1]["meta"]


@pytest.mark.parametrize("base", BASES)
def test_a_checkpoint_folder_resumes_bitwise(base: str, tmp_path: Path) -> None:
    pair, twin = build(base), build(base, seed=9)
    life(pair, 0, 3)
    tensors, meta = pieces(pair[1])
    checkpoint.save(tmp_path, 3, tensors, meta, world=World())
    kept = checkpoint.latest(tmp_path, world=World())
    assert kept is not None
    load_pieces(twin[1], kept, kept.meta)
    life(pair, 3, 6)
    life(twin, 3, 6)
    ends = [p[1].state_dict(weights=True)["everbatch"] for p in (pair, twin)]
    assert same(list(ends[0]["tensors"].values()), list(ends[1]["tensors"].values())) and ends[0]["meta"] == ends[1]["meta"]
    assert twin[1].param_groups[0].get("betas", ()).__class__ is tuple


def test_before_the_first_step() -> None:
    pair, twin = build(), build(seed=9)
    life(twin, 0, 2)
    twin[1].load_state_dict(pair[1].state_dict(weights=True))
    assert same(weights(twin[0]), weights(pair[0])) and not twin[1].state and not twin[1].states[EMA].average
    life(pair, 0, 2)
    life(twin, 0, 2)
    assert same(weights(twin[0]), weights(pair[0]))


def test_options_of_groups_and_counts_come_back() -> None:
    pair, twin = build(), build(seed=9)
    pair[1].param_groups[0]["lr"] = 0.025
    life(pair, 0, 2)
    train(*pair, 2, 3, scale=float("nan"))
    twin[1].load_state_dict(pair[1].state_dict(weights=True))
    assert twin[1].param_groups[0]["lr"] == 0.025 and len(twin[1].param_groups[0]["params"]) == 4
    assert (twin[1].step_count, twin[1].skipped_count, twin[1].states[ShrinkPerturb].round) == (2, 1, 1)


def test_a_saved_state_is_a_copy() -> None:
    pair = build()
    life(pair, 0, 2)
    saved = pair[1].state_dict(weights=True)["everbatch"]["tensors"]
    kept = {n: t.clone() for n, t in saved.items()}
    life(pair, 2, 4)
    assert all(torch.equal(saved[n], kept[n]) for n in kept)


def bytes_of(value: Any, seen: set[int]) -> int:
    """Bytes of all storages in a tree of dicts and lists, each counted once."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        new = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() if new else 0
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(bytes_of(v, seen) for v in values)


def sparse_adamw(seed: int = 0) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 3))
    return model, compose(DynamicSparsity, EMA, base=torch.optim.AdamW)(model, lr=0.01, density=0.3, update_every=2)


def test_each_number_is_saved_once() -> None:
    model, opt = sparse_adamw()
    train(model, opt, 0, 3)
    state, file = opt.state_dict(), io.BytesIO()
    torch.save(state, file)
    count = sum(p.numel() for p in model.parameters())
    needed = count * 4 * 3 + sum(mask.numel() for mask in opt.whole_masks().values())  # two moments, an average, a byte of mask
    assert bytes_of(state, set()) <= 1.01 * needed and len(file.getvalue()) <= 1.05 * needed
    both = bytes_of({"model": model.state_dict(), "opt": opt.state_dict(weights=True)}, set())
    assert bytes_of(opt.state_dict(weights=True), set()) <= 1.01 * (needed + count * 4) and both <= 1.01 * (needed + count * 8)


def test_a_loop_that_saves_model_and_optimizer_resumes_bitwise() -> None:
    (model, opt), (twin, again), file = sparse_adamw(), sparse_adamw(9), io.BytesIO()
    train(model, opt, 0, 3)
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["optimizer"])  # in either order
    twin.load_state_dict(saved["model"])
    train(model, opt, 3, 6)
    train(twin, again, 3, 6)
    assert same(weights(twin), weights(model))
    other, third = sparse_adamw(7)
    third.load_state_dict(saved["optimizer"], weights=saved["model"])
    train(other, third, 3, 6)
    assert same(weights(other), weights(model))


BROKEN: dict[str, tuple[Callable[[Any], object], str]] = {
    "tensors": (lambda e: e.update(tensors=[]), "'everbatch' entry is not of tensors by name"),
    "a number for a tensor": (lambda e: e["tensors"].update({"moment.momentum_buffer/0.weight": 3}), "not of tensors by name"),
    "no meta": (lambda e: e.pop("meta"), "'everbatch' entry is not of tensors by name and their 'meta'"),
    "no groups": (lambda e: e["meta"].pop("groups"), "meta is not what state_dict.. gives: KeyError: 'groups'"),
    "groups": (lambda e: e["meta"].update(groups=[3]), "meta is not what state_dict.. gives: TypeError"),
    "class": (lambda e: e["meta"].update({"class": None}), "meta is not what state_dict.. gives: TypeError"),
    "rate": (lambda e: e["meta"]["groups"][0]["options"].update(lr="fast"), "group option lr is 'fast' .*, must be a number"),
    "steps": (lambda e: e["meta"].update(steps="3"), "steps is '3' in the state, must be a number"),
    "round": (lambda e: e["meta"]["mixins"]["ShrinkPerturb"].update(round=[1]), r"ShrinkPerturb.round is \[1\] .* a number"),
    "mixin": (lambda e: e["meta"]["mixins"].update(EMA=[[1]]), r"the state of EMA is \[\[1\]\] in the state, must be a table"),
    "list": (lambda e: e["meta"]["mixins"]["ShrinkPerturb"].update(round={"list": 10**17}), "is a list of 100000000000000000 in"),
    "scalars": (lambda e: e["meta"].update(scalars={"0.weight": {"step": ["os.system", 1]}}), "of type 'os.system' in the state"),
    "moment": (lambda e: e["tensors"].update({"moment.momentum_buffer/2.weight": torch.ones(2)}), r"has shape \(2,\) in the"),
    "average": (lambda e: e["tensors"].update({"EMA.average/2.weight": torch.ones(3, 6)}), r"has shape \(3, 6\) in the state"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_state_is_named_before_anything_is_touched(kind: str) -> None:
    pair = build()
    life(pair, 0, 2)
    saved = copy.deepcopy(pair[1].state_dict(weights=True))
    BROKEN[kind][0](saved["everbatch"])
    refuse(saved, build(seed=1), BROKEN[kind][1])


def test_torchs_own_view_is_there_as_well() -> None:
    pair = build()
    life(pair, 0, 2)
    saved = pair[1].state_dict()
    assert set(saved) == {"state", "param_groups", "everbatch"}
    other = torch.optim.SGD(small_net().parameters(), lr=1.0, momentum=0.9)
    other.load_state_dict({"state": saved["state"], "param_groups": saved["param_groups"]})
    assert other.param_groups[0]["lr"] == 0.1


def test_none_gradients_leave_no_moments_and_that_is_kept() -> None:
    pair, twin = build(), build(seed=9)
    for model, opt in (pair, twin):
        extra = nn.Parameter(torch.ones(3))
        model.register_parameter("unused", extra)
        opt.add_param_group({"params": [("unused", extra)]})
    life(pair, 0, 2)
    twin[1].load_state_dict(pair[1].state_dict(weights=True))
    assert pair[0].unused not in pair[1].state and twin[0].unused not in twin[1].state
    life(pair, 2, 4)
    life(twin, 2, 4)
    assert same(weights(pair[0]), weights(twin[0]))


def refuse(saved: Any, other: tuple[nn.Module, Any], text: str) -> None:
    life(other, 0, 1)
    before = copy.deepcopy(other[1].state_dict(weights=True)["everbatch"])
    with pytest.raises(CheckpointMismatch, match=text):
        other[1].load_state_dict(saved)
    after = other[1].state_dict(weights=True)["everbatch"]
    assert same(list(after["tensors"].values()), list(before["tensors"].values())) and after["meta"] == before["meta"], "touched"


def test_what_does_not_fit_is_refused_before_anything_is_touched() -> None:
    pair = build()
    life(pair, 0, 2)
    saved = pair[1].state_dict(weights=True)
    refuse({k: v for k, v in saved.items() if k != "everbatch"}, build(seed=1), "has no 'everbatch' entry")
    wider = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    options = {"lr": 0.1, "momentum": 0.9, "noise": "gaussian", "buffers": "keep"}
    refuse(saved, (wider, type(pair[1])(wider, **options)), r"parameters \['0.weight', '0.bias', '2.weight'\] differ")
    fewer = small_net()
    refuse(saved, (fewer, type(pair[1])(list(fewer.named_parameters())[:3], **options)), "differ between the state and the model")
    regrouped = small_net()
    named = list(regrouped.named_parameters())
    two = [{"params": named[:2]}, {"params": named[2:]}]
    refuse(saved, (regrouped, type(pair[1])(two, **options)), "1 parameter groups .* 2 here")

    class Other(ClipGradNorm, ShrinkPerturb, torch.optim.SGD):
        pass

    model = small_net()
    refuse(saved, (model, Other(model, **options)), "compose the same mixins")

    class OverAdam(ClipGradNorm, EMA, ShrinkPerturb, SAM, torch.optim.AdamW):
        pass

    model = small_net()
    refuse(saved, (model, OverAdam(model, lr=0.1, noise="gaussian", buffers="keep")), "of base SGD, this class has AdamW")


def test_a_rate_in_a_tensor_and_the_seed_come_back() -> None:
    pair, twin = build("adamw"), build("adamw", seed=1)
    for _, opt in (pair, twin):
        opt.param_groups[0]["lr"] = torch.tensor(0.1)
    held = twin[1].param_groups[0]["lr"]
    pair[1].param_groups[0]["lr"].fill_(0.25)
    pair[1].seed = 5
    twin[1].load_state_dict(pair[1].state_dict(weights=True))
    assert twin[1].param_groups[0]["lr"] is held and held == 0.25 and twin[1].seed == 5


@pytest.mark.parametrize("folder", [True, False])
def test_what_is_kept_of_frozen_parameters_comes_back(folder: bool, tmp_path: Path) -> None:
    """A layer that is frozen for a while has its moments and average still, and a run resumed meanwhile has them too."""
    pair, twin = build(), build(seed=1)
    life(pair, 0, 2)
    twin[0].load_state_dict(pair[0].state_dict())  # frozen weights come with the model
    for model, _ in (pair, twin):
        model[0].requires_grad_(False)
    life(pair, 2, 3)
    if folder:
        tensors, meta = pieces(pair[1])
        checkpoint.save(tmp_path, 3, tensors, meta, world=World())
        kept = checkpoint.latest(tmp_path, world=World())
        assert kept is not None
        load_pieces(twin[1], kept, kept.meta)
    else:
        twin[1].load_state_dict(copy.deepcopy(pair[1].state_dict(weights=True)))
    for one in (pair, twin):
        one[0].requires_grad_(True)
        life(one, 3, 5)
    ends = [p[1].state_dict(weights=True)["everbatch"]["tensors"] for p in (pair, twin)]
    assert ends[0].keys() == ends[1].keys() and "EMA.average/0.weight" in ends[0]
    assert same(list(ends[0].values()), list(ends[1].values()))


class Small(nn.Module):
    """A parameter of one number, and one of none."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.nothing, self.rest = (nn.Parameter(torch.ones(s)) for s in ((), (0, 3), (3,)))

    def forward(self) -> torch.Tensor:
        return self.scale * self.rest.square().sum() + self.nothing.sum()


@pytest.mark.parametrize("base", BASES)
def test_parameters_of_one_number_and_of_none(base: str) -> None:
    cls, defaults = BASES[base]
    models = Small(), Small(), Small()
    opts = [compose(ClipGradNorm, base=cls)(m, max_norm=9.0, **defaults) for m in models]

    def steps(model: nn.Module, opt: Any, count: int) -> None:
        for _ in range(count):
            opt.step(closure_of(opt, model))

    steps(models[0], opts[0], 2)
    opts[1].load_state_dict(copy.deepcopy(opts[0].state_dict(weights=True)))
    steps(models[0], opts[0], 2)
    steps(models[1], opts[1], 2)
    assert same(weights(models[0]), weights(models[1]))
    steps(models[2], opts[2], 2)
    before = models[2].scale.clone(), {k: v.clone() for k, v in opts[2].host.shards[0].moments.items()}
    opts[2].hold(["scale"])
    steps(models[2], opts[2], 1)
    assert torch.equal(models[2].scale, before[0])
    assert all(torch.equal(v, before[1][k]) for k, v in opts[2].host.shards[0].moments.items())
    assert "step" not in before[1] and ("momentum" in defaults) <= ("momentum_buffer" in before[1])
