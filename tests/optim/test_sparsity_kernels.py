"""Kernels of dynamic sparse training: densities, selection over shards, pruning, growth, schedules, accounting, export."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn

from everbatch import seeds
from everbatch.errors import UnsupportedHost
from everbatch.optim.sparsity import (
    Schedule,
    SparseLinear,
    account,
    draw_mask,
    drop_fraction,
    erdos_renyi,
    exact_counts,
    fits_two_four,
    layer_densities,
    layer_flops,
    maskable,
    scaled_interval,
    sparsify,
    uniform,
    violations,
    weight_modules,
)
from everbatch.optim.sparsity.grow import grow, random_keys, shares
from everbatch.optim.sparsity.prune import Layer, dsr_threshold, num_dropped, prune
from everbatch.optim.sparsity.select import Piece, choose

SHAPES = {"a": (300, 784), "b": (100, 300), "c": (10, 100), "d": (16, 3, 5, 5)}


def alone(value: Tensor) -> Tensor:
    return value


# ------------------------------------------------------------------------------------------------------- densities
@pytest.mark.parametrize("density", [0.02, 0.1, 0.35, 0.8, 0.99])
@pytest.mark.parametrize("kernel", [True, False])
def test_the_fix_point_keeps_the_density(density: float, kernel: bool) -> None:
    got = erdos_renyi(SHAPES, density, kernel=kernel)
    size = {n: math.prod(s) for n, s in SHAPES.items()}
    assert math.isclose(sum(got[n] * size[n] for n in SHAPES), density * sum(size.values()), rel_tol=1e-12)
    assert all(0 < d <= 1 for d in got.values())


def test_densities_grow_with_the_density() -> None:
    rows = [erdos_renyi(SHAPES, d) for d in (0.01, 0.05, 0.2, 0.5, 0.9, 1.0)]
    assert all(low[n] <= high[n] for low, high in zip(rows, rows[1:], strict=False) for n in SHAPES)


def test_erk_does_not_depend_on_the_layout() -> None:
    turned = {n: tuple(reversed(s)) for n, s in SHAPES.items()}
    assert erdos_renyi(SHAPES, 0.1) == erdos_renyi(turned, 0.1)


def test_own_densities_and_the_dense_first_layer() -> None:
    got = layer_densities(SHAPES, 0.1, distribution="uniform", first_dense=True, own={"[bc]": 0.5})
    assert got == {"a": 1.0, "b": 0.5, "c": 0.5, "d": 0.1}
    assert uniform({"a": (3, 4)}, 0.5, first_dense=True) == {"a": 0.5}


@pytest.mark.parametrize("min_fan_in", [False, True])
def test_counts_are_exact(min_fan_in: bool) -> None:
    densities = erdos_renyi(SHAPES, 0.013)
    counts = exact_counts(SHAPES, densities, min_fan_in=min_fan_in)
    assert sum(counts.values()) == round(0.013 * sum(math.prod(s) for s in SHAPES.values()))
    assert all(abs(counts[n] - densities[n] * math.prod(SHAPES[n])) < 2 for n in SHAPES)
    tiny = exact_counts(SHAPES, dict.fromkeys(SHAPES, 1e-9), min_fan_in=min_fan_in)
    assert tiny == ({n: s[0] for n, s in SHAPES.items()} if min_fan_in else dict.fromkeys(SHAPES, 1))


def test_first_masks_are_functions_of_their_key() -> None:
    mask = draw_mask((40, 30), 200, (3, "mask", 1, "a"))
    assert int(mask.sum()) == 200 and torch.equal(mask, draw_mask((40, 30), 200, (3, "mask", 1, "a")))
    assert not torch.equal(mask, draw_mask((40, 30), 200, (3, "mask", 2, "a")))
    rows = draw_mask((40, 30), 50, (3, "mask", 1, "a"), min_fan_in=True)
    assert int(rows.sum()) == 50 and bool(rows.any(1).all())
    chance = draw_mask((400, 300), 1, (0,), density=0.3)
    assert abs(int(chance.sum()) - 36_000) < 5 * math.sqrt(36_000 * 0.7)


# ------------------------------------------------------------------------------------------------------- selection
@pytest.mark.parametrize("ties", ["first", "last", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("coarse", [False, True])
def test_choice_is_that_of_a_sort_at_any_sharding(ties: str, dtype: torch.dtype, coarse: bool) -> None:
    for trial in range(20):
        g = torch.Generator().manual_seed(trial)
        sizes = [17, 300, 9]
        scores = [(torch.randint(-2, 3, (n,), generator=g) if coarse else torch.randn(n, generator=g)).to(dtype) for n in sizes]
        scores[0][:2] = torch.tensor([0.0, -0.0])
        scores[1][3] = math.inf
        candidates = [torch.rand(n, generator=g) < 0.7 for n in sizes]
        counts = torch.stack([torch.randint(0, int(c.sum()) + 3, (), generator=g) for c in candidates])
        pieces, where = [], []
        for i, n in enumerate(sizes):
            cuts = [0, *sorted(torch.randint(0, n, (2,), generator=g).tolist()), n]
            for a, b in zip(cuts, cuts[1:], strict=False):
                pieces.append(Piece(i, a, scores[i][a:b], candidates[i][a:b]))
                where.append(i)
        got = choose(pieces, counts, alone, span=300, dtype=dtype, ties=ties)
        for i in range(3):
            mine = torch.cat([m for m, j in zip(got, where, strict=True) if j == i])
            assert torch.equal(mine, sort_choice(scores[i], candidates[i], int(counts[i]), ties)), (trial, i)


def sort_choice(scores: Tensor, candidates: Tensor, count: int, ties: str) -> Tensor:
    order = [i for i in range(len(scores)) if candidates[i]]
    order.sort(key=lambda i: (-float(scores[i]), -i if ties == "last" else i))
    chosen = torch.zeros_like(candidates)
    chosen[order[:count]] = True
    if ties == "all" and 0 < count < len(order):
        chosen |= candidates & (scores == scores[order[count - 1]])
    return chosen


def test_priority_beats_the_score() -> None:
    rank = torch.tensor([0, 1, 1, 0], dtype=torch.uint8)
    piece = Piece(0, 0, torch.tensor([5.0, 1, 2, 3]), torch.ones(4, dtype=torch.bool), rank)
    for count, want in ((1, [0, 0, 1, 0]), (3, [1, 1, 1, 0])):
        got, = choose([piece], torch.tensor([count]), alone, span=4, dtype=torch.float32, ranked=True)
        assert got.tolist() == [bool(w) for w in want]


# ------------------------------------------------------------------------------------------------ prune and grow
def layer(weight: list[float], active: list[int] | None = None, gradient: list[float] | None = None) -> Layer:
    w = torch.tensor(weight)
    return Layer("w", 0, 0, 0, w, torch.ones_like(w, dtype=torch.bool) if active is None else torch.tensor(active).bool(),
                 None if gradient is None else torch.tensor(gradient))


def indices(mask: Tensor) -> list[int]:
    return mask.nonzero().view(-1).tolist()


def test_set_drops_the_weights_around_zero() -> None:
    x = layer([0.1, 0.5, -0.05, -0.7, 0.2, -0.3])
    got, = prune([x], [num_dropped(6, 1 / 3)], [6], alone, criterion="set")
    assert indices(got) == [0, 2]
    got, = prune([layer([1.0, 2.0, -3.0])], [3], [3], alone, criterion="set")
    assert indices(got) == [0, 1, 2]  # two of each sign, clipped to what exists


def test_pruning_by_other_criteria() -> None:
    x = layer([1.0, -2.0, 3.0, 0.5], gradient=[1.0, 0.1, 0.0, 4.0])
    assert indices(prune([x], [2], [4], alone, criterion="taylor")[0]) == [1, 2]
    assert indices(prune([x], [1], [4], alone, criterion="soft")[0]) == [0]
    x.average = torch.tensor([3.0, -1.0, 2.0, -4.0])
    assert indices(prune([x], [1], [4], alone, criterion="momentum")[0]) == [1]


def test_ties_drop_the_last_positions_or_all() -> None:
    x = layer([1.0, 0.0, 0.0, 2.0, 0.0], active=[1, 1, 1, 1, 0])
    assert indices(prune([x], [1], [5], alone)[0]) == [2]
    assert indices(prune([x], [1], [5], alone, all_ties=True)[0]) == [1, 2]


def test_one_threshold_over_layers_leaves_each_its_best() -> None:
    small, large = layer([0.1, 0.2]), layer([3.0, 4.0, 5.0])
    large.index, large.offset = 1, 2
    a, b = prune([small, large], [1, 1], [2, 3], alone, across=True)
    assert indices(a) == [0] and indices(b) == [0]


def test_growth_takes_the_largest_gradients_and_ignores_active_ones() -> None:
    x = layer([0.0] * 5, active=[1, 0, 0, 0, 0], gradient=[9.0, -3.0, 1.0, 0.0, 2.0])
    assert indices(grow([x], [x.active], [2], [5], alone, criterion="gradient", key=())[0]) == [1, 4]
    assert indices(grow([x], [x.active], [9], [5], alone, criterion="gradient", key=())[0]) == [1, 2, 3, 4]
    barred = [torch.tensor([0, 1, 0, 0, 0]).bool()]
    assert indices(grow([x], [x.active], [2], [5], alone, criterion="gradient", key=(), forbidden=barred)[0]) == [2, 4]


def test_random_growth_is_keyed_by_position() -> None:
    active = torch.zeros(1000, dtype=torch.bool)
    whole = Layer("w", 0, 0, 0, torch.zeros(1000), active)
    parts = [Layer("w", 0, 0, 0, torch.zeros(300), active[:300]), Layer("w", 0, 300, 0, torch.zeros(700), active[300:])]
    one = grow([whole], [active], [77], [1000], alone, criterion="random", key=(1, "grow"))[0]
    two = grow(parts, [p.active for p in parts], [77], [1000], alone, criterion="random", key=(1, "grow"))
    assert int(one.sum()) == 77 and torch.equal(one, torch.cat(two))
    torch.manual_seed(5)
    torch.rand(9)
    assert torch.equal(one, grow([whole], [active], [77], [1000], alone, criterion="random", key=(1, "grow"))[0])
    keys = random_keys(torch.ones(5, dtype=torch.bool), 7, (3,))
    assert torch.equal(keys, torch.from_numpy(seeds.uniform_keys(torch.arange(7, 12).numpy(), 3)))


def test_shares_are_whole_and_capped() -> None:
    assert shares([3, 5], [10, 10], [7, 5], [0, 0], "layer") == [3, 5]
    assert shares([4, 4], [100, 100], [30, 10], [0, 0], "survivors") == [6, 2]
    assert shares([4, 4], [100, 100], [30, 10], [1.0, 3.0], "momentum") == [2, 6]
    got = shares([10, 10], [12, 100], [5, 5], [99.0, 1.0], "momentum")
    assert got == [11, 9]  # floor(.99 * 12), the rest elsewhere
    assert sum(shares([2, 3], [3, 2], [1, 1], [1.0, 0.0], "momentum")) == 5
    assert shares([2, 2], [9, 9], [1, 1], [0.0, 0.0], "momentum") == [2, 2]


def test_dsr_adapts_its_threshold() -> None:
    assert [dsr_threshold(1.0, n, 100) for n in (80, 100, 120)] == [2.0, 1.0, 0.5]


# ------------------------------------------------------------------------------------------------------- schedule
def test_schedules() -> None:
    assert drop_fraction(0, 100, 0.3) == 0.3 and drop_fraction(50, 100, 0.3) == pytest.approx(0.15, rel=1e-15)
    assert drop_fraction(100, 100, 0.3, floor=0.1) == 0.1
    assert drop_fraction(25, 100, 0.4, anneal="linear") == pytest.approx(0.3)
    assert drop_fraction(9, 1, 0.4, anneal="constant") == 0.4
    plan = Schedule(interval=4, start=0.3, total=16, stop=0.75, score_steps=2)
    assert [t for t in range(1, 17) if plan.due(t)] == [4, 8]  # 12 = .75 * 16 is the first step without
    assert [t for t in range(1, 17) if plan.scoring(t)] == [3, 4, 7, 8]
    endless = Schedule(interval=3, start=0.3, anneal="constant", begin=3)
    assert [t for t in range(1, 13) if endless.due(t)] == [6, 9, 12]
    assert scaled_interval(100, 4096, 1024) == 400 and scaled_interval(100, 64, 4096) == 2


# ------------------------------------------------------------------------------------------------------ accounting
@functools.cache
def resnet50() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        return torchvision.models.resnet50()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("density", "published", "plain"),
                         [(0.2, 0.42, 0.23), (0.1, 0.24, 0.13), (0.05, 0.12, 0.08), (0.035, 0.09, None)])
def test_flops_of_resnet50_are_the_published_ones(density: float, published: float, plain: float | None) -> None:
    model, x = resnet50(), torch.empty(1, 3, 224, 224, device="meta")
    shapes = maskable({n: tuple(p.shape) for n, p in model.named_parameters()}, model)
    got = account(model, x, layer_densities(shapes, density))
    assert len(shapes) == 54 and got.dense == 2 * 4_089_184_256 and got.rest == 0
    assert abs(got.inference_ratio - published) <= 0.01
    if plain is not None:
        flat = account(model, x, layer_densities(shapes, density, distribution="uniform", first_dense=True))
        assert abs(flat.inference_ratio - plain) <= 0.01
    weights = sum(math.prod(s) for s in shapes.values())
    assert abs(got.active - (got.parameters - weights + density * weights)) <= len(shapes)


def test_flops_of_layers_and_of_training() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6 * 16, 5))
    got = layer_flops(model, torch.zeros(7, 4, 6, 6))
    assert got == {"0.weight": 2 * 16 * (6 * 2 * 9), "2.weight": 2 * 96 * 5}
    sparse = account(model, torch.zeros(7, 4, 6, 6), {"0.weight": 0.25})
    dense, left = sparse.dense, sparse.sparse
    assert left == 0.25 * got["0.weight"] + got["2.weight"]
    assert [sparse.training(m) for m in ("dense", "set", "snfs")] == [3 * dense, 3 * left, 2 * left + dense]
    assert sparse.training("rigl", 9) == (27 * left + 2 * left + dense) / 10
    assert sparse.training_ratio("static") == left / dense
    with pytest.raises(ValueError, match="method='adam'"):
        sparse.training("adam")
    with pytest.raises(ValueError, match="densities of \\['1.weight'\\]"):
        account(model, torch.zeros(1, 4, 6, 6), {"1.weight": 0.5})


def test_what_is_maskable() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 4))
            self.embed = nn.Embedding(9, 4)
            self.norm = nn.LayerNorm((2, 4))
            self.attend = nn.MultiheadAttention(4, 2)
            self.tied = nn.Linear(4, 9)
            self.tied.weight = self.embed.weight
            self.head = nn.Linear(4, 3)

    model = Net()
    assert list(weight_modules(model)) == ["attend.in_proj_weight", "attend.out_proj.weight", "head.weight"]
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert list(maskable(shapes, model, exclude=("attend.*",))) == ["head.weight"]
    assert list(maskable(shapes, None, include=("token", "h*.weight"))) == ["token", "head.weight"]
    for include, exclude, text in ((("hed.*",), (), "fits no parameter"), (("head.bias",), (), "two dimensions"),
                                   ((), ("*",), "no layer to mask")):
        with pytest.raises(ValueError, match=text):
            maskable(shapes, model, include=include, exclude=exclude)
    with pytest.raises(ValueError, match="without their module.*pass the module"):
        maskable(shapes, None)


# ---------------------------------------------------------------------------------------------------------- export
def masked_net() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))
    masks = {n: torch.rand(p.shape) < 0.4 for n, p in model.named_parameters() if p.dim() > 1}
    return model, masks


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state", "ignore:Sparse invariant checks are implicitly")
def test_exports_compute_the_same() -> None:
    model, masks = masked_net()
    x = torch.randn(5, 2, 4, 4)
    assert violations(model, masks) == ["0.weight", "2.weight", "4.weight"]
    dense, csr = sparsify(model, masks), sparsify(model, masks, form="csr")
    assert violations(dense, masks) == [] and violations(model, masks)
    assert isinstance(csr[2], SparseLinear) and csr[2].weight.layout == torch.sparse_csr  # type: ignore[index]
    assert csr[2].weight.values().numel() == int(masks["2.weight"].sum())  # type: ignore[index]
    torch.testing.assert_close(csr(x), dense(x), rtol=1e-5, atol=1e-6)  # sums of 12 float32 in another order
    single = sparsify(model[4], {"weight": masks["4.weight"]}, form="csr")  # type: ignore[index]
    assert isinstance(single, SparseLinear)


def test_two_four_is_checked_and_refused() -> None:
    assert fits_two_four(torch.tensor([[0.0, 1, 2, 0, 0, 0, 0, 1]])) and not fits_two_four(torch.tensor([[1.0, 1, 2, 0]]))
    assert not fits_two_four(torch.zeros(2, 6)) and not fits_two_four(torch.zeros(2, 2, 4))
    model = nn.Sequential(nn.Linear(8, 4))
    bad = {"0.weight": torch.ones(4, 8, dtype=torch.bool)}
    with pytest.raises(ValueError, match="more than 2 of 4 neighbours"):
        sparsify(model, bad, form="2:4")
    good = {"0.weight": torch.tensor([1, 1, 0, 0] * 8).view(4, 8).bool()}
    with pytest.raises(UnsupportedHost, match="compute capability 8.0"):
        sparsify(model, good, form="2:4")
    with pytest.raises(ValueError, match="form='coo'"):
        sparsify(model, good, form="coo")
    with pytest.raises(ValueError, match="masks of \\['1.weight'\\]"):
        sparsify(model, {"1.weight": good["0.weight"]})


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor is in prototype stage")
def test_two_four_computes_the_same() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a CUDA device of compute capability 8.0")
    model = nn.Sequential(nn.Linear(128, 128, bias=False)).cuda().half()
    masks = {"0.weight": torch.tensor([1, 0, 0, 1]).repeat(128, 32).bool()}
    x = torch.randn(64, 128, device="cuda", dtype=torch.half)
    with torch.no_grad():
        torch.testing.assert_close(sparsify(model, masks, form="2:4")(x), sparsify(model, masks)(x), rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(("call", "text"), [
    (lambda: erdos_renyi(SHAPES, 0.0), "density=0.0, must be in \\(0, 1\\]"),
    (lambda: erdos_renyi(SHAPES, 1.5), "density=1.5"),
    (lambda: erdos_renyi(SHAPES, 0.1, power=0.0), "power=0.0"),
    (lambda: layer_densities(SHAPES, 0.1, own={"z": 0.5}), "'z' fits no layer"),
    (lambda: layer_densities(SHAPES, 0.1, own={"a": 0.0}), "a=0.0, must be in \\(0, 1\\]"),
    (lambda: layer_densities(SHAPES, 0.1, distribution="snip"), "distribution='snip'"),
    (lambda: Schedule(interval=0, start=0.3), "update_every=0"),
    (lambda: Schedule(interval=4, start=1.3, anneal="constant"), "drop_fraction=1.3"),
    (lambda: Schedule(interval=4, start=0.3, anneal="constant", score_steps=4),
     "score_steps=4, must be an integer in \\[1, update_every=4\\)"),
    (lambda: Schedule(interval=4, start=0.3), "anneal='cosine' without total_steps"),
    (lambda: scaled_interval(0, 1, 1), "scaled_interval"),
])
def test_bad_input(call: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()  # type: ignore[operator]
