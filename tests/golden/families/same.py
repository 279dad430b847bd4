"""`same_*`: the layer with experts as the paper has it, and what the released code computes in its place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everbatch.nn.experts import MoELoRALinear, Routing, leading
from everbatch.optim.subspace.transforms import Subspace, inverse
from everbatch.train.same.released import Activation, curvature_released, kept_rank, router_released, sketch
from golden.comparison import Array, Comparison, Vectors

__all__ = ["check_activation", "check_curvature", "check_forward", "check_layer", "check_router", "check_sketch", "check_trace"]


def check_forward(file: Vectors, compare: Comparison) -> None:
    """The paper's layer, all weights and two, and what preconditions the outer matrices."""
    x = _t(file["x"])
    for name, top_k in (("dense", None), ("top2", 2)):
        layer = _layer(file["W0"], None, file["router"], file["A"], file["B"], float(file["scaling"]), top_k=top_k)
        compare.close(f"weights_{name}", _n(layer.weigh(x)), file[f"weights_{name}"])
        compare.close(f"y_{name}", _n(layer(x)), file[f"y_{name}"])
    second = x.T @ x / len(x)
    inner = _t(file["A"]) @ second @ _t(file["A"]).mT
    made = []
    for gradient, matrix in zip(_t(file["grad_B"]), inner, strict=True):
        values, vectors = torch.linalg.eigh(matrix)
        made.append(inverse(vectors, values, float(file["mu"])).right(gradient))
    compare.close("grad_B_preconditioned", torch.stack(made), file["grad_B_preconditioned"])


def check_layer(file: Vectors, compare: Comparison) -> None:
    """One weight vector for a batch, products across experts, and the second router's prior."""
    layer = _layer(file["base_weight"], file["base_bias"], file["router_weight"], file["A"], file["B"], float(file["scaling"]),
                   top_k=file.integer("topk"), routing="batch")
    x = _t(file["x"])
    compare.close("train_routing", _n(layer.weigh(x)[0, 0]), file["train_routing"])
    compare.close("y_train_first_step", _n(layer(x)), file["y_train_first_step"])
    layer.prior = _t(file["eval_router_prior"])
    with torch.no_grad():
        compare.close("y_eval", layer(x), file["y_eval"])


def check_router(file: Vectors, compare: Comparison) -> None:
    """The damping of the router's gradient, by at most a fifth; none before the start."""
    for at in _cases(file):
        basis, deviations, energy, gradient = _factors(file, at)
        assert float(file[f"{at}_scaling_factor"]) == 0.2
        compare.close(f"{at}_k", kept_rank(deviations, energy), file[f"{at}_k"])
        rule = router_released(basis, deviations, energy, file.integer(f"{at}_window"))
        compare.close(f"{at}_grad_out", rule.right(gradient), file[f"{at}_grad_out"])
        compare.close(f"{at}_grad_before_start_step", gradient, file[f"{at}_grad_before_start_step"])


def check_curvature(file: Vectors, compare: Comparison) -> None:
    """The experts' gradient, as it is in the first task and scaled in later ones."""
    for at in _cases(file):
        basis, deviations, energy, gradient = _factors(file, at)
        compare.close(f"{at}_k", kept_rank(deviations, energy), file[f"{at}_k"])
        rule = curvature_released(basis, deviations, energy, float(file[f"{at}_mu"]))
        compare.close(f"{at}_grad_out", rule.right(gradient), file[f"{at}_grad_out"])
        compare.close(f"{at}_grad_task0", gradient, file[f"{at}_grad_task0"])


def check_sketch(file: Vectors, compare: Comparison) -> None:
    """The range of one batch's covariance: the subspace, and deviations in the order of the columns."""
    for at in _cases(file):
        x, draw = _t(file[f"{at}_X"]), _t(file[f"{at}_Q"])
        basis, deviations = sketch(x, draw)
        want = file[f"{at}_U"]
        compare.close(f"{at}_U", basis @ basis.T, want @ want.T)
        compare.close(f"{at}_S", deviations, file[f"{at}_S"])
        compare.close(f"{at}_alpha", len(x), file[f"{at}_alpha"])
        compare.close(f"{at}_max_components", draw.shape[1], file[f"{at}_max_components"])


def check_activation(file: Vectors, compare: Comparison) -> None:
    """Moving averages, scores, masks and the latch, forward by forward; the two leading weights beside a prior."""
    probs = _t(file["router_probs"])
    held = Activation.fresh(probs.shape[-1], probs, float(file["tau"]), float(file["ema"]))
    compare.close("init_value", held.utilisation[0], file["init_value"])
    for t, (x, weights) in enumerate(zip(_t(file["x"]), probs, strict=True)):
        mean = weights.mean(0) * held.active
        compare.close("masked_mean_routing_before_update", mean / mean.sum(), file["masked_mean_routing_before_update"][t])
        held.update(weights.mean(0), (weights * x.square().sum(1, keepdim=True)).mean(0), file.integer("cur_task"))
        for name, value in (("utilization", held.utilisation), ("importance", held.importance), ("scores", held.scores),
                            ("masks", held.active), ("all_frozen", torch.tensor(float(held.latched)))):
            compare.close(name, value, file[name][t])
    likely = _t(file["topk_probs_in"]) * _t(file["topk_router_prior"])
    chosen = leading(likely / likely.sum(1, keepdim=True), 2, 1e-8)
    compare.close("topk_out", chosen, file["topk_out"])


def check_trace(file: Vectors, compare: Comparison) -> None:
    """Two tasks of SGD with both rules acting on the gradients."""
    layer = _layer(file["base_weight"], None, file["router0"], file["A0"], file["B0"], float(file["scaling"]), routing="batch")
    # There the averages begin at 1/E in single precision.
    held = Activation.fresh(layer.num_experts, torch.empty(0), float(file["tau"]))
    held.utilisation, held.importance = held.utilisation.double(), held.importance.double()
    steps, lr = file.integer("steps_per_task"), float(file["lr"])
    energy, mu, window = float(file["energy"]), float(file["mu"]), file.integer("window")
    before: tuple[Tensor, Tensor] | None = None
    now: tuple[Tensor, Tensor] | None = None
    for t, (x, target) in enumerate(zip(_t(file["x"]), _t(file["target"]), strict=True)):
        task, within = divmod(t, steps)
        if within == 0:
            before, now = now, sketch(x, _t(file["sketch_Q"])[task])
        assert now is not None
        compare.close("cov_U", now[0] @ now[0].T, file["cov_U"][t] @ file["cov_U"][t].T)
        compare.close("cov_S", now[1], file["cov_S"][t])
        y = layer(x)
        compare.close("y", _n(y), file["y"][t])
        weights = functional_weights(layer, x)
        held.update(weights.mean(0), (weights * x.square().sum(1, keepdim=True)).mean(0), task)
        compare.close("importance_after_step", held.importance, file["importance_after_step"][t])
        layer.zero_grad()
        (y - target).square().mean().backward()
        rules: dict[str, Subspace] = {}
        if within + 1 >= file.integer("start_step"):
            rules["router"] = router_released(*now, energy, window)
        if before is not None:
            rules |= {f"down_{i}": curvature_released(*before, energy, mu) for i in range(layer.num_experts)}
        for name in layer.names:
            parameter = layer.get_parameter(name)
            assert parameter.grad is not None
            if name in rules:
                parameter.grad = rules[name].right(parameter.grad)
        experts = range(layer.num_experts)
        compare.close("router_grad_after_hook", _g(layer, "router"), file["router_grad_after_hook"][t])
        compare.close("A_grad_after_hook", torch.stack([_g(layer, f"down_{i}") for i in experts]), file["A_grad_after_hook"][t])
        with torch.no_grad():
            for name in layer.names:
                layer.get_parameter(name).sub_(_g(layer, name), alpha=lr)
        compare.close("router_after_step", _n(layer.get_parameter("router")), file["router_after_step"][t])
        for kind, key in (("down", "A_after_step"), ("up", "B_after_step")):
            made = torch.stack([layer.get_parameter(f"{kind}_{i}") for i in experts])
            compare.close(key, _n(made), file[key][t])


def functional_weights(layer: MoELoRALinear, x: Tensor) -> Tensor:
    """Weights of each token, before the mean over the batch."""
    with torch.no_grad():
        return nn.functional.linear(x, layer.get_parameter("router")).softmax(-1)


def _layer(weight: Array, bias: Array | None, router: Array, a: Array, b: Array, scaling: float, *, top_k: int | None = None,
           routing: Routing = "token") -> MoELoRALinear:
    """A layer with these matrices."""
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float64)
    made = MoELoRALinear(base, len(a), a.shape[1], alpha=scaling * len(a) * a.shape[1], top_k=top_k, routing=routing)
    values = {"weight": weight, "router": router, **({} if bias is None else {"bias": bias})}
    values |= {f"down_{i}": m for i, m in enumerate(a)} | {f"up_{i}": m for i, m in enumerate(b)}
    made.load_state_dict({name: _t(value) for name, value in values.items()})
    return made


def _cases(file: Vectors) -> list[str]:
    return [f"c{i}" for i in range(file.integer("n_cases"))]


def _factors(file: Vectors, at: str) -> tuple[Tensor, Tensor, float, Tensor]:
    return _t(file[f"{at}_U"]), _t(file[f"{at}_S"]), float(file[f"{at}_energy"]), _t(file[f"{at}_grad_in"])


def _g(layer: MoELoRALinear, name: str) -> Tensor:
    gradient = layer.get_parameter(name).grad
    assert gradient is not None
    return gradient


def _n(t: Tensor) -> Array:
    return t.detach().numpy()


def _t(value: Array) -> Tensor:
    return torch.as_tensor(value)
