"""Concurrent adversarial learning in one process: hand-written loops, weights of tau steps before, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import learning
from adversarial import ADV, BOX, FROZEN, SGD, batches, by_hand, learner, net
from everbatch.data import Batch
from everbatch.train import ConAdv, Replay, StepRecord, Trainer, TrainerMixin
from everbatch.train.adversarial.craft import pixel_box
from golden.families.conadv import Loop


# ------------------------------------------------------------------------------------------------------------- the steps
def test_without_lead_it_is_advprop() -> None:
    """A loop written out: no split batch norm, no box, no craft()."""
    t, hand = learner(tau=0), net()
    norms = (hand[1], copy.deepcopy(hand[1]))  # type: ignore[index]
    sgd = torch.optim.SGD([*hand.parameters(), *norms[1].parameters()], lr=0.1, momentum=0.9, weight_decay=1e-3)

    def call(x: Tensor, norm: nn.Module) -> Tensor:
        return hand[3](hand[2](norm(hand[0](x))))  # type: ignore[index, no-any-return]

    for x, y in batches():
        at = x.clone().requires_grad_()
        functional.cross_entropy(call(at, copy.deepcopy(norms[1])), y, reduction="sum").backward()
        radius, low, high = 6.0 / 255 / 0.25, -2.0, 2.0
        moved = x + radius * at.grad.sign()  # type: ignore[union-attr]
        moved = moved.clamp(torch.clamp(x - radius, min=low), torch.clamp(x + radius, max=high))
        sgd.zero_grad()
        terms = [functional.cross_entropy(call(i, n), y, reduction="none").mean() for i, n in zip((x, moved), norms, strict=True)]
        (terms[0] + terms[1]).backward()
        sgd.step()
        inputs, found = t.training_step()
        assert torch.equal(inputs[ADV], moved) and not torch.equal(moved, x)
        assert list(found.values()) == [term.detach() for term in terms]
    ours, branch = dict(t.model.state_dict()), t.model[1].branches[ADV].state_dict()
    assert all(torch.equal(ours[n], v) for n, v in hand.state_dict().items())
    assert all(torch.equal(branch[n], v) for n, v in norms[1].state_dict().items())


def test_weights_that_stay_make_the_lead_irrelevant() -> None:
    for options in ({}, {"steps": 3, "step_size": 4.0}, {"random_start": 0.5}, {"targeted": True, "classes": 3}):
        runs = [[t.training_step() for _ in range(7)] for t in (learner(optimizer=FROZEN, tau=k, **options) for k in range(4))]
        for step in range(7):
            for run in runs[1:]:
                assert torch.equal(run[step][0][ADV], runs[0][step][0][ADV]) and run[step][1] == runs[0][step][1]


@pytest.mark.parametrize("tau", range(4))
@pytest.mark.parametrize("first", ["clamp", "clean", "random"])
def test_every_batch_is_crafted_with_the_weights_of_tau_steps_before(tau: int, first: str) -> None:
    t, weights = learner(tau=tau, first=first), list[nn.Module]()
    for step, (x, y) in enumerate(batches()):
        weights.append(copy.deepcopy(t.model))
        crafted = t.training_step()[0].get(ADV)
        if step < tau and first == "clean":
            assert crafted is None
            continue
        assert ((x - BOX.radius.float() <= crafted) & (crafted <= x + BOX.radius.float()) & (crafted.abs() <= 2.0)).all()
        expected = by_hand(weights[max(step - tau, 0)], x, y, BOX)
        assert torch.equal(crafted, expected) == (step >= tau or first == "clamp") and not torch.equal(crafted, x)


def test_steps_without_a_term_leave_the_branch_as_it_was() -> None:
    t = learner(tau=3, first="clean")
    before = copy.deepcopy(t.model[1].branches[ADV].state_dict())
    for step in range(4):
        t.training_step()
        same = [torch.equal(v, before[n]) for n, v in t.model[1].branches[ADV].state_dict().items()]
        assert all(same) if step < 3 else not any(same)


def test_a_skipped_step_goes_on() -> None:
    data = batches()
    data[2][0][1, 3] = math.nan
    t, weights = learner(data=data, tau=1), list[nn.Module]()
    for step, (x, y) in enumerate(data):
        weights.append(copy.deepcopy(t.model))
        crafted = t.training_step()[0][ADV]
        if step != 2:
            assert torch.equal(crafted, by_hand(weights[max(step - 1, 0)], x, y, BOX))
    assert t.optimizer.skipped_count == 1 and t.optimizer.step_count == 6


def test_a_skipped_step_without_a_term_holds_no_later_one() -> None:
    data = batches()
    data[0][0][1, 3] = math.nan
    t = learner(data=data, tau=1, first="clean")
    before = t.model[1].branches[ADV].weight.clone()
    t.training_step()
    assert t.optimizer.skipped_count == 1 and torch.equal(t.model[1].branches[ADV].weight, before)
    t.training_step()
    assert not torch.equal(t.model[1].branches[ADV].weight, before)


def test_weights_of_the_terms() -> None:
    plain = learner(tau=0).training_step()[1]
    for clean, adversarial, normalize in ((0.5, 2.0, False), (0.5, 2.0, True), (1.0, 1.0, True)):
        found = learner(tau=0, weight_clean=clean, weight_adversarial=adversarial, normalize=normalize).training_step()[1]
        total = clean + adversarial if normalize else 1.0
        assert found["cross_entropy"] == clean / total * plain["cross_entropy"]
        assert found["adversarial_cross_entropy"] == adversarial / total * plain["adversarial_cross_entropy"]
    alone = learner(tau=1, first="clean", normalize=True, weight_clean=0.5).training_step()[1]
    assert alone == {"cross_entropy": plain["cross_entropy"]}
    off = learner(weight_adversarial=0.0)
    assert list(off.training_step()[0]) == ["stream"] and not hasattr(off.model[1], "branches")


def test_radius_zero_trains_on_each_batch_twice() -> None:
    t = learner(tau=1, radius=0.0)
    for x, _ in batches():
        inputs, terms = t.training_step()
        assert torch.equal(inputs[ADV], x) and terms["adversarial_cross_entropy"] == terms["cross_entropy"]


def test_evaluation_uses_the_main_branch_alone() -> None:
    t, (x, _) = learner(), batches()[0]
    t.training_step()
    expected = t.model.eval()(x)
    with torch.no_grad():
        for value in (*t.model[1].branches.parameters(), *t.model[1].branches.buffers()):
            value.fill_(7)
    assert torch.equal(t.model(x), expected) and t.model[1].training is False


@pytest.mark.parametrize("options", [{"tau": 0}, {"tau": 2, "weight_clean": 0.5}, {"first": "clean"}])
def test_one_forward_for_both_parts_is_two(options: dict[str, Any]) -> None:
    data = [(x.double(), y) for x, y in batches()]
    one, two = (learner(net().double(), data, one_forward=both, **options) for both in (True, False))
    for _ in data:
        (inputs, terms), (wanted, expected) = one.training_step(), two.training_step()
        assert list(terms) == list(expected) and all(torch.equal(v, wanted[k]) for k, v in inputs.items())
        torch.testing.assert_close(terms, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(one.model.state_dict(), two.model.state_dict(), rtol=1e-12, atol=1e-13)


def test_one_forward_moves_embeddings_of_the_adversarial_half_alone() -> None:
    data = [(torch.randint(0, 9, (4, 3), generator=torch.Generator().manual_seed(i)), torch.arange(4) % 3) for i in range(4)]
    ran = []
    for both in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), *net()).double()
        t = learner(model, data, one_forward=both, embedding="0", radius=100.0)
        ran.append([t.training_step()[1] for _ in data])
    torch.testing.assert_close(*ran, rtol=1e-12, atol=1e-14)
    assert all(step["cross_entropy"] != step["adversarial_cross_entropy"] for step in ran[0])


# ----------------------------------------------------------------------------------------------------------- the trainer
class Spying(TrainerMixin):
    """Keeps every step's record, and the model before it."""

    def draw_batch(self, parts: list[Batch]) -> list[Batch]:
        self.kept: list[Any] = [*getattr(self, "kept", []), copy.deepcopy(self.module)]  # type: ignore[attr-defined]
        return super().draw_batch(parts)  # type: ignore[misc, no-any-return]

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        self.kept[-1] = (record, self.kept[-1])


class Spied(Spying, ConAdv, Trainer):
    """ConAdv under observation."""


class Plain(Spying, Trainer):
    """Without it."""


def fitted(cls: Any, optimizer: Any = SGD, model: nn.Module | None = None, accumulation: int = 1, **conadv: Any) -> Any:
    config = Trainer.Config(batch_size=8, epochs=2, seed=3, accumulation=accumulation)
    t = cls(model or learning.net(), optimizer, config=config, augment=learning.jitter, device="cpu", num_tasks=3,
            **{"prepare": learning.scale, **conadv})
    t.fit(learning.stream())
    return t


@pytest.mark.parametrize("tau", [0, 1, 3])
def test_clean_part_is_as_without_the_mixin(tau: int) -> None:
    """Augmented inputs (peeked at or not), dropout, and the main statistics."""
    with_it, without = fitted(Spied, FROZEN, tau=tau, random_start=0.5), fitted(Plain, FROZEN)
    assert len(with_it.kept) == len(without.kept) == 24
    for (one, _), (other, _) in zip(with_it.kept, without.kept, strict=True):
        assert torch.equal(one.parts[0].inputs, other.parts[0].inputs) and torch.equal(one.parts[0].ids, one.parts[1].ids)
        assert torch.equal(one.outputs["stream"], other.outputs["stream"])
        assert one.terms["cross_entropy"] == other.terms["cross_entropy"]
        # `scale` maps 0..16 to 0..1, so the box is the unit one
        assert ((one.parts[1].inputs - one.parts[0].inputs).abs() <= 4 / 255 + 1e-7).all()
    buffers = learning.buffers(with_it)
    assert all(torch.equal(buffers[n], v) for n, v in learning.buffers(without).items())
    assert repr(with_it.matrix) == repr(without.matrix)  # NaN for tasks not yet seen


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_batch_norm_sees_the_rows_of_training_and_every_task_begins_anew(pieces: int) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 15), nn.BatchNorm1d(15), nn.ReLU(), nn.Linear(15, 6))
    t = fitted(Spied, model=model, accumulation=pieces, tau=2)
    for step, (record, _) in enumerate(t.kept):
        weights = t.kept[max(step - 2, step // 8 * 8)][1]
        clean, crafted = record.parts
        expected = [by_hand(weights, x, y, pixel_box(4.0)) for x, y in zip(
            clean.inputs.chunk(pieces), clean.targets.chunk(pieces), strict=True)]
        assert torch.equal(crafted.inputs, torch.cat(expected)) and torch.equal(crafted.targets, clean.targets)


class Rehearsing(Spying, ConAdv, Replay, Trainer):
    """A third part between the two; its forwards know their tasks and raw inputs."""

    def forward(self, batch: Batch) -> Tensor:
        if batch.part == "stream" and self.optimizer.recording and torch.is_grad_enabled():
            assert batch.task == self.task_index and len(batch.extras["raw"]) == len(batch.inputs) == len(batch)
        return super().forward(batch)


@pytest.mark.parametrize("pieces", [1, 2])
def test_one_forward_beside_other_parts_and_micro_batches(pieces: int) -> None:
    """One of 8 + 8 rows per micro-batch and one of the replayed rows, with the outputs and statistics of three."""
    ran, forwards = [], []
    for both in (True, False):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 15), nn.BatchNorm1d(15), nn.ReLU(), nn.Linear(15, 6)).double()
        torch.manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        seen: list[int] = []
        model.register_forward_pre_hook(lambda _m, x, seen=seen: seen.append(len(x[0])) if torch.is_grad_enabled() else None)
        ran.append(fitted(Rehearsing, FROZEN, model, pieces, one_forward=both, prepare=lambda x: x.double() / 16, tau=0,
                          **learning.REPLAY))
        forwards.append([n for n in seen if n > 8 // pieces])
    assert forwards == [[16 // pieces] * 24 * pieces, []]
    for (one, _), (two, _) in zip(ran[0].kept, ran[1].kept, strict=True):
        assert [p.part for p in one.parts] == [p.part for p in two.parts] and len(one.parts) >= 2
        torch.testing.assert_close(one.outputs, two.outputs, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(one.terms, two.terms, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(learning.buffers(ran[0]), learning.buffers(ran[1]), rtol=1e-10, atol=1e-12)
    assert any(len(record.parts) > 2 for record, _ in ran[0].kept)


# ------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(("name", "value"), [
    ("tau", -1), ("tau", 1.5), ("tau", True), ("radius", -1.0), ("radius", math.nan), ("radius", math.inf), ("steps", 0),
    ("steps", 1.0), ("step_size", 0.0), ("step_size", math.nan), ("std", (0.5, 0.0)), ("mean", (math.nan,)), ("raw_low", 1.0),
    ("random_start", 1.5), ("classes", 1), ("classes", 2.5), ("weight_clean", -1.0), ("weight_adversarial", math.nan),
    ("patience_s", 0.0), ("adversaries", 0), ("adversary_threads", 0), ("first", "none"), ("placement", "there"),
    ("on_failure", "ignore")])
def test_wrong_options_are_named(name: str, value: Any) -> None:
    bad = value[-1] if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=f"ConAdv: {name}={bad!r}".replace("(", r"\(")):
        learner(**{name: value})


def test_what_cannot_work_is_refused() -> None:
    class Blind(ConAdv, type("Short", (Loop,), {"peek": property()})):  # type: ignore[misc]
        """No look-ahead."""

    with pytest.raises(ValueError, match="tau=1 in a trainer without peek"):
        learner(cls=Blind)
    class Bare(ConAdv, type("Separate", (Loop,), {"forward_parts": property()})):  # type: ignore[misc]
        """Runs its forwards itself."""

    with pytest.raises(ValueError, match="one_forward=True in a trainer without forward_parts"):
        learner(cls=Bare, one_forward=True)
    with pytest.raises(ValueError, match="one_forward=True and split_bn=False with batch norm"):
        learner(one_forward=True, split_bn=False)
    with pytest.raises(ValueError, match="embedding='words'"):
        learner(embedding="words")
    with pytest.raises(ValueError, match="inputs of dtype torch.int64"):
        learner(data=[(x.long(), y) for x, y in batches()]).training_step()
    with pytest.raises(ValueError, match="targeted=True"):
        learner(targeted=True).training_step()
    with pytest.raises(ValueError, match="tau=8 and task 0 of 8 steps, must have at least tau"):
        fitted(Spied, tau=8)
    with pytest.raises(RuntimeError, match="does not depend on the inputs"):
        learner(nn.Sequential(nn.Linear(6, 3), Severed())).training_step()
    t = learner()
    t.training_step()
    t.batch = lambda step: Batch(*t.batches[step], torch.arange(5), torch.arange(5))
    with pytest.raises(RuntimeError, match="other samples"):
        t.training_step()


class Severed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()
