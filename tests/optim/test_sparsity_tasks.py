"""Isolated tasks of `DynamicSparsity`: nothing is forgotten, frozen weights stay, capacity adds up, tasks come back."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everbatch.optim import SAM, ClipGradNorm, DynamicSparsity
from rotation import When


class SGD(DynamicSparsity, torch.optim.SGD): ...


class AdamW(ClipGradNorm, DynamicSparsity, SAM, torch.optim.AdamW): ...


OPTIONS = {"density": 0.3, "update_every": 2}
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "sgd": (SGD, {**OPTIONS, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "adamw": (AdamW, {**OPTIONS, "lr": 0.01, "weight_decay": 0.1, "rho": 0.2, "max_norm": 1.0}),
}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 15), nn.LayerNorm(15), nn.Tanh(),
                         nn.Linear(15, 6))


def build(case: str = "sgd", seed: int = 0, **options: Any) -> tuple[Any, nn.Module]:
    cls, given = CASES[case]
    model = net(seed)
    return cls(model, **{**given, **options}), model


def step(opt: Any, model: nn.Module, task: int, i: int) -> None:
    g = torch.Generator().manual_seed(100 * task + i)
    x, y = torch.randn(8, 6, generator=g) + task, torch.randint(0, 2, (8,), generator=g)

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(x)[:, 2 * task - 2 : 2 * task], y)
        opt.backward(loss)
        return loss

    opt.step(closure)


def train(opt: Any, model: nn.Module, task: int, steps: int = 6, begin: int = 0) -> None:
    for i in range(begin, steps):
        step(opt, model, task, i)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    was = model.training
    model.eval()
    got = model(torch.linspace(-1, 1, 30).view(5, 6)).clone()
    model.train(was)
    return got


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def shown(opt: Any, model: nn.Module, task: int) -> Tensor:
    with opt.task(task):
        return logits(model)


GROWN = list(itertools.product(CASES, ("gradient", "random", "random_unfired"), ("allow", "prefer")))


@pytest.mark.filterwarnings("ignore:DynamicSparsity. .* layers have fewer free weights")
@pytest.mark.parametrize(
    ("case", "grow", "used"), [When(place, 4).param(*one) for place, one in enumerate(GROWN)])
def test_nothing_is_forgotten(case: str, grow: str, used: str) -> None:
    opt, model = build(case, grow=grow, grow_into_used=used)
    seen = {}
    for task in (1, 2, 3):
        opt.begin_task(task)
        train(opt, model, task)
        opt.end_task()
        seen[task] = logits(model)
        assert all(torch.equal(shown(opt, model, t), seen[t]) for t in seen)
    assert not torch.equal(seen[1], seen[2])
    now = weights(model)
    assert torch.equal(logits(model), seen[3]) and same(weights(model), now)


@pytest.mark.filterwarnings("ignore:DynamicSparsity. .* layers have fewer free weights")
@pytest.mark.parametrize("case", CASES)
def test_frozen_weights_keep_their_bits_under_decay(case: str) -> None:
    opt, model = build(case)
    opt.begin_task(1)
    train(opt, model, 1)
    opt.end_task()
    first, values = opt.whole_masks(), weights(model)
    opt.begin_task(2, masks={"0.weight": first["0.weight"]})
    for i in range(5):
        step(opt, model, 2, i)
        for name, mask in opt.whole_masks().items():
            both = mask & first[name]
            assert both.any() and torch.equal(weights(model)[name][both], values[name][both])
    assert not torch.equal(weights(model)["3.weight"], values["3.weight"])


@pytest.mark.filterwarnings("ignore:DynamicSparsity. .* layers have fewer free weights")
def test_growth_into_a_used_entry_brings_its_stored_value() -> None:
    opt, model = build(grow="random", update_every=1, drop_fraction=0.6)
    opt.begin_task(1)
    train(opt, model, 1)
    opt.end_task()
    first, values = opt.whole_masks(), weights(model)
    opt.begin_task(2)
    grown = 0
    for i in range(4):
        before = opt.whole_masks()
        step(opt, model, 2, i)
        for name, now in opt.whole_masks().items():
            born = now & ~before[name] & first[name]
            grown += int(born.sum())
            assert torch.equal(weights(model)[name][now & first[name]], values[name][now & first[name]])
    assert grown > 0
    trained = logits(model)
    opt.end_task()
    assert torch.equal(shown(opt, model, 2), trained)  # prediction sees what training saw


def test_fresh_weights_follow_the_initialiser_or_are_zero() -> None:
    for fresh, largest in (("initializer", 6**-0.5), ("zeros", 0.0)):
        opt, model = build(fresh_init=fresh)
        opt.begin_task(1)
        train(opt, model, 1)
        opt.end_task()
        used = opt.whole_masks()
        opt.begin_task(2)
        new = opt.whole_masks()["0.weight"] & ~used["0.weight"]
        value = weights(model)["0.weight"][new].abs()
        assert new.any() and value.max() <= largest and bool((value > 0).all()) == (largest > 0)


def test_forbidden_weights_are_not_shared_and_run_out() -> None:
    opt, model = build(grow_into_used="forbid", density=0.4, distribution="uniform", grow="random")
    for task in (1, 2):
        opt.begin_task(task)
        train(opt, model, task)
        opt.end_task()
    room = opt.capacity()
    assert all(c.shared == {1: 0.0, 2: 0.0} and c.used == 2 * opt.states[DynamicSparsity].active[n] for n, c in room.items())
    with pytest.raises(RuntimeError, match="task 3 wants \\[48, .*are free; use grow_into_used='allow'"):
        opt.begin_task(3)
    assert opt.states[DynamicSparsity].task == 0


def test_capacity_adds_up() -> None:
    opt, model = build(density=0.2, update_every=100)
    for task in (1, 2):
        opt.begin_task(task)
        train(opt, model, task, 1)
        opt.end_task()
    masks = opt.states[DynamicSparsity].task_masks
    for name, room in opt.capacity().items():
        a, b = masks[0][name], masks[1][name]
        assert room.size == a.numel() and room.used == int((a | b).sum()) and room.free == 1 - room.used / room.size
        assert room.shared == {1: 0.0, 2: int((a & b).sum()) / int(b.sum())}


def test_a_full_network_warns_once() -> None:
    opt, model = build(density=0.6, drop_fraction=0.0)
    opt.begin_task(1)
    train(opt, model, 1, 1)
    opt.end_task()
    with pytest.warns(UserWarning, match="fewer free weights than a task uses") as seen:
        opt.begin_task(2)
        train(opt, model, 2, 1)
        opt.end_task()
        opt.begin_task(3)
    assert len(seen) == 1


def test_unprotected_parameters_warn_once() -> None:
    opt, model = build(density=0.2, per_task_params=False)
    opt.begin_task(1)
    train(opt, model, 1, 1)
    opt.end_task()
    with pytest.warns(UserWarning, match="per_task_params=False, and \\['0.bias'.*and running statistics are trained"):
        opt.begin_task(2)


@pytest.mark.filterwarnings("ignore:DynamicSparsity. .* layers have fewer free weights")
def test_the_best_moment_is_kept() -> None:
    opt, model = build()
    opt.begin_task(1)
    train(opt, model, 1, 2)
    assert opt.keep_best(0.5)
    best, masks = weights(model), opt.whole_masks()
    train(opt, model, 1, 6, begin=2)
    assert not opt.keep_best(0.5) and not same(opt.whole_masks(), masks)
    opt.end_task(select="best")
    assert same(weights(model), best) and same(opt.whole_masks(), masks)
    opt.begin_task(2)
    assert opt.states[DynamicSparsity].best_score is None
    with pytest.raises(RuntimeError, match="'best'\\) without keep_best"):
        opt.end_task(select="best")


def test_prediction_leaves_the_open_task_as_it_was_even_when_it_raises() -> None:
    opt, model = build(density=0.2)
    opt.begin_task(1)
    train(opt, model, 1)
    opt.end_task()
    opt.begin_task(2)
    train(opt, model, 2, 3)
    before = weights(model)
    with pytest.raises(KeyError), opt.task(1):
        assert not same(weights(model), before)
        raise KeyError
    assert same(weights(model), before)
    with opt.task(2):
        assert same(weights(model), before)
    twin, other = copy.deepcopy((opt, model))
    shown(opt, model, 1)
    train(opt, model, 2, 6, begin=3)
    train(twin, other, 2, 6, begin=3)
    assert same(weights(model), weights(other))


@pytest.mark.parametrize("case", CASES)
def test_resume_inside_a_task_is_bitwise(case: str) -> None:
    opt, model = build(case, density=0.2, grow="random_unfired")
    opt.begin_task(1)
    train(opt, model, 1)
    opt.end_task()
    first = shown(opt, model, 1)
    opt.begin_task(2, steps=20)
    train(opt, model, 2, 3)
    opt.keep_best(1.0)
    saved, statistics = pickle.loads(pickle.dumps(opt.state_dict(weights=True))), weights(model)
    train(opt, model, 2, 7, begin=3)
    opt.end_task()
    twin, other = build(case, seed=5, density=0.2, grow="random_unfired")
    twin.load_state_dict(saved)
    other.load_state_dict(statistics)
    train(twin, other, 2, 7, begin=3)
    twin.end_task()
    assert same(weights(model), weights(other)) and torch.equal(shown(twin, other, 1), first)
    mine, theirs = opt.state_dict(weights=True)["everbatch"], twin.state_dict(weights=True)["everbatch"]
    assert same(mine["tensors"], theirs["tensors"]) and mine["meta"] == theirs["meta"]


def test_dense_layers_are_frozen_too() -> None:
    opt, model = build(density=0.5, densities={"6.weight": 1.0}, update_every=100)
    assert "6.weight" not in opt.states[DynamicSparsity].active
    opt.begin_task(1)
    train(opt, model, 1, 2)
    opt.end_task()
    first = logits(model)
    with pytest.warns(UserWarning, match="fewer free weights"):
        opt.begin_task(2)
    train(opt, model, 2, 2)
    opt.end_task()
    assert torch.equal(shown(opt, model, 1), first) and opt.capacity()["6.weight"].free == 0


def test_parameters_that_came_after_a_task_stay_as_they_are_in_it() -> None:
    opt, model = build(density=0.2)
    late = nn.Linear(3, 3)
    opt.begin_task(1)
    train(opt, model, 1, 2)
    opt.keep_best(1.0)
    best = logits(model)
    train(opt, model, 1, 4, begin=2)
    opt.add_param_group({"params": [(f"late.{n}", p) for n, p in late.named_parameters()]})
    before = weights(late)
    opt.end_task(select="best")
    assert torch.equal(logits(model), best) and same(weights(late), before)
    opt.states[DynamicSparsity].saved["1"]["parameters"] = {  # as if the task had ended before the group came
        n: t for n, t in opt.states[DynamicSparsity].saved["1"]["parameters"].items() if not n.startswith("late.")}
    opt.begin_task(2)
    train(opt, model, 2, 2)
    opt.end_task()
    with torch.no_grad():
        late.weight.add_(1.0)
    after = weights(late)
    with opt.task(1):
        assert same(weights(late), after) and torch.equal(logits(model), best)
    with opt.task(2):
        assert same(weights(late), before)
    assert same(weights(late), after)


FREEZES = {  # steps at which the parameters are frozen and trained again, of three tasks of 6
    "from the start": (0, 6), "through the second task": (6, 12), "in the second task": (9, 18), "in the first": (3, 9)}


LAYERS = (("3.weight",), ("0.weight", "3.bias", "4.weight"), ("6.weight",))
FROZEN = list(itertools.product(LAYERS, FREEZES, (0.0, 0.3)))


@pytest.mark.filterwarnings("ignore:DynamicSparsity. .* layers have fewer free weights")
@pytest.mark.parametrize(
    ("names", "when", "drop_fraction"), [When(place, 4).param(*one) for place, one in enumerate(FROZEN)])
def test_what_is_frozen_for_a_while_is_not_forgotten(names: tuple[str, ...], when: str, drop_fraction: float) -> None:
    opt, model = build(density=0.2, drop_fraction=drop_fraction, densities={"6.weight": 1.0})
    seen, (begin, end) = {}, FREEZES[when]
    for task in (1, 2, 3):
        for i in range(6):
            for name in names:
                model.get_parameter(name).requires_grad_(not begin <= 6 * (task - 1) + i < end)
            if i == 0:
                opt.begin_task(task)
            step(opt, model, task, i)
        opt.end_task()
        seen[task] = logits(model)
        assert all(torch.equal(shown(opt, model, t), seen[t]) for t in seen)
        assert all(int(m.sum()) == round(opt.densities()[n] * m.numel()) > 0 for n, m in opt.whole_masks().items())
        assert all(room.used > 0 for room in opt.capacity().values())


def test_the_best_weights_of_a_layer_that_was_frozen_since_come_back() -> None:
    opt, model = build(density=0.2)
    opt.begin_task(1)
    train(opt, model, 1, 3)
    opt.keep_best(1.0)
    best = logits(model)
    train(opt, model, 1, 6, begin=3)
    model[3].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    opt.end_task(select="best")
    assert torch.equal(logits(model), best) and torch.equal(shown(opt, model, 1), best)


def test_misuse_is_named() -> None:
    opt, model = build(density=0.2)
    for call, error, text in (
        (lambda: opt.end_task(), RuntimeError, "end_task\\(\\) without begin_task"),
        (lambda: opt.keep_best(1.0), RuntimeError, "keep_best\\(\\) without begin_task"),
        (lambda: opt.begin_task(2), ValueError, "begin_task\\(2\\), must be the next task, 1"),
        (lambda: opt.begin_task(True), ValueError, "begin_task\\(True\\)"),
        (lambda: opt.begin_task(1, steps=0), ValueError, "total_steps=0"),
        (lambda: opt.begin_task(1, masks={"x": torch.ones(1, dtype=torch.bool)}), ValueError, "masks of \\['x'\\]"),
        (lambda: shown(opt, model, 1), RuntimeError, "task\\(1\\) has no mask; tasks that ended: none"),
    ):
        with pytest.raises(error, match=text):
            call()
    opt.begin_task(1)
    with pytest.raises(RuntimeError, match="begin_task\\(2\\) while task 1 is open"):
        opt.begin_task(2)
    train(opt, model, 1, 2)
    with pytest.raises(ValueError, match="select='worst'"):
        opt.end_task(select="worst")
    opt.end_task()
    before = weights(model)
    with pytest.raises(RuntimeError, match="a step outside a task would change what tasks 1 to 1 compute"):
        step(opt, model, 1, 0)
    assert same(weights(model), before)  # refused before the first pass


@pytest.mark.parametrize("what", ["store", "weight"])
def test_a_frozen_weight_that_changes_is_noticed(what: str) -> None:
    opt, model = build(density=0.2, weight_decay=0.0, drop_fraction=0.0)
    opt.begin_task(1)
    train(opt, model, 1, 2)
    opt.end_task()
    used = opt.whole_masks()["0.weight"]
    opt.begin_task(2, masks={"0.weight": used})
    train(opt, model, 2, 2)
    target = opt.states[DynamicSparsity].store["0.weight"] if what == "store" else model[0].weight.data  # type: ignore[index]
    target[used] += 1e-3
    with pytest.raises(RuntimeError, match="frozen weights of \\['0.weight'\\] changed during task 2"):
        opt.end_task()
