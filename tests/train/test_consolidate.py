"""Consolidate calls the optimizer's parts at task ends, on the task's samples, as one would by hand."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from everbatch import checkpoint, seeds
from everbatch.composition import compose
from everbatch.data import Loader, Stream, Task, TensorSource, class_incremental, task_incremental
from everbatch.distributed import World
from everbatch.optim import EWC, MAS, SAM, SI, ClipGradNorm, DynamicSparsity, Refresh
from everbatch.train import Consolidate, Trainer, TrainerMixin
from processes import ROOT, Zygote
from rotation import When

LR, BATCH = 0.1, 10


class Learner(Consolidate, Trainer): ...


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 6))


def stream(make: Any = class_incremental) -> Stream:
    g = torch.Generator().manual_seed(0)
    sources = [TensorSource(torch.randn(n, 6, generator=g), torch.arange(n) % 6, name=str(n)) for n in (180, 60)]
    return make(*sources, tasks=3)  # type: ignore[no-any-return]


def learner(parts: tuple[type, ...], options: dict[str, Any], folder: Path | None = None, *, every: int = 0, **mixin: Any) -> Any:
    return Learner(net(), functools.partial(compose(*parts, base=torch.optim.SGD), lr=LR, **options), device="cpu", folder=folder,
                   config=Trainer.Config(batch_size=BATCH, epochs=2, checkpoint_every=every), **mixin)


def by_hand(parts: tuple[type, ...], options: dict[str, Any], end: Any, samples: int = 60) -> nn.Module:
    """The same training in a loop of one's own, `end(opt, rows)` at the end of every task."""
    model, data = net(), stream()
    opt: Any = compose(*parts, base=torch.optim.SGD)(model, lr=LR, **options)
    for task in data.tasks:
        opt.host.reset_moments()
        for batch in Loader(data, task, BATCH, 2, 0, World()):
            def loss(batch: Any = batch) -> Tensor:
                value = functional.cross_entropy(model(batch.inputs), batch.targets)
                opt.backward(value)
                return value

            opt.step(loss, data=loss)
        order = torch.randperm(len(task.train_ids), generator=seeds.generator(0, "consolidate", task.id))
        ids = task.train_ids[order[:samples]]
        end(opt, [(data.fetch(i), data.targets(i), i) for i in ids.split(64)])
    return model


def _both(opt: Any, rows: Any) -> None:
    opt.consolidate_ewc(rows)
    opt.update_fisher(rows)


CASES: dict[str, tuple[tuple[type, ...], dict[str, Any], Any]] = {
    "ewc": ((EWC,), {"strength": 5.0}, lambda opt, rows: opt.consolidate_ewc(rows)),
    "ewc, sampled": ((EWC, SAM), {"strength": 5.0, "estimator": "sampled"}, lambda opt, rows: opt.consolidate_ewc(rows)),
    "mas": ((MAS,), {"strength": 0.1}, lambda opt, rows: opt.consolidate_mas(rows)),
    "si": ((SI,), {"strength": 1.0}, lambda opt, rows: opt.consolidate_si()),
    "refresh and ewc": ((Refresh, EWC), {"refresh_gamma": 0.01, "loss": "current_ce", "strength": 1.0}, _both),
}


@pytest.mark.parametrize(("case", "samples"), [*((c, 0) for c in CASES), ("ewc", 25)])
def test_it_is_what_a_plain_loop_calls_by_hand(case: str, samples: int) -> None:
    parts, options, end = CASES[case]
    trainer = learner(parts, options, samples=samples)
    trainer.fit(stream())
    expected, without = by_hand(parts, options, end, samples or 60), by_hand(parts, options, lambda opt, rows: None)
    for p, q, r in zip(trainer.module.parameters(), expected.parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # fp32: the trainer's loss is a weighted sum, not a mean
        assert not torch.allclose(p, r, rtol=0, atol=1e-4)


def test_at_strength_zero_nothing_is_called_and_nothing_changes() -> None:
    zero = {"ewc_strength": 0.0, "si_strength": 0.0, "mas_strength": 0.0, "refresh_gamma": 0.0}
    quiet = learner((Refresh, EWC, SI, MAS), zero)
    plain = Trainer(net(), functools.partial(compose(base=torch.optim.SGD), lr=LR), device="cpu",
                    config=Trainer.Config(batch_size=BATCH, epochs=2))
    assert str(quiet.fit(stream())) == str(plain.fit(stream()))  # NaN is unequal to itself
    assert all(torch.equal(p, q) for p, q in zip(quiet.module.parameters(), plain.module.parameters(), strict=True))
    assert [quiet.optimizer.states[part].tasks for part in (EWC, MAS, Refresh)] == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:DynamicSparsity. .* layers have fewer free weights")
def test_isolated_tasks_are_not_forgotten() -> None:
    trainer = learner((DynamicSparsity, SAM), {"density": 0.3, "update_every": 4, "rho": 0.05}, isolate=True)
    matrix = trainer.fit(stream(task_incremental))
    assert matrix[1][0] == matrix[2][0] == matrix[0][0] and matrix[2][1] == matrix[1][1]
    state = trainer.optimizer.states[DynamicSparsity]
    assert state.done == 3 and state.task == 0 and state.task_steps == 12


@pytest.mark.filterwarnings("ignore:DynamicSparsity. .* layers have fewer free weights")
def test_isolated_tasks_are_not_trained_again(tmp_path: Path) -> None:
    data = stream(task_incremental)
    trainer = learner((DynamicSparsity,), {"density": 0.3}, tmp_path, isolate=True)
    matrix, before = str(trainer.fit(data)), [p.detach().clone() for p in trainer.module.parameters()]
    found = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="Consolidate: isolate=True in a run after 3 isolated tasks, must come before the first"):
        trainer.fit(data)
    assert sorted(tmp_path.rglob("*")) == found and str(trainer.matrix) == matrix and trainer.step == 36
    assert all(torch.equal(p, q) for p, q in zip(trainer.module.parameters(), before, strict=True))
    assert str(trainer.fit(data, resume=True)) == matrix  # it ended, and no task is left


@pytest.mark.filterwarnings("ignore:DynamicSparsity. .* layers have fewer free weights")
@pytest.mark.parametrize("case", ["refresh and ewc", "si", "isolated"])
def test_a_resumed_run_repeats_no_call(tmp_path: Path, case: str) -> None:
    isolated = case == "isolated"
    parts, options = ((DynamicSparsity,), {"density": 0.3, "update_every": 4}) if isolated else CASES[case][:2]
    data = stream(task_incremental)
    ends = []
    for name in ("whole", "cut"):
        trainer = learner(parts, options, tmp_path / name, every=1, isolate=isolated)
        if name == "cut":
            step = trainer.training_step

            def stop(batch: Any, trainer: Any = trainer, step: Any = step) -> Any:
                if trainer.task_index == 1 and trainer.task_step == 5:
                    raise KeyboardInterrupt
                return step(batch)

            trainer.training_step = stop
            with pytest.raises(KeyboardInterrupt):
                trainer.fit(data)
            trainer = learner(parts, options, tmp_path / name, every=1, isolate=isolated)
        matrix = trainer.fit(data, resume=True)
        ends.append((str(matrix), [p.detach().clone() for p in trainer.module.parameters()]))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(p, q) for p, q in zip(ends[0][1], ends[1][1], strict=True))


def test_what_cannot_work_is_refused_before_training() -> None:
    for parts, options, mixin, text in (
            ((SAM,), {}, {}, "Consolidate: optimizer SAMSGD has nothing to call at a task's end"),
            ((EWC,), {"estimator": "given"}, {}, "Consolidate: estimator='given' of EWC"),
            ((EWC,), {}, {"isolate": True}, "isolate=True and optimizer EWCSGD, must hold DynamicSparsity"),
            ((DynamicSparsity,), {}, {"isolate": True}, "isolate=True on a stream of kind 'class'")):
        trainer = learner(parts, options, **mixin)
        with pytest.raises(ValueError, match=text):
            trainer.fit(stream())
        assert trainer.step == 0
    for bad in ({"samples": -1}, {"rows": 0}, {"samples": True}):
        with pytest.raises(ValueError, match=f"Consolidate: {next(iter(bad))}="):
            learner((EWC,), {}, **bad)


@pytest.mark.distributed
@pytest.mark.parametrize("sharded", [When(i, 3).param(engine) for i, engine in enumerate(("kind=ddp", "kind=fsdp2", "stage=3"))])
def test_importance_is_the_same_at_any_world_size(zygote: Zygote, tmp_path: Path, sharded: str) -> None:
    """Also where the ranks hold different numbers of samples (41 on two), and where weights are sharded (a replica is made)."""
    kept = []
    for ranks, engine in ((1, "kind=plain"), (2, sharded)):
        folder = tmp_path / f"{ranks}-{engine}"
        job = zygote.run(ROOT / "recipes" / "class_incremental.py", "replay=null", "tasks=2", "trainer.epochs=1",
                         "optimizer.ewc.strength=5", "optimizer.mas.strength=0.1", "optimizer.si.strength=1",
                         "optimizer.refresh.gamma=0.001", "consolidate.samples=41", f"engine.{engine}", f"output={folder}",
                         ranks=ranks, limit=120)
        assert job.codes == [0] * ranks, job.err[-3000:]
        found = checkpoint.latest(folder / "checkpoints", world=World())
        assert found is not None
        kept.append(found)
    names = [n for n in kept[0].names() if n.split("/")[0] in ("master", "EWC.importance", "MAS.importance", "SI.importance",
                                                               "Refresh.fisher")]
    assert len(names) == 5 * len([n for n in names if n.startswith("master/")]) > 0
    for name in names:  # fp32, sums in another order, over 44 steps
        first, other = (found.whole(name) for found in kept)
        torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_a_trainer_that_lists_nothing_does_the_same(case: str) -> None:
    parts, options, _ = CASES[case]
    listed = learner(parts, options)
    alone = Trainer(net(), functools.partial(compose(*parts, base=torch.optim.SGD), lr=LR, **options), device="cpu",
                    config=Trainer.Config(batch_size=BATCH, epochs=2))
    assert str(listed.fit(stream())) == str(alone.fit(stream()))
    assert all(torch.equal(p, q) for p, q in zip(listed.module.parameters(), alone.module.parameters(), strict=True))
    assert f"{', '.join(p.__name__ for p in (EWC, MAS, Refresh, SI) if p in parts)} called by the trainer" in alone.describe()


class ByHand(TrainerMixin):
    """Calls EWC itself."""

    def consolidate(self, task: Task) -> None:
        super().consolidate(task)  # type: ignore[misc]
        opt: Any = self.optimizer  # type: ignore[attr-defined]
        ones = {n: torch.full(shape, 0.01) for n, (_, shape) in opt.host.master_layout().items()}
        opt.consolidate_ewc(importance=ones)


def test_what_a_mixin_has_called_is_not_called_again() -> None:
    class Own(ByHand, Trainer): ...

    optimizer = functools.partial(compose(EWC, base=torch.optim.SGD), lr=LR, strength=1.0, estimator="given")
    trainer = Own(net(), optimizer, device="cpu", config=Trainer.Config(batch_size=BATCH))
    trainer.fit(stream())
    assert trainer.optimizer.states[EWC].tasks == 3
    lazy = Trainer(net(), optimizer, device="cpu", config=Trainer.Config(batch_size=BATCH))
    with pytest.warns(UserWarning) as told:
        lazy.fit(stream())
    said = [f"EWC with estimator='given' was handed no importance for task {k}" for k in range(3)]
    assert len(told) == 3 and all(text in str(w.message) for text, w in zip(said, told, strict=True))
    assert lazy.optimizer.states[EWC].tasks == 0


def test_a_pull_that_must_overflow_is_refused_before_the_next_task() -> None:
    trainer = Trainer(net(), functools.partial(compose(MAS, base=torch.optim.SGD), lr=LR, strength=1e4), device="cpu",
                      config=Trainer.Config(batch_size=BATCH))
    with pytest.raises(ValueError, match=r"MAS with strength=10000 and importance .* have strength below .*ClipGradNorm"):
        trainer.fit(stream())
    assert trainer.task_index == 1 and trainer.bad_steps == 0
    clipped = Trainer(net(), functools.partial(compose(MAS, ClipGradNorm, base=torch.optim.SGD), lr=LR, mas_strength=1e4,
                                               max_norm=1.0), device="cpu", config=Trainer.Config(batch_size=BATCH))
    assert len(clipped.fit(stream())) == 3
