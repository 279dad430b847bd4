"""What MOS is made of: merging, Gaussians of classes, the identity contrast, classifier alignment."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from everbatch import seeds
from everbatch.distributed import World
from everbatch.optim.subspace.splits import NonFiniteStatistics
from everbatch.train.mos.alignment import drawn, fit_head
from everbatch.train.mos.gaussians import RIDGE, Covariance, EmptyClass, Moments, Sampler
from everbatch.train.mos.merging import merge_, merges_per_step
from everbatch.train.mos.terms import TEMPERATURE, across, identity_contrast

FORMS: list[Covariance] = ["full", "diagonal", "low_rank"]


def test_merges_follow_their_closed_form() -> None:
    g = torch.Generator().manual_seed(0)
    begin, mean = (torch.randn(7, generator=g, dtype=torch.float64) for _ in range(2))
    one = begin.clone()
    for m in range(1, 6):
        merge_([one], [mean], 0.1)
        torch.testing.assert_close(one, 0.9**m * begin + (1 - 0.9**m) * mean, rtol=1e-14, atol=1e-15)
    at_once = begin.clone()
    merge_([at_once], [mean], 0.1, 5)
    torch.testing.assert_close(at_once, one, rtol=1e-14, atol=1e-15)
    still, off, whole = mean.clone(), begin.clone(), begin.clone()
    merge_([still], [mean], 0.1)
    merge_([off], [mean], 0.0)
    merge_([whole], [mean], 1.0)
    torch.testing.assert_close(still, mean, rtol=1e-15, atol=0)
    assert torch.equal(off, begin) and torch.equal(whole, mean)
    assert merges_per_step("step", 12) == 1 and merges_per_step("released", 12) == 13


class Ranks(World):
    """Two ranks in one process, each a thread."""

    _both = threading.Barrier(2)
    _given: list[Tensor] = []

    def sum(self, value: Tensor) -> Tensor:
        self._given.append(value.clone())
        self._both.wait()
        total = self._given[0] + self._given[1]
        self._both.wait()
        if self.rank == 0:
            self._given.clear()
        self._both.wait()
        return value.copy_(total)


def on_both(work: object) -> None:
    threads = [threading.Thread(target=work, args=(Ranks(rank, 2),)) for rank in range(2)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def samples(d: int = 5) -> tuple[Tensor, Tensor]:
    """Features far from zero, with rows that do not count."""
    g = torch.Generator().manual_seed(1)
    return 30.0 + torch.randn(24, d, generator=g) @ torch.randn(d, d, generator=g), torch.arange(24) % 3


@pytest.mark.parametrize("form", FORMS)
def test_gaussians_are_those_of_all_samples_on_any_number_of_ranks(form: Covariance) -> None:
    features, labels = samples()
    squares = "diagonal" if form == "diagonal" else "outer"
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def work(world: World) -> None:
        moments = Moments(3, squares)  # type: ignore[arg-type]
        for rows in torch.arange(world.rank, 24, 2).split(5):
            filled = torch.cat([rows, rows[:1]])
            real = torch.arange(len(filled)) < len(rows)
            moments.add(features[filled], labels[filled], real)
        moments.reduce(world)
        found[world.rank] = moments.means(), moments.spread(form, 2)

    on_both(work)
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))
    means, spread = found[0]
    for label in range(3):
        rows = features[labels == label].double()
        torch.testing.assert_close(means[label], rows.mean(0), rtol=1e-12, atol=0)
        whole = rows.T.cov() + RIDGE * torch.eye(5, dtype=torch.float64)
        if form == "full":
            torch.testing.assert_close(spread[label], whole, rtol=1e-9, atol=1e-10)
        elif form == "diagonal":
            torch.testing.assert_close(spread[label], whole.diagonal(), rtol=1e-9, atol=0)
        else:
            factor, rest = spread[label][:-1], spread[label][-1]
            kept = factor.T @ factor + rest.diag()
            torch.testing.assert_close(kept.diagonal(), whole.diagonal(), rtol=1e-9, atol=0)
            leading = torch.linalg.eigvalsh(whole)[-2:] - RIDGE
            torch.testing.assert_close(factor.square().sum(1), leading, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_drawn_has_the_gaussians_moments(form: Covariance) -> None:
    features, labels = samples(3)
    moments = Moments(3, "diagonal" if form == "diagonal" else "outer")
    moments.add(features, labels, torch.ones(24, dtype=torch.bool))
    means, spread = moments.means(), moments.spread(form, 3)
    count = 40_000
    x, y = Sampler(means, spread, form).draw(count, torch.Generator().manual_seed(0))
    for label in range(3):
        rows = x[y == label].double()
        wanted = {"full": lambda s: s, "diagonal": torch.diag, "low_rank": lambda s: s[:-1].T @ s[:-1] + s[-1].diag()}
        covariance = wanted[form](spread[label])
        error = (rows.mean(0) - means[label]) / (covariance.diagonal() / count).sqrt()
        assert error.abs().max() < 5
        assert (rows.T.cov() - covariance).norm() / covariance.norm() < 0.05


def test_a_covariance_of_fewer_samples_than_features_is_drawn_from() -> None:
    g = torch.Generator().manual_seed(0)
    moments = Moments(1, "outer")
    moments.add(5.0 * torch.randn(4, 32, generator=g), torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool))
    spread = moments.spread("full", 0).float()
    x, _ = Sampler(moments.means(), spread, "full").draw(100, g)
    assert x.isfinite().all()
    with pytest.raises(NonFiniteStatistics, match="covariance of class 0 is not positive definite"):
        Sampler(torch.zeros(1, 2), -torch.eye(2)[None], "full")


def test_classes_without_samples_or_with_one_are_told() -> None:
    moments = Moments(3, "outer")
    moments.add(torch.randn(3, 4), torch.tensor([0, 0, 1]), torch.ones(3, dtype=torch.bool))
    with pytest.raises(EmptyClass, match=r"MOS: classes \[12\] have no training sample"):
        moments.means(10)
    moments.add(torch.randn(2, 4), torch.tensor([2, 2]), torch.ones(2, dtype=torch.bool))
    with pytest.warns(UserWarning, match=r"classes \[11\] have one training sample each"):
        spread = moments.spread("full", 0, 10)
    torch.testing.assert_close(spread[1], RIDGE * torch.eye(4, dtype=torch.float64))
    moments.add(torch.full((1, 4), torch.inf), torch.tensor([1]), torch.ones(1, dtype=torch.bool))
    with pytest.raises(NonFiniteStatistics, match=r"classes \[1\]"):
        moments.reduce(World())


def test_the_contrast_over_ranks_is_that_of_all_rows() -> None:
    g = torch.Generator().manual_seed(0)
    rows, means = torch.randn(6, 4, generator=g, dtype=torch.float64), torch.randn(3, 4, generator=g, dtype=torch.float64)
    whole = rows.clone().requires_grad_()
    identity_contrast(whole, means).backward()
    assert whole.grad is not None
    shares: dict[int, tuple[Tensor, Tensor]] = {}

    def work(world: World) -> None:
        own = rows[3 * world.rank : 3 * world.rank + 3].clone().requires_grad_()
        share = across(own, means, world)
        share.backward()  # type: ignore[no-untyped-call]
        assert own.grad is not None
        shares[world.rank] = share.detach(), own.grad

    on_both(work)
    torch.testing.assert_close(torch.stack([shares[r][0] for r in (0, 1)]).mean(), identity_contrast(rows, means))
    torch.testing.assert_close(torch.cat([shares[r][1] for r in (0, 1)]) / 2, whole.grad)
    closed = (torch.cat([means, rows]) @ torch.cat([means, rows]).T / TEMPERATURE).log_softmax(1).diagonal().mean()
    torch.testing.assert_close(identity_contrast(rows, means), -closed)


def test_alignment_tells_drawn_classes_apart_and_leaves_the_others() -> None:
    means = 4.0 * torch.eye(3, 8)
    sampler = Sampler(means, torch.ones(3, 8), "diagonal")
    begin, bias = torch.zeros(5, 8), torch.zeros(5)
    epochs = [list(batches) for batches in drawn(sampler, 4, 10, seeds.generator(0))]
    assert [[len(y) for _, y in batches] for batches in epochs] == [[10, 10, 10]] * 4
    for batches in epochs:
        assert torch.bincount(torch.cat([y for _, y in batches])).tolist() == [10, 10, 10]
    weight, offset = fit_head(begin, bias, epochs, 4, seen=3, lr=0.1, weight_decay=0.0)
    x, y = sampler.draw(50, seeds.generator(1))
    assert (functional.linear(x, weight, offset)[:, :3].argmax(1) == y).float().mean() > 0.95
    assert offset is not None and torch.equal(weight[3:], begin[3:]) and torch.equal(offset[3:], bias[3:])
    assert torch.equal(begin, torch.zeros(5, 8)), "what is given stays"
    again, _ = fit_head(begin, None, drawn(sampler, 4, 10, seeds.generator(0)), 4, seen=3, lr=0.1, weight_decay=0.0)
    assert again.shape == begin.shape
