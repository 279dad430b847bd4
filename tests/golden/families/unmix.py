"""`unmixtns_*`: the layer of the released code, its momentum, TENT on top of it, and streams with labels in runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everbatch.data import dirichlet_order
from everbatch.nn import UnMixTNS, convert_unmix_tns
from everbatch.nn.unmix import momentum_of
from golden.comparison import Array, Comparison, Vectors

__all__ = ["check_layer", "check_momentum", "check_order", "check_tent", "check_vectors"]


def check_layer(file: Vectors, compare: Comparison) -> None:
    """Outputs, assignments and components batch by batch, and the gradients of the last."""
    layer = _layer(file, nn.BatchNorm2d)
    compare.close("layer_momentum", layer.step, file["layer_momentum"])
    compare.close("init_means", _n(layer.component_means), file["init_means"])
    compare.close("init_vars", _n(layer.component_vars), file["init_vars"])
    for t, given in enumerate(file["x"]):
        x = _t(given).requires_grad_()
        compare.close("assign_probs", layer.assignments(x.detach().mean((2, 3))), file["assign_probs"][t])
        y = layer(x)
        compare.close("y", _n(y), file["y"][t])
        compare.close("means_after", _n(layer.component_means), file["means_after"][t])
        compare.close("vars_after", _n(layer.component_vars), file["vars_after"][t])
    (y * _t(file["grad_r"])).sum().backward()
    compare.close("grad_x_last", _n(x.grad), file["grad_x_last"])
    compare.close("grad_weight_last", _n(layer.weight.grad), file["grad_weight_last"])
    compare.close("grad_bias_last", _n(layer.bias.grad), file["grad_bias_last"])


def check_vectors(file: Vectors, compare: Comparison) -> None:
    """Inputs without positions take the source's statistics, every time."""
    layer = _layer(file, nn.BatchNorm1d)
    compare.close("y_first", _n(layer(_t(file["x"]))), file["y_first"])
    compare.close("y_second", _n(layer(_t(file["x"]))), file["y_second"])


def check_momentum(file: Vectors, compare: Comparison) -> None:
    """By batch size."""
    for momentum, rows, most, want in file["columns_bnmom_bs_bsmax_lambda"]:
        compare.close("columns_bnmom_bs_bsmax_lambda", momentum_of(momentum, int(rows), int(most)), want)


def check_order(file: Vectors, compare: Comparison) -> None:
    """The legacy generator's draws, in the order of the released code."""
    order = dirichlet_order(torch.from_numpy(file["labels"]), float(file["delta"]), file.integer("np_seed"))
    compare.close("order", order, file["order"])


def check_tent(file: Vectors, compare: Comparison) -> None:
    """Four steps on the entropy of what is predicted, with the layers' weights alone."""
    net = _Net().double()
    first = [key for key in file.arrays if key.startswith("init_")]
    net.load_state_dict({key.removeprefix("init_").replace("_", ".", 1): _t(file[key]) for key in first}, strict=False)
    convert_unmix_tns(net, file.integer("K"), batch_size=file.integer("batch_size"),
                      batch_size_max=file.integer("batch_size_max"))
    for name in ("b1", "b2"):
        layer = net.get_submodule(name)
        assert isinstance(layer, UnMixTNS)
        layer.noise.copy_(_t(file[f"noise_{name}"]))
        layer.reset()
    trained = [p for name in ("b1", "b2") for p in net.get_submodule(name).parameters()]
    optimizer = torch.optim.Adam(trained, lr=float(file["adam_lr"]))
    for t, x in enumerate(file["x"]):
        logits = net(_t(x))
        compare.close("logits", _n(logits), file["logits"][t])
        optimizer.zero_grad()
        loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        loss.backward()
        optimizer.step()
    for name in ("b1", "b2"):
        layer = net.get_submodule(name)
        for ours, theirs in (("weight", "weight"), ("bias", "bias"), ("component_means", "running_means_mat"),
                             ("component_vars", "running_vars_mat")):
            compare.close(f"final_{name}_{theirs}", _n(getattr(layer, ours)), file[f"final_{name}_{theirs}"])


class _Net(nn.Module):
    """Of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.b1 = nn.BatchNorm2d(6)
        self.c2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.b2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b1(self.c1(x)).relu()
        h = self.b2(self.c2(h)).relu()
        return self.fc(h.mean((2, 3)))  # type: ignore[no-any-return]


def _layer(file: Vectors, kind: type[nn.BatchNorm1d | nn.BatchNorm2d]) -> UnMixTNS:
    """The source layer of the file, converted, with the file's noise."""
    source = _t(file["source_mean"])
    layer = kind(len(source), eps=float(file["eps"])).to(source.dtype)
    state = {"weight": file["weight"], "bias": file["bias"],
             "running_mean": file["source_mean"], "running_var": file["source_var"]}
    layer.load_state_dict({name: _t(value) for name, value in state.items()}, strict=False)
    if "bn_momentum" in file.arrays:
        layer.momentum = float(file["bn_momentum"])
        alpha = float(file["alpha_init"])  # of one component it plays no part
        convert_unmix_tns(layer, file.integer("K"), alpha=alpha if file.integer("K") > 1 else 0.5,
                          temperature=float(file["temperature"]), batch_size=file.integer("batch_size"),
                          batch_size_max=file.integer("batch_size_max"))
    else:
        convert_unmix_tns(layer, file.integer("K"))
    made: nn.Module = layer
    assert isinstance(made, UnMixTNS)
    if "noise_zeta" in file.arrays:
        made.noise.copy_(_t(file["noise_zeta"]))
        made.reset()
    return made


def _n(tensor: Tensor | None) -> Array:
    assert tensor is not None
    return tensor.detach().numpy()


def _t(array: Array) -> Tensor:
    return torch.from_numpy(array.copy())
