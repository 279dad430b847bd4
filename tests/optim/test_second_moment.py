"""Second moments: exact whatever the batching, and the directions that carry them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from everbatch.optim.subspace.second_moment import LowRankSecondMoment, SecondMoment
from everbatch.optim.subspace.splits import (
    NoFreeSubspace,
    NonFiniteStatistics,
    free_split,
    spectral_split,
)


def data(rows: int = 60, width: int = 7, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=g, dtype=torch.float64) * torch.linspace(3, 0.2, width, dtype=torch.float64) + 0.5


@pytest.mark.parametrize("centred", [False, True])
def test_any_batching_and_any_order_of_merging_is_the_whole(centred: bool) -> None:
    x = data()
    away = x - x.mean(0) if centred else x
    want = away.T @ away / len(x)
    for sizes in ([60], [1, 9, 20, 30], [30, 30]):
        parts = []
        for rows in x.split(sizes):
            parts.append(SecondMoment(7, centred=centred, dtype=torch.float64))
            parts[-1].update(rows.view(len(rows), 1, 7))
        for order in (parts, parts[::-1]):
            whole = SecondMoment(7, centred=centred, dtype=torch.float64)
            for part in order:
                whole.merge(part)
            torch.testing.assert_close(whole.matrix, want, rtol=1e-12, atol=1e-12)
            assert whole.count == 60.0
            if centred:
                torch.testing.assert_close(whole.mean, x.mean(0), rtol=1e-12, atol=1e-12)


def test_reduce_decay_and_state() -> None:
    x, y = data(40), data(20, seed=1)
    moment = SecondMoment(7, dtype=torch.float64)
    assert not moment.valid and torch.equal(moment.matrix, torch.zeros(7, 7, dtype=torch.float64))
    moment.update(x)
    with pytest.raises(RuntimeError, match="call reduce"):
        moment.state_dict()
    moment.reduce()
    moment.decay(0.5)
    twin = SecondMoment(7, dtype=torch.float64)
    twin.load_state_dict(moment.state_dict())
    for m in (moment, twin):
        m.update(y)
        assert m.count == 40.0
        torch.testing.assert_close(m.matrix, (0.5 * x.T @ x + y.T @ y) / 40)


def test_masked_rows_and_a_few_bad_ones_are_left_out() -> None:
    x = data(300)
    x[5, 2] = float("nan")
    mask = torch.ones(300, dtype=torch.bool)
    mask[10:20] = False
    moment = SecondMoment(7, dtype=torch.float64)
    moment.update(x, mask)
    kept = x[mask & torch.isfinite(x).all(1)]
    assert (moment.count, moment.dropped) == (289.0, 1)
    torch.testing.assert_close(moment.matrix, kept.T @ kept / 289)
    x[:9] = float("inf")
    with pytest.raises(NonFiniteStatistics, match="9 of 300 rows are not finite, must be at most 1 %"):
        moment.update(x)


def test_an_update_does_not_wait_for_the_device() -> None:
    """Other devices: nothing is read back in an update; too many bad rows are refused when a number is asked for."""
    moment, x = SecondMoment(7, device="meta"), torch.ones(300, 7, device="meta")
    moment.update(x)  # a meta tensor raises wherever its number is read
    moment.update(x, torch.ones(300, dtype=torch.bool, device="meta"))
    SecondMoment(7, centred=True, device="meta").update(x)
    with pytest.raises(RuntimeError, match="meta"):
        _ = moment.count


def test_low_rank_is_exact_within_its_rank_and_always_in_its_trace() -> None:
    g = torch.Generator().manual_seed(0)
    low = torch.randn(90, 3, generator=g, dtype=torch.float64) @ torch.randn(3, 7, generator=g, dtype=torch.float64)
    for x, exact in ((low, True), (data(90), False)):
        sketch, full = LowRankSecondMoment.empty(7, 4, torch.float64), SecondMoment(7, dtype=torch.float64)
        for rows in x.split([5, 25, 60]):
            sketch.update(rows)
            full.update(rows)
        assert sketch.basis.shape == (7, 4)
        assert abs(sketch.trace - float(full.matrix.trace())) < 1e-11
        if exact:
            assert sketch.rest < 1e-12
            torch.testing.assert_close((sketch.basis * sketch.values) @ sketch.basis.T, full.matrix, rtol=1e-11, atol=1e-11)
        share = spectral_split((sketch.basis * sketch.values) @ sketch.basis.T, 1.0, max_rank=2, total=sketch.trace).share
        assert abs(share - float(sketch.values[:2].sum()) / sketch.trace) < 1e-12


def test_a_split_has_the_share_asked_for() -> None:
    q = torch.linalg.qr(data(6, 6))[0]
    values = torch.tensor([5.0, 2.0, 2.0 * (1 - 1e-9), 0.9, 0.1, 0.0], dtype=torch.float64)
    c = (q * values) @ q.T
    for delta, power, rank in ((0.5, 1.0, 1), (0.6, 1.0, 3), (0.89, 1.0, 3), (0.95, 1.0, 4), (1.0, 1.0, 5), (0.7, 2.0, 1)):
        split = spectral_split(c, delta, power)
        assert split.rank == rank, (delta, power)  # the two equal ones come together
        assert split.share >= delta - 1e-12
        torch.testing.assert_close(split.values, values[:rank], rtol=1e-6, atol=1e-12)
        assert bool((split.basis.gather(0, split.basis.abs().argmax(0, keepdim=True)) > 0).all())
    assert spectral_split(c, 0.95, max_rank=2).rank == 2
    assert spectral_split(torch.zeros(4, 4)).rank == 0
    assert spectral_split(c.float(), 0.9).basis.dtype == torch.float32


def test_a_split_refuses_what_is_no_second_moment() -> None:
    for value in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="delta"):
            spectral_split(torch.eye(3), value)
    with pytest.raises(ValueError, match="must be positive semidefinite"):
        spectral_split(torch.diag(torch.tensor([1.0, -0.5])))
    with pytest.raises(NonFiniteStatistics):
        spectral_split(torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match="must be square"):
        spectral_split(torch.ones(2, 3))
    with pytest.warns(UserWarning, match="max_rank=5 is clipped to the width 3"):
        spectral_split(torch.eye(3), max_rank=5)
    with pytest.warns(UserWarning, match="rank=9 is clipped"):
        assert LowRankSecondMoment.empty(4, 9).rank == 4


def test_room_to_learn_is_left() -> None:
    c = torch.diag(torch.arange(32, 0, -1).double())
    assert free_split(c, 1.0).rank == 30 and free_split(c, 1.0, min_free=5).rank == 27
    assert free_split(c, 0.1).rank == spectral_split(c, 0.1).rank
    with pytest.raises(NoFreeSubspace, match="needs 32 of 32 directions, must leave 2 free"):
        free_split(c, 1.0, pinned=True)


def test_bad_values() -> None:
    for call, text in ((lambda: SecondMoment(0), "width=0"), (lambda: SecondMoment(3, dtype=torch.bfloat16), "must be float32"),
                       (lambda: SecondMoment(3).update(torch.ones(2, 4)), "must end in 3"),
                       (lambda: SecondMoment(3).decay(0.0), "decay=0.0"),
                       (lambda: SecondMoment(3).merge(SecondMoment(3, centred=True)), "same width and centring"),
                       (lambda: SecondMoment(3).update(torch.ones(2, 3), torch.ones(3)), "a mask of shape")):
        with pytest.raises(ValueError, match=text):
            call()
