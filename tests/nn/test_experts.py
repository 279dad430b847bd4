"""Experts in linear layers: closed forms, what is refused, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from everbatch.nn import MoELoRALinear, UnknownTarget, attach_experts, detach_experts, expert_layers, merge_experts


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def stirred(model: nn.Module) -> nn.Module:
    """With outer matrices that are not 0."""
    torch.manual_seed(1)
    for layer in expert_layers(model).values():
        for name in layer.names:
            layer.get_parameter(name).data.normal_()
    return model


X = torch.randn(4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_at_first_nothing_changes_and_the_way_back_leaves_every_bit() -> None:
    source = net()
    model, before = copy.deepcopy(source), source(X)
    assert attach_experts(model, ("*",), num_experts=3, rank=2, seed=5) == ["0", "2"]
    assert torch.equal(model(X), before)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{i}.{n}" for i in "02" for n in ("router", "down_0", "down_1", "down_2", "up_0", "up_1", "up_2")}
    again = copy.deepcopy(source)
    attach_experts(again, ("2", "0"), num_experts=3, rank=2, seed=5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    missing = model.load_state_dict(source.state_dict(), strict=False)
    assert not missing.unexpected_keys and len(missing.missing_keys) == 14
    assert detach_experts(stirred(model)) == ["0", "2"]
    assert type(model[0]) is nn.Linear and vars(model[0]).keys() == vars(source[0]).keys()  # type: ignore[index]
    assert torch.equal(model(X), before) and model.state_dict().keys() == source.state_dict().keys()


def expected(layer: MoELoRALinear, x: Tensor, weights: Tensor) -> Tensor:
    y = x @ layer.weight.T + layer.bias
    for i in range(layer.num_experts):
        y = y + layer.scaling * weights[..., i, None] * (x @ layer.get_parameter(f"down_{i}").T
                                                         @ layer.get_parameter(f"up_{i}").T)
    return y


def test_routing_by_token_and_by_sample() -> None:
    for routing, top_k in (("token", None), ("token", 2), ("sample", None), ("sample", 1)):
        layer = MoELoRALinear(nn.Linear(6, 5).double(), 3, 2, top_k=top_k, routing=routing)  # type: ignore[arg-type]
        stirred(layer)
        weights = (X @ layer.get_parameter("router").T).softmax(-1)
        if routing == "sample":
            weights = weights.mean(1, keepdim=True).expand_as(weights)
        if top_k is not None:
            weights = torch.where(weights >= weights.topk(top_k).values[..., -1:], weights, 0.0)
            weights = weights / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(layer(X), expected(layer, X, weights), rtol=1e-12, atol=1e-12)


def test_a_resting_expert_learns_nothing_and_a_masked_one_takes_no_part() -> None:
    layer = MoELoRALinear(nn.Linear(6, 5).double(), 3, 2)
    stirred(layer)
    whole = layer(X)
    layer.frozen = (1,)
    assert torch.equal(layer(X), whole)
    layer(X).sum().backward()
    assert layer.get_parameter("down_1").grad is None and layer.get_parameter("up_1").grad is None
    assert layer.get_parameter("down_0").grad is not None
    layer.masked = True
    weights = (X @ layer.get_parameter("router").T).softmax(-1)
    weights = weights * torch.tensor([1.0, 0.0, 1.0])
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(layer(X), expected(layer, X, weights), rtol=1e-12, atol=1e-12)
    layer.masked = False
    assert torch.equal(layer(X), whole)


def test_merged() -> None:
    model = net()
    attach_experts(model, ("0",), num_experts=1, rank=2)
    y = stirred(model)(X)
    assert merge_experts(model) == ["0"] and type(model[0]) is nn.Linear  # type: ignore[index]
    torch.testing.assert_close(model(X), y, rtol=1e-12, atol=1e-12)
    attach_experts(model, ("2",), num_experts=3, rank=2)
    stirred(model)
    with pytest.raises(ValueError, match="'2' of 3 experts, must be given fixed weights"):
        merge_experts(model)
    layer, inner = expert_layers(model)["2"], model[:2](X)  # type: ignore[index]
    share = torch.tensor([0.2, 0.0, 0.8], dtype=torch.float64)
    y = expected(layer, inner, share.expand(4, 7, 3))
    merge_experts(model, {"2": share})
    torch.testing.assert_close(model(X), y, rtol=1e-12, atol=1e-12)


def test_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.MultiheadAttention(5, 1))
    for layers, words in ((("*.fc1",), "'\\*.fc1' fits nothing in a Sequential"),
                          (("1",), "'1' fits nothing but '1', a LayerNorm"),
                          (("0", "0.weigt"), "'0.weigt' fits nothing"),
                          (("2.out_proj",), "a NonDynamicallyQuantizableLinear")):
        with pytest.raises(UnknownTarget, match=words):
            attach_experts(model, layers)
    with pytest.raises(UnknownTarget, match=r"did you mean 'blocks.0.mlp.fc1'"):
        attach_experts(nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({
            "fc1": nn.Linear(2, 2)})})])}), ("blocks.0.mlp.fc11",))
    assert not expert_layers(model)
    for options, words in (({"rank": 7}, "rank=7 in '0', must be at most the width of its inputs, 6"), ({"rank": 0}, "rank=0"),
                           ({"num_experts": 0}, "num_experts=0"), ({"top_k": 5}, "top_k=5"),
                           ({"routing": "row"}, "routing='row'"), ({"alpha": 0.0}, "alpha=0.0")):
        with pytest.raises(ValueError, match=words):
            attach_experts(model, ("0",), **options)  # type: ignore[arg-type]
    assert type(model[0]) is nn.Linear and not hasattr(model[0], "router")
    tied = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="the weight of '0', which '1' has too"):
        attach_experts(tied, ("0",))
    attach_experts(model, ("0",))
    with pytest.raises(ValueError, match="'0' with experts, must be without"):
        attach_experts(model, ("0",))


@pytest.mark.slow
def test_a_decoder_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=2)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(10).view(2, 5)
    before = model(ids).logits
    found = attach_experts(model, ("*.mlp.up_proj", "*.mlp.gate_proj"))
    assert len(found) == 4 and torch.equal(model(ids).logits, before)
    stirred(model)
    model(ids).logits.sum().backward()
    assert expert_layers(model)["model.layers.0.mlp.up_proj"].get_parameter("down_0").grad is not None
    assert not torch.equal(model(ids).logits, before)
