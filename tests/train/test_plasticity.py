"""Plasticity in one process: closed forms, and a run measured by hand. Bits on engines: the contract suite."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import learning
from everbatch.data import task_free
from everbatch.metrics.plasticity import dormant, effective_rank, threshold_rank
from everbatch.train import Plasticity, Trainer
from learning import stream


class Measured(Plasticity, Trainer):
    """Measured at task ends."""


def build(model: nn.Module, **options: Any) -> Any:
    return functools.partial(Measured, **options)(
        model, learning.PLAIN, "plain", config=Trainer.Config(batch_size=8, seed=3), prepare=learning.scale, device="cpu")


def test_ranks_in_closed_form() -> None:
    assert effective_rank(3 * torch.eye(5)) == pytest.approx(5.0) and threshold_rank(torch.eye(5)) == 5
    one = torch.outer(torch.arange(1.0, 7.0), torch.tensor([1.0, 2.0, 3.0]))
    assert effective_rank(one) == pytest.approx(1.0, abs=1e-6) and threshold_rank(one) == 1
    assert effective_rank(torch.zeros(3, 2)) == threshold_rank(torch.zeros(3, 2)) == 0
    two = torch.diag(torch.tensor([3.0, 1.0]))  # p = 3/4, 1/4
    assert effective_rank(two) == pytest.approx(4 / 3**0.75) and threshold_rank(two, 0.25) == 1 and threshold_rank(two, 0.2) == 2
    with pytest.raises(ValueError, match="must be \\(samples, features\\)"):
        effective_rank(torch.zeros(3))


def test_dormant_units_in_closed_form() -> None:
    means = torch.tensor([0.0, 0.1, 4.0, 7.9])  # mean 3
    assert dormant(means, 0.0).tolist() == [True, False, False, False]
    assert dormant(means, 0.04).tolist() == [True, True, False, False]
    assert dormant(torch.zeros(2), 0.025).all()


class Net(nn.Module):
    """One activation in two places, a layer of which a known share is dead, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(64, 10), nn.Linear(10, 6), nn.Linear(6, 6)
        self.act = nn.ReLU()
        with torch.no_grad():
            self.first.weight[:3] = 0.0
            self.first.bias[:3] = -1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.second(self.act(self.first(x.flatten(1))))))  # type: ignore[no-any-return]


def test_a_run_is_measured_as_by_hand() -> None:
    model = Net()
    t = build(model, subset=1000)
    t.fit(stream())
    report = t.report()
    last = stream().tasks[2]
    ids = last.train_ids.sort().values
    x, y = learning.scale(stream().fetch(ids)), stream().targets(ids)  # type: ignore[arg-type]
    with torch.no_grad():
        hidden = model.act(model.first(x.flatten(1)))
        features = model.act(model.second(hidden))
    asleep = torch.cat([dormant(h.double().abs().mean(0), 0.025) for h in (hidden, features)])
    assert report.values["dormant_units"][-1] == pytest.approx(asleep.double().mean().item()) and asleep[:3].all()
    assert report.values["effective_rank"][-1] == pytest.approx(effective_rank(features))
    assert report.values["threshold_rank"][-1] == threshold_rank(features)
    loss = functional.cross_entropy(model(x), y)
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm().item()
    assert report.values["gradient_norm"][2][2] == pytest.approx(norm, rel=1e-5)
    assert [len(row) for row in report.values["gradient_norm"]] == [1, 2, 3]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert report.lines[0].startswith("dormant units by task") and report.lines[0].count(".") == 3


def test_a_stream_without_boundaries_is_measured_and_trained_as_without() -> None:
    made = [build(Net(), subset=12) for _ in range(2)]
    made.append(Trainer(
        Net(), learning.PLAIN, "plain", config=Trainer.Config(batch_size=8, seed=3), prepare=learning.scale, device="cpu"))
    hidden = task_free(stream())
    for one in made:
        one.fit(hidden)
    values = made[0].report().values
    assert [len(row) for row in values["gradient_norm"]] == [1, 2, 3] and min(map(min, values["gradient_norm"])) > 0
    assert all(0 < share < 1 for share in values["dormant_units"]) and len({row[0] for row in values["gradient_norm"]}) == 3
    again = made[1].report().values
    assert {**values, "measuring_seconds": 0} == {**again, "measuring_seconds": 0}
    for one, other in zip(made[0].module.parameters(), made[2].module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_seen_is_none(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 6, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.view(-1, 1, 8, 8)).flatten(1)  # type: ignore[no-any-return]

    t = build(Plain())
    t.recorder = learning.recorder(tmp_path)
    t.fit(stream())
    values = t.report().values
    assert values["dormant_units"] == values["effective_rank"] == [None] * 3 and values["gradient_norm"][0][0] > 0
    t.recorder.close()
    text = (tmp_path / "scalars.jsonl").read_text()
    assert "plasticity/gradient_norm/task_2" in text and "plasticity/dormant" not in text


def test_its_figure_is_drawn_with_one_task_and_with_many() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    from everbatch.report.curves import plasticity_by_task

    for tasks in (1, 40):
        values = {"dormant_units": [None] * tasks, "effective_rank": [3.0] * tasks, "threshold_rank": [4.0] * tasks,
                  "gradient_norm": [[0.1] * (k + 1) for k in range(tasks)]}
        assert len(plasticity_by_task(values).axes) == 3


@pytest.mark.parametrize(("options", "text"), [({"subset": 0}, "subset=0"), ({"tau": -0.1}, "tau=-0.1")])
def test_bad_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"Plasticity: {text}, must"):
        build(Net(), **options)
