"""GDumb and joint training: which samples each task trains on, and that a recipe starts over with each."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

import learning
from everbatch import config
from everbatch.composition import compose
from everbatch.data import Stream
from everbatch.experiment import ClassIncremental, learner
from everbatch.train import GDumb, Joint, StepRecord, Trainer, TrainerMixin
from everbatch.train.memory.gdumb import greedily_balanced


def held(tasks: list[list[int]], capacity: int, seed: int = 0) -> list[list[tuple[int, int]]]:
    """(id, label) of what is held after each task, given labels; ids count on."""
    labels = [label for task in tasks for label in task]
    starts = np.cumsum([0, *map(len, tasks)])
    parts = [(np.arange(a, b), np.array(labels[a:b])) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    found = greedily_balanced(parts, capacity, np.random.default_rng(seed))
    return [[(i, labels[i]) for i in ids.tolist()] for ids in found]


def test_the_greedy_sampler_by_hand() -> None:
    # One class fills the memory; a second one takes the place of it until both have half; a third one likewise.
    one, two, three = held([[0] * 9, [1] * 9, [2] * 9], 6)
    assert [i for i, _ in one] == [0, 1, 2, 3, 4, 5]  # first come: a full class lets no later one in
    assert Counter(label for _, label in two) == {0: 3, 1: 3} and {i for i, label in two if label == 1} == {9, 10, 11}
    assert Counter(label for _, label in three) == {0: 2, 1: 2, 2: 2}
    assert {i for i, _ in three if i < 18} < {i for i, _ in two}
    rare = held([[0, 1, 0, 0, 0, 1, 0, 0]], 4)[0]
    assert Counter(label for _, label in rare) == {0: 2, 1: 2}
    few = held([[0, 1, 1]], 10)[0]  # everything that there is
    assert len(few) == 3


def test_which_sample_goes_is_uniform() -> None:
    gone = Counter(i for seed in range(400) for i in range(4) if i not in {k for k, _ in held([[0] * 4 + [1]], 4, seed)[0]})
    assert set(gone) == {0, 1, 2, 3} and all(60 < count < 140 for count in gone.values())  # 100 each, deviation 8.7


class Looking(TrainerMixin):
    """Keeps which samples each task trained on."""

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        seen = self.__dict__.setdefault("seen", {})
        seen.setdefault(record.parts[0].task, set()).update(record.parts[0].ids.tolist())


def trained(part: type, **options: Any) -> Any:
    cls: Any = type("Learner", (Looking, part, Trainer), {})
    optimizer = functools.partial(compose(base=torch.optim.SGD), lr=0.05)
    made = cls(learning.net(smooth=True), optimizer, prepare=learning.scale, device="cpu",
               config=Trainer.Config(batch_size=4, epochs=4, seed=3), **options)
    made.fit(learning.stream())
    return made


def labels(ids: set[int]) -> Counter[int]:
    return Counter(learning.stream().targets(torch.tensor(sorted(ids))).tolist())


def test_gdumb_trains_on_its_memory_alone() -> None:
    made = trained(GDumb, capacity=12)
    classes = [task.classes for task in learning.stream().tasks]
    for task, ids in made.seen.items():
        known = [c for earlier in classes[: task + 1] for c in earlier]
        assert labels(ids) == dict.fromkeys(known, 12 // len(known))
    assert made.seen[2] - made.seen[1] <= set(learning.stream().tasks[2].train_ids.tolist())  # only what is there may come
    assert made.step == 3 * 4 * 3  # epochs of 12 samples
    stream: Stream = made.stream
    assert all(torch.equal(a.test_ids, b.test_ids) for a, b in zip(stream.tasks, learning.stream().tasks, strict=True))
    with pytest.raises(ValueError, match="GDumb: capacity=5 for 6 classes, must hold one sample of each"):
        trained(GDumb, capacity=5)


def test_joint_has_all_earlier_samples_and_a_share_has_some() -> None:
    made, tasks = trained(Joint), learning.stream().tasks
    wanted: set[int] = set()
    for task in tasks:
        wanted |= set(task.train_ids.tolist())
        assert made.seen[task.id] == wanted and len(made.stream.tasks[task.id].train_ids) == len(wanted)
    some = trained(Joint, share=0.25).seen
    assert [len(some[k]) for k in range(3)] == [32, 40, 48] and some[2] - set(tasks[2].train_ids.tolist()) >= some[1] - set(
        tasks[1].train_ids.tolist())


@pytest.mark.parametrize("method", ["gdumb", "joint", "nearest_mean", "agem"])
def test_what_needs_tasks_is_refused_on_a_task_free_stream(method: str) -> None:
    with pytest.raises(config.ConfigError, match="on a task-free stream, must not have to know where tasks begin and end"):
        config.build(ClassIncremental, {"method": method, "scenario": "task_free"})
    config.build(ClassIncremental, {"method": "er_ace", "scenario": "task_free"})


@pytest.mark.parametrize(("name", "past"), [("joint", 0.6), ("gdumb", 0.5), ("finetune", 0.0)])
def test_bounds_by_one_word(name: str, past: float) -> None:
    """The recipe's own parts over a small stream: joint and GDumb know the first task at the end, and fine-tuning does not."""
    options: Any = config.build(ClassIncremental, {"method": name, "optimizer": {"lr": 0.1, "momentum": 0.9}})
    made = learner(options.mixins())
    net = learning.net(smooth=True)
    t = made(net, options.optimizer.build(), prepare=learning.scale, device="cpu",
             config=Trainer.Config(batch_size=16, epochs=20 if name == "gdumb" else 8, seed=3))
    matrix = t.fit(learning.stream())
    assert (matrix[2][0] >= past) if past else matrix[2][0] < 0.2
    rounds = [state.round for part, state in t.optimizer.states.items() if part.__name__ == "ShrinkPerturb"]
    assert rounds == ([] if name == "finetune" else [2])
