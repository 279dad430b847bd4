"""The final step: closures, hooks, schedulers, accumulation, skipped steps, scaling, copies."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from quadratics import Quadratic, batch, closure_of, same, small_net, train, weights
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from everbatch.composition import compose
from everbatch.engines.shards import Vector
from everbatch.optim import EMA, EWC, GSAM, SAM, ClipGradNorm, DynamicSparsity, OptimizerMixin


class Sharp(ClipGradNorm, EMA, SAM, torch.optim.SGD):
    pass


class SharpAdam(ClipGradNorm, EMA, SAM, torch.optim.AdamW):
    pass


class Plain(OptimizerMixin, torch.optim.SGD):
    pass


def fresh_base() -> type[torch.optim.Optimizer]:
    """A base that nobody has built, so nothing has wrapped its step yet."""

    class Descent(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.add_(p.grad, alpha=-group["lr"])

    return Descent


def build(cls: Any = Sharp, **options: Any) -> tuple[nn.Module, Any]:
    model = small_net()
    return model, cls(model, **{"lr": 0.1, "max_norm": 0.5, "rho": 0.5, "ema_decay": 0.5} | options)


# ---------------------------------------------------------------------------------------------- hooks and schedulers
@pytest.mark.parametrize("before", ["nothing", "base built", "other composed class built"])
def test_step_hooks_fire_once_whatever_was_built_before(before: str) -> None:
    base = fresh_base()
    if before == "base built":
        base(small_net().parameters(), lr=0.1)
    if before == "other composed class built":
        compose(EMA, base=base)(small_net(), lr=0.1)
    model = small_net()
    opt: Any = compose(SAM, base=base)(model, lr=0.1)
    calls: list[str] = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    everywhere = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    try:
        train(model, opt, 0, 1)
    finally:
        everywhere.remove()
    assert calls in (["pre", "post", "global"], ["pre", "global", "post"])


def test_a_base_built_after_the_composed_class_fires_its_hooks_once_as_well() -> None:
    cls, ours, theirs = fresh_base(), small_net(), small_net()
    opt: Any = compose(base=cls)(ours, lr=0.1)
    base = cls(theirs.parameters(), lr=0.1)
    calls: list[str] = []
    opt.register_step_post_hook(lambda *_: calls.append("ours"))
    base.register_step_post_hook(lambda *_: calls.append("theirs"))
    train(ours, opt, 0, 1)
    base.step()
    assert calls == ["ours", "theirs"]


@pytest.mark.parametrize("make", [lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
                                  lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1 / (i + 1)),
                                  lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=6)])
def test_torch_schedulers_attach(make: Any) -> None:
    ours, theirs = small_net(), small_net()
    opt = compose(SAM, base=torch.optim.SGD)(ours, lr=0.1, momentum=0.9, rho=0.0)
    base = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    ours_schedule, theirs_schedule = make(opt), make(base)
    for i in range(4):
        train(ours, opt, i, i + 1)
        ours_schedule.step()
        base.zero_grad()
        x, y = batch(i)
        nn.functional.cross_entropy(theirs(x), y).backward()
        base.step()
        theirs_schedule.step()
        assert opt.param_groups[0]["lr"] == base.param_groups[0]["lr"]
    assert same(weights(ours), weights(theirs))


# -------------------------------------------------------------------------------------------------------- closures
def test_without_a_closure_the_gradients_that_are_there_are_used() -> None:
    one, two = build(rho=0.0), build(rho=0.0)
    for i in range(3):
        x, y = batch(i)
        nn.functional.cross_entropy(one[0](x), y).backward()
        assert one[1].step() is None
        train(*two, i, i + 1)
    assert same(weights(one[0]), weights(two[0]))
    assert all(p.grad is None for p in one[0].parameters())


def test_without_a_closure_a_mixin_that_needs_a_pass_says_so() -> None:
    model, opt = build()
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match="was not given a closure, and a mixin asks for its gradient"):
        opt.step()
    assert same(weights(model), before)


def test_gradients_are_zeroed_before_every_pass() -> None:
    """Those of a backward before the step are not forgotten without a word."""
    dirty, clean = build(), build()
    for p in dirty[0].parameters():
        p.grad = torch.full_like(p, 3.0)
    with pytest.raises(RuntimeError, match=r"found a gradient of a backward outside of the closure .*opt.zero_grad\(\) before"):
        train(*dirty, 0, 1)
    assert all((p.grad == 3.0).all() for p in dirty[0].parameters())  # opt.step() may use them yet
    dirty[1].zero_grad()
    train(*dirty, 0, 2)
    train(*clean, 0, 2)
    assert same(weights(dirty[0]), weights(clean[0]))


def test_the_closure_may_return_anything() -> None:
    model, opt = build()
    x, y = batch()

    def closure() -> dict[str, float]:
        loss = nn.functional.cross_entropy(model(x), y)
        opt.backward(loss)
        return {"loss": loss.item()}

    assert set(opt.step(closure)) == {"loss"}


def test_micro_batches_are_one_batch() -> None:
    one, two = build(), build()
    for i in range(3):
        x, y = batch(i)

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> None:
            for xs, ys in one[1].micro_batches(zip(x.chunk(4), y.chunk(4), strict=True)):
                one[1].backward(nn.functional.cross_entropy(one[0](xs), ys))

        one[1].step(closure)
        train(*two, i, i + 1)
    for a, b in zip(weights(one[0]), weights(two[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # float32 sums in another order
    with pytest.raises(ValueError, match="must hold at least one micro-batch"):
        list(one[1].micro_batches([]))


# ---------------------------------------------------------------------------------------------------- skipped steps
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(value: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    twin = copy.deepcopy(model)
    runs = [(m, SharpAdam(m, lr=0.1, max_norm=0.5, rho=0.5, ema_decay=0.5)) for m in (model, twin)]
    for m, o in runs:
        train(m, o, 0, 2)
    opt = runs[0][1]
    before, buffers = weights(model), [b.clone() for b in model.buffers()]
    state = copy.deepcopy(opt.state_dict(weights=True)["everbatch"])
    train(model, opt, 2, 3, scale=value)
    assert same(weights(model), before) and same(list(model.buffers()), buffers)
    after = opt.state_dict(weights=True)["everbatch"]
    assert same(list(after["tensors"].values()), list(state["tensors"].values()))
    assert after["meta"] == state["meta"] | {"skipped": 1}
    assert (opt.skipped_count, opt.step_count, opt.last_applied) == (1, 2, False)
    for m, o in runs:
        train(m, o, 3, 5)
    assert same(weights(model), weights(twin)) and same(list(model.buffers()), list(twin.buffers()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["few", "many", "narrow", "turned"])
def test_one_odd_element_of_any_gradient_is_found(name: str, value: float) -> None:
    sizes = {"few": torch.zeros(3), "many": torch.zeros(16_385), "narrow": torch.zeros(5, dtype=torch.bfloat16),
             "turned": torch.zeros(4, 6).t()}
    model = nn.ParameterDict({n: nn.Parameter(t) for n, t in sizes.items()})
    opt = Plain(model, lr=0.1)
    for p in model.values():
        p.grad = torch.ones_like(p)
    assert opt.host.finite()
    model[name].grad[(-1,) * model[name].dim()] = value
    assert not opt.host.finite()


def test_statistics_are_kept_of_a_part_that_runs_before_its_whole() -> None:
    """Repeated passes move none; a skipped step puts all back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), nn.BatchNorm1d(4), nn.Linear(4, 3))
    one = copy.deepcopy(model)
    for m, cls in ((model, Sharp), (one, Plain)):
        opt = cls(m, lr=0.0)

        def closure(scale: float = 1.0, m: nn.Module = m, opt: Any = opt) -> torch.Tensor:
            x = torch.arange(12.0).view(2, 6).sin()
            loss = scale * (m[0](x).sum() + m(x).square().sum())
            opt.backward(loss)
            return loss

        opt.step(closure)
        before = [b.clone() for b in m.buffers()]
        opt.step(lambda c=closure: c(float("nan")))
        assert opt.skipped_count == 1 and same(list(m.buffers()), before)
    assert same(list(model.buffers()), list(one.buffers()))


def test_a_huge_finite_gradient_is_not_skipped() -> None:
    model = Quadratic([1e30], [1e5], dtype=torch.float32)
    opt = Plain(model, lr=0.0)
    opt.step(closure_of(opt, model))
    assert (opt.skipped_count, opt.step_count) == (0, 1)  # its square overflows float32; it does not


# ---------------------------------------------------------------------------------------------------------- scaling
@pytest.mark.parametrize("cls", [Sharp, SharpAdam])
def test_a_scaler_changes_nothing_but_the_range(cls: Any) -> None:
    """Scales are powers of two: float32 gradients come back bit for bit."""
    scaled, bare = build(cls, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10)), build(cls)
    train(*scaled, 0, 4)
    train(*bare, 0, 4)
    assert same(weights(scaled[0]), weights(bare[0]))


def test_a_scaler_backs_off_and_grows_as_torchs_does() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    model, opt = build(scaler=scaler)
    scales = []
    for i, factor in enumerate([1.0, 1.0, float("inf"), 1.0, 1.0]):
        train(model, opt, i, i + 1, scale=factor)
        scales.append(scaler.get_scale())
    assert scales == [2.0**10, 2.0**11, 2.0**10, 2.0**10, 2.0**11]
    assert (opt.step_count, opt.skipped_count) == (4, 1)


def test_fp16_autocast_with_a_scaler() -> None:
    """An overflow in half precision is skipped, the scale comes down, and training goes on with true magnitudes."""
    model, opt = build(scaler=torch.amp.GradScaler("cpu", init_scale=2.0**24))
    twin, other = build()
    norms = []
    for i in range(12):
        x, y = batch(i)

        def loss(net: nn.Module = model, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.float16):
                return nn.functional.cross_entropy(net(x), y)

        before = opt.step_count
        opt.step(closure_of(opt, loss))
        if opt.step_count > before:
            other.step(closure_of(other, lambda x=x, y=y: nn.functional.cross_entropy(twin(x), y)))
            norms.append((opt.metrics["grad_norm"].item(), other.metrics["grad_norm"].item()))
    assert opt.skipped_count > 0 and norms, (opt.skipped_count, len(norms))
    for half, full in norms:
        assert half == pytest.approx(full, rel=2e-2)  # half precision: 11 bits, a few dozen operations


# ----------------------------------------------------------------------------------------------- copies and pickles
@pytest.mark.parametrize("cls", [Sharp, SharpAdam])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_their_state_and_train_on_bitwise(cls: Any, how: str) -> None:
    pair = build(cls)
    train(*pair, 0, 3)
    other: Any = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other[1].host.module is other[0] and other[1].host.shards[0].data.data_ptr() != pair[1].host.shards[0].data.data_ptr()
    kept = weights(pair[0])
    train(*other, 3, 6)
    assert same(weights(pair[0]), kept), "the copy trains itself only"
    train(*pair, 3, 6)
    assert same(weights(pair[0]), weights(other[0])) and other[1].step_count == 6


def test_a_copy_after_a_scheduler_was_attached() -> None:
    pair = build()
    schedule = torch.optim.lr_scheduler.StepLR(pair[1], 1, 0.5)
    train(*pair, 0, 1)
    schedule.step()
    model, opt = copy.deepcopy(pair)
    train(model, opt, 1, 2)
    train(*pair, 1, 2)
    assert same(weights(model), weights(pair[0])) and opt.param_groups[0]["lr"] == 0.05


# --------------------------------------------------------------------------------------------- what a mixin may ask
class Recorder(OptimizerMixin):
    """Writes down the verbs it sees."""

    def _note(self, verb: str) -> None:
        self.__dict__.setdefault("seen", []).append(verb)

    def move_parameters(self, objective: Any) -> None:
        super().move_parameters(objective)
        self._note("move_parameters")

    def estimate_gradient(self, objective: Any) -> Any:
        self._note("estimate_gradient")
        return super().estimate_gradient(objective)

    def add_penalty(self) -> None:
        super().add_penalty()
        self._note("add_penalty")

    def displacement(self, vector: Vector) -> Vector:
        self._note("displacement")
        return super().displacement(vector).mul_(0.0)

    def edit_gradient(self) -> None:
        super().edit_gradient()
        self._note("edit_gradient")

    def update(self) -> None:
        self._note("update")
        super().update()

    def edit_parameters(self) -> None:
        super().edit_parameters()
        self._note("edit_parameters")


def test_verbs_come_in_the_order_the_gradient_travels() -> None:
    model = small_net()
    opt: Any = compose(Recorder, SAM, base=torch.optim.SGD)(model, lr=0.1, rho=0.5)
    train(model, opt, 0, 1)
    assert opt.seen == ["move_parameters", "estimate_gradient", "add_penalty", "displacement", "add_penalty", "edit_gradient",
                        "update", "edit_parameters"]
    bare = small_net()  # the displacement was filtered to nothing: SAM is the base
    train(bare, compose(base=torch.optim.SGD)(bare, lr=0.1), 0, 1)
    assert same(weights(model), weights(bare))


def test_replace_update_is_an_applied_step_without_an_update() -> None:
    class Topology(OptimizerMixin):
        def edit_gradient(self) -> None:
            super().edit_gradient()
            self.replace_update("a test")

    model = small_net()
    opt: Any = compose(Topology, base=torch.optim.SGD)(model, lr=0.1, momentum=0.9)
    before = weights(model)
    train(model, opt, 0, 1)
    assert same(weights(model), before) and (opt.step_count, opt.last_applied, dict(opt.state)) == (1, True, {})


def test_on_apply_runs_for_applied_steps_only() -> None:
    class Counter(OptimizerMixin):
        def estimate_gradient(self, objective: Any) -> Any:
            loss = super().estimate_gradient(objective)
            self.on_apply(lambda: self.__dict__.__setitem__("count", self.__dict__.get("count", 0) + 1))
            return loss

    model = small_net()
    opt: Any = compose(Counter, base=torch.optim.SGD)(model, lr=0.1)
    train(model, opt, 0, 1)
    train(model, opt, 1, 2, scale=float("nan"))
    train(model, opt, 2, 3)
    assert opt.count == 2


@pytest.mark.parametrize("seed", [1.5, "1", None])
def test_a_seed_is_an_integer(seed: Any) -> None:
    with pytest.raises(ValueError, match=f"Sharp: seed={seed!r}, must be an integer"):
        build(seed=seed)


def test_a_base_with_passes_of_its_own_and_complex_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="base LBFGS, which runs passes of its own, must update once per step"):
        compose(SAM, base=torch.optim.LBFGS)(small_net(), lr=0.1)
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"complex parameters \['weight', 'bias'\], must be real"):
        compose(SAM, base=torch.optim.SGD)(model, lr=0.1)
    compose(SAM, base=torch.optim.SGD)(nn.Sequential(small_net(), model.requires_grad_(False)), lr=0.1)  # nothing trains them


def test_autocast_around_steps_is_autocast_inside_closures() -> None:
    """Its cache of weights in fewer bits lives as long as the context."""
    x, y = torch.randn(32, 20, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 5
    bf16 = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)

    def losses(inside: Any, around: Any, loop: Any) -> list[float]:
        torch.manual_seed(0)
        model, found = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 5)), []
        opt: Any = compose(EMA, SAM, base=torch.optim.SGD)(model, lr=0.5, rho=1.0, ema_decay=0.5)

        def closure() -> Tensor:
            with inside():
                loss = nn.functional.cross_entropy(model(x), y)
            found.append(loss.item())
            opt.backward(loss)
            return loss

        with loop():
            for _ in range(3):
                with around():
                    opt.step(closure)
            with opt.averaged(), bf16():
                found.append(model(x).float().square().mean().item())
        return found

    nothing = contextlib.nullcontext
    wanted = losses(bf16, nothing, nothing)
    assert wanted == losses(nothing, bf16, nothing) == losses(nothing, nothing, bf16) and len(set(wanted)) == 7


def test_a_step_while_other_weights_stand_in_is_refused() -> None:
    model = small_net()
    opt: Any = compose(EMA, base=torch.optim.SGD)(model, lr=0.1, ema_decay=0.5)
    opt.step(closure_of(opt, lambda: model(batch()[0]).square().mean()))
    before = weights(model)
    with pytest.raises(RuntimeError, match="inside a block where other weights stand in"), opt.averaged():
        opt.step(closure_of(opt, lambda: model(batch()[0]).square().mean()))
    assert same(before, weights(model))
    opt.step(closure_of(opt, lambda: model(batch()[0]).square().mean()))


def test_options_of_mixins_in_a_group_are_refused() -> None:
    model = small_net()
    groups = [{"params": list(model.named_parameters()), "rho": 2.0}]
    with pytest.raises(ValueError, match=r"SAMSGD: \['rho'\] in a parameter group, must be an option of the optimizer"):
        compose(SAM, base=torch.optim.SGD)(groups, lr=0.1)
    opt: Any = compose(SAM, base=torch.optim.Adadelta)(groups, lr=0.1, sam_rho=0.1)  # its own
    assert opt.param_groups[0]["rho"] == 2.0
    more = {"params": [("more", nn.Parameter(torch.ones(2)))], "rho": 0.1}
    opt = compose(SAM, base=torch.optim.SGD)(model, lr=0.1)
    with pytest.raises(ValueError, match="in a parameter group"):
        opt.add_param_group(more)
    assert len(opt.param_groups) == 1


def test_a_group_that_is_refused_is_not_added() -> None:
    model, other = small_net(), small_net()
    opt: Any = compose(SAM, base=torch.optim.SGD)(model, lr=0.1)
    with pytest.raises(ValueError, match="occur twice"):
        opt.add_param_group({"params": list(other.named_parameters())})
    assert len(opt.param_groups) == 1
    opt.step(closure_of(opt, lambda: model(batch()[0]).square().mean()))


@pytest.mark.parametrize(("part", "options", "text"), [
    (GSAM, {"adaptive": "elementwise"}, "GSAM: adaptive='elementwise', must be True or False"),
    (EWC, {"factory": 5}, "EWC: factory=5, must be a function"),
    (DynamicSparsity, {"exclude": "2.weight"}, r"exclude='2.weight', must be a tuple of texts, such as \('2.weight',\)"),
    (DynamicSparsity, {"densities": 0.5}, "densities=0.5, must be a mapping")])
def test_options_of_another_kind(part: type, options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        compose(part, base=torch.optim.SGD)(small_net(), lr=0.1, **options)


def test_kinds_that_a_config_checks_itself_are_left_to_it() -> None:
    class Own(OptimizerMixin):
        """Options of several kinds."""

        @dataclass(frozen=True, kw_only=True)
        class Config:
            weights: Mapping[str, float] | float = 1.0
            rule: Callable[[int], float] | str = "cosine"
            names: tuple[str, ...] = ()
            flag: bool = False

    opt: Any = compose(Own, base=torch.optim.SGD)(small_net(), lr=0.1, weights=2.0, rule="linear", names={"a": 1}.keys(), flag=1)
    assert opt.configs[Own].weights == 2.0 and opt.configs[Own].rule == "linear"


def test_methods_of_descent_refuse_a_base_that_maximises() -> None:
    with pytest.raises(ValueError, match="maximize=True with SAM, must minimise"):
        compose(ClipGradNorm, SAM, base=torch.optim.SGD)(small_net(), lr=0.1, maximize=True)
    ends = []
    for sign in (1.0, -1.0):
        model = small_net()
        opt = compose(ClipGradNorm, EMA, base=torch.optim.SGD)(model, lr=0.1, max_norm=0.1, maximize=sign < 0)
        train(model, opt, 0, 3, scale=sign)
        ends.append(weights(model))
    assert same(*ends)
    opt = compose(SAM, base=torch.optim.SGD)([("a", nn.Parameter(torch.ones(2)))], lr=0.1)
    with pytest.raises(ValueError, match="maximize=True with SAM"):
        opt.add_param_group({"params": [("b", nn.Parameter(torch.ones(2)))], "maximize": True})
    assert len(opt.param_groups) == 1 and opt.host.names == ["a"]


@pytest.mark.parametrize("signature", ["self", "self, *args, **kwargs"])
def test_a_base_may_take_no_closure(signature: str) -> None:
    names: dict[str, Any] = {"torch": torch}
    exec(f"""class Descent(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {{"lr": lr}})

    @torch.no_grad()
    def step({signature}):
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad, alpha=-self.param_groups[0]["lr"])
""", names)
    ends = []
    for base in (names["Descent"], torch.optim.SGD):
        model = small_net()
        train(model, compose(SAM, base=base)(model, lr=0.1), 0, 3)
        ends.append(weights(model))
    assert same(*ends)


def test_a_weight_that_overflowed_is_found_at_the_next_check_also_where_no_pass_reaches_it() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "spare": nn.Linear(2, 2)})
    opt = compose(base=torch.optim.SGD)(model, lr=10.0)

    def step(names: str, scale: float) -> None:
        def closure() -> Tensor:
            loss = torch.stack([model[n](torch.ones(1, 2)).sum() for n in names.split()]).sum() * scale
            opt.backward(loss)
            return loss

        opt.step(closure)

    step("spare", 1e38)
    assert opt.last_applied and not torch.isfinite(model["spare"].weight).any()
    before = model["used"].weight.detach().clone()
    step("used", 1.0)
    assert not opt.last_applied and opt.skipped_count == 1 and torch.equal(model["used"].weight, before)


def test_two_parts_hold_what_each_of_them_names_for_one_step() -> None:
    model = nn.Linear(3, 2)
    opt = Plain(model, lr=0.1, momentum=0.9, weight_decay=0.1)

    def stepped() -> list[bool]:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        opt.step(lambda: opt.backward(model(torch.ones(4, 3)).square().mean()))
        return [torch.equal(p, before[name]) for name, p in model.named_parameters()]

    assert stepped() == [False, False]
    opt.hold(["weight"])
    opt.hold(["bias"])
    assert stepped() == [True, True]
    assert stepped() == [False, False]
