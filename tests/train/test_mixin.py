"""How trainer mixins compose, micro-batches, what a prediction may be, and checkpoints that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import learning
from everbatch import checkpoint
from everbatch.data import Batch, domain_incremental, task_incremental
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch, CompositionError
from everbatch.train import Replay, Schedule, StepRecord, Trainer, TrainerMixin
from everbatch.train.evaluate import allowed_classes
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

    from everbatch.train.evaluate import accuracies

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
    ({"seed": 4}, "made with trainer.seed=3, this run has 4"), ({"epochs": 3}, "trainer.epochs=2, this run has 3"),
    ({"schedule": Schedule()}, "trainer.schedule="), ({"replay": {"alpha": 0.5}}, "mixins.Replay="),
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
    assert (tmp_path / "previous" / "step-00000024").exists()
    found = checkpoint.latest(tmp_path, world=World())
    assert found is not None and found.step == 2


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
