"""How trainer mixins compose, micro-batches, what a prediction may be, and checkpoints that do not fit."""

from __future__ import annotations

import json
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import learning
from everbatch import checkpoint
from everbatch.data import Batch, class_incremental, domain_incremental, task_incremental
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch, CompositionError
from everbatch.evaluate.candidates import allowed_classes
from everbatch.evaluate.evaluator import Evaluator
from everbatch.report.recorder import Recorder
from everbatch.train import Replay, Schedule, StepRecord, Trainer, TrainerMixin
from everbatch.train.signals import StopOnSignal
from learning import Abandoned, stream


def test_a_trainer_that_lacks_a_verb_is_refused_by_name() -> None:
    class Mine:
        world, seed, step = World(), 0, 0

        def draw_batch(self, parts: list[Batch]) -> list[Batch]:
            return parts

        def loss_terms(self, outputs: Any, batch: Batch) -> dict[str, Any]:
            return {}

    with pytest.raises(CompositionError, match=r"Replay extends configure_model\(\), which Mine does not offer; define "
                                               r"configure_model\(\), after_step\(\) there"):
        type("Learner", (Replay, Mine), {})


def test_a_mixin_right_of_its_base() -> None:
    with pytest.raises(TypeError, match="Replay"):
        type("Learner", (Trainer, Replay), {})


def test_the_step_is_final_and_verbs_cooperate() -> None:
    with pytest.raises(CompositionError, match=r"overrides training_step\(\), which is final"):
        type("Greedy", (TrainerMixin,), {"training_step": lambda self, batch: None})
    with pytest.raises(CompositionError, match=r"after_step\(\) never calls super"):
        type("Silent", (TrainerMixin,), {"after_step": lambda self, record: None})
    with pytest.raises(CompositionError, match="training_step"):
        type("Learner", (Replay, Trainer), {"training_step": lambda self, batch: None})


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(TypeError, match="unknown option 'capcity'; did you mean 'capacity'"):
        learning.trainer("plain", replay={"capcity": 3})


@pytest.mark.parametrize(("rows", "pieces"), [(7, 3), (6, 2), (2, 4), (1, 1)])
def test_micro_batches_sum_to_the_batch(rows: int, pieces: int) -> None:
    losses = torch.arange(1, rows + 1, dtype=torch.float64)
    for weight in (None, torch.linspace(0.1, 0.5, rows, dtype=torch.float64)):
        index = torch.arange(rows)
        batch = Batch(losses[:, None], torch.zeros_like(index), index, index, weight=weight,
                      extras={"logits": losses[:, None]})
        parts = batch.split(pieces)
        assert len(parts) == pieces and all(len(p) >= 1 for p in parts)
        assert sum(p.mean(p.inputs[:, 0]).item() for p in parts) == pytest.approx(batch.mean(losses).item(), rel=1e-6)
        assert torch.cat([p.extras["logits"] for p in parts])[:rows, 0].tolist() == losses.tolist()


def test_what_a_prediction_may_be() -> None:
    s = stream()
    assert allowed_classes(s, 1, s.tasks[0]).tolist() == [0, 1, 2, 3]
    assert allowed_classes(s, 0, s.tasks[2]).tolist() == [0, 1, 2, 3, 4, 5]  # not yet seen: among its own as well
    t = task_incremental(s.train, s.test, tasks=3, classes=range(6))
    assert allowed_classes(t, 2, t.tasks[1]).tolist() == [2, 3]
    d = domain_incremental([(s.train, s.test)] * 2)
    assert allowed_classes(d, 0, d.tasks[0]).tolist() == list(range(10))


def test_evaluation_takes_the_best_of_the_allowed() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bias.expand(len(x), 6)

    from everbatch.evaluate.evaluator import accuracies

    s = stream()
    t = learning.trainer("plain", cls=Trainer, model=Fixed())
    for task, best in ((0, 1), (1, 3), (2, 5)):
        share = [(s.targets(k.test_ids) == best).double().mean().item() for k in s.tasks[: task + 1]]
        assert accuracies(t, s, task, list(s.tasks[: task + 1])) == share


def left(folder: Path, after: int, **options: Any) -> None:
    t = learning.trainer("plain", folder=folder, recorder=learning.recorder(folder, after), **options)
    with pytest.raises(Abandoned):
        t.fit(stream())


@pytest.mark.parametrize(("options", "text"), [
    ({"seed": 4}, "made with trainer.seed=3, this run has 4"), ({"replay": {"alpha": 0.5}}, "mixins.Replay="),
    ({"cls": Trainer}, "classes=[['Replay'],"),
    ({"optimizer": learning.PLAIN}, "optimizer.")])
def test_a_checkpoint_of_another_configuration(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    left(tmp_path, 5)
    t = learning.trainer("plain", folder=tmp_path, **options)
    before = learning.whole(t)
    with pytest.raises(CheckpointMismatch, match="repeat the configuration, or use another folder") as caught:
        t.fit(stream(), resume=True)
    assert text in str(caught.value)
    after = learning.whole(t)
    assert all(torch.equal(before[k], after[k]) for k in before) and t.step == 0


def test_what_may_change_between_save_and_load(tmp_path: Path) -> None:
    left(tmp_path, 5)
    t = learning.trainer("plain", folder=tmp_path, keep_last=5, checkpoint_every=3, eval_batch=7, accumulation=2, workers=0)
    t.fit(stream(), resume=True)
    assert t.step == learning.STEPS


def test_another_model_is_refused(tmp_path: Path) -> None:
    left(tmp_path, 5)
    with pytest.raises(CheckpointMismatch, match="differ between the state and the model"):
        learning.trainer("plain", folder=tmp_path, model=learning.net(smooth=True)).fit(stream(), resume=True)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    whole = learning.trainer("plain", folder=tmp_path / "whole")
    whole.fit(stream())
    left(tmp_path / "cut", 7)
    file = next((tmp_path / "cut" / "step-00000006").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    t = learning.trainer("plain", folder=tmp_path / "cut")
    with pytest.warns(UserWarning, match="damaged checkpoint skipped: .*step-00000006.*step-00000004 is used"):
        t.fit(stream(), resume=True)
    one, other = learning.everything(t), learning.everything(whole)
    assert all(torch.equal(one[k].nan_to_num(-1), other[k].nan_to_num(-1)) for k in other)


def test_a_second_run_in_the_folder_sets_the_first_aside(tmp_path: Path) -> None:
    learning.trainer("plain", folder=tmp_path).fit(stream())
    left(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002"]
    assert (tmp_path / "previous" / "1" / "step-00000024").exists()
    left(tmp_path, 5)
    assert [p.name for p in sorted((tmp_path / "previous" / "2").iterdir())] == ["step-00000002"]
    assert (tmp_path / "previous" / "1" / "step-00000024").exists()
    found = checkpoint.latest(tmp_path, world=World())
    assert found is not None and found.step == 4


def test_a_second_fit_trains_all_its_tasks() -> None:
    t = learning.trainer("plain", cls=Trainer)
    first = t.fit(stream())
    second = t.fit(stream())
    assert t.step == 48 and len(first) == len(second) == 3 and first is not second and first != second
    halves = class_incremental(stream().train, stream().test, tasks=2, seed=1, classes=range(6))
    with pytest.raises(ValueError, match="a stream of 2 tasks after num_tasks=3, must have as many"):
        t.fit(halves)


def test_frozen_weights_are_resumed_and_what_the_caller_names_must_be_the_same(tmp_path: Path) -> None:
    def frozen(seed: int) -> nn.Module:
        model = learning.net(seed)
        model[1].requires_grad_(False)
        return model

    whole = learning.trainer("plain", cls=Trainer, model=frozen(0), folder=tmp_path / "whole")
    whole.fit(stream())
    with pytest.raises(Abandoned):
        learning.trainer("plain", cls=Trainer, model=frozen(0), folder=tmp_path / "cut",
                         recorder=learning.recorder(tmp_path / "cut", 5)).fit(stream())
    again = learning.trainer("plain", cls=Trainer, model=frozen(9), folder=tmp_path / "cut")
    again.fit(stream(), resume=True)
    assert all(torch.equal(v, again.module.state_dict()[n]) for n, v in whole.module.state_dict().items())
    again.identity = {"data.std": 0.5}
    with pytest.raises(CheckpointMismatch, match="made with identity.data.std=None, this run has 0.5"):
        again.fit(stream(), resume=True)


def test_a_head_that_is_too_narrow_is_told_in_the_first_step() -> None:
    t = learning.trainer("plain", cls=Trainer, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
    with pytest.raises(ValueError, match=r"logits of \(8, 4\), 6 classes, must be \(n, classes\)"):
        t.fit(stream())
    assert t.step == 0


def test_a_final_rate_above_the_peak_is_told_before_the_first_step() -> None:
    schedule = Schedule(kind="polynomial", first="zero", end_lr=0.5)
    with pytest.raises(ValueError, match="Schedule: end_lr=0.5, must be at most the learning rate 0.1"):
        learning.trainer("plain", cls=Trainer, schedule=schedule).fit(stream())


def test_scalars_of_a_run_that_diverges_are_kept(tmp_path: Path) -> None:
    with Recorder(tmp_path, 0, tensorboard=False) as recorder:
        t = learning.trainer("plain", cls=Trainer, recorder=recorder, max_bad_steps=2,
                             prepare=lambda x: x.float() * float("nan"))
        with pytest.raises(RuntimeError, match="2 consecutive steps"):
            t.fit(stream())
        lines = (tmp_path / "scalars.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


@pytest.mark.parametrize("action", ["default", "error"])
def test_scalars_that_cannot_be_written_hide_no_error(tmp_path: Path, action: Any) -> None:
    class Full(Recorder):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    t = learning.trainer("plain", cls=Trainer, recorder=Full(tmp_path, tensorboard=False), max_bad_steps=2,
                         prepare=lambda x: x.float() * float("nan"))
    with pytest.warns(UserWarning, match="last scalars before RuntimeError were not written: OSError: .*No space left"):
        warnings.simplefilter(action)
        with pytest.raises(RuntimeError, match="2 consecutive steps"):
            t.fit(stream())
    t.recorder._file.close()


def test_a_run_that_fails_in_its_first_step_keeps_the_scalars_of_the_last(tmp_path: Path) -> None:
    with Recorder(tmp_path, 0, tensorboard=False) as recorder:
        learning.trainer("plain", cls=Trainer, recorder=recorder).fit(stream())
    lines, narrow = (tmp_path / "scalars.jsonl").read_text(), nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with Recorder(tmp_path, 0, tensorboard=False) as recorder, pytest.raises(ValueError, match="give the model a head"):
        learning.trainer("plain", cls=Trainer, recorder=recorder, model=narrow).fit(stream())
    assert (tmp_path / "scalars.jsonl").read_text() == lines and lines.count("\n") == learning.STEPS


def test_a_signal_that_comes_twice_at_once_asks_once(tmp_path: Path) -> None:
    t = learning.trainer("plain", cls=Trainer, folder=tmp_path)
    with StopOnSignal(t.run.stop):
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert t.run.stop.asked


def test_a_batch_that_no_task_can_fill() -> None:
    with pytest.raises(ValueError, match="global_batch=64 and task 0 with 32 training samples"):
        learning.trainer("plain", batch_size=64).fit(stream())


def test_verbs_are_called_in_order() -> None:
    calls: list[str] = []

    class Tracing(TrainerMixin):
        def on_task_start(self, task: Any) -> None:
            super().on_task_start(task)  # type: ignore[misc]
            calls.append(f"start {task.id}")

        def after_step(self, record: StepRecord) -> None:
            super().after_step(record)  # type: ignore[misc]
            calls.append(f"step {record.step}")

        def consolidate(self, task: Any) -> None:
            super().consolidate(task)  # type: ignore[misc]
            calls.append(f"consolidate {task.id}")

        def on_task_end(self, task: Any) -> None:
            super().on_task_end(task)  # type: ignore[misc]
            calls.append(f"end {task.id}")

    learning.trainer("plain", cls=type("Traced", (Tracing, Trainer), {})).fit(stream())
    expected = [[f"start {k}", *(f"step {s}" for s in range(8 * k, 8 * k + 8)), f"consolidate {k}", f"end {k}"] for k in range(3)]
    assert calls == [call for task in expected for call in task]


def test_a_part_that_runs_parts_calls_super() -> None:
    with pytest.raises(CompositionError, match=r"Silent: forward_parts\(\) never calls super\(\)"):
        class Silent(TrainerMixin):
            def forward_parts(self, parts: Any) -> Any:
                return list(parts)


def test_a_trainer_may_lack_what_is_optional() -> None:
    class Own:
        def draw_batch(self, parts: list[Batch]) -> list[Batch]:
            return parts

    class Together(TrainerMixin):
        def forward_parts(self, parts: Any) -> Any:
            return super().forward_parts(parts)  # type: ignore[misc]

    assert type("Both", (Together, Own), {})().notes() == ""


def test_evaluation_needs_no_trainer() -> None:
    s, module = stream(), nn.Linear(1, 1)
    modes: list[bool] = []

    def predict(batch: Batch) -> torch.Tensor:
        modes.append(module.training)
        return nn.functional.one_hot(batch.targets, 6).float()

    evaluator = Evaluator(module, predict, torch.Tensor.float, World(), torch.device("cpu"), rows=4)
    assert evaluator.accuracies(s, 2, list(s.tasks)) == [1.0, 1.0, 1.0]
    assert not any(modes) and module.training
    assert evaluator.accuracies(s, 2, list(s.tasks), stop=lambda _now: True) is None
