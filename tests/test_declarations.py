"""What a part declares is checked when its class is created, and hides nothing of the class it stands on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from everbatch.composition import compose
from everbatch.contract import Made, Range, parts_of
from everbatch.errors import CompositionError
from everbatch.optim import SAM, ClipGradNorm, OptimizerMixin, Refresh
from everbatch.train import TrainerMixin


@pytest.mark.parametrize("name", ["example", "off", "search"])
def test_a_declaration_names_fields_of_its_config(name: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        strength: float = 1.0

    with pytest.raises(CompositionError, match=rf"Wrong: {name} has 'strenght', which is no field .*'strength'"):
        type("Wrong", (OptimizerMixin,), {"Config": Config, name: {"strenght": (1.0,)}})
    right: Any = type("Right", (OptimizerMixin,), {"Config": Config, name: {"strength": (1.0,)}})
    assert getattr(right, name) == {"strength": (1.0,)}
    made: Any = type("Later", (OptimizerMixin,), {"Config": Config, "example": Made(lambda factory: {"strength": factory()})})
    assert made.example.by(lambda: 2.0) == {"strength": 2.0}


@pytest.mark.parametrize(("low", "high", "log"), [(1.0, 1.0, False), (2.0, 1.0, False), (0.0, 1.0, True), (0.0, math.inf, False)])
def test_a_range_ascends_and_is_finite(low: float, high: float, log: bool) -> None:
    with pytest.raises(ValueError, match=r"Range: low=.*, must"):
        Range(low, high, log)
    assert Range(0.1, 1.0, log=True).low == 0.1


def test_an_order_may_name_what_the_others_own() -> None:
    class Shake(OptimizerMixin):
        owns = ("perturbation",)

    made = compose(Shake, Refresh, base=torch.optim.SGD)
    assert [part.__name__ for part in parts_of(made)] == ["Refresh", "Shake"]
    with pytest.raises(CompositionError, match=r"Refresh must stand to the left of Shake; write class .*\(Refresh, Shake, SGD\)"):
        type("Wrong", (Shake, Refresh, torch.optim.SGD), {})


def test_what_the_base_calls_by_the_same_name_stays_the_bases() -> None:
    class Own:
        def __init__(self, example: int = 0) -> None:
            self.given = example

        def search(self) -> int:
            return self.given

        @staticmethod
        def asked() -> str:
            return "the trainer's"

    class Part(TrainerMixin):
        search = {}
        example = {}

    made: Any = type("Mine", (Part, Own), {})(example=3)
    assert made.search() == 3 and made.asked() == "the trainer's" and Part.search == {}
    assert compose(ClipGradNorm, SAM, base=torch.optim.SGD).__name__ == "ClipGradNormSAMSGD"
