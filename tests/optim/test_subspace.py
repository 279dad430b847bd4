"""Subspace projections: closed forms of the maps, and what the optimizer may and may not move."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quadratics import same, small_net, train, weights
from torch import Tensor, nn

from everbatch import checkpoint, compose
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch, CompositionError
from everbatch.optim import EMA, SAM, ClipGradNorm, DynamicSparsity, Projection, Subspace, SubspaceProjection
from everbatch.optim import state as optimizer_state
from everbatch.optim.subspace.maps import _hash
from everbatch.optim.subspace.transforms import damped, high_block, inverse, null_space, rows, window_damped


class Sub(SubspaceProjection, torch.optim.SGD):
    pass


class SubAdam(SubspaceProjection, torch.optim.AdamW):
    pass


class Mix(ClipGradNorm, SubspaceProjection, SAM, torch.optim.SGD):
    pass


def basis(width: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, rank, generator=g, dtype=torch.float64))[0].to(dtype)


def matrix(o: int = 4, d: int = 6, seed: int = 9) -> Tensor:
    return torch.randn(o, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- maps
def test_the_factored_form_is_the_dense_map() -> None:
    v, a, g = basis(6, 3), torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64), matrix()
    dense = (v * a) @ v.T + 0.7 * (torch.eye(6, dtype=torch.float64) - v @ v.T)
    torch.testing.assert_close(Subspace(v, a, 0.7).right(g), g @ dense)
    torch.testing.assert_close(Subspace(v, a, 0.7).right(g, 2), Subspace(v, a, 0.7).right(g))  # one basis: rows do not matter


def test_null_space() -> None:
    m, g = null_space(basis(6, 3)), matrix()
    once = m.right(g)
    assert float((once @ m.basis).abs().max()) < 1e-14
    torch.testing.assert_close(m.right(once), once)
    assert float(once.norm()) <= float(g.norm())


def test_curvature_is_the_damped_inverse_where_all_pairs_are_kept() -> None:
    v, values, mu, g = basis(6, 6), torch.linspace(3, 0.1, 6, dtype=torch.float64), 0.3, matrix()
    wanted = g @ torch.linalg.inv((v * values) @ v.T + mu * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(inverse(v, values, mu).right(g), wanted)
    torch.testing.assert_close(damped(v, values, mu).right(g), mu * wanted)


def test_window_damping_is_one_on_flat_stretches() -> None:
    scale = window_damped(basis(6, 5), torch.tensor([4.0, 4.0, 4.0, 1.0, 0.0], dtype=torch.float64), 3).scale
    torch.testing.assert_close(scale, torch.tensor([1.0, 1.0, 1.0, 1 / 3, 0.0], dtype=torch.float64))


def test_maps_of_one_basis_compose_and_others_do_not() -> None:
    v, values, g = basis(6, 3), torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64), matrix()
    a, b = inverse(v, values, 0.1), window_damped(v, values)
    torch.testing.assert_close(a.then(b).right(g), b.right(a.right(g)))
    with pytest.raises(ValueError, match="share one basis to compose"):
        a.then(null_space(basis(6, 3, seed=1)))


def test_rows_with_bases_of_their_own() -> None:
    bases, g = [basis(6, k, k) for k in (1, 3, 2, 0)], matrix()
    got = null_space(rows(bases)).right(g)
    for j, v in enumerate(bases):
        torch.testing.assert_close(got[j], g[j] - v @ (v.T @ g[j]))
    torch.testing.assert_close(null_space(rows(bases)).right(g[1:3], 1), got[1:3])


def test_two_sides_and_the_joint_block() -> None:
    u, v, g = basis(4, 2, 1), basis(6, 3), matrix()
    left, right = null_space(u), null_space(v)
    pu, pv = u @ u.T, v @ v.T
    eye = torch.eye(4, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(Projection(left=left, right=right).apply(g), (eye[0] - pu) @ g @ (eye[1] - pv))
    torch.testing.assert_close(Projection(left=left).apply(g), (eye[0] - pu) @ g)
    torch.testing.assert_close(Projection(left=left, right=right, joint=True).apply(g), g - pu @ g @ pv)


def test_high_block() -> None:
    w, g = matrix(5, 5), matrix(5, 5, 1)
    assert float(high_block(w, 5).apply(g).abs().max()) < 1e-13  # everything is high: frozen
    u, _, vh = torch.linalg.svd(w)
    assert float((u[:, :2].T @ high_block(w, 2).apply(g) @ vh[:2].T).abs().max()) < 1e-13


def test_every_bit_survives_encoding() -> None:
    right = damped(basis(6, 3), torch.ones(3).double(), 0.1)
    p = Projection(left=null_space(basis(4, 2, 1, torch.float32)), right=right, joint=True)
    q = Projection.decode(json.loads(json.dumps(p.encode())))
    for a, b in ((p.left, q.left), (p.right, q.right)):
        assert a is not None and b is not None
        assert torch.equal(a.basis, b.basis) and torch.equal(a.scale, b.scale)
        assert (a.rest, a.basis.dtype) == (b.rest, b.basis.dtype)
    assert q.joint
    empty = Projection.decode(Projection(right=null_space(basis(6, 0))).encode())
    assert empty.right is not None and empty.right.basis.shape == (6, 0) and empty.identity


def test_bad_maps() -> None:
    v, one = basis(6, 2), torch.ones(2, dtype=torch.float64)
    for call, text in (
            (lambda: Subspace(v, torch.ones(3).double()), r"scale of shape \(3,\), must be \(2,\)"),
            (lambda: Subspace(v.bfloat16(), one.bfloat16()), "must both be float32 or float64"),
            (lambda: Subspace(2 * v, one), "columns orthonormal to 3, must be so to 0.001; pass eigenvectors, or QR them"),
            (lambda: Subspace(v * float("nan"), one), "entries that are not finite"),
            (lambda: Subspace(torch.ones(2, 3), torch.ones(3)), "3 directions in 2 dimensions"),
            (lambda: Subspace(v, one, float("inf")), "rest=inf"),
            (lambda: damped(v, one, 0.0), "mu=0.0, must be a finite number > 0"),
            (lambda: inverse(v, one, -1.0), "mu=-1.0"), (lambda: window_damped(v, one, 0), "window=0"),
            (lambda: high_block(matrix(), 9), r"rank=9, must be in \[1, 4\]"), (lambda: Projection(), "neither left nor right"),
            (lambda: Projection(left=null_space(v), joint=True), "joint with one side"),
            (lambda: Projection(left=null_space(rows([v, v]))), "a basis for each row on the left")):
        with pytest.raises(ValueError, match=text):
            call()


# -------------------------------------------------------------------------------------------------------- optimizer
NULL = {"0.weight": Projection(right=null_space(basis(6, 3, dtype=torch.float32)))}

NULL_OF_FIVE = Projection(right=null_space(basis(5, 1, dtype=torch.float32)))


def moved(model: nn.Module, start: list[Tensor]) -> Tensor:
    """How far the first weight has moved along the protected directions."""
    side = NULL["0.weight"].right
    assert side is not None
    return ((next(model.parameters()).detach() - start[0]) @ side.basis).abs().max()


def test_protected_directions_do_not_move_under_sgd() -> None:
    for cls, options in ((Sub, {}), (Mix, {"rho": 0.1, "max_norm": 0.5})):
        model = small_net()
        start = weights(model)
        train(model, cls(model, lr=0.3, projections=NULL, **options), 0, 5)
        assert moved(model, start) < 1e-6 and float((weights(model)[0] - start[0]).norm()) > 1e-2


def test_only_update_space_holds_under_adam_with_decay() -> None:
    ends = {}
    for space in ("grad", "update"):
        model = small_net()
        start = weights(model)
        train(model, SubAdam(model, lr=0.05, weight_decay=0.1, projections=NULL, space=space), 0, 50)
        ends[space] = moved(model, start)
    assert ends["update"] < 1e-6 < 1e-2 < ends["grad"]


def test_the_high_block_stays_for_fifty_steps_of_adam() -> None:
    model = small_net()
    start = weights(model)[0]
    block = high_block(start, 2)
    train(model, SubAdam(model, lr=0.05, projections={"0.weight": block}, space="update"), 0, 50)
    assert block.left is not None and block.right is not None
    change = weights(model)[0] - start
    assert float((block.left.basis.T @ change @ block.right.basis).abs().max()) < 1e-6 and float(change.norm()) > 0.1


def test_one_step_in_closed_form() -> None:
    model, other = small_net(), small_net()
    damp = damped(basis(5, 3, 2, torch.float32), torch.tensor([1.0, 0.5, 0.1]), 0.2)
    maps = {"0.weight": Projection(left=damp), "2.weight": Projection(left=null_space(basis(3, 1, 4, torch.float32)), right=damp)}
    train(model, Sub(model, lr=0.3, projections=maps, strength=0.25), 0, 1)
    start = weights(other)
    train(other, torch_sgd(other), 0, 1)
    for (name, p), q, w in zip(model.named_parameters(), weights(other), start, strict=True):
        g = (w - q) / 0.3
        wanted = w - 0.3 * (g + 0.25 * (maps[name].apply(g) - g)) if name in maps else q
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-5, atol=1e-6)


def torch_sgd(model: nn.Module) -> Any:
    return type("Bare", (SubspaceProjection, torch.optim.SGD), {})(model, lr=0.3)


@pytest.mark.parametrize("space", ["grad", "update"])
def test_nothing_to_do_leaves_every_bit(space: str) -> None:
    ends = []
    identity = {"0.weight": Projection(right=Subspace(basis(6, 2, dtype=torch.float32), torch.ones(2)))}
    for options in ({}, {"projections": NULL, "strength": 0.0}, {"projections": {}}, {"projections": identity}):
        model = small_net()
        train(model, Sub(model, lr=0.3, momentum=0.9, space=space, **options), 0, 4)
        ends.append(weights(model))
    assert all(same(e, ends[0]) for e in ends[1:])


@pytest.mark.parametrize("space", ["grad", "update"])
def test_a_resumed_run_has_the_same_projections(space: str) -> None:
    model = small_net()
    opt = SubAdam(model, lr=0.05, space=space)
    opt.set_projections(NULL)
    train(model, opt, 0, 2)
    saved, twin = copy.deepcopy(opt.state_dict(weights=True)), small_net(5)
    json.dumps(saved["everbatch"]["meta"])
    other = SubAdam(twin, lr=0.05, space=space)
    other.load_state_dict(saved)
    train(model, opt, 2, 4)
    train(twin, other, 2, 4)
    assert same(weights(model), weights(twin)) and list(other.projections) == ["0.weight"]
    opt.set_projections({})
    assert opt.projections == {} and copy.deepcopy(other).projections.keys() == {"0.weight"}


def test_bases_are_tensors_of_the_state_and_text_of_old_ones_is_read() -> None:
    model, maps = small_net(), {**NULL, "2.weight": high_block(small_net()[2].weight, 1)}
    opt = Sub(model, lr=0.3, projections=maps)
    saved = opt.state_dict(weights=True)
    meta, tensors = saved["everbatch"]["meta"], saved["everbatch"]["tensors"]
    assert torch.equal(tensors["SubspaceProjection.bases/0.weight/right.basis"], opt.projections["0.weight"].right.basis)
    assert len(json.dumps(meta["mixins"])) < 600  # base64 of these bases alone would be 700
    # What was written before bases were tensors: outlines with the bases in them, as text.
    old = {k: t for k, t in tensors.items() if not k.startswith("SubspaceProjection")}
    then = {**meta, "mixins": {"SubspaceProjection": {"factors": {"by_name": {n: p.encode() for n, p in maps.items()}}}}}
    twins = [small_net(5), small_net(6)]
    ends = [Sub(twins[0], lr=0.3), Sub(twins[1], lr=0.3, projections={"2.weight": NULL_OF_FIVE})]
    ends[0].load_state_dict({"everbatch": {"meta": json.loads(json.dumps(meta)), "tensors": tensors}})
    ends[1].load_state_dict({"everbatch": {"meta": json.loads(json.dumps(then)), "tensors": old}})
    for net, one in [(model, opt), *zip(twins, ends, strict=True)]:
        train(net, one, 0, 3)
    assert same(weights(twins[0]), weights(model)) and same(weights(twins[1]), weights(model))
    assert ends[1].state_dict()["everbatch"]["tensors"].keys() == opt.state_dict()["everbatch"]["tensors"].keys()
    lost = {k: t for k, t in tensors.items() if not k.endswith("right.scale")}
    with pytest.raises(CheckpointMismatch, match=r"tensors \['0.weight/right.scale', '2.weight/right.scale'\] of Sub"):
        ends[0].load_state_dict({"everbatch": {"meta": meta, "tensors": lost}})


def test_a_checkpoint_holds_bases_once_as_tensors(tmp_path: Path) -> None:
    maps = {"0.weight": Projection(right=null_space(rows([basis(6, k, k, torch.float32) for k in (1, 0, 2, 3, 1)]))),
            "2.weight": Projection(right=null_space(basis(5, 0, dtype=torch.float32)))}
    model, twin = small_net(), small_net(5)
    opt, other = Sub(model, lr=0.3, projections=maps), Sub(twin, lr=0.3)
    pieces, meta = optimizer_state.pieces(opt)
    checkpoint.save(tmp_path, 3, pieces, {"optimizer": meta}, world=World())
    kept = checkpoint.latest(tmp_path, world=World())
    assert kept is not None and "SubspaceProjection.bases/0.weight/right.basis" in kept.names()
    optimizer_state.load_pieces(other, kept, kept.meta["optimizer"])
    train(model, opt, 0, 2)
    train(twin, other, 0, 2)
    assert same(weights(model), weights(twin)) and other.projections["2.weight"].identity


def test_stale_momentum_can_be_projected() -> None:
    model = small_net()
    opt = Sub(model, lr=0.1, momentum=0.9)
    train(model, opt, 0, 2)
    opt.set_projections(NULL, project_moments=True)
    start = weights(model)
    train(model, opt, 2, 6)
    assert moved(model, start) < 1e-6


def test_a_skipped_step_changes_nothing() -> None:
    model = small_net()
    opt = SubAdam(model, lr=0.05, projections=NULL, space="update")
    train(model, opt, 0, 2)
    before = weights(model)
    train(model, opt, 2, 3, scale=float("nan"))
    assert same(weights(model), before) and opt.skipped_count == 1


def test_a_convolution_is_a_matrix_of_flattened_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten())
    v = basis(8, 3, dtype=torch.float32)
    opt = Sub(model, lr=0.5, projections={"0.weight": Projection(right=null_space(v))})
    start = weights(model)[0]

    def closure() -> None:
        opt.backward(model(torch.ones(1, 2, 4, 4).cumsum(-1)).square().mean())

    opt.step(closure)
    change = (weights(model)[0] - start).flatten(1)
    assert float((change @ v).abs().max()) < 1e-5 and float(change.norm()) > 1e-2


def test_a_frozen_matrix_is_passed_over() -> None:
    model = small_net()
    opt = Sub(model, lr=0.1, projections=NULL)
    model[0].weight.requires_grad_(False)
    start = weights(model)
    train(model, opt, 0, 2)
    assert torch.equal(weights(model)[0], start[0]) and not torch.equal(weights(model)[2], start[2])


def test_bad_options() -> None:
    good = NULL["0.weight"]
    for options, text in (({"space": "state"}, "space='state', must be 'grad' or 'update'"), ({"strength": 1.5}, "strength=1.5"),
                          ({"projections": {"9.weight": good}}, "has '9.weight', must name a trained parameter; did you mean"),
                          ({"projections": {"2.weight": good}}, "right of 2.weight has width 6, must be 5; is the matrix stored"),
                          ({"projections": {"0.bias": good}}, r"0.bias of shape \(5,\), must have two dimensions")):
        with pytest.raises(ValueError, match=text):
            Sub(small_net(), lr=0.1, **options)
    with pytest.raises(CompositionError, match="ClipGradNorm must stand to the left of SubspaceProjection"):
        type("Wrong", (SubspaceProjection, ClipGradNorm, torch.optim.SGD), {})
    late = type("Late", (SubspaceProjection, EMA, torch.optim.SGD), {})
    with pytest.raises(CompositionError, match="EMA must stand to the left of SubspaceProjection"):
        late(small_net(), lr=0.1, space="update")


def test_pruned_weights_stay_zero_where_updates_are_projected() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    opt = compose(DynamicSparsity, SubspaceProjection, base=torch.optim.AdamW)(
        model, lr=0.1, density=0.3, drop_fraction=0.0, space="update",
        projections={"0.weight": Projection(right=null_space(basis(6, 2, dtype=torch.float32)))})
    masks = opt.whole_masks()
    train(model, opt, 0, 3)
    assert not model[0].weight[~masks["0.weight"]].any() and model[0].weight[masks["0.weight"]].all()


def test_ranks_compare_bases_however_they_lie() -> None:
    """One column cut from a row: contiguous to torch, with a stride that bytes cannot be read by."""
    column = torch.arange(17.0).view(1, 17).T
    assert column.is_contiguous() and column.stride(-1) != 1
    assert _hash({}, {"basis": column}) == _hash({}, {"basis": torch.arange(17.0)[:, None]})
    assert _hash({}, {"basis": column}) != _hash({}, {"basis": torch.arange(17.0)})
