"""A trainer that grows, in one process: methods beside it, what is refused, and what is stored."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import growing
import learning
from everbatch import compose
from everbatch.data import ReplayStore, Reservoir, Task
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch
from everbatch.objective.table import dark_er
from everbatch.objective.terms import dark_term, known_dark_term
from everbatch.optim import (
    EMA,
    EWC,
    GSAM,
    LAMB,
    MAS,
    SI,
    ClipGradNorm,
    DynamicSparsity,
    LookSAM,
    Refresh,
    ShrinkPerturb,
    StaleSAM,
)
from everbatch.train import ConAdv, Consolidate, GrowingHead, StepRecord, Trainer, TrainerMixin, WarmStart
from learning import everything, stream
from rotation import When

SGD = torch.optim.SGD


def optimizer(*parts: type, **options: Any) -> Any:
    return functools.partial(compose(*parts, base=SGD), lr=0.05, momentum=0.9, **options)


class Remembering(GrowingHead, Consolidate, Trainer):
    """Grows, and has importance taken."""


class Perturbing(GrowingHead, WarmStart, Trainer):
    """Grows, and is shrunk and perturbed."""


METHODS: dict[str, tuple[type, Any]] = {
    "EWC": (Remembering, optimizer(EWC, strength=1.0)),
    "EWC online": (Remembering, optimizer(EWC, strength=1.0, form="online")),
    "SI": (Remembering, optimizer(SI, strength=0.1)),
    "MAS": (Remembering, optimizer(MAS, strength=0.1)),
    "Refresh": (Remembering, optimizer(Refresh, every=2)),
    "LookSAM": (growing.Widened, optimizer(LookSAM, rho=0.1, every=3)),
    "StaleSAM": (growing.Widened, optimizer(StaleSAM, rho=0.1, tau=2)),
    "GSAM": (growing.Widened, optimizer(GSAM, rho=0.1)),
    "LAMB": (growing.Widened, functools.partial(compose(EMA, LAMB, base=torch.optim.AdamW), lr=0.01)),
    "ClipGradNorm, EMA": (growing.Widened, optimizer(ClipGradNorm, EMA, ema_decay=0.9)),
    "ShrinkPerturb": (Perturbing, optimizer(ShrinkPerturb, noise="gaussian", sigma=0.01)),
    "Replay": (growing.WidenedMemory, optimizer()),
}


@pytest.mark.parametrize("name", [When(i, 4).param(name) for i, name in enumerate(METHODS)])
def test_methods_beside_a_head_that_grows(name: str, tmp_path: Path) -> None:
    """What they know of a weight goes on, a new weight begins, and a run left in mid-task is resumed bit for bit."""
    cls, chosen = METHODS[name]
    options: dict[str, Any] = {"smooth": True, "optimizer": chosen}
    t = growing.trainer("plain", cls, **options)
    t.fit(stream())
    names = {n for n, _ in t.module.named_parameters()}
    assert t.growths == [{"classes": 2}] * 2 and "3.parts.2.weight" in names
    for part in (EWC, MAS, SI):
        if part in t.optimizer.states:
            assert set(t.optimizer.states[part].importance) == names, "a weight without importance"
    assert all(bool(p.isfinite().all()) for p in t.module.parameters())

    left = growing.trainer("plain", cls, folder=tmp_path, recorder=learning.recorder(tmp_path, 13), **options)
    with pytest.raises(learning.Abandoned):
        left.fit(stream())
    again = growing.trainer("plain", cls, folder=tmp_path, **options)
    again.fit(stream(), resume=True)
    ours, theirs = everything(again), everything(t)
    assert ours.keys() == theirs.keys()
    assert not [n for n in ours if not torch.equal(ours[n].nan_to_num(7.0), theirs[n].nan_to_num(7.0))]


def test_concurrent_adversaries_in_the_step_grow_too() -> None:
    class Crafting(GrowingHead, ConAdv, Trainer):
        """Grows beside its adversary."""

    t = learning.trainer("plain", cls=Crafting, model=growing.model(), grown=growing.model, optimizer=optimizer(),
                         reset_optimizer=False)
    adversarial = {n: b.clone() for n, b in t.module.named_buffers() if "branches" in n}
    t.fit(stream())
    moved = [n for n, b in t.module.named_buffers() if n in adversarial and not torch.equal(b, adversarial[n])]
    assert moved, "the adversarial batch norms did not run"
    assert t.growths == [{"classes": 2}] * 2 and len(t.matrix) == 3


def test_importance_of_before_keeps_its_bits() -> None:
    t = growing.trainer("plain", Remembering, smooth=True, optimizer=optimizer(EWC, strength=1.0))
    seen: list[bool] = []

    def watched(grow: Any, inner: Any = t.relaunch) -> None:
        before = {n: v.clone() for n, v in t.optimizer.states[EWC].importance.items()}
        inner(grow)
        after = t.optimizer.states[EWC].importance
        seen.append(bool(before) and before.keys() == after.keys() and all(torch.equal(after[n], v) for n, v in before.items()))

    t.relaunch = watched
    t.fit(stream())
    assert seen == [True, True]


def refused(text: str, cls: type = Trainer, chosen: Any = None, *, model: nn.Module | None = None, **options: Any) -> None:
    with pytest.raises(ValueError, match=text):
        learning.trainer("plain", cls=cls, model=model or growing.model(), grown=growing.model, optimizer=chosen or optimizer(),
                         **options)


def test_what_cannot_be_beside_growth_is_refused_at_construction() -> None:
    refused(r"grown= with DynamicSparsity, must be without it; its masks", chosen=optimizer(DynamicSparsity, density=0.5))
    other = optimizer(EWC, strength=1.0, factory=lambda: growing.model())
    refused(r"grown= and another factory in EWC, must be one function", Remembering, other)
    refused("eval_future=True, must be without it", growing.Widened, eval_future=True)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    flat.get_classifier = lambda: flat[-1]  # type: ignore[assignment]
    refused("a head of Linear, must be in parts", growing.Widened, model=flat)

    class Crafting(ConAdv, Trainer):
        """With an adversary."""

    with pytest.raises(ValueError, match=r"grown= with ConAdv, .* a replica that would not grow"):
        Crafting(growing.model(), optimizer(), grown=growing.model, device="cpu", placement="process")
    with pytest.raises(ValueError, match="GrowingHead: no factory of the model, must have one"):
        learning.trainer("plain", cls=growing.Widened, model=growing.model())
    with pytest.raises(ValueError, match=r"grown=3, must be a function"):
        learning.trainer("plain", cls=Trainer, grown=3)


def test_the_trainers_own_factory_follows_the_growths() -> None:
    chosen = optimizer(EWC, strength=1.0, factory=growing.model)
    t = learning.trainer("plain", cls=Remembering, model=growing.model(), grown=growing.model, optimizer=chosen)
    made = t.optimizer.configs[EWC].factory
    assert repr(made) == "growing.model" and made()[-1].sizes == [2]
    assert "a head of [2] classes" in t.describe()
    t.relaunch({"classes": 3})
    assert "a head of [2, 3] classes" in t.describe()
    assert made()[-1].sizes == [2, 3] and t.optimizer.configs[EWC].factory()[-1].sizes == [2, 3]


def sharded(growths: Any) -> nn.Module:
    made = growing.model(growths)
    made[1].weight.ds_id = 1  # as DeepSpeed's stage 3 marks what it has taken
    return made


def meta(growths: Any) -> nn.Module:
    with torch.device("meta"):
        return growing.model(growths)


def without_statistics(growths: Any) -> nn.Module:
    made = growing.model(growths)
    made[2].running_mean = None
    made[2]._buffers.pop("running_mean")
    made[2].running_mean = 0
    return made


def frozen(growths: Any) -> nn.Module:
    return growing.model(growths).requires_grad_(False)


@pytest.mark.parametrize(("build", "text"), [
    (sharded, r"gives a model whose \['1.weight'\] are sharded, must be a bare module"),
    (meta, r"leaves \['1.weight', '1.bias', '2.weight'\] on the meta device, must have values"),
    (without_statistics, r"has no place for buffers \['2.running_mean'\], must take every buffer"),
    (frozen, "has nothing to train, must train something")])
def test_what_a_factory_may_not_give(build: Any, text: str) -> None:
    """Beside what tests/distributed/growth_jobs.py gives on ranks. The trainer is as before, and may grow by another one."""
    chosen = [build]
    t = learning.trainer("plain", cls=Trainer, model=growing.model(), grown=lambda growths: chosen[0](growths))
    before, module = everything(t), t.module
    with pytest.raises(ValueError, match=text):
        t.relaunch({"classes": 2})
    assert t.module is module and t.growths == []
    assert not [n for n, v in everything(t).items() if not torch.equal(v, before[n])]
    chosen[0] = growing.model
    t.relaunch({"classes": 2})
    assert t.module[-1].sizes == [2, 2]


class Impatient(TrainerMixin):
    """Grows after a step."""

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        self.relaunch({"classes": 1})  # type: ignore[attr-defined]


class Hasty(Impatient, Trainer):
    """Grows inside a task."""


def test_not_without_a_factory_and_not_inside_a_task_or_a_step() -> None:
    t = growing.trainer("plain", Hasty, first=6)
    with pytest.raises(ValueError, match=r"relaunch\(\{'classes': 1\}\) inside task 0, must be called between tasks"):
        t.fit(stream())
    assert t.growths == []
    t.relaunch({"classes": 1})  # the run has ended, by an error
    assert t.growths == [{"classes": 1}] and t.module[-1].sizes == [6, 1]
    inside = growing.trainer("plain", Trainer, first=6)

    def closure() -> Any:
        inside.relaunch({"classes": 1})

    with pytest.raises(ValueError, match="inside a step, must be called between tasks"):
        inside.optimizer.step(closure)
    with pytest.raises(ValueError, match=r"relaunch\(1\) without a factory, must have one"):
        learning.trainer("plain").relaunch(1)


class ByHand(TrainerMixin):
    """Grows at the ends of tasks, by hand."""

    def on_task_end(self, task: Task) -> None:
        super().on_task_end(task)  # type: ignore[misc]
        if task.id < 2:
            self.relaunch({"classes": 2})  # type: ignore[attr-defined]


class Handed(ByHand, Trainer):
    """Grows when a task has ended."""


def test_at_a_tasks_end_and_resumed(tmp_path: Path) -> None:
    """Also what a trainer without the factory, or with another one, says of the checkpoint."""
    t = growing.trainer("plain", Handed)
    t.fit(stream())
    left = growing.trainer("plain", Handed, folder=tmp_path, recorder=learning.recorder(tmp_path, 9))
    with pytest.raises(learning.Abandoned):
        left.fit(stream())
    odd = {"without": (None, "no factory, and 1 growths to repeat, must have one"),
           "another": (lambda growths: growing.model(first=2), "has other parameters than the checkpoint: .'5.parts.1.bias'")}
    for grown, text in odd.values():
        other = learning.trainer("plain", cls=Handed, model=growing.model(), grown=grown, folder=tmp_path, reset_optimizer=False)
        with pytest.raises(CheckpointMismatch, match=text):
            other.fit(stream(), resume=True)
    again = growing.trainer("plain", Handed, folder=tmp_path)
    again.fit(stream(), resume=True)
    ours, theirs = everything(again), everything(t)
    assert not [n for n in theirs if not torch.equal(ours[n].nan_to_num(7.0), theirs[n].nan_to_num(7.0))]


def test_a_grown_trainer_goes_back_to_an_earlier_checkpoint(tmp_path: Path) -> None:
    t = growing.trainer("plain", growing.Widened, folder=tmp_path, recorder=learning.recorder(tmp_path, 5))
    with pytest.raises(learning.Abandoned):
        t.fit(stream())
    t.relaunch({"classes": 2})
    t.recorder = None
    t.fit(stream(), resume=True)
    assert t.growths == [{"classes": 2}] * 2 and t.module[-1].sizes == [2, 2, 2]
    whole = growing.trainer("plain", growing.Widened)
    whole.fit(stream())
    ours, theirs = everything(t), everything(whole)
    assert not [n for n in theirs if not torch.equal(ours[n].nan_to_num(7.0), theirs[n].nan_to_num(7.0))]


def test_frozen_parameters_and_modes_go_over() -> None:
    def build(growths: Any) -> nn.Module:
        made = growing.model(growths)
        made[1].weight.requires_grad_(bool(growths))  # trained from the first growth on
        made[1].bias.requires_grad_(not growths)  # frozen from then on
        return made

    t = learning.trainer("plain", cls=Trainer, model=build(()), grown=build, reset_optimizer=False)
    with torch.no_grad():
        t.module[1].weight.add_(1.0)
        t.module[2].running_mean.add_(3.0)
    t.module[2].eval()
    before = {n: p.detach().clone() for n, p in t.module.named_parameters()}
    t.relaunch({"classes": 2})
    after = dict(t.module.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert not t.module[2].training and t.module[4].training and bool((t.module[2].running_mean == 3.0).all())
    assert t.growth.born == [["1.bias", "2.weight", "2.bias", "5.parts.0.weight", "5.parts.0.bias"],
                             ["1.weight", "5.parts.1.weight", "5.parts.1.bias"]]
    assert after["1.weight"].requires_grad and not after["1.bias"].requires_grad


def test_groups_without_decay_on_vectors() -> None:
    t = growing.trainer("plain", growing.Widened, smooth=True, optimizer=optimizer(weight_decay=0.01), decay_vectors=False)
    t.fit(stream())
    assert [g["weight_decay"] for g in t.optimizer.param_groups] == [0.01, 0.0] * 3
    assert t.optimizer.host.module is t.module


def test_a_store_is_widened_with_nan() -> None:
    store = ReplayStore(Reservoir(4, seed=0), World(), 0)
    store.widen("logits", 3)  # nothing is stored
    store.add([1, 2], [0, 1], [0, 1], 0, {"logits": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"'logits' of \(2,\) .* to widen to 1, must be narrower"):
        store.widen("logits", 1)
    store.widen("logits", 3)
    store.add([3], [2], [2], 1, {"logits": torch.full((1, 3), 2.0)})
    drawn = store.draw(3, 0)
    assert drawn is not None
    rows = dict(zip(drawn["ids"].tolist(), drawn["logits"], strict=True))
    assert rows[3].tolist() == [2.0] * 3 and rows[1][:2].tolist() == [1.0, 1.0] and bool(rows[1][2].isnan())


def test_rows_of_a_narrower_head_are_compared_where_they_know() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    stored = torch.randn(3, 4)
    stored[1, 2:] = torch.nan
    for reduction in ("element_mean", "sample_sum"):
        by_row = torch.cat([dark_term(logits[i : i + 1], stored[i : i + 1, : 2 if i == 1 else 4], reduction) for i in range(3)])
        got = known_dark_term(logits, stored, reduction)
        torch.testing.assert_close(got, by_row)
        ours, = torch.autograd.grad(got.sum(), logits)
        theirs, = torch.autograd.grad(by_row.sum(), logits)
        torch.testing.assert_close(ours, theirs)
        assert bool((ours[1, 2:] == 0).all())
    term = dark_er(0.5, "sample_sum", True)[0]
    assert term.text == dark_er(0.5, "sample_sum")[0].text
    torch.testing.assert_close(term.divergence.definition(logits, torch.nn.functional.pad(stored, (0, 1), value=torch.nan)),
                               known_dark_term(logits, stored, "sample_sum"))
