"""The sharpness family on quadratics, where every step has a closed form, and at the edges of its options."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everbatch import compose
from everbatch.optim import ASAM, ESAM, GSAM, SAM, WSAM, GradientNorm, Ignite, LookSAM, StaleSAM
from everbatch.optim.sharpness.esam import select_samples
from processes import Zygote

CURVATURE = torch.tensor([1.0, 10.0], dtype=torch.float64)
RHO = 0.1 * math.sqrt(2)
FAMILY = [SAM, ASAM, GSAM, GradientNorm, WSAM, LookSAM, StaleSAM]


class Bowl(nn.Module):
    """L(w) = 1/2 w' diag(curvature) w, whose gradient at w + e is curvature * (w + e)."""

    def __init__(self, start: tuple[float, ...] = (1.0, 0.1), curvature: Tensor = CURVATURE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.curvature = curvature

    def forward(self) -> Tensor:
        return 0.5 * (self.curvature * self.weight.square()).sum()


def gradients(part: type, options: dict[str, Any], *, model: Bowl | None = None, steps: int = 1, lr: float = 0.0,
              **auxiliary: Any) -> list[Tensor]:
    """The gradient each step handed to SGD."""
    seen: list[Tensor] = []

    class Watched(part, torch.optim.SGD):  # type: ignore[misc, valid-type]
        def update(self) -> None:
            seen.append(torch.cat([g.reshape(-1).clone() for _, g in self.host.gradient()]))
            super().update()

    model = model or Bowl()
    opt = Watched(model, lr=lr, **options)

    def closure() -> Tensor:
        loss = model()
        opt.backward(loss)
        return loss

    for _ in range(steps):
        opt.step(closure, **{name: make(opt, model) for name, make in auxiliary.items()})
    return seen


def same(got: Tensor, want: tuple[float, ...]) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-6)


def test_closed_forms_on_a_quadratic() -> None:
    # g = (1, 1), e = (0.1, 0.1), h = (1.1, 2.0)
    same(gradients(SAM, {"rho": RHO})[0], (1.1, 2.0))
    same(gradients(GradientNorm, {"radius": RHO, "mix": 0.8})[0], (1.08, 1.8))
    same(gradients(GSAM, {"rho": RHO, "alpha": 0.5})[0], (0.927255, 2.095010))
    same(gradients(WSAM, {"rho": RHO, "gamma": 0.6})[0], (1.15, 2.5))  # a = 1.5
    first, second = gradients(LookSAM, {"rho": RHO, "alpha": 0.7, "every": 2}, steps=2)
    same(first, (1.1, 2.0))
    gain = 0.7 * math.sqrt(2) / math.sqrt(2 * 0.45**2)  # g_v = (-0.45, 0.45)
    same(second, (1 - 0.45 * gain, 1 + 0.45 * gain))


def test_gsam_keeps_the_perturbed_slope() -> None:
    f, h = gradients(GSAM, {"rho": RHO, "alpha": 0.4})[0], torch.tensor([1.1, 2.0], dtype=torch.float64)
    torch.testing.assert_close(f @ h, h @ h)


def test_isotropic_quadratic_has_no_gap_and_no_direction() -> None:
    bowl = torch.full((2,), 3.0, dtype=torch.float64)
    assert torch.allclose(gradients(GSAM, {"rho": RHO}, model=Bowl(curvature=bowl))[0],
                          gradients(SAM, {"rho": RHO}, model=Bowl(curvature=bowl))[0])
    off = gradients(LookSAM, {"rho": RHO, "every": 2}, model=Bowl(curvature=bowl), steps=2)[1]
    same(off, (3.0, 0.3))


def test_gradient_norm_is_exact_on_quadratics_in_one_dimension() -> None:
    bowl = Bowl((2.0,), torch.tensor([5.0], dtype=torch.float64))
    f = gradients(GradientNorm, {"radius": 0.1, "mix": 0.3}, model=bowl)[0]  # penalty 0.03: 5 w + 5 * 0.03
    same(f, (10.15,))


def test_gsam_radius_follows_the_learning_rate() -> None:
    options = {"rho": 0.4, "rho_min": 0.1, "lr_max": 0.2, "lr_min": 0.0, "alpha": 0.0}
    f = gradients(GSAM, options, lr=0.1)[0]  # radius 0.25
    same(f, (1 + 0.25 / math.sqrt(2), 1 + 2.5 / math.sqrt(2)))
    options = {"rho": 0.5, "rho_min": 0.25, "lr_max": 0.5, "lr_min": 0.25}
    for lr, rho in ((0.0, 0.25), (0.25, 0.25), (0.5, 0.5), (2.0, 0.5)):  # a warm-up begins below lr_min
        assert torch.equal(gradients(GSAM, options, lr=lr)[0], gradients(GSAM, {"rho": rho}, lr=lr)[0])


def test_adaptive_radius_is_measured_in_units_of_the_weights() -> None:
    model = Bowl()
    opt = compose(ASAM, base=torch.optim.SGD)(model, lr=0.0, rho=0.5, adaptive="elementwise")
    start, moved = model.weight.detach().clone(), []

    def closure() -> Tensor:
        moved.append(model.weight.detach().clone())
        loss = model()
        opt.backward(loss)
        return loss

    opt.step(closure)
    torch.testing.assert_close(((moved[1] - start) / start.abs()).norm(), torch.tensor(0.5, dtype=torch.float64))
    assert torch.equal(model.weight.detach(), start)


def test_stale_direction_costs_one_pass_and_is_tau_steps_old() -> None:
    # lr 0: h_0 = (1, 1) plain; then e = rho (1, 1)/sqrt 2 = (0.1, 0.1): h_1 = (1.1, 2); then along h_1
    calls = gradients(StaleSAM, {"rho": RHO, "tau": 1}, steps=3)
    same(calls[0], (1.0, 1.0))
    same(calls[1], (1.1, 2.0))
    e = RHO * torch.tensor([1.1, 2.0]) / math.hypot(1.1, 2.0)
    same(calls[2], (1 + e[0].item(), 1 + 10 * e[1].item()))
    delayed = gradients(StaleSAM, {"rho": RHO, "tau": 2}, steps=4)
    same(delayed[1], (1.0, 1.0))
    same(delayed[2], (1.1, 2.0))
    same(delayed[3], (1.1, 2.0))
    opt = compose(StaleSAM, base=torch.optim.SGD)(Bowl(), lr=0.1)
    assert opt.extra_passes() == 0


def test_ignite_closed_form_and_multiplier() -> None:
    def output(opt: Any, model: Bowl) -> Any:
        def run() -> Tensor:
            value = model()
            opt.backward(value)
            return value

        return run

    class Linear(Bowl):
        """L = b'w with b = (2, 3); the output G is the bowl."""

    model = Linear()
    seen: list[Tensor] = []

    class Watched(Ignite, torch.optim.SGD):
        def update(self) -> None:
            seen.append(model.weight.grad.clone())  # type: ignore[union-attr]
            super().update()

    opt: Any = Watched(model, lr=0.0, rho=0.5, radius=0.2, multiplier=0.1, rate=0.3, budget=0.4)

    def closure() -> Tensor:
        loss = (torch.tensor([2.0, 3.0], dtype=torch.float64) * model.weight).sum()
        opt.backward(loss)
        return loss

    opt.step(closure, output=output(opt, model))
    # u = (1, 1), n = sqrt 2: f = b + lambda rho A u / n, exactly, whatever r
    n = math.sqrt(2)
    same(seen[0], (2 + 0.1 * 0.5 * 1 / n, 3 + 0.1 * 0.5 * 10 / n))
    assert opt.states[Ignite].multiplier.item() == pytest.approx(0.1 + 0.3 * (0.5 * n - 0.4), abs=1e-12)


def test_ignite_multiplier_is_projected_unless_told() -> None:
    for project, sign in ((True, 0.0), (False, -1.0)):
        model = Bowl((1e-9, 1e-9))
        opt: Any = compose(Ignite, base=torch.optim.SGD)(model, lr=0.0, rate=1.0, budget=1.0, project=project)

        def closure(opt: Any = opt, model: Bowl = model) -> Tensor:
            loss = model()
            opt.backward(loss)
            return loss

        opt.step(closure, output=closure)
        value = opt.states[Ignite].multiplier.item()
        assert math.copysign(1.0, value) == -1.0 if sign else value == 0.0


class Routed(nn.Module):
    """Two experts, of which the sign of `router` picks one: the displaced pass picks the other. `dense` multiplies the one that
    is not picked by 0, so that every pass reaches every parameter; otherwise it has no gradient."""

    def __init__(self, *, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        self.router = nn.Parameter(torch.tensor([-0.01], dtype=torch.float64))
        self.experts = nn.ParameterList([torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 1.0]).double()])

    def forward(self) -> Tensor:
        picked = int(self.router.item() > 0)
        terms = [(w.square() * (3 + self.router)).sum() * float(i == picked) for i, w in enumerate(self.experts)]
        return terms[0] + terms[1] if self.dense else terms[picked]


def routed(part: type, options: dict[str, Any], *, dense: bool) -> tuple[dict[str, Tensor], Any]:
    """The final gradient of one step by name, and the optimizer."""
    seen: dict[str, Tensor] = {}

    class Watched(part, torch.optim.SGD):  # type: ignore[misc, valid-type]
        def update(self) -> None:
            seen.update({s.name: g.clone() for s, g in self.host.gradient()})
            super().update()

    model = Routed(dense=dense)
    opt: Any = Watched(model, lr=0.0, **options)
    reached = []

    def closure() -> Tensor:
        loss = model()
        opt.backward(loss)
        reached.append([n for n, p in model.named_parameters() if p.grad is not None])
        return loss

    opt.step(closure, **({"output": closure} if part is Ignite else {}))
    assert (reached[0] == reached[-1]) == dense
    return seen, opt


@pytest.mark.parametrize(("part", "options"), [
    (GSAM, {"alpha": 0.5}), (GradientNorm, {}), (WSAM, {}), (LookSAM, {"norms": "model"}), (LookSAM, {"norms": "tensor"}),
    (Ignite, {"multiplier": 1.0})])
def test_a_parameter_that_one_pass_does_not_reach_has_a_zero_gradient_there(part: type, options: dict[str, Any]) -> None:
    (got, ours), (want, theirs) = routed(part, options, dense=False), routed(part, options, dense=True)
    for name, f in want.items():
        assert torch.equal(got.get(name, torch.zeros_like(f)), f), name
    if part is LookSAM:
        kept, wanted = ours.states[part].direction, theirs.states[part].direction
        assert set(kept) == set(wanted) and all(torch.equal(kept[n], v) for n, v in wanted.items())
        assert kept["experts.1"].any()


def test_what_only_the_first_pass_reaches_takes_no_part_where_its_weight_is_zero() -> None:
    sam, wsam = routed(SAM, {}, dense=False)[0], routed(WSAM, {"gamma": 0.5}, dense=False)[0]
    assert set(sam) == set(wsam) == {"router", "experts.1"} and all(torch.equal(wsam[n], f) for n, f in sam.items())


@pytest.mark.parametrize("norms", ["model", "tensor"])
def test_looksam_leaves_a_gradient_without_a_kept_direction_as_it_is(norms: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"trunk": nn.Linear(3, 2), "0": nn.Linear(2, 1), "1": nn.Linear(2, 1)}).double()
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain: dict[str, Tensor] = {}
    final: dict[str, Tensor] = {}

    class Watched(LookSAM, torch.optim.SGD):
        def update(self) -> None:
            final.clear()
            final.update({s.name: g.clone() for s, g in self.host.gradient()})
            super().update()

    opt: Any = Watched(model, lr=0.0, norms=norms, every=5)
    for head in "01":
        def closure(head: str = head) -> Tensor:
            loss = model[head](model["trunk"](x).tanh()).square().sum()
            opt.backward(loss)
            plain.clear()
            plain.update({s.name: g.clone() for s, g in opt.host.gradient()})
            return loss

        opt.step(closure)
    assert set(final) == set(plain) == {"trunk.weight", "trunk.bias", "1.weight", "1.bias"}
    assert all(torch.equal(final[n], plain[n]) for n in ("1.weight", "1.bias"))
    v = {n: opt.states[LookSAM].direction[n] for n in ("trunk.weight", "trunk.bias")}

    def norm(of: dict[str, Tensor]) -> Tensor:
        return torch.cat([t.flatten() for t in of.values()]).norm()

    for n in v:
        gain = norm(plain) / (norm(v) + 1e-12) if norms == "model" else plain[n].norm() / (v[n].norm() + 1e-8)
        torch.testing.assert_close(final[n], plain[n] + 0.7 * gain * v[n], rtol=1e-12, atol=0)


def test_a_missing_objective_is_an_error_before_the_first_pass() -> None:
    opt: Any = compose(Ignite, base=torch.optim.SGD)(Bowl(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"Ignite needs opt.step\(closure, output="):
        opt.step(lambda: pytest.fail("the closure ran"))
    with pytest.raises(TypeError, match="outputs="):
        compose(SAM, base=torch.optim.SGD)(Bowl(), lr=0.1).step(lambda: pytest.fail("ran"), outputs=print)


def test_samples_that_rise_most_are_selected() -> None:
    before, after = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.1, 1.4, 1.3, 1.2])
    assert select_samples(before, after, 0.5).tolist() == [1]  # above the 2nd largest rise
    assert select_samples(before, after, 0.5, strict=False).tolist() == [1, 2]
    assert select_samples(before, before, 0.5).tolist() == [0, 1, 2, 3]  # nothing stands out: all
    assert select_samples(before, after, 0.1).tolist() == [0, 1, 2, 3]


def test_interval_perturbs_every_kth_step() -> None:
    seen = gradients(SAM, {"rho": RHO, "interval": 3}, steps=4)
    same(seen[0], (1.1, 2.0))
    same(seen[1], (1.0, 1.0))
    same(seen[2], (1.0, 1.0))
    same(seen[3], (1.1, 2.0))


@pytest.mark.parametrize(("part", "options"), [
    (SAM, {"rho": 0.0}), (ASAM, {"rho": 0.0}), (GSAM, {"rho": 0.0}), (GradientNorm, {"mix": 0.0}), (WSAM, {"gamma": 0.0}),
    (LookSAM, {"rho": 0.0}), (StaleSAM, {"rho": 0.0})])
def test_zero_strength_is_absent_bit_for_bit(part: type, options: dict[str, Any]) -> None:
    got = gradients(part, options, steps=5, lr=0.05)
    bare, model = [], Bowl()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(5):
        sgd.zero_grad()
        model().backward()
        assert model.weight.grad is not None
        bare.append(model.weight.grad.clone())
        sgd.step()
    assert all(torch.equal(a, b) for a, b in zip(got, bare, strict=True))


@pytest.mark.parametrize("part", FAMILY)
def test_a_zero_gradient_gives_a_plain_step(part: type) -> None:
    for f in gradients(part, {}, model=Bowl((0.0, 0.0)), steps=2, lr=0.1):
        assert torch.equal(f, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(("part", "options", "text"), [
    (SAM, {"rho": -0.1}, "rho=-0.1"), (SAM, {"rho": math.nan}, "rho=nan"), (SAM, {"interval": 0}, "interval=0"),
    (SAM, {"scope": "worker"}, "scope='worker'"), (SAM, {"delta": -1.0}, "delta=-1.0"), (SAM, {"group_size": 0}, "group_size=0"),
    (ASAM, {"rho": math.inf}, "rho=inf"), (ASAM, {"eta": -1.0}, "eta=-1.0"), (ASAM, {"adaptive": "yes"}, "adaptive='yes'"),
    (GSAM, {"alpha": 1.5}, "alpha=1.5"), (GSAM, {"rho_min": 0.01}, "lr_max=None"),
    (GSAM, {"rho": 0.1, "rho_min": 0.2, "lr_max": 1.0}, "rho_min=0.2"),
    (GradientNorm, {"radius": 0.0}, "radius=0.0"), (GradientNorm, {"mix": -0.1}, "mix=-0.1"), (WSAM, {"gamma": 1.0}, "gamma=1.0"),
    (LookSAM, {"every": 0}, "every=0"), (LookSAM, {"every": 2.5}, "every=2.5"), (LookSAM, {"alpha": 2.0}, "alpha=2.0"),
    (StaleSAM, {"tau": 0}, "tau=0"), (ESAM, {"gamma": 0.0}, "gamma=0.0"), (ESAM, {"beta": 0.0}, "beta=0.0"),
    (Ignite, {"radius": 0.0}, "radius=0.0"), (Ignite, {"rho": -1.0}, "rho=-1.0")])
def test_bad_options_name_themselves(part: type, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"{part.__name__}: {text}".replace("(", r"\(")):
        compose(part, base=torch.optim.SGD)(Bowl(), lr=0.1, **options)


def test_two_owners_of_the_perturbation_are_refused() -> None:
    with pytest.raises(TypeError, match="both own the perturbation"):
        compose(SAM, StaleSAM, base=torch.optim.SGD)


@pytest.mark.distributed
def test_a_group_averages_like_with_like_where_ranks_reach_different_parameters(tmp_path: Path, zygote: Zygote) -> None:
    """Each rank perturbs every parameter along the group's mean, also one that its own rows, or any rows, do not reach."""
    found = zygote.found(Path(__file__).parent / "sharpness_worker.py", tmp_path / "out.json", limit=120.0)
    assert len(found) == 9
    for case, ((moves, mean, collectives), (others, _, counted)) in found.items():
        gradients = [torch.tensor(g) for g in mean]
        length = torch.cat(gradients).norm()
        assert len(moves) == len(gradients) == 3 and collectives == counted == 1, case
        assert moves == others, case  # bit for bit: a text of a float32 is read back as it was
        for e, g in zip(moves, gradients, strict=True):
            torch.testing.assert_close(torch.tensor(e), g / length, rtol=1e-6, atol=0)


def test_state_survives_a_resume_bit_for_bit() -> None:
    for part, options in ((LookSAM, {"rho": RHO, "every": 3}), (StaleSAM, {"rho": RHO, "tau": 2})):
        cls: Any = compose(part, base=torch.optim.SGD)

        def run(model: Bowl, opt: Any, steps: int) -> None:
            for _ in range(steps):
                opt.step(lambda: (loss := model(), opt.backward(loss))[0])

        whole = Bowl()
        run(whole, cls(whole, lr=0.02, momentum=0.9, **options), 7)
        first = Bowl()
        opt = cls(first, lr=0.02, momentum=0.9, **options)
        run(first, opt, 4)
        second = Bowl((5.0, 5.0))
        again = cls(second, lr=0.5, momentum=0.9, **options)
        again.load_state_dict(opt.state_dict(weights=True))
        run(second, again, 3)
        assert torch.equal(second.weight, whole.weight), part.__name__
