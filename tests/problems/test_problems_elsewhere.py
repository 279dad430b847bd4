"""Adversaries in other processes and on other ranks attack a problem's own losses, with targets as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import texts
import torch

from everbatch.problems import CausalLM, Classification, Problem, Regression
from everbatch.train import ConAdv
from everbatch.train.adversarial.attack import Attack
from everbatch.train.adversarial.wire import heard_attack, order_layout, told_attack
from processes import torchrun

WORKER = Path(__file__).parent / "elsewhere_worker.py"


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.distributed
@pytest.mark.parametrize("what", ["regression", pytest.param("language", marks=pytest.mark.slow)])
def test_a_process_beside_the_trainer_attacks_what_the_trainer_would(what: str) -> None:
    inline = texts.attacked(what, placement="inline")
    assert same(inline, texts.attacked(what, placement="process"))
    assert not same(inline, texts.attacked(what, placement="inline", weight_adversarial=0.0))


@pytest.mark.slow
@pytest.mark.distributed
def test_another_rank_attacks_what_the_trainer_would(tmp_path: Path) -> None:
    job = torchrun(2, WORKER, str(tmp_path / "out.pt"), limit=120)
    assert job.codes == [0], job.err[-3000:]
    assert same(torch.load(tmp_path / "out.pt", weights_only=True), texts.attacked("regression", placement="inline"))


@pytest.mark.parametrize("problem", [None, CausalLM(ignore=0), Regression(loss="huber", delta=0.5),
                                     Classification(label_smoothing=0.1)])
def test_an_attack_comes_over_the_wire_with_its_problem(problem: Problem | None) -> None:
    attack = Attack(radius=1.0, step_size=None, steps=1, mean=(0.5,), std=(0.5, 1.0), raw_low=0.0, raw_high=1.0, targeted=False,
                    random_start=0.0, embedding=None, classes=0, pieces=2, autocast=False, seed=3, problem=problem)
    assert heard_attack(json.loads(json.dumps(told_attack(attack)))) == attack


def test_targets_travel_in_their_own_type() -> None:
    hello: dict[str, Any] = {"carries": False, "modes": 1, "inputs": [4, 5], "dtype": "float32", "targets": [4],
                             "targets_dtype": "float32"}
    assert order_layout(hello)[-1] == ["targets", [4], "float32"]


class Own(Regression):
    """A problem that the other end would not know."""


def test_a_problem_of_ones_own_is_refused_on_ranks_by_name() -> None:
    with pytest.raises(ValueError, match="placement='ranks' with problem=Own, must be one of everbatch.problems there"):
        from everbatch.train.adversarial.conadv import _check_problem

        _check_problem(ConAdv.Config(placement="ranks"), Own())
