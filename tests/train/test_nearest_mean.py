"""iCaRL's memory: herding by brute force, which exemplars stay, and predictions by hand."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import learning
from everbatch import config
from everbatch.composition import compose
from everbatch.data import Batch
from everbatch.experiment import ClassIncremental, named, run
from everbatch.optim import SemanticMemory
from everbatch.train import NearestMean, StepRecord, Trainer, TrainerMixin
from everbatch.train.memory.herding import Herded, herding, last_input, unit


def by_brute_force(phi: Tensor, count: int) -> list[int]:
    """Algorithm 4 as it is written."""
    mean, taken = phi.mean(0), list[int]()
    for k in range(1, count + 1):
        total = phi[taken].sum(0)
        left = [i for i in range(len(phi)) if i not in taken]
        taken.append(min(left, key=lambda i: float((mean - (phi[i] + total) / k).norm())))
    return taken


def test_herding_is_the_algorithm() -> None:
    g = torch.Generator().manual_seed(0)
    phi = unit(torch.randn(40, 7, generator=g, dtype=torch.float64))
    order = herding(phi, 25)
    assert order.tolist() == by_brute_force(phi, 25)
    assert sorted(herding(phi, 99).tolist()) == list(range(40))
    far = [float((phi.mean(0) - phi[order[:k]].mean(0)).norm()) for k in (1, 5, 25)]
    apart = float((phi.mean(0) - phi[:5].mean(0)).norm())
    assert far[0] > far[1] > far[2] and far[1] < apart / 2  # five exemplars stand for the class, five others do not


def test_lists_are_cut_from_their_ends() -> None:
    memory = Herded(6, key="sample")
    ids = np.arange(6)
    memory.add(ids, np.zeros(6, dtype=np.int64), ids, 0)
    assert len(memory) == 6
    memory.add(ids[:3] + 10, np.ones(3, dtype=np.int64), ids[:3], 1)
    assert sorted(memory.ids[memory.filled].tolist()) == [0, 1, 2, 10, 11, 12]
    memory.add(ids[:2] + 20, np.full(2, 2), ids[:2], 2)
    assert sorted(memory.ids[memory.filled].tolist()) == [0, 1, 10, 11, 20, 21]


def test_means_are_of_the_weights_that_predict() -> None:
    cls: Any = type("Learner", (NearestMean, Trainer), {})
    slow = {"stable_decay": 0.9, "stable_often": 0.5}
    optimizer = functools.partial(compose(SemanticMemory, base=torch.optim.SGD), lr=0.3, **slow)
    made = cls(learning.net(smooth=True), optimizer, prepare=learning.scale, device="cpu", capacity=14, replay_batch=5,
               config=Trainer.Config(batch_size=8, seed=3))
    made.fit(learning.stream())
    x = learning.stream().fetch(learning.stream().tasks[0].test_ids)
    found = made.predict(learning.scale(x))
    with made.optimizer.remembered("stable"):
        means = unit(torch.stack([features(made, ids).mean(0) for ids in exemplars(made).values()]))
        with torch.no_grad():
            phi = unit(made.module[:-1](learning.scale(x)))
    torch.testing.assert_close(found, -(phi[:, None] - means).square().sum(2), rtol=1e-4, atol=1e-5)


class Spying(TrainerMixin):
    """Keeps what each step drew."""

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        self.kept = [*getattr(self, "kept", []), record]


@functools.cache
def trained() -> Any:
    cls: Any = type("Learner", (Spying, NearestMean, Trainer), {})
    optimizer = functools.partial(compose(base=torch.optim.SGD), lr=0.1)
    made = cls(learning.net(smooth=True), optimizer, prepare=learning.scale, device="cpu", capacity=14, replay_batch=5, rows=3,
               config=Trainer.Config(batch_size=8, epochs=2, seed=3, accumulation=2))
    made.fit(learning.stream())
    return made


def features(made: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = made.module[:-1](learning.scale(learning.stream().fetch(ids)))
    return hidden / hidden.norm(dim=1, keepdim=True)  # type: ignore[no-any-return]


def exemplars(made: Any) -> dict[int, Tensor]:
    """Ids by class, in order of use."""
    memory = made.states[NearestMean].store.buffer
    slots = memory.filled
    found = {}
    for label in sorted(set(memory.targets[slots].tolist())):
        mine = slots[memory.targets[slots] == label]
        found[label] = torch.from_numpy(memory.ids[mine[np.argsort(memory.positions[mine])]])
    return found


def test_exemplars_of_the_last_task_are_herded_by_its_features() -> None:
    made, stream = trained(), learning.stream()
    held = exemplars(made)
    assert sorted(map(len, held.values())) == [2, 2, 2, 2, 3, 3]  # 14 slots for 6 classes
    labels = stream.targets(stream.tasks[2].train_ids)
    for label in stream.tasks[2].classes:
        ids = stream.tasks[2].train_ids[labels == label]
        order = by_brute_force(features(made, ids).double(), len(held[label]))
        assert held[label].tolist() == ids[order].tolist()
    rows = made.states[NearestMean].store.state_dict()["rows"]["raw"]
    memory = made.states[NearestMean].store.buffer
    assert torch.equal(rows, stream.fetch(torch.from_numpy(memory.ids[memory.filled])))


def test_predictions_are_the_nearest_mean_and_the_run_was_scored_by_them() -> None:
    made, stream = trained(), learning.stream()
    means = torch.stack([features(made, ids).mean(0) for ids in exemplars(made).values()])
    means = means / means.norm(dim=1, keepdim=True)
    for task in stream.tasks:
        phi = features(made, task.test_ids)
        distance = (phi[:, None] - means).square().sum(2)
        scores = made.predict(learning.scale(stream.fetch(task.test_ids)))
        torch.testing.assert_close(-scores, distance, rtol=1e-4, atol=1e-5)
        right = (distance.argmin(1) == stream.targets(task.test_ids)).double().mean()
        assert made.matrix[2][task.id] == pytest.approx(float(right), abs=1e-9)


def test_passes_of_other_mixins_see_logits_and_the_means_follow_the_weights() -> None:
    made, stream = trained(), learning.stream()
    inputs = learning.scale(stream.fetch(stream.tasks[0].test_ids))
    ids = stream.tasks[0].test_ids
    with torch.no_grad():
        asked = made.predict(Batch(inputs, stream.targets(ids), ids, ids, part="old"))
        torch.testing.assert_close(asked, made.module(inputs))
    before = made.predict(inputs)
    kept = [p.detach().clone() for p in made.module.parameters()]
    for shard in made.optimizer.host.shards:
        shard.data.mul_(0.5)
    made.optimizer.host.touch()
    assert not torch.allclose(made.predict(inputs), before)
    for p, value in zip(made.module.parameters(), kept, strict=True):
        p.data.copy_(value)
    made.optimizer.host.touch()
    torch.testing.assert_close(made.predict(inputs), before)


class Asking(TrainerMixin):
    """Predicts after each step, as an evaluation inside a task does, and keeps how far from the means by hand it was."""

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        held = exemplars(self)
        if held:
            means = unit(torch.stack([features(self, ids).mean(0) for ids in held.values()]))
            ids = learning.stream().tasks[0].test_ids
            found = self.predict(learning.scale(learning.stream().fetch(ids)))  # type: ignore[attr-defined]
            distance = (features(self, ids)[:, None] - means).square().sum(2)
            self.worst = max(getattr(self, "worst", 0.0), float((distance + found[:, : len(means)]).abs().max()))


def test_means_are_of_the_network_after_each_step() -> None:
    cls: Any = type("Learner", (Asking, NearestMean, Trainer), {})
    made = cls(learning.net(smooth=True), learning.PLAIN, prepare=learning.scale, device="cpu", capacity=12,
               config=Trainer.Config(batch_size=16, epochs=1))
    made.fit(learning.stream())
    assert 0.0 < made.worst < 1e-5


@pytest.mark.rotated(1, 4)
def test_a_head_that_grows_predicts_among_what_it_has(tmp_path: Path) -> None:
    options = config.build(ClassIncremental, {
        "method": "nearest_mean", "model": {"head": "growing"}, "engine": {"kind": "plain"}, "output": str(tmp_path), "tasks": 5,
        "trainer": {"batch_size": 128}, "nearest_mean": {"capacity": 40, "rows": 256}})
    matrix = run(options).values["accuracy_matrix"]
    assert len(matrix) == 5 and sum(matrix[4]) / 5 > 0.5  # chance is 0.1


def test_exemplars_are_rehearsed_once_a_task_has_ended() -> None:
    for record in trained().kept:
        late = record.parts[0].task > 0
        assert [part.part for part in record.parts] == ["stream", *["exemplars"] * late]
        assert list(record.terms) == ["cross_entropy", *["exemplar_label"] * late]
        if late:
            loss = torch.nn.functional.cross_entropy(record.outputs["exemplars"], record.parts[1].targets)
            torch.testing.assert_close(record.terms["exemplar_label"], loss)
    assert "E_exemplars CE(logits, labels)" in trained().describe()


def test_features_are_what_the_last_linear_layer_is_given() -> None:
    net = learning.net(smooth=True)
    x = torch.randn(3, 1, 8, 8)
    with last_input(net) as held:
        net(x)
    assert torch.equal(held.value, net[:-1](x)) and not any(layer._forward_pre_hooks for layer in net.modules())


def test_too_few_slots_are_refused_and_icarl_distils() -> None:
    cls: Any = type("Learner", (NearestMean, Trainer), {})
    made = cls(learning.net(smooth=True), learning.PLAIN, device="cpu", config=Trainer.Config(batch_size=8), capacity=1)
    with pytest.raises(ValueError, match="NearestMean: capacity=1 for 2 classes, must hold one sample of each"):
        made.fit(learning.stream())
    assert named.layer("icarl")["nearest_mean"] == {} and named.layer("icarl")["lwf"]["strength"] == 1.0
