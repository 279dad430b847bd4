"""Split batch norm: what each branch sees and moves, and that a conversion can be undone. Equality throughout."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from everbatch.nn import (
    SplitBatchNorm,
    bn_recalibrate,
    branch_parameters,
    convert_split_bn,
    frozen_statistics,
    split_branch,
    strip_split_bn,
)
from rotation import When

ADV = "adversarial"


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
                          nn.LazyLinear(5), nn.BatchNorm1d(5))
    moved(model, 8)
    return model


def zoo(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=5)
    moved(model, 32)
    return model


def moved(model: nn.Module, size: int) -> None:
    """Statistics and weights unlike the initial ones, so that a copy differs from a new layer."""
    g = torch.Generator().manual_seed(1)
    model.train()
    model(torch.randn(4, 3, size, size, generator=g))
    for m in model.modules():
        if isinstance(m, _BatchNorm):
            m.weight.data.copy_(1 + 0.1 * torch.randn(m.weight.shape, generator=g))
            m.bias.data.copy_(0.1 * torch.randn(m.bias.shape, generator=g))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "small": (small, 8), "resnet18": (lambda: zoo("resnet18"), 32), "regnetx_002": (lambda: zoo("regnetx_002"), 32),
}
WHEN = {"small": When(), "resnet18": When(0, 2), "regnetx_002": When(1, 2)}
every_model = pytest.mark.parametrize("name", [WHEN[name].param(name) for name in MODELS])


@functools.cache
def made(name: str) -> nn.Module:
    """The model that copies are taken of; drawing the weights anew takes ten times as long."""
    return MODELS[name][0]()


def build(name: str = "small") -> tuple[nn.Module, Tensor, Tensor]:
    size = MODELS[name][1]
    g = torch.Generator().manual_seed(2)
    clean, moved = (torch.randn(4, 3, size, size, generator=g) for _ in range(2))
    return copy.deepcopy(made(name)), clean, 2 * moved + 1


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def main_of(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in kept.items() if ".branches." not in f".{k}"}


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def scramble(model: nn.Module) -> None:
    for m in model.modules():
        if isinstance(m, SplitBatchNorm):
            for t in [*m.branches.parameters(), *m.branches.buffers()]:
                t.data.add_(3)


# ---------------------------------------------------------------------------------------------- what a conversion changes
@every_model
def test_round_trip_gives_the_same_names_values_classes_and_objects(name: str) -> None:
    model, _, _ = build(name)
    before, kinds, parts, tensors = state(model), classes(model), list(model.modules()), list(model.parameters())
    count = sum(isinstance(m, _BatchNorm) for m in parts)
    assert convert_split_bn(model) == count
    assert same(main_of(state(model)), before)
    assert [type(m) for m in parts] != kinds
    assert strip_split_bn(model) == count
    assert same(state(model), before) and classes(model) == kinds
    assert all(a is b for a, b in zip(model.modules(), parts, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), tensors, strict=True))
    assert all(not {"_active", "_halves"} & m.__dict__.keys() for m in parts)
    assert strip_split_bn(model) == 0


@every_model
def test_branches_start_as_copies_of_weights_and_statistics(name: str) -> None:
    model, _, _ = build(name)
    names = dict(model.named_modules())
    before = state(model)
    count = convert_split_bn(model)
    after, found = state(model), 0
    for path, layer in names.items():
        if isinstance(layer, SplitBatchNorm):
            found += 1
            twin = layer.branches[ADV]
            assert type(twin) is layer.original and isinstance(layer, layer.original)
            for k, v in main_of(layer.state_dict()).items():
                assert torch.equal(after[f"{path}.branches.{ADV}.{k}"], before[f"{path}.{k}"])
                assert twin.state_dict()[k].data_ptr() != v.data_ptr()
    assert found == count


def test_a_second_conversion_adds_only_what_is_missing() -> None:
    model, x, _ = build()
    assert convert_split_bn(model) == 3
    with split_branch(model, ADV):
        model(x)
    before, parts = state(model), list(model.modules())
    assert convert_split_bn(model) == 3
    assert same(state(model), before) and all(a is b for a, b in zip(model.modules(), parts, strict=True))
    assert convert_split_bn(model, ["augmented", ADV, "augmented"]) == 3
    assert set(model[1].branches) == {ADV, "augmented"}
    now = state(model)
    assert all(torch.equal(now[k], v) for k, v in before.items())
    assert torch.equal(model[1].branches["augmented"].running_mean, model[1].running_mean)
    assert type(model[1].branches["augmented"]) is nn.BatchNorm2d and not list(model[1].branches["augmented"].children())


@pytest.mark.parametrize("layer", [
    nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3), nn.BatchNorm1d(3, affine=False),
    nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm2d(3, affine=False, track_running_stats=False),
    nn.BatchNorm1d(3, momentum=None), timm.layers.BatchNormAct2d(3, act_layer=nn.PReLU),
], ids=lambda m: repr(m).split("\n")[0][:60])
def test_a_layer_that_is_the_model(layer: _BatchNorm) -> None:
    layer, plain = copy.deepcopy(layer), copy.deepcopy(layer)
    x = torch.randn(6, 3, *[2] * {"1d": 1, "3d": 3}.get(type(layer).__name__[-2:], 2))
    assert convert_split_bn(layer) == 1 and isinstance(layer, SplitBatchNorm) and isinstance(layer, type(plain))
    expected = plain(x.clone())
    assert torch.equal(layer(x.clone()), expected)
    with split_branch(layer, ADV):
        assert torch.equal(layer(x.clone()), expected)
    branch = layer.branches[ADV].state_dict()
    assert same(main_of(layer.state_dict()), plain.state_dict()) and same(branch, plain.state_dict())
    assert set(branch_parameters(layer)) == {f"branches.{ADV}.{n}" for n, _ in plain.named_parameters()}
    assert set(branch_parameters(layer, "main")) == {n for n, _ in plain.named_parameters()}
    assert torch.equal(layer.eval()(x.clone()), plain.eval()(x.clone()))
    assert strip_split_bn(layer) == 1 and type(layer) is type(plain)


def test_a_model_without_batch_norm_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.InstanceNorm1d(2))
    before, kinds = state(model), classes(model)
    assert convert_split_bn(model) == 0 == strip_split_bn(model)
    with split_branch(model, "anything"):
        model(torch.zeros(2, 2, 2))
    assert branch_parameters(model) == {}
    assert same(state(model), before) and classes(model) == kinds


@pytest.mark.parametrize("branches", [(), "adversarial", ("main",), ("a.b",), ("keys",), ("training",), ("",), (1,)])
def test_bad_names_change_nothing(branches: Any) -> None:
    model, _, _ = build()
    kinds = classes(model)
    with pytest.raises(ValueError, match="convert_split_bn"):
        convert_split_bn(model, branches)
    assert classes(model) == kinds


def test_lazy_layers_have_nothing_to_copy_yet() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="LazyBatchNorm1d"):
        convert_split_bn(model)
    assert type(model[0]) is nn.BatchNorm1d
    model(torch.randn(4, 3))
    assert convert_split_bn(model) == 2


# ------------------------------------------------------------------------------------------------------- which branch runs
@every_model
def test_evaluation_depends_on_main_only(name: str) -> None:
    model, x, _ = build(name)
    convert_split_bn(model)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        scramble(model)
        assert torch.equal(model(x), expected)
        with split_branch(model, ADV):
            assert torch.equal(model(x), expected)
        model.train()
        clean = model(x)
        with split_branch(model, ADV):
            assert not torch.equal(model(x), clean)


@every_model
def test_main_statistics_are_those_of_a_run_without_the_branch(name: str) -> None:
    model, x, y = build(name)
    plain = copy.deepcopy(model)
    convert_split_bn(model)
    clean = branch = None
    for _ in range(2):
        expected, clean = plain(x), model(x)
        with split_branch(model, ADV):
            branch = model(y)
        assert torch.equal(clean, expected)
    assert same(main_of(state(model)), state(plain))
    # ... and the branch's are those of a run on its own inputs.
    other, _, _ = build(name)
    outs = [other(y) for _ in range(2)]
    assert branch is not None and torch.equal(branch, outs[-1])
    theirs = state(other)
    infix = f"branches.{ADV}."
    mine = {k.replace(infix, ""): v for k, v in state(model).items() if infix in k}
    assert mine and all(torch.equal(theirs[k], v) for k, v in mine.items())


def test_two_forwards_are_one_that_splits_the_batch_by_hand() -> None:
    """Every other layer acts by row, so [x; y] with a norm that halves the batch is the same network. In float64 and sums of
    gradients up to rounding; outputs and statistics bit for bit."""
    model, x, y = (v.double() for v in build())
    hand = copy.deepcopy(model)
    convert_split_bn(model)
    scramble(model)
    adv = {i: copy.deepcopy(model[i].branches[ADV]) for i in (1, 4, 7)}
    clean = model(x)
    with split_branch(model, ADV):
        attacked = model(y)
    (clean.square().sum() + attacked.square().sum()).backward()
    h = torch.cat([x, y])
    for i, layer in enumerate(hand):
        h = torch.cat([layer(h[:4]), adv[i](h[4:])]) if i in adv else layer(h)
    h.square().sum().backward()
    torch.testing.assert_close(torch.cat([clean, attacked]), h, rtol=1e-13, atol=1e-13)
    for i, layer in enumerate(hand):
        for a, b in [(model[i], layer), *([(model[i].branches[ADV], adv[i])] if i in adv else [])]:
            for n, p in b.named_parameters():
                torch.testing.assert_close(a.get_parameter(n).grad, p.grad, rtol=1e-11, atol=1e-11)
            for n, t in b.named_buffers():
                torch.testing.assert_close(a.get_buffer(n), t, rtol=1e-13, atol=1e-13)


@every_model
def test_one_forward_in_halves_is_two_forwards(name: str) -> None:
    model, x, other = build(name)
    convert_split_bn(model.double())
    scramble(model)
    twin, x, other = copy.deepcopy(model), x.double(), other.double()
    outputs = [twin(x)]
    with split_branch(twin, ADV):
        outputs.append(twin(other))
    with split_branch(model, ADV, halves=True):
        both = model(torch.cat([x, other]))
    torch.testing.assert_close(both, torch.cat(outputs), rtol=1e-10, atol=1e-12)
    (both * both).sum().backward()
    sum((out * out).sum() for out in outputs).backward()  # type: ignore[union-attr]
    for (one, mine), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-8, atol=1e-9, msg=one)
    for mine, wanted in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-13)
    expected = twin.eval()(x)
    with split_branch(model.eval(), ADV, halves=True):
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_repeated_forward_is_refused(reentrant: bool) -> None:
    """It would take main for the branch, and nobody would know."""
    model, x, _ = build()
    convert_split_bn(model)
    with split_branch(model, ADV):
        out = torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
    with pytest.raises(ValueError, match="a forward inside a backward"):
        out.sum().backward()
    strip_split_bn(model)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).sum().backward()


def test_compiles_without_a_break() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    convert_split_bn(model)
    scramble(model)
    twin, x = copy.deepcopy(model), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    for options in ({"name": "main"}, {"name": ADV}, {"name": ADV, "halves": True}):
        with split_branch(model, **options), split_branch(twin, **options):
            assert torch.equal(compiled(x), model(x)), options
    assert same(state(model), state(twin))


def test_halves_must_be_as_many_and_end_with_their_block() -> None:
    model, x, _ = build()
    convert_split_bn(model)
    with split_branch(model, ADV, halves=True), pytest.raises(ValueError, match="3 rows in halves, must be as many"):
        model(x[:3])
    before = state(model)
    with split_branch(model, ADV, halves=True), split_branch(model, ADV):
        model(x[:3])
    assert [k for k, v in state(model).items() if not torch.equal(v, before[k])] == [
        k for k in before if f"branches.{ADV}." in k and ("running" in k or "tracked" in k)]
    copy.deepcopy(model)(x[:3])


@every_model
def test_gradients_reach_the_branch_used_only(name: str) -> None:
    model, x, _ = build(name)
    convert_split_bn(model, (ADV, "augmented"))
    groups = {b: branch_parameters(model, b) for b in ("main", ADV, "augmented")}
    assert sum(map(len, groups.values())) == len({id(p) for g in groups.values() for p in g.values()})
    names = dict(model.named_parameters())
    assert all(names[n] is p for g in groups.values() for n, p in g.items())
    for used in groups:
        model.zero_grad()
        with split_branch(model, used):
            model(x).sum().backward()
        for branch, params in groups.items():
            assert params and all((p.grad is not None) == (branch == used) for p in params.values())


def test_blocks_nest_and_survive_exceptions() -> None:
    model, _, _ = build()
    convert_split_bn(model, (ADV, "augmented"))

    def now() -> set[str | None]:
        return {m._active for m in model.modules() if isinstance(m, SplitBatchNorm)}

    with split_branch(model, ADV):
        with pytest.raises(KeyError), split_branch(model, "augmented"):
            assert now() == {"augmented"}
            raise KeyError
        assert now() == {ADV}
        with split_branch(model, "main"):
            assert now() == {None}
        with split_branch(model[4], "augmented"):
            assert now() == {"augmented", ADV}
        assert now() == {ADV}
        with pytest.raises(ValueError, match="known: main, adversarial, augmented"), split_branch(model, "other"):
            pass
        assert now() == {ADV}
    assert now() == {None}
    with split_branch(model, ADV):
        strip_split_bn(model)
    assert not any("_active" in m.__dict__ for m in model.modules())


def test_a_name_must_be_known_to_all_layers() -> None:
    model, _, _ = build()
    convert_split_bn(model[4])
    with split_branch(model, ADV):
        assert model[4]._active == ADV  # the others are not split
    convert_split_bn(model, ["augmented"])
    with pytest.raises(ValueError, match="known: main, augmented$"), split_branch(model, ADV):
        pass
    with pytest.raises(ValueError, match="branch_parameters"):
        branch_parameters(model, ADV)


def test_finding_the_layers_keeps_no_model_alive_and_walks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = build()
    layer = nn.BatchNorm1d(2)
    for m in (model, layer):
        convert_split_bn(m)
    for m in (model, layer):
        with split_branch(m, ADV):
            pass
    monkeypatch.setattr(type(model), "modules", None)
    with split_branch(model, ADV):
        pass
    monkeypatch.undo()
    refs = [weakref.ref(model), weakref.ref(layer), weakref.ref(model[1])]
    del model, layer, m
    gc.collect()
    assert [r() for r in refs] == [None] * 3


# --------------------------------------------------------------------------------------- copies, checkpoints, other code
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@every_model
def test_copies_are_whole_and_their_own(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x, y = build(name)
    convert_split_bn(model)
    with split_branch(model, ADV):
        model(y)
        twin = copied(model)
    assert classes(twin) == classes(model) and same(state(twin), state(model)) and repr(twin) == repr(model)
    before = state(model)
    clean = twin(x)  # made inside a block, used outside: main
    with split_branch(twin, ADV):
        attacked = twin(y)
    assert same(state(model), before)
    assert torch.equal(model(x), clean)
    with split_branch(model, ADV):
        assert torch.equal(model(y), attacked)
    assert same(state(twin), state(model))
    assert strip_split_bn(twin) == sum(isinstance(m, SplitBatchNorm) for m in model.modules())


@pytest.mark.parametrize("assign", [False, True])
@every_model
def test_an_old_checkpoint_loads_strictly_into_all_branches(name: str, assign: bool) -> None:
    model, x, _ = build(name)
    old = state(model)
    held = dict(old)
    model(x)
    convert_split_bn(model, (ADV, "augmented"))
    scramble(model)
    model.load_state_dict(old, strict=True, assign=assign)
    assert list(old) == list(held) and same(main_of(state(model)), held)
    for m in model.modules():
        if isinstance(m, SplitBatchNorm):
            for twin in m.branches.values():
                assert same(twin.state_dict(), main_of(m.state_dict()))
                assert not {t.data_ptr() for t in twin.state_dict().values()} & {
                    t.data_ptr() for t in main_of(m.state_dict()).values()}


def test_a_new_checkpoint_keeps_the_branches_apart_and_a_torn_one_is_refused() -> None:
    model, _, y = build()
    other, _, _ = build()
    for m in (model, other):
        convert_split_bn(m)
    with split_branch(model, ADV):
        model(y)
    kept = state(model)
    other.load_state_dict(kept)
    assert same(state(other), kept)
    torn = {k: v for k, v in kept.items() if k != f"1.branches.{ADV}.weight"}
    with pytest.raises(RuntimeError, match=f"Missing key.*1.branches.{ADV}.weight"):
        other.load_state_dict(torn)
    convert_split_bn(other, ["augmented"])  # a branch the checkpoint has not heard of
    other.load_state_dict(kept)
    assert same(other[1].branches["augmented"].state_dict(), main_of(other[1].state_dict()))
    lacking = {k: v for k, v in kept.items() if not k.startswith("1.")}
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(lacking)


def test_hooks_of_a_layer_fire_once_and_are_not_copied() -> None:
    model, x, _ = build()
    calls: list[nn.Module] = []
    model[1].register_forward_hook(lambda m, _i, _o: calls.append(m))
    convert_split_bn(model)
    with split_branch(model, ADV):
        model(x)
    assert len(calls) == 1 and calls[0] is model[1]


def test_branches_of_a_synchronised_layer_share_its_communicator() -> None:
    layer = nn.SyncBatchNorm(3)
    layer.process_group = threading.Lock()  # as little to be copied as a process group
    convert_split_bn(layer)
    assert layer.branches[ADV].process_group is layer.process_group


def test_recalibration_moves_the_branch_in_use() -> None:
    model, x, y = build()
    convert_split_bn(model)
    before = state(model)
    bn_recalibrate(model, [x, y])
    middle = state(model)
    assert all(torch.equal(middle[k], v) == (k not in main_of(before) or "running" not in k and "num_b" not in k)
               for k, v in before.items())
    with split_branch(model, ADV):
        bn_recalibrate(model, [x, y])
    after = state(model)
    assert same(main_of(after), main_of(middle))
    for i in (1, 4, 7):
        assert torch.equal(model[i].branches[ADV].running_var, model[i].running_var)
        assert torch.equal(model[i].branches[ADV].running_mean, model[i].running_mean)


# --------------------------------------------------------------------------------------------------- frozen statistics
class Counting(nn.Module):
    """Buffers of its own: one moved in place, one that every forward replaces, one that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.last = x.detach().flatten()[:2].clone()
        return x


@pytest.mark.parametrize("branch", ["main", ADV])
@every_model
def test_frozen_statistics_leave_all_buffers_and_no_trace(name: str, branch: str) -> None:
    inner, x, _ = build(name)
    model = nn.Sequential(Counting(), nn.InstanceNorm2d(3, track_running_stats=True), inner)
    convert_split_bn(model)
    free = copy.deepcopy(model)
    next(m for m in model.modules() if isinstance(m, SplitBatchNorm)).eval()
    next(m for m in free.modules() if isinstance(m, SplitBatchNorm)).eval()
    tensors, before = dict(model.named_buffers()), state(model)
    flags = {n: (m.training, getattr(m, "track_running_stats", None)) for n, m in model.named_modules()}
    with split_branch(free, branch):
        expected = free(x)
    with pytest.raises(KeyError), frozen_statistics(model), split_branch(model, branch):
        out = model(x)
        out.sum().backward()
        raise KeyError
    assert torch.equal(out, expected) and not same(state(free), before)
    assert same(state(model), before)
    assert all(b is tensors[n] for n, b in model.named_buffers())
    assert flags == {n: (m.training, getattr(m, "track_running_stats", None)) for n, m in model.named_modules()}
    with split_branch(model, branch):
        model(x)
    assert same(state(model), state(free))  # and moves on as if the block had not been


def test_frozen_statistics_nest() -> None:
    model, x, _ = build()
    before = state(model)
    with frozen_statistics(model):
        with frozen_statistics(model):
            model(x)
        model(x)
        assert same(state(model), before) and not model[1].track_running_stats
    assert same(state(model), before) and model[1].track_running_stats
