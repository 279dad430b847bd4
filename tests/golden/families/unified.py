"""`unified_objective*`: Bregman divergences, the losses they reduce to, and the paper's unlearning steps on quadratics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from everbatch.objective import bregman as objectives
from everbatch.objective import table
from everbatch.optim import Refresh
from golden.comparison import Array, Comparison, FormatError, Vectors

__all__ = ["check"]


def check(file: Vectors, compare: Comparison) -> None:
    """Every case that the file holds, with all of its quantities."""
    cases = file.groups()
    for case in cases:
        values = {key: torch.from_numpy(value.copy()) for key, value in file.under(f"{case}/").items()}
        for key, got in {**_outputs(values), **_weights(values)}.items():
            compare.close(f"{case}/{key}", got.numpy(), file[f"{case}/{key}"])
        for key, got in _of_the_table(values).items():
            compare.close(f"{case}/{key} (table)", got.numpy(), file[f"{case}/{key}"])
        compare.close(f"{case}/refresh_traj", _trajectory(values), file[f"{case}/refresh_traj"])
    if not cases:
        raise FormatError("no case: keys are like 0/p")


def _outputs(v: dict[str, Tensor]) -> dict[str, Tensor]:
    """Terms in the outputs. `p` is a probability vector: its logarithm serves as logits."""
    p, q, y, new, old = v["p"], v["q"], v["y"], v["logits_new"], v["logits_old"]
    onehot = nn.functional.one_hot(y, len(p)).to(p)
    return {
        "bregman_negentropy_p_q": objectives.bregman(objectives.negative_entropy, p, q),
        "kl_p_q": objectives.kl_divergence(p, q),
        "ce": nn.functional.cross_entropy(p.log()[None], y[None]),
        "kl_onehot_p": objectives.kl_divergence(onehot, p),
        "kl_p_uniform": objectives.uniform_divergence(p.log()),
        "entropy_p": objectives.entropy(p.log()),
        "bregman_sqnorm": objectives.bregman(objectives.squared_norm, new, old),
        "sq_dist": objectives.squared_norm(new - old),
        "mse_loss_mean_over_all_elements": objectives.bregman(objectives.squared_norm, new, old) / new.numel(),
    }


def _weights(v: dict[str, Tensor]) -> dict[str, Tensor]:
    """Terms in the weights."""
    full, theta, old = v["F_full"], v["theta"], v["theta_old"]
    return {
        "bregman_fisher_full": objectives.bregman(objectives.quadratic_form(full), theta, old),
        "bregman_fisher_diag": objectives.quadratic_penalty(theta, old, full.diagonal()) / 2,
        "vcl_kl": objectives.gaussian_divergence(v["vcl_mu"], v["vcl_sigma"], v["vcl_mu_old"], v["vcl_sigma_old"]),
        "ncl_theta_next": objectives.natural_step(theta, v["ncl_grad"], old, full, v["ncl_lr"]),
    }


def _of_the_table(v: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by the terms of the methods, as optimizers evaluate them."""
    at = [("w", v["theta"])]
    (ewc,) = table.online_ewc(0.5, {"w": v["F_full"].diagonal()}, {"w": v["theta_old"]})
    spreads = {"w": v["vcl_sigma_old"].log()}, {"w": v["vcl_sigma"].log()}
    (vcl,) = table.vcl(1.0, 1, {"w": v["vcl_mu_old"]}, *spreads)
    logits, onto = v["p"].log()[None], v["logits_old"][None]
    (er,), (dark,), (cpr,) = table.er(1.0), table.dark_er(1.0), table.cpr(1.0)
    return {
        "bregman_fisher_diag": ewc.value(ewc.distance(at)),
        "vcl_kl": vcl.value(vcl.distance([("w", v["vcl_mu"])])),
        "ce": er.divergence.definition(logits, v["y"][None])[0],
        "kl_p_uniform": cpr.divergence.definition(logits, v["y"][None])[0],
        "mse_loss_mean_over_all_elements": dark.divergence.definition(v["logits_new"][None], onto)[0],
    }


def _trajectory(v: dict[str, Tensor]) -> Array:
    """The weights after each unlearning step of the mixin, which is seen by the pass that follows it."""
    model = nn.ParameterDict({"theta": nn.Parameter(v["theta"].clone())})
    steps, damping = len(v["refresh_noise"]), 1e-8
    opt: Any = _Recorded(model.named_parameters(), lr=0.0, unlearn_steps=steps, gamma=v["refresh_gamma"].item(), noise_scale=1.0,
                         damping=damping, estimator="given")
    opt.noise = v["refresh_noise"]
    opt.update_fisher(importance={"theta": v["refresh_Fdiag"] - damping})  # the file's F has no damping
    seen = []

    def closure() -> Tensor:
        seen.append(model["theta"].detach().clone())
        away = model["theta"] - v["refresh_c"]
        loss = 0.5 * away @ v["refresh_H"] @ away
        opt.backward(loss)
        return loss

    opt.step(closure)
    return torch.stack(seen[1:]).numpy()


class _Recorded(Refresh, torch.optim.SGD):
    """With the noise of the file."""

    noise: Tensor

    def refresh_noise(self, shard: Any, iteration: int) -> Tensor:
        return self.noise[iteration]
