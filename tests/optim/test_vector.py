"""Vectors in one piece: the same numbers as tensor by tensor, and memory that is lent to one user at a time."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from everbatch import compose
from everbatch.engines import shards
from everbatch.engines.named import ByName
from everbatch.engines.shards import Vector, count_bad
from everbatch.optim import EMA, SAM, ClipGradNorm, LookSAM, StaleSAM
from everbatch.optim.sharpness.ascent import ascent

X, Y = torch.rand(8, 6), torch.arange(8) % 3


def started(*mixins: type, base: type = torch.optim.SGD, **options: Any) -> tuple[nn.Module, Any, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, (2, 3)).to(memory_format=torch.channels_last), nn.Flatten(), nn.ReLU(), nn.Linear(4, 3))
    opt = compose(*mixins, base=base)(model, lr=0.1, **options)

    def closure() -> Tensor:
        loss = functional.cross_entropy(model(X.view(8, 1, 2, 3)), Y)
        opt.backward(loss)
        return loss

    return model, opt, closure


def tensors_in(saved: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(saved) if torch.is_tensor(leaf)]


def vectors(seed: int) -> tuple[Vector, Vector]:
    """The same numbers as separate tensors, and in one piece."""
    _, opt, _ = started()
    g = torch.Generator().manual_seed(seed)
    apart = Vector(opt.host, opt.host.shards, [torch.randn(s.data.shape, generator=g) for s in opt.host.shards])
    return apart, apart.clone()


def test_what_is_in_one_piece_has_the_numbers_of_what_is_not() -> None:
    (a, one_a), (b, one_b) = vectors(1), vectors(2)
    b.host, one_b.shards, b.shards = a.host, one_a.shards, a.shards
    assert a.flat is None and one_a.flat is not None
    assert all(map(torch.equal, a.tensors, one_a.tensors))
    for got, want in ((one_a.norm(), a.norm()), (shards.inner(a.host, (one_a, one_b)), shards.inner(a.host, (a, b)))):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    scale = torch.tensor(0.3, dtype=torch.float64)
    for action in (lambda v, w: v.add_(w), lambda v, w: v.add_(w, -0.5), lambda v, w: v.add_(w, scale),
                   lambda v, w: v.mul_(scale), lambda v, w: v.mul_(0.7)):
        got, want = action(one_a, one_b), action(a, b)
        for x, y in zip(got.tensors, want.tensors, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-7, atol=1e-8)


def test_a_direction_has_the_length_that_was_asked_for() -> None:
    a, one = vectors(3)
    for direction in (ascent(a, 0.05), ascent(one, 0.05)):
        torch.testing.assert_close(direction.norm().item(), 0.05, rtol=1e-6, atol=0)
    assert not ascent(a.mul_(0.0), 0.05).norm()


@pytest.mark.parametrize("largest", [shards.LARGEST, 0])
def test_displacements_within_displacements_come_back(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    """With memory that is kept, and without; a view of the weights sees every move."""
    monkeypatch.setattr(shards, "LARGEST", largest)
    model, opt, closure = started(SAM, rho=0.05)
    opt.step(closure)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        one = opt.host.weights().clone().mul_(0.5)
        with opt.displaced(one):
            half = [p.detach().clone() for p in model.parameters()]
            with opt.displaced(one):
                assert all(torch.allclose(p, 2 * b) for p, b in zip(model.parameters(), before, strict=True))
            assert all(map(torch.equal, model.parameters(), half))
    assert all(map(torch.equal, model.parameters(), before))


def test_weights_that_are_put_elsewhere_are_found() -> None:
    model, opt, closure = started(SAM, ClipGradNorm, rho=0.05, max_norm=0.1)
    twin, other, same = started(SAM, ClipGradNorm, rho=0.05, max_norm=0.1)
    for step in range(4):
        if step == 2:
            for p in model.parameters():
                p.data = p.data.clone(memory_format=torch.contiguous_format)
        opt.step(closure)
        other.step(same)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("part", [LookSAM, StaleSAM])
def test_kept_directions_survive_copies_and_resumes(part: type) -> None:
    """Copied, pickled, or loaded by another optimizer, what is kept in one piece gives the steps of the run that went on."""
    model, opt, closure = started(part, rho=0.05)
    for _ in range(3):
        opt.step(closure)
    resumed_model, resumed, again = started(part, rho=0.05)
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(opt.state_dict())
    for _ in range(3):
        opt.step(closure)
        resumed.step(again)
    for p, q in zip(model.parameters(), resumed_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tau", [1, 2])
def test_old_directions_take_turns_in_the_same_memory(monkeypatch: pytest.MonkeyPatch, tau: int) -> None:
    """The memory of a direction that is too old is that of a fresh one; no bit differs, and what was saved stays what it was."""
    model, opt, closure = started(StaleSAM, rho=0.5, tau=tau)
    twin, kept, again = started(StaleSAM, rho=0.5, tau=tau)
    saved: dict[str, Any] = {}
    places = []
    for step in range(8):
        with monkeypatch.context() as without:
            without.setattr(shards, "LARGEST", 0)
            opt.step(closure)
        if step == 4:
            saved = kept.state_dict()
        before = copy.deepcopy(tensors_in(saved))
        kept.step(again)
        places.append({t.data_ptr() for t in kept.states[StaleSAM].history[-1].values()})
        assert all(map(torch.equal, tensors_in(saved), before))
    assert places[-1] == places[-1 - (tau + 1)] and places[-1] != places[-2]
    assert all(map(torch.equal, twin.parameters(), model.parameters()))


def test_a_copy_of_state_by_name_holds_its_tensors_alone() -> None:
    kept = ByName.of(vectors(4)[1])
    for twin in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert type(twin) is ByName and twin._vector is None
        assert all(torch.equal(twin[name], kept[name]) and twin[name] is not kept[name] for name in kept)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_base_takes_the_same_steps(base: type) -> None:
    """Up to rounding: SAM, clipping and averages over torch's fused update, and a resume of it."""
    ends = []
    for fused in (False, True):
        model, opt, closure = started(ClipGradNorm, SAM, EMA, base=base, rho=0.05, max_norm=0.5, ema_decay=0.5, fused=fused)
        for _ in range(3):
            opt.step(closure)
        other_model, other, again = started(ClipGradNorm, SAM, EMA, base=base, rho=0.05, max_norm=0.5, ema_decay=0.5, fused=fused)
        other_model.load_state_dict(model.state_dict())
        other.load_state_dict(opt.state_dict())
        for _ in range(2):
            opt.step(closure)
            other.step(again)
        for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        ends.append(list(model.parameters()))
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_what_was_kept_by_name_lies_in_one_piece_again_once_loaded() -> None:
    """Sums over pieces round otherwise than over the whole: a resumed run would not repeat the bits of one that went on."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 31), torch.nn.Linear(31, 17))
    opt: Any = compose(base=torch.optim.SGD)(net, lr=0.1)
    host = opt.host
    kept = ByName.of(host.weights().clone())
    loaded = ByName({name: value.clone() for name, value in kept.items()})
    one, other = (state.over(host, host.shards) for state in (kept, loaded))
    assert one.flat is not None and other.flat is not None and torch.equal(one.norm(), other.norm())
    other.mul_(2.0)  # what is edited is what is saved
    assert all(torch.equal(loaded[name], 2.0 * value) for name, value in kept.items())
    assert loaded.over(host, host.shards) is other


ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
PLACES = ["cpu", pytest.param("cuda", marks=ON_A_GPU)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_is_not_finite_is_found_in_every_type(dtype: torch.dtype, place: str) -> None:
    weight = torch.full((7,), torch.finfo(dtype).max, dtype=dtype, device=place)
    for value, found in ((torch.finfo(dtype).min, False), (float("nan"), True), (float("inf"), True), (-float("inf"), True)):
        gradient = [torch.ones(0, dtype=dtype, device=place), torch.ones(300, dtype=dtype, device=place)]
        gradient[1][150] = value
        kept = gradient[1].clone()
        bad = count_bad([weight, *gradient], torch.device(place))
        assert bool(bad > 0) is found, value
        assert torch.equal(gradient[1].isnan(), kept.isnan()) and torch.equal(gradient[1].nan_to_num(), kept.nan_to_num())
    nothing = torch.ones(0, dtype=dtype, device=place)  # a rank without a slice of it
    assert not count_bad([nothing, nothing], torch.device(place)) > 0
