"""WarmStart calls the optimizer's shrink and perturb when data arrive, and at no other time."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everbatch.composition import compose
from everbatch.data import TensorSource, growing
from everbatch.optim import ShrinkPerturb
from everbatch.optim.restart.fresh import fresh_model
from everbatch.train import Trainer, WarmStart


class Learner(WarmStart, Trainer):
    pass


def build() -> nn.Module:
    return nn.Linear(6, 3)


def stream(rounds: int = 3) -> Any:
    g = torch.Generator().manual_seed(0)
    sources = [TensorSource(torch.randn(n, 6, generator=g), torch.arange(n) % 3, name=str(n)) for n in (48, 12)]
    return growing(*sources, rounds=rounds)


def learner(folder: Path | None = None, *, base: Any = ShrinkPerturb, options: dict[str, Any] | None = None,
            trainer: dict[str, Any] | None = None, **mixin: Any) -> Any:
    torch.manual_seed(0)
    chosen = {"factory": build} if options is None else options
    kind = compose(*([base] if base else []), base=torch.optim.SGD)
    return Learner(build(), functools.partial(kind, lr=0.1, **(chosen if base else {})),
                   config=Trainer.Config(batch_size=8, **(trainer or {})), folder=folder, device="cpu", **mixin)


def rounds_of(trainer: Any) -> int:
    return trainer.optimizer.states[ShrinkPerturb].round  # type: ignore[no-any-return]


def test_called_before_every_task_but_the_first() -> None:
    seen: list[tuple[int, int]] = []
    for first in (False, True):
        seen.clear()
        trainer = learner(first=first)
        step = trainer.training_step
        trainer.training_step = lambda b, t=trainer, s=step: (seen.append((b.task, rounds_of(t))), s(b))[1]
        trainer.fit(stream())
        assert set(seen) == {(0, first), (1, 1 + first), (2, 2 + first)}


def test_a_round_starts_from_the_shrunk_weights() -> None:
    ends = []
    for rounds in (1, 2):
        trainer = learner()
        starts: list[list[torch.Tensor]] = []
        step = trainer.training_step
        trainer.training_step = lambda b, t=trainer, s=step, k=starts: (
            k.append([p.detach().clone() for p in t.module.parameters()]), s(b))[1]
        trainer.fit(stream(2) if rounds == 2 else _only_first(stream(2)))
        ends.append((starts, [p.detach().clone() for p in trainer.module.parameters()]))
    fresh = fresh_model(build, 0, "shrink_perturb", 0)
    for start, old, draw in zip(ends[1][0][3], ends[0][1], fresh.parameters(), strict=True):  # three steps in the first round
        torch.testing.assert_close(start, 0.4 * old + 0.1 * draw.detach())


def _only_first(whole: Any) -> Any:
    return replace(whole, tasks=whole.tasks[:1])


def test_soft_resets_every_so_many_steps() -> None:
    trainer = learner(options={"factory": build, "shrink": 0.999, "perturb": 0.001, "moments": "keep"}, every_steps=2,
                      trainer={"reset_optimizer": False})
    trainer.fit(stream())  # 2 + 4 + 6 steps
    assert trainer.step == 12 and rounds_of(trainer) == 6 + 2


def test_a_resumed_run_repeats_no_call(tmp_path: Path) -> None:
    whole = learner(tmp_path / "a")
    whole.fit(stream())
    cut = learner(tmp_path / "b", trainer={"checkpoint_every": 1})
    step = cut.training_step

    def stop(batch: Any) -> Any:
        if batch.task == 1 and cut.task_step == 2:
            raise KeyboardInterrupt
        return step(batch)

    cut.training_step = stop
    with pytest.raises(KeyboardInterrupt):
        cut.fit(stream())
    again = learner(tmp_path / "b", trainer={"checkpoint_every": 1})
    again.fit(stream(), resume=True)
    assert rounds_of(again) == rounds_of(whole) == 2
    assert all(torch.equal(a, b) for a, b in zip(again.module.parameters(), whole.module.parameters(), strict=True))


def test_what_it_needs_is_asked_for_before_training() -> None:
    for made, text in ((lambda: learner(base=None), "WarmStart: optimizer SGD has no shrink_perturb.., must be composed with"),
                       (lambda: learner(options={"factory": build, "moments": "keep"}), "set reset_optimizer=False")):
        trainer = made()
        with pytest.raises(ValueError, match=text):
            trainer.fit(stream())
        assert trainer.step == 0
    for value in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"WarmStart: every_steps={value!r}, must be an integer >= 0"):
            learner(every_steps=value)
