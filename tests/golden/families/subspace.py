"""`osft_analytic`, `grip_analytic`, `same_paper_equations_analytic`: the projections that the surgery papers share."""

from __future__ import annotations

import torch
from torch import Tensor

from everbatch.optim.subspace.routing import corrected, margins, routed
from everbatch.optim.subspace.second_moment import SecondMoment
from everbatch.optim.subspace.splits import spectral_split
from everbatch.optim.subspace.transforms import Projection, damped, high_block, inverse, null_space, rows, window_damped
from golden.comparison import Array, Comparison, Vectors

__all__ = ["check_grip", "check_osft", "check_same"]


def check_osft(file: Vectors, compare: Comparison) -> None:
    """Weight space: the high-high block goes. Factor space: each factor stays orthogonal to its frozen one."""
    rank = file.integer("k_high")
    block = high_block(_t(file["W"]), rank)
    compare.close("grad_W_projected", block.apply(_t(file["grad_W"])), file["grad_W_projected"])
    left, right = Projection(left=block.left), Projection(right=block.right)
    compare.close("grad_U_low_projected", left.apply(_t(file["grad_U_low"])), file["grad_U_low_projected"])
    compare.close("grad_V_low_projected", right.apply(_t(file["grad_V_low"])), file["grad_V_low_projected"])
    compare.close("singular_values", torch.linalg.svdvals(_t(file["W"])), file["singular_values"])


def check_grip(file: Vectors, compare: Comparison) -> None:
    """The equality projection: each row of the router has the inputs that chose its expert for a basis. Who chose whom, the
    margins, and the correction afterwards."""
    x, selected, least = _t(file["X"]), _t(file["selected"]), float(file["eps_null"])
    bases = []
    for expert in range(len(file["theta"])):
        _, sigma, vh = torch.linalg.svd(x[(selected == expert).any(1)], full_matrices=False)
        bases.append(vh[sigma.square() > least].T)
    compare.close("subspace_ranks", [b.shape[1] for b in bases], file["subspace_ranks"])
    equality = null_space(rows(bases))
    compare.close("delta_equality_projected", equality.right(_t(file["delta"])), file["delta_equality_projected"])
    scores = x @ _t(file["theta"]).T
    sent = routed(scores, file.integer("top_k"))
    compare.close("selected", sent.nonzero()[:, 1].view(selected.shape), selected.sort(1).values.numpy())
    compare.close("tau_margin_with_inf", margins(scores, sent), file["tau_margin_with_inf"])
    fitted, _ = corrected(_t(file["theta"]), x, _t(file["X_unlearned"]), float(file["ridge"]))
    compare.close("theta_ptc", fitted, file["theta_ptc"])  # the file's own error is a third of the tolerance


def check_same(file: Vectors, compare: Comparison) -> None:
    """The running second moment, and the router and curvature rules at each energy share and power of the file."""
    moment = SecondMoment(file["X_padded"].shape[-1], dtype=torch.float64)
    for x, count, want in zip(file["X_padded"], file["X_counts"], file["C_after"], strict=True):
        moment.update(_t(x)[: int(count)])
        compare.close("C_after", moment.matrix, want)
    every = spectral_split(moment.matrix, 1.0)
    compare.close("eigenvalues_desc", every.values, file["eigenvalues_desc"])
    g, window = _t(file["grad"]), file.integer("window")
    compare.close("full_inverse_mu0_05", inverse(every.basis, every.values, 0.05).right(g), file["full_inverse_mu0_05"])
    for key in [k for k in file.arrays if k.endswith("_k")]:
        at = key.removesuffix("_k")
        share, power = at.split("_")
        split = spectral_split(moment.matrix, int(share[1:]) / 1000, float(power[1:]))
        compare.close(key, split.rank, file[key])
        rules = {"router_paper": window_damped(split.basis, split.values, window), "router_nullspace": null_space(split.basis)}
        for mu in (0.05, 0.9):
            rules[f"curv_mu{mu}"] = inverse(split.basis, split.values, mu)
            rules[f"curv_normalised_mu{mu}"] = damped(split.basis, split.values, mu)
        for name, rule in rules.items():
            compare.close(f"{at}_{name}", rule.right(g), file[f"{at}_{name}"])


def _t(value: Array) -> Tensor:
    return torch.as_tensor(value)
