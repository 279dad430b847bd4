"""What a user put into evaluation mode stays there: in training, evaluation, a resumed run, an adversary's copy."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everbatch.composition import compose
from everbatch.data import Stream, TensorSource, class_incremental
from everbatch.errors import CheckpointMismatch
from everbatch.optim import SAM
from everbatch.optim.sparsity.flops import layer_flops
from everbatch.train import ConAdv, Trainer, TrainerMixin
from everbatch.train.adversarial.inline import Replica
from everbatch.train.modes import evaluation_roots, in_evaluation


class Noise(nn.Module):
    """Counts forwards in training mode, as dropout would draw in them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("drawn", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.drawn += 1
        return x


def net(*, frozen: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Tanh(), Noise())
    if frozen:
        backbone.requires_grad_(False).eval()
    return nn.Sequential(backbone, nn.BatchNorm1d(20), nn.Linear(20, 6))


def stream() -> Stream:
    g = torch.Generator().manual_seed(0)
    sources = [TensorSource(torch.randn(n, 6, generator=g), torch.arange(n) % 6, name=str(n)) for n in (120, 60)]
    return class_incremental(*sources, tasks=3)


def learner(model: nn.Module, folder: Path | None = None, kind: Any = Trainer, **options: Any) -> Any:
    return kind(model, functools.partial(compose(SAM, base=torch.optim.SGD), lr=0.1, rho=0.05), device="cpu", folder=folder,
                config=Trainer.Config(batch_size=10, epochs=1, checkpoint_every=1, keep_last=99), **options)


class Freezing(TrainerMixin):
    """Puts a layer into evaluation mode when the second task begins."""

    def on_task_start(self, task: Any) -> None:
        super().on_task_start(task)  # type: ignore[misc]
        if task.id == 1:
            self.module[1].eval()  # type: ignore[attr-defined]


def test_a_frozen_backbone_stays_in_evaluation_mode() -> None:
    model = net()
    before, modes = model[0][1].running_mean.clone(), in_evaluation(model)
    learner(model).fit(stream())
    assert in_evaluation(model) == modes == ["0", "0.0", "0.1", "0.2", "0.3"] and evaluation_roots(model) == ["0"]
    assert torch.equal(model[0][1].running_mean, before) and model[0][3].drawn == 0
    assert model[1].num_batches_tracked == 12


def test_modes_changed_inside_a_run_are_those_of_a_resumed_one(tmp_path: Path) -> None:
    class Learner(Freezing, Trainer): ...

    whole = learner(net(frozen=False), tmp_path / "whole", Learner)
    whole.fit(stream())
    assert whole.module[1].num_batches_tracked == 4 and in_evaluation(whole.module) == ["1"]
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "step-00000006").rename(tmp_path / "part" / "step-00000006")
    again = learner(net(frozen=False), tmp_path / "part", Learner)
    again.fit(stream(), resume=True)  # from the middle of the second task, whose start has been
    one, other = whole.module.state_dict(), again.module.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    with pytest.raises(CheckpointMismatch, match=r"made with evaluation=None, this run has \['0'\]"):
        model = net(frozen=False)
        model[0].eval()
        learner(model, tmp_path / "part", Learner).fit(stream(), resume=True)


def test_a_model_in_evaluation_mode_as_a_whole_is_warned_of() -> None:
    model = net(frozen=False).eval()
    with pytest.warns(UserWarning, match=r"whole model is in evaluation mode and stays in it.*model\.train\(\)"):
        learner(model).fit(stream())
    assert not any(m.training for m in model.modules()) and model[0][3].drawn == 0


def test_counting_flops_puts_every_mode_back() -> None:
    model = net()
    layer_flops(model, torch.randn(4, 6))
    assert in_evaluation(model) == in_evaluation(net())


def test_a_copy_that_crafts_takes_the_modes_of_the_live_module() -> None:
    live, spare = net(), net(frozen=False)
    live[1].eval()
    Replica(None, spare, live, 0).submit(0, [], live.state_dict())  # type: ignore[arg-type]
    assert in_evaluation(spare) == in_evaluation(live)


@pytest.mark.slow
def test_an_adversary_process_takes_the_modes_of_every_step() -> None:
    class Learner(ConAdv, Freezing, Trainer): ...

    def trained(**options: Any) -> Any:
        made = learner(net(), kind=Learner, radius=3.0, split_bn=False, tau=1, **options)
        try:
            made.fit(stream())
        finally:
            made.close()
        return made.module.state_dict()

    inline, beside = trained(), trained(placement="process")
    assert all(torch.equal(a, b) for a, b in zip(inline.values(), beside.values(), strict=True))
    assert inline["0.1.num_batches_tracked"] == 0
