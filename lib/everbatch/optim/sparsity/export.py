"""A sparse model to take away: masked dense weights, torch's CSR for inference on CPU, or 2:4 semi-structured."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from everbatch.errors import UnsupportedHost, check

__all__ = ["SparseLinear", "fits_two_four", "sparsify", "violations"]


class SparseLinear(nn.Module):
    """A linear layer whose weight is stored in CSR, with int32 indices: for inference. For files see `save_sparse`.

    y = x W^T + b, computed as (W x^T)^T with torch's sparse-dense product. No gradient.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Args: weight: dense (out, in), zeros are dropped. bias: (out,) or None."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        csr = weight.detach().to_sparse_csr()
        if weight.numel() < 2**31:  # indices of 4 bytes in place of 8
            csr = torch.sparse_csr_tensor(csr.crow_indices().int(), csr.col_indices().int(), csr.values(), csr.shape,
                                          check_invariants=True)
        self.register_buffer("weight", csr)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in); returns (..., out)."""
        rows = x.reshape(-1, self.in_features)
        y = torch.mm(self.weight, rows.t()).t()
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], self.out_features)


def violations(model: nn.Module, masks: Mapping[str, Tensor]) -> list[str]:
    """Names of weights with a value other than zero where their mask is off."""
    weights = dict(model.named_parameters())
    return [name for name, mask in masks.items() if bool((weights[name].detach()[~mask.to(weights[name].device)] != 0).any())]


def fits_two_four(weight: Tensor) -> bool:
    """Whether each run of 4 entries along a row has at least 2 zeros, as 2:4 semi-structured kernels demand."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight.reshape(weight.shape[0], -1, 4) != 0).sum(-1) <= 2).all())


def sparsify(model: nn.Module, masks: Mapping[str, Tensor], *, form: str = "dense") -> nn.Module:
    """A copy of `model` with its masks applied for good.

    Args:
        model: the bare model, whole weights (gather them first where they are sharded).
        masks: bool masks by parameter name, as `opt.whole_masks()` gives them.
        form: "dense": zeros in dense tensors. "csr": masked linear layers become `SparseLinear`; other layers stay masked
            dense, for torch has no sparse convolution. "2:4": masked linear weights become torch's semi-structured tensors
            (CUDA of compute capability 8.0 or more, float16, bfloat16, float32 or int8).

    Raises:
        ValueError: an unknown form, a mask of no parameter or of another shape, or for "2:4" a layer whose pattern does not
            fit: unstructured masks rarely do, and dropping more weights would be another model.
        UnsupportedHost: "2:4" without such a GPU.
    """
    check(form in ("dense", "csr", "2:4"), "sparsify", f"form={form!r}", "be 'dense', 'csr' or '2:4'")
    known = dict(model.named_parameters())
    odd = [n for n in masks if n not in known] or [n for n in masks if masks[n].shape != known[n].shape]
    check(not odd, "sparsify", f"masks of {odd[:5]}", "have the names and shapes of this model's parameters")
    result = copy.deepcopy(model)
    for name, parameter in result.named_parameters():
        if name in masks:
            parameter.data.masked_fill_(~masks[name].to(parameter.device), 0.0)
    if form == "dense":
        return result
    layers = {f"{n}.weight" if n else "weight": (n, m) for n, m in result.named_modules() if type(m) is nn.Linear}
    targets = {name: layers[name] for name in masks if name in layers}
    if form == "2:4":
        bad = [name for name, (_, m) in targets.items() if not fits_two_four(m.weight)]
        check(not bad, "sparsify", f"the masks of {bad[:5]} leave more than 2 of 4 neighbours in a row",
              "have at least 2 zeros in each run of 4 along a row", "export form='csr' or 'dense'")
        check(bool(targets), "sparsify", "no masked linear layer", "have one for form='2:4'")
        gpu = all(m.weight.is_cuda and torch.cuda.get_device_capability(m.weight.device) >= (8, 0) for _, m in targets.values())
        if not gpu:
            raise UnsupportedHost("sparsify: form='2:4' needs the model on a CUDA device of compute capability 8.0 or more; "
                                  "export form='csr' for CPU inference")
    for path, layer in targets.values():
        if form == "2:4":
            layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
            continue
        fresh = SparseLinear(layer.weight, layer.bias)
        if not path:
            return fresh
        parent = result.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], fresh)
    return result
