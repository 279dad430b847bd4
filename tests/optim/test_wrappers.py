"""Wrappers of other frameworks that subclass an optimizer on the fly, made as Lightning and Fabric make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from everbatch.composition import compose
from everbatch.contract import base_of, parts_of
from everbatch.errors import CompositionError
from everbatch.optim import EMA, SAM, ClipGradNorm

Sharp: Any = compose(SAM, ClipGradNorm, EMA, base=torch.optim.SGD, name="Sharp")


class Wrapper:
    """Holds an optimizer, steps it, forwards what it lacks, and passes for an instance of its class."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (self.__class__, type(optimizer)), {})

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return self._optimizer.step(closure, **kwargs)

    def state_dict(self) -> Any:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._optimizer.load_state_dict(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Copying(Wrapper):
    """Copies the optimizer's attributes as well, as Lightning does."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__ = {k: v for k, v in vars(optimizer).items() if k != "step"}
        super().__init__(optimizer)


def started() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, Sharp(model, lr=0.1, momentum=0.9, rho=0.1, max_norm=1.0, ema_decay=0.5)


def trained(model: nn.Module, opt: Any, steps: int = 3) -> list[Tensor]:
    x = torch.arange(48.0).sin().view(8, 6)

    def closure() -> Tensor:
        loss = model(x).square().mean()
        opt.backward(loss)
        return loss

    for _ in range(steps):
        opt.step(closure)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("wrapper", [Wrapper, Copying])
def test_a_wrapped_optimizer_is_the_optimizer(wrapper: Any) -> None:
    model, opt = started()
    wrapped = wrapper(opt)
    schedule = torch.optim.lr_scheduler.StepLR(wrapped, 1, 0.5)
    assert isinstance(wrapped, Sharp) and parts_of(type(wrapped)) == parts_of(Sharp) and base_of(type(wrapped)) is torch.optim.SGD
    assert wrapped.param_groups is opt.param_groups and wrapped.state is opt.state
    other, bare = started()
    expected = trained(other, bare)
    assert all(torch.equal(p, q) for p, q in zip(trained(model, wrapped), expected, strict=True))
    schedule.step()
    assert opt.param_groups[0]["lr"] == 0.05
    state = wrapped.state_dict()
    again, fresh = started()
    wrapper(fresh).load_state_dict(state)
    again.load_state_dict(model.state_dict())
    bare.param_groups[0]["lr"] = 0.05
    assert all(torch.equal(p, q) for p, q in zip(trained(again, wrapper(fresh)), trained(other, bare), strict=True))


def test_a_wrapper_over_a_wrapper_finds_the_base() -> None:
    _, opt = started()
    twice = Copying(Wrapper(opt))
    assert base_of(type(twice)) is torch.optim.SGD and twice.param_groups is opt.param_groups


@pytest.mark.parametrize("bases", [(torch.optim.SGD, Sharp), (torch.optim.AdamW, Sharp), (torch.optim.SGD, SAM),
                                   (Wrapper, SAM, torch.optim.SGD), (Wrapper, torch.optim.SGD, SAM)])
def test_a_wrong_order_stays_refused(bases: tuple[type, ...]) -> None:
    with pytest.raises((CompositionError, TypeError), match=r"stands to the right of its base|consistent method resolution"):
        type("Wrong", bases, {})


def test_functions_that_would_lose_what_mixins_hold_are_refused() -> None:
    model = nn.Linear(4, 2)
    opt: Any = compose(EMA, base=torch.optim.SGD)(model, lr=0.1, ema_decay=0.9)
    model(torch.ones(3, 4)).sum().backward()
    opt.step()
    with pytest.raises(RuntimeError, match="EMASGD: .* would lose what the mixins hold; save opt.state_dict()"):
        get_optimizer_state_dict(model, opt)
    assert opt.state_dict()["everbatch"]["tensors"]
