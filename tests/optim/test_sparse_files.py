"""Sparse weights in files: smaller, and the same bits again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from everbatch import compose
from everbatch.errors import CheckpointMismatch
from everbatch.optim import DynamicSparsity
from everbatch.optim.sparsity import SparseLinear, load_sparse, save_sparse


def sparse_model() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16 * 36, 101), nn.Linear(101, 10))
    opt = compose(DynamicSparsity, base=torch.optim.SGD)(model, lr=0.1, density=0.2, distribution="uniform")
    return model, opt.whole_masks()


@pytest.mark.parametrize(("form", "share"), [("packed", 0.30), ("csr", 0.48)])
def test_a_sparse_file_is_small_and_reads_back_bit_for_bit(tmp_path: Path, form: Any, share: float) -> None:
    model, masks = sparse_model()
    state = {**model.state_dict(), "0.weight": model[0].weight.detach().to(memory_format=torch.channels_last)}
    with torch.no_grad():
        state["3.weight"][:, :400] *= -0.0  # zeros of either sign that a mask keeps are kept
        state["3.weight"] *= masks["3.weight"]
        state["3.weight"].masked_fill_(~masks["3.weight"], 0.0)
    path = save_sparse(tmp_path / "sparse.safetensors", state, masks, form=form, metadata={"note": "ours"})
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "dense.safetensors")
    assert path.stat().st_size <= share * (tmp_path / "dense.safetensors").stat().st_size
    again = load_sparse(path)
    assert again.keys() == state.keys()
    for name, value in state.items():
        assert again[name].dtype == value.dtype and again[name].shape == value.shape
        assert again[name].numpy().tobytes() == value.contiguous().numpy().tobytes(), name
    if form == "csr":
        assert load_file(path)["3.weight.col"].dtype == load_file(path)["3.weight.crow"].dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("form", ["packed", "csr"])
def test_odd_shapes_and_types(tmp_path: Path, form: Any, dtype: torch.dtype) -> None:
    for shape in ((7,), (1, 9), (3, 5, 2), (4, 0), (2, 3)):
        value = torch.randn(shape).to(dtype)
        for mask in (torch.rand(shape) < 0.4, torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)):
            kept = value.masked_fill(~mask, 0)
            got = load_sparse(save_sparse(tmp_path / "x.safetensors", {"a": kept}, {"a": mask}, form=form))["a"]
            assert got.shape == kept.shape and torch.equal(got, kept)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    state, path = {"a": torch.ones(3)}, tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="form='coo', must be packed or csr"):
        save_sparse(path, state, {}, form="coo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"masks of \['b'\]"):
        save_sparse(path, state, {"b": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"tensors \['a.mask'\] of the state, must have other names"):
        save_sparse(path, {**state, "a.mask": torch.ones(1)}, {"a": torch.ones(3, dtype=torch.bool)})
    save_file(state, path)
    with pytest.raises(CheckpointMismatch, match="is not a file of save_sparse, or damaged: KeyError: 'sparse'"):
        load_sparse(path)
    save_file({"a.values": torch.ones(2), "a.mask": torch.zeros(2, dtype=torch.uint8)}, path,
              {"sparse": '{"a": {"form": "packed", "shape": [3]}}'})
    with pytest.raises(CheckpointMismatch, match="a has 2 bytes of mask for shape"):
        load_sparse(path)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_a_layer_in_csr_has_indices_of_four_bytes() -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 7) * (torch.rand(9, 7) < 0.3)
    layer, x = SparseLinear(weight, None), torch.randn(5, 7)
    assert layer.weight.col_indices().dtype == layer.weight.crow_indices().dtype == torch.int32
    torch.testing.assert_close(layer(x), x @ weight.t(), rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.weight.to_dense(), weight)
