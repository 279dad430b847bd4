"""Learning rates in closed form, as the trainer applies and logs them, also after a resume."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import learning
from everbatch import compose
from everbatch.optim.layerwise.rules import IMAGENET, Peak, conadv_peak
from everbatch.report.recorder import read_scalars
from everbatch.train import Schedule, StepRecord, Trainer
from learning import PER_TASK, STEPS, Abandoned, stream
from rotation import When

PEAK, WARM = 0.1, 2
"""Half an epoch of four steps of warm-up."""


def warmed(shape: Callable[[int, int], float]) -> Callable[[int], float]:
    """Ramp, then `shape` of (step, steps) after it."""
    return lambda s: PEAK * ((s + 1) / (WARM + 1) if s < WARM else shape(s - WARM, PER_TASK - WARM))


CASES: dict[str, tuple[Schedule, Callable[[int], float]]] = {
    "constant": (Schedule(), lambda s: PEAK),
    "cosine": (Schedule(kind="cosine"), lambda s: PEAK * (1 + math.cos(math.pi * s / PER_TASK)) / 2),
    "polynomial": (Schedule(kind="polynomial", power=2.0), lambda s: PEAK * (1 - s / PER_TASK) ** 2),
    "steps": (Schedule(kind="steps", milestones=(0.75, 1.5), factor=0.1), lambda s: PEAK * 0.1 ** ((s >= 3) + (s >= 6))),
    "warm constant": (Schedule(warmup_epochs=0.5), warmed(lambda s, n: 1.0)),
    "warm cosine": (Schedule(kind="cosine", warmup_epochs=0.5), warmed(lambda s, n: (1 + math.cos(math.pi * s / n)) / 2)),
    "warm by samples": (Schedule(kind="cosine", warmup_samples=13), warmed(lambda s, n: (1 + math.cos(math.pi * s / n)) / 2)),
    "warm polynomial": (Schedule(kind="polynomial", power=1.5, warmup_epochs=0.5), warmed(lambda s, n: (1 - s / n) ** 1.5)),
    "warm from zero": (Schedule(kind="polynomial", first="zero", warmup_epochs=0.5, power=2.0, end_lr=0.01), lambda s:
                       PEAK * s / WARM if s <= WARM else 0.09 * (1 - (s - WARM) / (PER_TASK - WARM + 1)) ** 2 + 0.01),
    "warm steps": (Schedule(kind="steps", milestones=(0.75, 1.5), warmup_epochs=0.5),
                   warmed(lambda s, n: 0.1 ** ((s >= 1) + (s >= 4)))),
}


@pytest.mark.parametrize("name", CASES)
def test_rates_of_every_step(tmp_path: Path, name: str) -> None:
    schedule, rate = CASES[name]
    expected = [rate(s) for s in range(PER_TASK)] * 3
    for after in (STEPS + 1, 15):  # the second run is left after step 15, inside a task, and goes on from step 12
        folder = tmp_path / str(after)

        def run(after: int, resume: bool, folder: Path = folder) -> None:
            t = learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN, schedule=schedule, checkpoint_every=12,
                                 folder=folder, recorder=learning.recorder(folder, after))
            t.fit(stream(), resume=resume)
            t.recorder.close()

        if after > STEPS:
            run(after, False)
        else:
            with pytest.raises(Abandoned):
                run(after, False)
            run(-1, True)
        rows = read_scalars(folder / "scalars.jsonl")
        assert [row["step"] for row in rows] == list(range(STEPS))
        assert [row["lr"] for row in rows] == pytest.approx(expected, rel=1e-9, abs=1e-12)


class Noting(Trainer):
    """Keeps the tensor that the rate is in, and the rate of every step."""

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)
        rate = self.optimizer.param_groups[0]["lr"]
        self.held = getattr(self, "held", rate)
        assert rate is self.held or not isinstance(rate, torch.Tensor)
        self.rates = [*getattr(self, "rates", []), torch.as_tensor(rate, dtype=torch.float32).item()]


@pytest.mark.parametrize("name", [When(place, 3).param(name) for place, name in enumerate(CASES)])
def test_a_rate_in_a_tensor_gives_what_a_number_gives(tmp_path: Path, name: str) -> None:
    number = torch.tensor(PEAK).item()

    def run(lr: float | torch.Tensor, folder: Path, after: int = 0) -> Noting:
        optimizer = functools.partial(compose(base=torch.optim.SGD), lr=lr, momentum=0.9)
        made = learning.trainer("plain", cls=Noting, optimizer=optimizer, schedule=CASES[name][0], folder=folder,
                                recorder=learning.recorder(folder, after) if after else None)
        made.fit(stream(), resume=not after)
        return made  # type: ignore[no-any-return]

    expected, found = run(number, tmp_path / "number"), run(torch.tensor(PEAK), tmp_path / "tensor")
    assert found.rates == expected.rates and len(found.rates) == STEPS and isinstance(found.held, torch.Tensor)
    with pytest.raises(Abandoned):
        run(torch.tensor(PEAK), tmp_path / "cut", 13)
    ends = [learning.everything(t) for t in (expected, found, run(torch.tensor(PEAK), tmp_path / "cut"))]
    for end in ends[1:]:
        assert all(torch.equal(end[k].nan_to_num(-1), ends[0][k].nan_to_num(-1)) for k in end)


def test_a_warm_up_longer_than_the_training() -> None:
    with pytest.raises(ValueError, match=r"warmup_epochs=2.0, must be shorter than the 2 epochs of the task"):
        learning.trainer("plain", schedule=Schedule(warmup_epochs=2.0)).fit(stream())


@pytest.mark.parametrize(("batch", "peak", "warm", "epochs"), [
    (16384, 25.0, 5, 91), (32768, 31.2, 25, 91), (98304, 43.0, 41, 100)])
def test_the_schedule_of_the_tpu_recipes(batch: int, peak: float, warm: int, epochs: int) -> None:
    assert conadv_peak(batch) == Peak(lr=peak, warmup_epochs=warm)
    per_epoch = IMAGENET // batch
    schedule = Schedule(kind="polynomial", first="zero", warmup_epochs=warm, power=1.6, end_lr=1e-4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = schedule.build(optimizer, epochs=epochs, steps_per_epoch=per_epoch, batch_size=batch)
    w, total = warm * per_epoch, epochs * per_epoch
    left, rates = total - w + 1, []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        expected = peak * step / w if step <= w else (peak - 1e-4) * (1 - min(step - w, left) / left) ** 1.6 + 1e-4
        assert rates[-1] == pytest.approx(expected, rel=1e-9), step
    assert rates[0] == 0 and max(rates) == peak and rates[-1] < 1e-3 * peak


@pytest.mark.parametrize(("option", "text"), [
    ({"kind": "linear"}, "kind='linear'"), ({"warmup_epochs": -1.0}, "warmup_epochs=-1.0"), ({"power": 0.0}, "power=0.0"),
    ({"warmup_samples": -1}, "warmup_samples=-1"), ({"warmup_samples": 8, "warmup_epochs": 1.0}, "be one of them"),
    ({"milestones": (2.0, 1.0)}, "ascend"), ({"factor": 1.5}, "factor=1.5"), ({"first": "one"}, "first='one'"),
    ({"first": "zero"}, "go with kind='polynomial'"), ({"end_lr": 1e-4}, "be 0 without first='zero'"),
    ({"first": "zero", "kind": "polynomial", "end_lr": -1.0}, "end_lr=-1.0")])
def test_bad_options(option: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Schedule(**option)  # type: ignore[arg-type]
