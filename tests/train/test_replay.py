"""Rehearsal: the losses in closed form, what is drawn, what is stored, and what zero capacity leaves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import learning
from everbatch.data import Batch
from everbatch.train import Replay, StepRecord, Trainer, TrainerMixin
from everbatch.train.memory.replay import dark_term, label_term
from learning import stream


def test_gradients_of_the_terms() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, generator=g, dtype=torch.float64).requires_grad_()
    stored, targets = torch.randn(4, 5, generator=g), torch.tensor([0, 3, 4, 1])
    for reduction, count in (("element_mean", 4 * 5), ("sample_sum", 4)):
        (grad,) = torch.autograd.grad(dark_term(logits, stored, reduction).mean(), logits)  # type: ignore[arg-type]
        assert torch.allclose(grad, 2 * (logits.detach() - stored) / count, rtol=1e-6, atol=1e-7)
    (grad,) = torch.autograd.grad(label_term(logits, targets).mean(), logits)
    assert torch.allclose(grad, (logits.detach().softmax(1) - functional.one_hot(targets, 5)) / 4, rtol=1e-6, atol=1e-7)


def test_a_head_that_grew_is_compared_on_the_common_prefix() -> None:
    logits, stored = torch.ones(2, 5), torch.zeros(2, 3)
    assert dark_term(logits, stored).tolist() == [1.0, 1.0] and dark_term(logits, stored, "sample_sum").tolist() == [3.0, 3.0]


class Spying(TrainerMixin):
    """Keeps every step's record, the weights before it, and what the memory held."""

    def draw_batch(self, parts: list[Batch]) -> list[Batch]:
        self.before = copy.deepcopy(self.module.state_dict())  # type: ignore[attr-defined]
        store = self.states[Replay].store
        self.held = store.buffer.ids[store.buffer.filled].copy()
        return super().draw_batch(parts)  # type: ignore[misc, no-any-return]

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        kept = getattr(self, "kept", [])
        self.kept = [*kept, (record, self.before, self.held)]


class Spied(Spying, Replay, Trainer):
    """Replay under observation."""


def spied(**replay: Any) -> Any:
    t = learning.trainer("plain", cls=Spied, model=learning.net(smooth=True), replay=replay, augment=None)
    t.fit(stream())
    return t


@pytest.mark.parametrize(("method", "parts"), [("er", ["replay"]), ("dark_er", ["dark"]), ("dark_er_pp", ["dark", "replay"])])
def test_composition_of_the_loss(method: str, parts: list[str]) -> None:
    t = spied(method=method, alpha=0.3, beta=0.7)
    assert list(t.kept[0][0].terms) == ["cross_entropy"]  # nothing to replay yet
    for record, _, held in t.kept[1:]:
        assert [p.part for p in record.parts] == ["stream", *parts]
        batch = {p.part: p for p in record.parts}
        expected = {"cross_entropy": functional.cross_entropy(record.outputs["stream"], batch["stream"].targets)}
        if "dark" in parts:
            expected["replay_dark"] = 0.3 * functional.mse_loss(record.outputs["dark"], batch["dark"].extras["logits"])
        if "replay" in parts:
            expected["replay_label"] = 0.7 * functional.cross_entropy(record.outputs["replay"], batch["replay"].targets)
        assert record.terms.keys() == expected.keys()
        torch.testing.assert_close(record.terms, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(record.loss, sum(expected.values()), rtol=1e-5, atol=1e-6)
        for part in parts:
            ids = batch[part].ids
            assert len(ids) == len(ids.unique()) == min(5, len(held)) and set(ids.tolist()) <= set(held.tolist())
            assert torch.equal(batch[part].targets, stream().targets(ids))
            assert torch.equal(batch[part].inputs, learning.scale(stream().fetch(ids)))


def test_the_two_draws_are_independent() -> None:
    draws = [[sorted(p.ids.tolist()) for p in record.parts[1:]] for record, _, held in spied().kept if len(held) > 5]
    same = sum(dark == label for dark, label in draws)
    overlapping = sum(bool(set(dark) & set(label)) for dark, label in draws)
    assert len(draws) > 15 and same < 3 and 0 < overlapping < len(draws)


def test_stored_are_the_logits_before_the_update_although_sam_passes_twice() -> None:
    t = spied(capacity=96)  # everything is kept
    store, model = t.states[Replay].store, learning.net(smooth=True)
    last: dict[int, torch.Tensor] = {}
    for record, before, _ in t.kept:
        model.load_state_dict(before)
        batch = record.parts[0]
        with torch.no_grad():
            last.update(zip(batch.ids.tolist(), model(batch.inputs), strict=True))
    slots = store.buffer.filled
    assert t.optimizer.last_passes == 2 and len(slots) == 96
    rows = store.state_dict()["rows"]
    expected = torch.stack([last[i] for i in store.buffer.ids[slots].tolist()])
    torch.testing.assert_close(rows["logits"], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(rows["raw"], stream().fetch(torch.from_numpy(store.buffer.ids[slots])))


def test_class_balanced_and_ring() -> None:
    balanced = spied(memory="class_balanced", capacity=18).states[Replay].store.buffer
    assert torch.bincount(torch.from_numpy(balanced.targets[balanced.filled])).tolist() == [3] * 6
    ring = spied(memory="ring", capacity=18).states[Replay].store.buffer
    assert torch.bincount(torch.from_numpy(ring.tasks[ring.filled])).tolist() == [6] * 3
    for task in range(3):  # the last samples of the task
        positions = sorted(ring.positions[ring.filled][ring.tasks[ring.filled] == task].tolist())
        assert positions == list(range(64 * task + 58, 64 * task + 64))


@pytest.mark.parametrize("memory", ["reservoir", "class_balanced"])
def test_a_second_fit_goes_on_in_the_stream(tmp_path: Path, memory: str) -> None:
    """Its samples are new visits with keys of their own, as in a run that never ended; also after a resume inside it."""
    def run(folder: Path, after: int = 0) -> Any:
        t = learning.trainer("plain", replay={"key": "stream", "memory": memory}, folder=folder,
                             recorder=learning.recorder(folder, after) if after else None)
        t.fit(stream())
        first = sorted(t.states[Replay].store.buffer.positions.tolist())
        assert len(set(first)) == 20 and 0 <= first[0] <= first[-1] < 192
        t.fit(stream())
        return t

    whole = run(tmp_path / "whole")
    positions = whole.states[Replay].store.buffer.positions.tolist()
    assert len(set(positions)) == 20 and 192 <= max(positions) < 2 * 192
    with pytest.raises(learning.Abandoned):
        run(tmp_path / "cut", 24 + 13)
    again = learning.trainer("plain", replay={"key": "stream", "memory": memory}, folder=tmp_path / "cut")
    again.fit(stream(), resume=True)
    one, other = learning.everything(whole), learning.everything(again)
    assert one.keys() == other.keys() and all(torch.equal(one[k].nan_to_num(-1), other[k].nan_to_num(-1)) for k in one)


def test_no_capacity_is_no_replay_bit_for_bit() -> None:
    runs = [learning.trainer("plain", replay={"capacity": 0}), learning.trainer("plain", cls=Trainer)]
    for run in runs:
        run.fit(stream())
    one, other = (learning.whole(run) | learning.buffers(run) for run in runs)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert runs[0].matrix[2] == runs[1].matrix[2]


@pytest.mark.parametrize(("option", "text"), [
    ({"capacity": -1}, "capacity=-1, must be an integer >= 0"), ({"replay_batch": 0}, "replay_batch=0, must be an integer >= 1"),
    ({"alpha": float("nan")}, "alpha=nan"), ({"beta": -0.5}, "beta=-0.5"),
    ({"memory": "ring", "capacity": 2}, "capacity"), ({"method": "der"}, "method='der'"), ({"memory": "herd"}, "memory='herd'"),
    ({"reduction": "sum"}, "reduction='sum'"), ({"key": "id"}, "key='id'")])
def test_bad_options(option: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        learning.trainer("plain", replay=option).fit(stream())
