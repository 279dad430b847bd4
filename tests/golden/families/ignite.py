"""`lb_ignite*`: the surrogate-norm constraint on a small Gaussian regression net, over SGD and Keras' Adam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from everbatch.optim import Ignite
from golden.comparison import Comparison, FormatError, Tolerance, Vectors

__all__ = ["check"]


class KerasAdam(torch.optim.Optimizer):
    """Adam as Keras 2.15 has it: w -= lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["t"] += 1
                state["m"].lerp_(p.grad, 0.1)
                state["v"].lerp_(p.grad.square(), 0.001)
                rate = group["lr"] * (1 - 0.999 ** state["t"]) ** 0.5 / (1 - 0.9 ** state["t"])
                p.sub_(rate * state["m"] / (state["v"].sqrt() + 1e-7))


class Surrogate(nn.Module):
    """Dense layers of the file, leaky ReLU between them; outputs a mean and a squashed log standard deviation."""

    def __init__(self, init: dict[str, Any], slope: float) -> None:
        super().__init__()
        self.names = list(dict.fromkeys(name.split(".")[0] for name in init if "." in name))
        for name in self.names:
            layer = nn.Module()
            for part in ("kernel", "bias"):
                layer.register_parameter(part, nn.Parameter(torch.from_numpy(init[f"{name}.{part}"].copy())))
            self.add_module(name, layer)
        for name in ("max_logstd", "min_logstd"):
            self.register_parameter(name, nn.Parameter(torch.from_numpy(init[name].copy())))
        self.slope = slope

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i, name in enumerate(self.names):
            layer = self.get_submodule(name)
            x = x @ layer.kernel + layer.bias
            if i < len(self.names) - 1:
                x = nn.functional.leaky_relu(x, self.slope)
        mean, log = x.chunk(2, dim=1)
        log = self.max_logstd - nn.functional.softplus(self.max_logstd - log)
        return mean, self.min_logstd + nn.functional.softplus(log - self.min_logstd)


def check(file: Vectors, compare: Comparison) -> None:
    """Run all steps; compare weights, multiplier, mean output, its gradient and the likelihood after each."""
    hp, x, y = file.hp(), file["x"], file["y"]
    compare.floats = Tolerance.of(x.dtype)
    init = file.under("init/")
    multiplier = float(init.pop("lambda", hp["lambda0"]))
    model = Surrogate(init, hp["leaky_relu_slope"])
    if hp.get("base", "sgd") not in ("sgd", "adam"):
        raise FormatError(f"base {hp['base']!r} in hp_json, must be sgd or adam")
    adam = hp.get("base") == "adam" or "_adam_" in file.path.name
    fixed = hp["variant"] == "IGNITE2"
    options = {"rho": hp["rho"], "radius": hp["r"], "multiplier": multiplier, "project": False,
               "rate": 0.0 if fixed else hp["eta_lambda"], "budget": 0.0 if fixed else hp["epsilon"]}
    opt: Any = type("Recorded", (Ignite, KerasAdam if adam else torch.optim.SGD), {})(model, lr=hp["lr"], **options)
    for t, (inputs, targets) in enumerate(zip(x, y, strict=True), start=1):
        _step(opt, model, torch.from_numpy(inputs.copy()), torch.from_numpy(targets.copy()), file, compare, t)


def _step(opt: Any, model: Surrogate, x: Tensor, y: Tensor, file: Vectors, compare: Comparison, t: int) -> None:
    seen: dict[str, Any] = {}

    def closure() -> Tensor:
        mean, log = model(x)
        loss = (0.5 * ((y.view_as(mean) - mean) / log.exp()).square() + log + 0.5 * torch.log(torch.tensor(2 * torch.pi))).mean()
        opt.backward(loss)
        return loss

    def output() -> Tensor:
        mean = model(x)[0].mean()
        opt.backward(mean)
        if not seen:
            seen.update({s.name: g.clone() for s, g in opt.host.gradient()}, mean=mean.detach())
        return mean

    loss = opt.step(closure, output=output)
    state = opt.states[Ignite].multiplier
    compare.close(f"step{t}/nll_mean", loss.numpy(), file[f"step{t}/nll_mean"])
    compare.close(f"step{t}/G", seen["mean"].numpy(), file[f"step{t}/G"])
    compare.close(f"step{t}/gradG_norm", opt.metrics["ignite_output_gradient_norm"].numpy(), file[f"step{t}/gradG_norm"])
    compare.close(f"step{t}/lambda", state.numpy(), file[f"step{t}/lambda"])
    for name, want in file.under(f"step{t}/gradG/").items():
        if want.size:
            compare.close(f"step{t}/gradG/{name}", seen[name].numpy(), want)
        elif name in seen and seen[name].abs().max() > 0:
            raise FormatError(f"step{t}/gradG/{name} is empty, and the library found a gradient there")
    for name, want in file.under(f"step{t}/param/").items():
        compare.close(f"step{t}/param/{name}", dict(model.named_parameters())[name].detach().numpy(), want)
