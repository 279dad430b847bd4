"""What bases do with the elements of a tensor, found by trying them, and who is refused for it."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from everbatch.engines.engine_modes import check_optimizer
from everbatch.engines.habits import KNOWN, Habits, habits_of
from everbatch.errors import UnsupportedHost


class Centred(torch.optim.Optimizer):
    """SGD whose gradients have their mean taken out, by rows where there are some."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take one."""
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad - p.grad.mean(-1, keepdim=True)))


class Failing(torch.optim.SGD):
    """Needs what a stand-in has not."""

    def step(self, closure: Any = None) -> None:
        """Never."""
        raise RuntimeError("no such data")


def made(cls: Any, **options: Any) -> torch.optim.Optimizer:
    known = inspect.signature(cls.__init__).parameters
    return cls([torch.nn.Parameter(torch.ones(3, 3))], **{k: v for k, v in options.items() if k in known})  # type: ignore[no-any-return]


def habits(cls: Any, **options: Any) -> Habits:
    optimizer = made(cls, **options)
    return habits_of(type(optimizer), optimizer.param_groups)


def test_torchs_are_known_and_a_copy_of_each_is_found_to_be_what_it_is_known_for() -> None:
    for name in KNOWN:
        cls = type(f"My{name}", (getattr(torch.optim, name),), {})
        mine = habits(cls, lr=0.01, momentum=0.9, weight_decay=0.1)
        assert mine == habits(getattr(torch.optim, name), lr=0.01) == Habits(), name


def test_what_looks_at_rows_or_matrices() -> None:
    assert habits(Centred) == Habits(by_element=False, keeps_zeros=False)
    assert habits(torch.optim.Muon, lr=0.01) == Habits(by_element=False, keeps_zeros=False)
    assert not habits(torch.optim.Adafactor, lr=0.01).by_element
    assert habits(Failing, lr=0.1) == Habits()  # unknown: nothing against it


TIMMS = [("AdaBelief", {}, True), ("Adopt", {}, True), ("MADGRAD", {}, True), ("Lion", {}, True), ("NAdamW", {}, True),
         ("Lion", {"caution": True}, False), ("NAdamW", {"caution": True}, False), ("Mars", {}, False), ("Lamb", {}, False),
         ("AdamP", {}, False), ("SGDP", {}, False), ("NvNovoGrad", {}, False)]


@pytest.mark.parametrize(("name", "options", "by_element"), TIMMS)
def test_timms(name: str, options: Any, by_element: bool) -> None:
    optimizers = pytest.importorskip("timm.optim")
    cls = type("Mine", (getattr(optimizers, name),), {})  # no name that is known
    optimizer = made(cls, lr=0.01, **options)
    assert habits_of(cls, optimizer.param_groups).by_element is by_element
    for stage in (0, 1, 3):
        if by_element or not stage:
            check_optimizer(optimizer, cls, stage, [1, 2])
        else:
            with pytest.raises(UnsupportedHost, match="Mine, with these options, updates an element by what else"):
                check_optimizer(optimizer, cls, stage, [1, 2])


def test_counts_in_groups_are_no_counts_of_steps_at_stage_3() -> None:
    optimizers = pytest.importorskip("timm.optim")
    adan = made(optimizers.Adan, lr=0.01)
    assert habits_of(type(adan), adan.param_groups) == Habits(counts_in_groups=True)
    check_optimizer(adan, type(adan), 2, [1, 2])
    check_optimizer(adan, type(adan), 3, [1])
    with pytest.raises(UnsupportedHost, match="Adan counts its steps in its groups, and stage 3 has it step 2 times"):
        check_optimizer(adan, type(adan), 3, [1, 2])


def test_no_random_number_of_the_run_is_drawn() -> None:
    class Noisy(Centred):
        """Adds noise."""

        def step(self, closure: Any = None) -> None:
            """Take one."""
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(torch.randn_like(p))

    torch.manual_seed(5)
    before: Tensor = torch.get_rng_state()
    assert habits(Noisy) == Habits(keeps_zeros=False)  # whether slices would do cannot be told
    assert torch.equal(before, torch.get_rng_state())


def test_a_count_that_nothing_reads_and_a_rate_of_zero() -> None:
    class Counting(torch.optim.SGD):
        """Notes its steps."""

        def step(self, closure: Any = None) -> None:
            """Take one."""
            for group in self.param_groups:
                group["calls"] = group.get("calls", 0) + 1
            super().step()

    assert habits(Counting, lr=0.1) == Habits()
    assert habits(torch.optim.Muon, lr=0.0) == habits(torch.optim.Muon, lr=0.01)  # a warm-up begins at zero
    with torch.device("meta"):
        optimizer = torch.optim.Muon([torch.nn.Parameter(torch.ones(3, 3, device="cpu"))], lr=0.1)
        assert not habits_of(torch.optim.Muon, optimizer.param_groups).keeps_zeros


def test_groups_without_parameters_and_with_odd_options() -> None:
    group = {"params": [], "lr": torch.tensor(0.1), "tag": SimpleNamespace()}
    assert habits_of(type("Mine", (torch.optim.SGD,), {}), [group]) == Habits()
