"""Bases whose state could not be saved by name are refused when the optimizer is built, others are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everbatch import compose
from everbatch.errors import CheckpointMismatch
from everbatch.optim import SAM
from everbatch.optim.savable import PROVEN, _stand_ins, _tried


class Own(torch.optim.Optimizer):
    """A base of one's own, whose subclasses keep something in `remember`."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.start()

    def start(self) -> None:
        pass

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.remember(p, group)
                    p.add_(p.grad, alpha=-group["lr"])

    def remember(self, p: Tensor, group: dict[str, Any]) -> None:
        pass


def kept_in(name: str, value: Callable[[Tensor], Any]) -> Any:
    """A base that keeps this for each parameter."""
    return keeping(lambda s, p, g: s.state[p].update({name: value(p)}))


def keeping(remember: Callable[[Any, Tensor, dict[str, Any]], Any], start: Callable[[Any], Any] = lambda self: None) -> Any:
    return compose(SAM, base=type("Mine", (Own,), {"remember": remember, "start": start}))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


REFUSED: dict[str, tuple[Any, str]] = {
    "rows": (kept_in("row", lambda p: p.sum(-1)), "keeps 'row' of shape "),
    "a list of tensors": (kept_in("past", lambda p: [p.clone()]), "keeps a list for each parameter ('past')"),
    "a dict of tensors": (kept_in("past", lambda p: {"a": p.clone()}), "keeps a dict for each parameter"),
    "an object": (kept_in("rng", lambda p: torch.Generator()), "keeps a Generator for each"),
    "state of no parameter": (keeping(lambda s, p, g: s.state["all"].update(t=1)), "keeps state['all'], which belongs to no"),
    "a tensor in a group": (keeping(lambda s, p, g: g.update(basis=torch.eye(2))), "keeps a Tensor in its groups ('basis')"),
    "a counter on itself": (keeping(lambda s, p, g: setattr(s, "t", s.t + 1), lambda s: setattr(s, "t", 0)),
                            "keeps 't' on itself"),
    "moments on itself": (keeping(lambda s, p, g: s.past.append(p.clone()), lambda s: setattr(s, "past", [])),
                          "keeps 'past' on itself"),
    "a stream on itself": (keeping(lambda s, p, g: torch.rand((), generator=s.rng),
                                   lambda s: setattr(s, "rng", torch.Generator())), "keeps 'rng' on itself"),
    "Adafactor": (compose(SAM, base=torch.optim.Adafactor), "base Adafactor keeps 'row_var' of shape (5, 1) for a parameter of "
                                                            "shape (5, 6), must keep tensors shaped like"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_base_whose_state_would_be_lost_is_refused(name: str) -> None:
    cls, text = REFUSED[name]
    with pytest.raises(ValueError, match="use another base, such as torch.optim.AdamW") as error:
        cls(net(), lr=0.1)
    assert text in str(error.value)


KEPT: dict[str, Any] = {
    "nothing": keeping(lambda s, p, g: None),
    "moments and numbers": keeping(lambda s, p, g: s.state[p].update(m=p.clone(), t=torch.tensor(1.0), k=3, on=True)),
    "numbers in a group": keeping(lambda s, p, g: g.update(k=g.get("k", 0) + 1)),
    "constants on itself": keeping(lambda s, p, g: None, lambda s: setattr(s, "table", {"a": torch.ones(2), "f": print})),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_base_of_ones_own_is_tried_without_a_trace(name: str) -> None:
    before = torch.get_rng_state()
    model = net()
    start = [p.detach().clone() for p in model.parameters()]
    torch.set_rng_state(before)
    opt = KEPT[name](model, lr=0.1)
    assert torch.equal(torch.get_rng_state(), before) and not opt.state
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), start, strict=True))
    opt.step(lambda: opt.backward(model(torch.ones(2, 6)).square().sum()))
    other = KEPT[name](model, lr=0.1)
    other.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("name", PROVEN)
def test_those_that_are_not_tried_are_right(name: str) -> None:
    base = getattr(torch.optim, name)
    matrices = [p for p in net().parameters() if p.dim() == 2]
    groups = base(matrices if name == "Muon" else net().parameters(), lr=0.1).param_groups
    assert _tried(base, _stand_ins(groups), {}, torch.device("cpu")) == ""


def test_a_base_that_cannot_be_tried_is_looked_at_after_its_first_step() -> None:
    def picky(self: Any, p: Tensor, group: dict[str, Any]) -> None:
        if tuple(p.shape) not in {(5, 6), (5,), (3, 5), (3,)} or not hasattr(p, "mine"):
            raise RuntimeError("only parameters that I know")
        self.state[p]["row"] = p.sum(0, keepdim=True)

    model = net()
    for p in model.parameters():
        p.mine = True  # type: ignore[attr-defined]
    opt = keeping(picky)(model, lr=0.1)
    with pytest.raises(ValueError, match="base Mine keeps 'row' of shape"):
        opt.step(lambda: opt.backward(model(torch.ones(2, 6)).square().sum()))


def test_what_a_base_keeps_of_large_parameters_only_is_found_after_its_first_step() -> None:
    model = nn.Linear(100, 50)
    opt = kept_in("row", lambda p: p.sum(-1) if p.numel() > 2000 else p.clone())(model, lr=0.1)
    with pytest.raises(ValueError, match=r"base Mine keeps 'row' of shape \(50,\) for a parameter of shape \(50, 100\)"):
        opt.step(lambda: opt.backward(model(torch.ones(2, 100)).square().sum()))


def test_stand_ins_are_few_and_small() -> None:
    model = nn.ModuleList([nn.Linear(3000, 1000), nn.Conv2d(64, 128, 7), nn.Conv2d(3, 64, 3), nn.LayerNorm(7)])
    groups = [{"params": [p], "lr": 0.1 * i, "weight_decay": 0.0, "momentum": 0.9} for i, p in enumerate(model.parameters())]
    groups.append({"params": [nn.Parameter(torch.ones(2))], "lr": 0.1, "weight_decay": 0.0, "momentum": 0.0})
    made = [p for g in _stand_ins(groups) for p in g["params"]]
    assert len(made) == 4 and sum(p.numel() for p in made) < 2**16


def test_state_of_an_odd_kind_is_no_silent_loss_in_a_checkpoint() -> None:
    model = net()
    opt: Any = compose(SAM, base=torch.optim.SGD)(model, lr=0.1)
    opt.state[model[0].weight]["past"] = [torch.ones(1)]
    with pytest.raises(CheckpointMismatch, match=r"state 'past' of 0.weight is a list"):
        opt.state_dict()
