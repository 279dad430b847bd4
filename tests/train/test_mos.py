"""MOS in a run on one process: what is trained, what stays, what is merged, kept, aligned and predicted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import learning
import surgery
from everbatch.errors import CheckpointMismatch, CompositionError
from everbatch.nn import Retriever, UnsupportedAdapterTarget
from everbatch.train import MOS, SAME, LwF, Trainer, load_model, model_info
from learning import stream
from rotation import When
from surgery import ADAMW, OPTIONS, SGD, STEPS


@pytest.fixture(scope="module")
def done() -> Any:
    """A run of three tasks, under AdamW."""
    t = surgery.trainer("plain", optimizer=ADAMW, scale=3.0)
    t.fit(stream())
    return t


@pytest.mark.parametrize("parts", [False, True])
def test_what_is_exported_predicts_as_the_trainer(done: Any, tmp_path: Path, parts: bool) -> None:
    built = {"model": "vit_tiny_patch16_224", "options": {**surgery.SHAPE, "num_classes": 6}}
    path = done.export(tmp_path / "model.safetensors", built, parts=parts)
    kept = load_model(path)
    assert isinstance(kept, Retriever) and not kept.training
    torch.testing.assert_close(kept(images()), done.predict(images()), rtol=1e-5, atol=1e-6)
    assert torch.equal(kept.last_paths, done.last_paths)
    assert model_info(path)["retrieval"] == {"ends": [2, 4, 6], "ensemble": True, "on_cycle": "cap"}
    assert model_info(path)["adapters"]["rank"] == OPTIONS["rank"]
    with torch.no_grad():  # the live adapters are in it too, and the network by itself
        torch.testing.assert_close(kept.network(images()), done.module.eval()(images()), rtol=1e-5, atol=1e-5)
    done.module.train()
    cut = {name: value for name, value in load_file(path).items() if name != "retrieval.archive"}
    save_file(cut, path, {key: json.dumps(value) if not isinstance(value, str) else value
                          for key, value in model_info(path).items()})
    with pytest.raises(CheckpointMismatch, match="do not fit"):
        load_model(path)


def images(count: int = 40) -> Tensor:
    return learning.scale(stream().test.fetch(torch.arange(count)))  # type: ignore[arg-type]


def test_only_adapters_and_head_are_trained(done: Any) -> None:
    trained = {n for n, p in done.module.named_parameters() if p.requires_grad}
    assert trained == {*done.optimizer.host.names} == {
        f"blocks.{b}.adapter.{part}.{k}" for b in (0, 1) for part in ("down", "up") for k in ("weight", "bias")} | {
        "head.weight", "head.bias"}
    before = dict(surgery.vit().named_parameters())
    for name, p in done.module.named_parameters():
        if name not in trained:
            assert torch.equal(p, before[name]), name


def test_old_rows_of_the_head_keep_their_bits_in_a_tasks_steps(done: Any) -> None:
    """Under weight decay and Adam's moments."""
    noted = done.noted
    for task in (1, 2):
        start, end, aligned = (noted[f"{when}/{task}"] for when in ("start", "end", "aligned"))
        for one, other in zip(surgery.head_rows(start, 2 * task), surgery.head_rows(end, 2 * task), strict=True):
            assert torch.equal(one, other)
        for one, other in zip(surgery.head_rows(start, 6), surgery.head_rows(end, 6), strict=True):
            assert not torch.equal(one[2 * task : 2 * task + 2], other[2 * task : 2 * task + 2])
        assert not torch.equal(end["head.weight"][: 2 * task], aligned["head.weight"][: 2 * task])
        same = [n for n in end if not n.startswith("head.")]
        assert all(torch.equal(end[n], aligned[n]) for n in same)


def test_the_archive_is_what_the_adapters_were_and_stays(done: Any) -> None:
    state = done.states[MOS]
    assert state.archive.shape == (3, len(state.prefix)) and state.ends == [2, 4, 6] and not state.inside
    layout = surgery.AdapterLayout.of(done.module)
    for task in range(3):
        assert torch.equal(state.archive[task], layout.flat(done.noted[f"end/{task}"]))
    torch.testing.assert_close(state.prefix, state.archive.double().sum(0))
    assert not torch.equal(state.archive[0], state.archive[1])
    assert not list(done.module.buffers()), "evaluation takes the mean of buffers over ranks"
    assert state.means.shape == state.prototypes.shape == (6, 8) and state.spread.shape == (6, 8, 8)
    assert torch.equal(state.means[:2], state.prototypes[:2]) and not torch.equal(state.means[2:], state.prototypes[2:])


def test_predictions_are_those_of_one_sample_after_the_other(done: Any) -> None:
    x = images()
    scores = done.predict(x)
    paths = [[task for task in row if task >= 0] for row in done.last_paths.tolist()]
    wanted, by_hand = surgery.by_hand(done, x)
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-5)
    assert paths == by_hand and len({*map(tuple, paths)}) > 2
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(done.predict(x[order]), scores[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(done.predict(x[:1]), scores[:1], rtol=1e-5, atol=1e-5)
    before = done.states[MOS].archive.clone()
    torch.testing.assert_close(done.predict(x), scores, rtol=0, atol=0)
    assert torch.equal(before, done.states[MOS].archive)


@pytest.mark.parametrize(("merging", "merges"), [("step", STEPS), When(3, 4).param("released", 3 * STEPS)])
def test_merges_follow_their_closed_form_and_a_skipped_step_makes_none(merging: str, merges: int) -> None:
    t = surgery.trainer("plain", init="fresh", merging=merging, still=True, spoil=(5,), align_epochs=0, orthogonality=0.0)
    t.fit(stream())
    applied, before, after = t.noted["skipped/5"]
    assert not applied and all(torch.equal(before[n], after[n]) for n in before)
    archive = t.states[MOS].archive
    for task, count in ((1, merges * (STEPS - 1) // STEPS), (2, merges)):
        keep, mean = 0.9**count, archive[:task].mean(0)
        torch.testing.assert_close(archive[task], keep * surgery.fresh_vector(t, task) + (1 - keep) * mean, rtol=1e-5, atol=1e-6)
    assert torch.equal(t.noted["start/2"]["head.weight"], t.noted["aligned/2"]["head.weight"]), "no step, no alignment"


@pytest.mark.rotated(2, 4)
def test_without_merging_and_term_it_is_plain_adapter_tuning() -> None:
    """A loop over the task's own classes, with a group of its own for the head, beside it."""
    from torch.nn import functional

    from everbatch.data import Loader
    from everbatch.distributed import World
    from everbatch.nn import attach_adapters

    t = surgery.trainer("plain", alpha=0.0, orthogonality=0.0, align_epochs=0, head_rate=0.1)
    t.fit(stream())
    net: Any = surgery.vit()
    attach_adapters(net, 4, scale=1.0, dropout=0.0, seed=3)
    trained = [p for n, p in net.named_parameters() if ".adapter." in n or n.startswith("head.")]
    groups = [{"params": trained[:-2]}, {"params": trained[-2:], "lr": 0.1 * SGD.keywords["lr"]}]
    optimizer = torch.optim.SGD(groups, **SGD.keywords)
    for task in stream().tasks:
        old = [p.detach()[: 2 * task.id].clone() for p in trained[-2:]]
        for batch in Loader(stream(), task, surgery.BATCH, 2, 3, World(), position0=STEPS * task.id * surgery.BATCH):
            loss = functional.cross_entropy(net(learning.scale(batch.inputs))[:, 2 * task.id : 2 * task.id + 2],  # type: ignore[arg-type]
                                            batch.targets - 2 * task.id)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if task.id:
                rows = trained[-2].grad
                assert rows is not None and not rows[: 2 * task.id].any() and not rows[2 * task.id + 2 :].any()
            optimizer.step()
            for p, kept in zip(trained[-2:], old, strict=True):
                p.data[: 2 * task.id] = kept
    for name, p in net.named_parameters():
        torch.testing.assert_close(dict(t.module.named_parameters())[name], p, rtol=0, atol=2e-6)


@pytest.mark.rotated(1, 4)
def test_a_run_resumes_inside_a_task_bit_for_bit(tmp_path: Path) -> None:
    expected = surgery.trainer("plain", optimizer=ADAMW, covariance="low_rank", covariance_rank=2)
    expected.fit(stream())
    cut = surgery.trainer("plain", optimizer=ADAMW, covariance="low_rank", covariance_rank=2, folder=tmp_path,
                          recorder=learning.recorder(tmp_path, STEPS + 2))
    with pytest.raises(learning.Abandoned):
        cut.fit(stream())
    again = surgery.trainer("plain", optimizer=ADAMW, covariance="low_rank", covariance_rank=2, folder=tmp_path)
    again.fit(stream(), resume=True)
    one, other = learning.everything(again), learning.everything(expected)
    assert surgery.apart(one, other) == []
    assert "state/MOS.archive" in one and torch.equal(again.predict(images()), expected.predict(images()))


@pytest.mark.rotated(0, 4)
def test_a_head_that_grows_keeps_its_rows_and_resumes(tmp_path: Path) -> None:
    expected = surgery.trainer("plain", surgery.Growing, optimizer=ADAMW)
    expected.fit(stream())
    assert expected.growths == [{"classes": 2}, {"classes": 2}] and len(expected.optimizer.param_groups) == 3
    for task in (1, 2):
        start, end = expected.noted[f"start/{task}"], expected.noted[f"end/{task}"]
        old = [f"head.parts.{k}.{p}" for k in range(task) for p in ("weight", "bias")]
        assert all(torch.equal(start[n], end[n]) for n in old) and not torch.equal(start[f"head.parts.{task}.weight"],
                                                                                   end[f"head.parts.{task}.weight"])
        assert not torch.equal(end["head.parts.0.weight"], expected.noted[f"aligned/{task}"]["head.parts.0.weight"])
    assert expected.states[MOS].archive.shape[0] == 3 and expected.predict(images()).shape == (40, 6)
    cut = surgery.trainer("plain", surgery.Growing, optimizer=ADAMW, folder=tmp_path,
                          recorder=learning.recorder(tmp_path, 2 * STEPS + 1))
    with pytest.raises(learning.Abandoned):
        cut.fit(stream())
    again = surgery.trainer("plain", surgery.Growing, optimizer=ADAMW, folder=tmp_path)
    again.fit(stream(), resume=True)
    assert surgery.apart(learning.everything(again), learning.everything(expected)) == []


# --------------------------------------------------------------------------------------------------------- bad input
def test_what_cannot_be_is_refused_by_name(done: Any) -> None:
    class Learner(MOS, Trainer):
        """No more."""

    for model, said in ((timm.create_model("resnet18", num_classes=6), "adapters: a ResNet, which has no such block"),
                        (nn.Linear(4, 2), "head: the classifier of Linear is none")):
        with pytest.raises(ValueError, match=said) as caught:
            Learner(model, SGD, device="cpu")
        assert isinstance(caught.value, UnsupportedAdapterTarget) or "head" in said
    with pytest.raises(ValueError, match="rank=9, must be at most the width of the tokens, 8"):
        surgery.trainer("plain", rank=9)
    for wrong in ({"rank": 0}, {"alpha": 1.1}, {"alpha": -0.1}, {"dropout": 1.0}, {"merging": "block"}, {"covariance": "none"},
                  {"align_lr": 0.0}, {"merge_every": 0}, {"orthogonality": -1.0}, {"on_cycle": "stop"}, {"init": "zero"},
                  {"head_rate": 0.0}):
        (name, value), = wrong.items()
        with pytest.raises(ValueError, match=rf"MOS: {name}={value!r}, must"):
            MOS.Config(**wrong)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"MOS: predict\(\) before the first task has ended"):
        surgery.trainer("plain").predict(images(2))
    with pytest.raises(ValueError, match="MOS: task 0 after 3 that have ended, must be the next"):
        done.fit(stream())
    again = learning.stream()
    twice = dataclasses.replace(again, tasks=(again.tasks[0], again.tasks[0]))
    with pytest.raises(ValueError, match=r"MOS: task 0 with classes \[0, 1\] after 2 others, must have the next ones"):
        surgery.trainer("plain").fit(twice)


def test_another_owner_of_the_adapters_is_refused_by_name() -> None:
    for one, other in ((MOS, SAME), (SAME, MOS)):
        with pytest.raises(CompositionError, match=f"{one.__name__} and {other.__name__} both own the adapters; keep one"):
            type("Both", (one, other, Trainer), {})
    with pytest.raises(CompositionError, match="LwF must stand to the left of MOS"):
        type("Both", (MOS, LwF, Trainer), {})


def test_it_says_what_it_does(done: Any) -> None:
    told = done.describe()
    assert "3 adapters of 152 weights archived; 1 merge(s) of 0.1 every 1 step(s), 0.1 CE(M M^T / 0.8, i) of features" in told
    assert MOS.Config(**OPTIONS) and MOS.idle(MOS.Config(alpha=0.0)).keys() == {"covariance_rank", "merge_every", "merging"}
