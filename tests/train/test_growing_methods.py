"""Methods of the continual objective beside a head that grows: what they keep by name goes on, and a new part begins anew; and
beside an evaluation in mid-task, which predicts as they do."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import growing
import learning
from everbatch import compose
from everbatch.optim import NCL, VCL, SemanticMemory
from everbatch.train import CLSER, CPR, ContinualEvaluation, GrowingHead, LwF, Replay, Trainer


class Distilled(GrowingHead, LwF, CPR, Trainer):
    """LwF and CPR."""


class Complementary(GrowingHead, CLSER, Replay, Trainer):
    """CLS-ER."""


class Watched(ContinualEvaluation, Trainer):
    """Evaluated after every step."""


class Bare(GrowingHead, Trainer):
    """Nothing."""


CASES: dict[str, tuple[Any, tuple[type, ...], dict[str, Any], dict[str, Any]]] = {
    "lwf": (Distilled, (), {}, {"lwf_strength": 1.0, "cpr_strength": 0.1}),
    "cls_er": (Complementary, (SemanticMemory,), {}, {"strength": 0.5, "replay_method": "er", "capacity": 20, "replay_batch": 5}),
    "vcl": (Bare, (VCL,), {"predictions": 2}, {}),
    "ncl": (Bare, (NCL,), {}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_head_grows_beside_it(name: str) -> None:
    cls, parts, options, mixins = CASES[name]
    grown = functools.partial(growing.model, first=2, smooth=True)
    made = cls(grown(), functools.partial(compose(*parts, base=torch.optim.SGD), lr=0.1, **options), grown=grown, device="cpu",
               config=Trainer.Config(batch_size=8, epochs=1, seed=3), prepare=learning.scale, num_tasks=3, **mixins)
    made.fit(learning.stream())
    weights = dict(made.module.named_parameters())
    assert len(made.growths) == 2 and all(p.isfinite().all() for p in weights.values())
    for part in parts:
        state = made.optimizer.states[part]
        for kept in (value for value in vars(state).values() if isinstance(value, dict) and value):
            assert kept.keys() == weights.keys()  # the new parts, too
            assert all(kept[n].shape == p.shape for n, p in weights.items())
        assert getattr(state, "tasks", 3) == 3


@pytest.mark.parametrize("part", [VCL, SemanticMemory])
def test_predictions_at_other_weights_leave_no_trace(part: type) -> None:
    def fitted(cls: Any, **more: Any) -> Any:
        options = {"predictions": 2} if part is VCL else {}
        sgd = compose(part, base=torch.optim.SGD)
        made = cls(learning.net(smooth=True), functools.partial(sgd, lr=0.1, momentum=0.9, **options), device="cpu",
                   config=Trainer.Config(batch_size=8, epochs=1, seed=3), prepare=learning.scale, **more)
        made.fit(learning.stream())
        return made

    plain, watched = fitted(Trainer), fitted(Watched, every=1, subset=5, windows=(2,))
    one, other = (t.optimizer.state_dict()["everbatch"]["tensors"] for t in (plain, watched))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert watched.states[ContinualEvaluation].points >= 12
