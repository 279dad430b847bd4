"""The host of plain torch: names, shards of any layout, groups that change, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from quadratics import same, small_net, train, weights
from torch import nn

from everbatch.engines.host import plain_name
from everbatch.engines.shards import inner
from everbatch.optim import SAM, ClipGradNorm, groups


class Sharp(ClipGradNorm, SAM, torch.optim.SGD):
    pass


def build(params: Any, **options: Any) -> Any:
    return Sharp(params, **{"lr": 0.1, "momentum": 0.9, "rho": 0.5, "max_norm": 0.5} | options)


def test_the_three_forms_of_parameters_are_one() -> None:
    ends = []
    for form in (lambda m: m, lambda m: m.named_parameters(), lambda m: [{"params": list(m.named_parameters())}],
                 lambda m: groups(m, weight_decay=0.0)):
        model = small_net()
        opt = build(form(model))
        assert sorted(opt.host.names) == ["0.bias", "0.weight", "2.bias", "2.weight"]
        train(model, opt, 0, 3)
        ends.append(weights(model))
    assert all(same(end, ends[0]) for end in ends[:3])
    for a, b in zip(ends[0], ends[3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # another order of parameters in the norms


def test_unnamed_parameters_are_refused() -> None:
    for unnamed in (small_net().parameters(), [{"params": small_net().parameters()}], [("a", 1, 2)]):
        with pytest.raises(TypeError, match="Sharp: got an unnamed .*, expected .name, parameter. pairs, because state is kept"):
            build(unnamed)


def test_names_must_be_unique() -> None:
    a, b = small_net(), small_net(1)
    with pytest.raises(ValueError, match="parameter names .* occur twice, must be unique; pass the module"):
        build([*a.named_parameters(), *b.named_parameters()])


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="Sharp: no parameters, must get at least one"):
        build([])


def test_names_are_those_of_the_bare_model() -> None:
    assert plain_name("module._orig_mod.0._checkpoint_wrapped_module.w", ddp=True) == "0.w"
    assert plain_name("_orig_mod.module.w", ddp=True) == "w"
    assert plain_name("module.w") == "module.w"

    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    model = Wraps()  # a submodule of this name is not DDP's
    assert "module.weight" in build(model).host.names and "module.weight" in build(model.named_parameters()).host.names


def test_channels_last_and_other_layouts() -> None:
    def run(layout: torch.memory_format) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)).double()
        model = model.to(memory_format=layout)
        opt = build(model)
        g = torch.Generator().manual_seed(1)
        for _ in range(3):
            x = torch.randn(5, 3, 6, 6, generator=g, dtype=torch.float64).to(memory_format=layout)

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                loss = model(x).square().mean()
                opt.backward(loss)
                return loss

            opt.step(closure)
        return model, opt

    (plain, plain_opt), (last, last_opt) = run(torch.contiguous_format), run(torch.channels_last)
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last) and not last[0].weight.is_contiguous()
    for a, b in zip(weights(plain), weights(last), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    ours, theirs = (o.state_dict(weights=True)["everbatch"]["tensors"] for o in (plain_opt, last_opt))
    for name in ours:  # saved by logical index, whatever the layout
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-12)
    plain_opt.load_state_dict(last_opt.state_dict(weights=True))
    assert torch.equal(plain[0].weight, last[0].weight)
    assert torch.equal(plain_opt.state[plain[0].weight]["momentum_buffer"], last_opt.state[last[0].weight]["momentum_buffer"])


def test_shards_are_views_of_live_things() -> None:
    model = small_net()
    opt = build(model, weight_decay=0.01)
    train(model, opt, 0, 1)
    shard = next(s for s in opt.host.shards if s.name == "2.weight")
    assert (shard.shape, shard.start, shard.numel) == ((3, 5), 0, 15) and shard.grad is None
    assert shard.group is opt.param_groups[0] and shard.data.data_ptr() == model[2].weight.data_ptr()
    assert shard.moments["momentum_buffer"].data_ptr() == opt.state[model[2].weight]["momentum_buffer"].data_ptr()


def test_sums_over_the_model() -> None:
    model = small_net()
    opt = build(model)
    vector = opt.host.weights()
    flat = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    assert vector.norm().item() == pytest.approx(flat.norm().item(), rel=1e-6)
    assert {n: v.item() for n, v in vector.norms().items()} == pytest.approx(
        {n: p.detach().double().norm().item() for n, p in model.named_parameters()}, rel=1e-6)
    assert inner(opt.host, (vector, vector.clone()))[0].item() == pytest.approx(flat.square().sum().item(), rel=1e-6)
    assert torch.equal(vector.whole("2.weight"), model[2].weight.detach())
    copied = vector.clone()
    copied.mul_(2.0).add_(vector, -1.0)
    assert all(torch.equal(a, b) for a, b in zip(copied.tensors, vector.tensors, strict=True))
    assert math.isclose(copied.map_(lambda s, t: torch.ones_like(t)).norm().item(), flat.numel() ** 0.5, rel_tol=1e-6)


def test_freezing_and_unfreezing_are_followed() -> None:
    model = small_net()
    opt = build(model)
    model[0].weight.requires_grad_(False)
    train(model, opt, 0, 1)
    assert "0.weight" not in opt.host.names and len(opt.host.shards) == 3
    model[0].weight.requires_grad_(True)
    model[2].weight.requires_grad_(False)  # as many as before, others
    kept, moved = model[2].weight.clone(), model[0].weight.clone()
    train(model, opt, 1, 2)
    assert [s.name for s in opt.host.shards] == ["0.weight", "0.bias", "2.bias"]
    assert torch.equal(model[2].weight, kept) and not torch.equal(model[0].weight, moved)


def test_a_group_added_later_takes_part() -> None:
    def run(late: bool) -> list[torch.Tensor]:
        model = small_net()
        named = list(model.named_parameters())
        opt = build(named[:2] if late else [{"params": named[:2]}, {"params": named[2:]}])
        if late:
            opt.add_param_group({"params": named[2:]})
        train(model, opt, 0, 3)
        assert all(p.grad is None for p in model.parameters())
        return weights(model)

    assert same(run(True), run(False))


def test_a_step_leaves_no_trace_in_the_modules() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    model[2].eval()
    opt = build(model)
    hooks = len(nn.modules.module._global_forward_pre_hooks)

    def traces() -> list[Any]:
        return [(m.training, getattr(m, "track_running_stats", None), [b.data_ptr() for b in m.buffers()],
                 [(p.data_ptr(), p.requires_grad) for p in m.parameters()], len(m._forward_pre_hooks), len(m._forward_hooks))
                for m in model.modules()]

    before = traces()
    train(model, opt, 0, 2)
    assert traces() == before and len(nn.modules.module._global_forward_pre_hooks) == hooks
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert traces() == before and len(nn.modules.module._global_forward_pre_hooks) == hooks


def test_groups() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    model[2].weight.requires_grad_(False)
    decayed, free = groups(model, weight_decay=0.1)
    assert [n for n, _ in decayed["params"]] == ["0.weight"] and decayed["weight_decay"] == 0.1
    assert [n for n, _ in free["params"]] == ["0.bias", "1.weight", "1.bias", "2.bias"] and free["weight_decay"] == 0.0
    with pytest.raises(ValueError, match="groups: weight_decay=-1, must be a finite number >= 0"):
        groups(model, weight_decay=-1)
