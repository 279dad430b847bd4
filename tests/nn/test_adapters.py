"""Adapters in timm's vision transformers: values, places, and vectors."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import Tensor

from everbatch.nn import (
    AdaptedBlock,
    AdapterLayout,
    UnsupportedAdapterTarget,
    adapters_of,
    attach_adapters,
    detach_adapters,
    flat_adapters,
    load_adapters,
    reading_adapters,
)


def tiny(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    made = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3, "mlp_ratio": 2.0}
    return VisionTransformer(**{**made, **options}).double().eval()


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def moved(model: VisionTransformer, seed: int = 2) -> Tensor:
    """Adapters that add something, as a vector."""
    drawn = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(AdapterLayout.of(model).size, generator=drawn, dtype=torch.float64)


def test_fresh_ones_add_nothing_and_detaching_restores() -> None:
    model = tiny(init_values=0.5, drop_path_rate=0.2)
    before, state = model(images()), copy.deepcopy(model.state_dict())
    globals_before = torch.get_rng_state()
    names = attach_adapters(model, 3, seed=5)
    assert torch.equal(torch.get_rng_state(), globals_before)
    assert names == ["blocks.0.adapter", "blocks.1.adapter"] == list(adapters_of(model))
    assert torch.equal(model(images()), before)
    first = adapters_of(model)["blocks.0.adapter"].down.weight
    again = tiny()
    attach_adapters(again, 3, seed=5)
    assert torch.equal(first, adapters_of(again)["blocks.0.adapter"].down.weight)
    assert not torch.equal(first, adapters_of(model)["blocks.1.adapter"].down.weight)
    load_adapters(model, moved(model))
    assert not torch.allclose(model(images()), before)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), model(images()))
    assert detach_adapters(model) == names and not adapters_of(model)
    assert all(type(block) is Block for block in model.blocks)
    assert torch.equal(model(images()), before)
    assert list(model.state_dict()) == list(state)


def test_layer_scale_and_drop_path_are_those_of_the_block() -> None:
    model = tiny(init_values=0.5, drop_path_rate=0.5, depth=1)
    attach_adapters(model, 3, dropout=0.0)
    load_adapters(model, moved(model))
    block = model.blocks[0].train()
    assert isinstance(block, AdaptedBlock)
    x = torch.randn(6, 5, 8, dtype=torch.float64)
    torch.manual_seed(3)
    out = block(x)
    torch.manual_seed(3)
    h = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
    expected = h + block.drop_path2(block.ls2(block.mlp(block.norm2(h)))) + block.adapter(h)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("norm", ["none", "in", "out"])
def test_one_adapter_per_sample_is_each_alone(norm: str) -> None:
    model = tiny()
    attach_adapters(model, 3, norm=norm, scale=None)
    archive = torch.stack([moved(model, seed) for seed in (5, 6, 7)])
    tasks = torch.tensor([2, 0, 2, 1])
    kept = flat_adapters(model)
    with reading_adapters(model, archive, tasks):
        together = model(images())
    for row, task in enumerate(tasks.tolist()):
        load_adapters(model, archive[task])
        alone = model(images()[row:row + 1])
        torch.testing.assert_close(together[row:row + 1], alone, rtol=1e-12, atol=1e-12)
        with reading_adapters(model, archive[task]):
            torch.testing.assert_close(model(images()[row:row + 1]), alone, rtol=1e-12, atol=1e-12)
    load_adapters(model, kept)
    with pytest.raises(RuntimeError, match="inside"), reading_adapters(model, archive[0]):
        raise RuntimeError("inside")
    assert all(adapter.given is None for adapter in adapters_of(model).values())
    assert torch.equal(flat_adapters(model), kept)


def test_a_vector_has_its_places() -> None:
    model = tiny()
    attach_adapters(model, 3)
    layout = AdapterLayout.of(model)
    assert layout.size == 2 * (2 * 3 * 8 + 3 + 8)
    assert layout.names[:4] == [f"blocks.0.adapter.{part}" for part in ("down.weight", "down.bias", "up.weight", "up.bias")]
    values = layout.named(torch.arange(layout.size, dtype=torch.float64))
    assert torch.equal(layout.flat(values), torch.arange(layout.size, dtype=torch.float64))
    assert set(layout.names) < {name for name, _ in model.named_parameters()}


def test_what_cannot_have_adapters_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedAdapterTarget, match="ResNet, which has no such block.*vision_transformer.Block"):
        attach_adapters(timm.create_model("resnet10t"))
    with pytest.raises(UnsupportedAdapterTarget, match="ParallelScalingBlock"):
        attach_adapters(tiny(block_fn=ParallelScalingBlock))
    mixed = tiny()
    mixed.blocks[1] = ParallelScalingBlock(8, 2)
    with pytest.raises(UnsupportedAdapterTarget, match="ParallelScalingBlock"):
        attach_adapters(mixed)
    assert type(mixed.blocks[0]) is Block
    model = tiny()
    with pytest.raises(ValueError, match="rank=9, must be at most the width of the tokens, 8"):
        attach_adapters(model, 9)
    assert not adapters_of(model)
    attach_adapters(model, 8)
    with pytest.raises(UnsupportedAdapterTarget, match="must have none"):
        attach_adapters(model)
    with pytest.raises(ValueError, match=r"a vector of shape \(3,\)"):
        load_adapters(model, torch.zeros(3))
    with pytest.raises(ValueError, match=r"values of shape \(3,\)"), reading_adapters(model, torch.zeros(3), torch.zeros(1)):
        pass
    with pytest.raises(ValueError, match="without adapters"):
        AdapterLayout.of(tiny())
