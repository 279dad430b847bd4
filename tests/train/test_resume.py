"""What a resumed run freezes and trains, what it refuses untouched, and what was computed before it resumed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import learning
from everbatch.data import Task
from everbatch.errors import CheckpointMismatch
from everbatch.train import Trainer, TrainerMixin
from learning import Abandoned, everything, stream
from processes import Zygote

WORKER = Path(__file__).parent / "evaluated_worker.py"


class Probe(nn.Module):
    """A frozen body of some depth, and a head."""

    def __init__(self, depth: int, slopes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.PReLU(slopes)) for _ in range(depth)))
        self.body.requires_grad_(False)
        self.head = nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)))  # type: ignore[no-any-return]


def probe(folder: Path, depth: int, slopes: int) -> Any:
    return learning.trainer("plain", cls=Trainer, model=Probe(depth, slopes), optimizer=learning.PLAIN, folder=folder)


SHAPES = r"frozen parameters \['body.0.1.weight'\] have shapes \[\({},\)\] there and \[\({},\)\] in the model"


@pytest.mark.parametrize(("saved", "here", "text"), [
    ((1, 1), (2, 1), r"made with frozen.body.1.0.weight=None, this run has True \(and frozen.body.1.0.bias, .* differ\)"),
    ((2, 1), (1, 1), r"made with frozen.body.1.0.weight=True, this run has None \(and frozen.body.1.0.bias, .* differ\)"),
    ((1, 1), (1, 64), SHAPES.format(1, 64)),  # it broadcasts
    ((1, 64), (1, 1), SHAPES.format(64, 1))],
    ids=["more", "fewer", "larger", "smaller"])
def test_another_frozen_part_is_refused_untouched(tmp_path: Path, saved: Any, here: Any, text: str) -> None:
    probe(tmp_path, *saved).fit(stream())
    other = probe(tmp_path, *here)
    before = {n: v.clone() for n, v in other.module.state_dict().items()}
    with pytest.raises(CheckpointMismatch, match=text):
        other.fit(stream(), resume=True)
    after = other.module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before) and other.step == 0


class Freezing(TrainerMixin):
    """Layer 1 is trained in the first task alone."""

    def on_task_start(self, task: Task) -> None:
        super().on_task_start(task)  # type: ignore[misc]
        self.module[1].requires_grad_(task.id == 0)  # type: ignore[attr-defined]


class Thawing(TrainerMixin):
    """Layer 1 is trained from the second task on."""

    def on_task_start(self, task: Task) -> None:
        super().on_task_start(task)  # type: ignore[misc]
        self.module[1].requires_grad_(task.id > 0)  # type: ignore[attr-defined]


def changing(part: type, folder: Path, after: int = 0, **options: Any) -> Any:
    recorder = learning.recorder(folder, after) if after else None
    return learning.trainer("plain", cls=type("Learner", (part, Trainer), {}), folder=folder, recorder=recorder, **options)


@pytest.mark.parametrize("after", [5, 9, 13])
@pytest.mark.parametrize("part", [Freezing, Thawing])
def test_what_a_run_froze_meanwhile_is_frozen_in_the_resumed_one(tmp_path: Path, part: type, after: int) -> None:
    whole = changing(part, tmp_path / "whole")
    whole.fit(stream())
    with pytest.raises(Abandoned):
        changing(part, tmp_path / "cut", after).fit(stream())
    again = changing(part, tmp_path / "cut", model=learning.net(9))
    again.fit(stream(), resume=True)
    for name, flag in ((n, p.requires_grad) for n, p in whole.module.named_parameters()):
        assert again.module.get_parameter(name).requires_grad == flag
    one, other = everything(whole) | whole.module.state_dict(), everything(again) | again.module.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[k].nan_to_num(-1), other[k].nan_to_num(-1)) for k in one)


def test_a_refused_resume_freezes_nothing(tmp_path: Path) -> None:
    with pytest.raises(Abandoned):
        changing(Freezing, tmp_path, 13).fit(stream())
    other = changing(Freezing, tmp_path, model=learning.net(smooth=True))
    with pytest.raises(CheckpointMismatch, match="differ between the state and the model"):
        other.fit(stream(), resume=True)
    assert all(p.requires_grad for p in other.module.parameters())


def test_another_choice_of_what_is_frozen_from_the_start_is_refused(tmp_path: Path) -> None:
    learning.trainer("plain", cls=Trainer, folder=tmp_path).fit(stream())
    model = learning.net()
    model[1].requires_grad_(False)
    again = learning.trainer("plain", cls=Trainer, folder=tmp_path, model=model)
    with pytest.raises(CheckpointMismatch, match=r"frozen.1.weight=None, this run has True \(and frozen.1.bias differ\)"):
        again.fit(stream(), resume=True)


def named(folder: Path, value: Any) -> Any:
    t = learning.trainer("plain", cls=Trainer, folder=folder)
    t.identity = {"data": value}
    return t


@pytest.mark.parametrize("value", [math.nan, [1, {"std": math.nan}], (0.5, 0.25), {1: 2}])
def test_what_the_caller_names_equals_itself(tmp_path: Path, value: Any) -> None:
    named(tmp_path, value).fit(stream())
    named(tmp_path, value).fit(stream(), resume=True)
    with pytest.raises(CheckpointMismatch, match="made with identity.data="):
        named(tmp_path, 0.25).fit(stream(), resume=True)


def test_a_number_may_change_its_type(tmp_path: Path) -> None:
    named(tmp_path, [1, 0]).fit(stream())
    named(tmp_path, [1.0, 0.0]).fit(stream(), resume=True)


@pytest.mark.parametrize("value", [Path("/x"), torch.ones(1), np.float32(1), [{"a": b"x"}]])
def test_what_no_checkpoint_can_hold_is_told_at_once(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Trainer: identity\['data'\]=.*, must be made of numbers, texts, lists and dicts"):
        Trainer(learning.net(), learning.PLAIN, device="cpu", identity={"data": value})
    t = named(Path("unused"), value)
    with pytest.raises(ValueError, match="must be made of numbers"):
        t.fit(stream())
    assert t.step == 0


@pytest.mark.distributed
def test_an_evaluation_before_it_leaves_no_trace_on_fsdp2(zygote: Zygote, tmp_path: Path) -> None:
    found = zygote.found(WORKER, tmp_path / "odd.json", str(tmp_path), ranks=1, limit=120)
    assert len(found) == 6 and found == dict.fromkeys(found, [])
