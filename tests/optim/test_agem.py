"""A-GEM: the projection in closed form, what a step does with it, and the memory that a trainer draws from."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import learning
from everbatch.composition import compose
from everbatch.contract import parts_of
from everbatch.errors import CompositionError
from everbatch.optim import AGEM, SAM
from everbatch.train import EpisodicMemory, StepRecord, Trainer, TrainerMixin

NEEDED = pytest.mark.parametrize("sign", [1.0, -1.0])


class Two(nn.Module):
    """Two vectors; each pass may reach one, or both."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(5, generator=g, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(3, generator=g, dtype=torch.float64))


def stepped(g: dict[str, Tensor], r: dict[str, Tensor], **options: Any) -> tuple[dict[str, Tensor], Any]:
    """What a step of SGD with lr=1 took off the weights, given the two gradients."""
    model = Two()
    opt: Any = compose(AGEM, base=torch.optim.SGD)(model, lr=1.0, **options)

    def closure(wanted: dict[str, Tensor]) -> Tensor:
        loss = torch.stack([(getattr(model, name) * value).sum() for name, value in wanted.items()]).sum()
        opt.backward(loss)
        return loss

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt.step(lambda: closure(g), reference=lambda: closure(r))
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}, opt


def draw(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(5, generator=g, dtype=torch.float64), "b": torch.randn(3, generator=g, dtype=torch.float64)}


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([values["a"], values["b"]])


@NEEDED
def test_a_conflict_is_taken_out_and_nothing_else(sign: float) -> None:
    g, r = draw(1), draw(2)
    against = -torch.sign(flat(g) @ flat(r)) * sign
    r = {name: against * value for name, value in r.items()}  # sign=1: in conflict
    taken, opt = stepped(g, r)
    u, v = flat(g), flat(r)
    expected = u - torch.clamp(u @ v, max=0.0) / (v @ v) * v
    torch.testing.assert_close(flat(taken), expected, rtol=1e-12, atol=1e-12)
    assert abs(float(flat(taken) @ v) - (0.0 if sign > 0 else float(u @ v))) < 1e-12
    assert float(opt.metrics["agem_projected"]) == (sign > 0) and opt.last_passes == 2


def test_passes_may_reach_different_weights() -> None:
    g, r = draw(1), draw(2)
    alone, _ = stepped({"a": g["a"]}, {"b": r["b"]})  # nothing in common: no conflict
    assert torch.equal(alone["b"], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(alone["a"], g["a"], rtol=1e-15, atol=1e-15)
    r = {**r, "a": -g["a"]}
    both, _ = stepped({"a": g["a"]}, r)
    v = flat(r)
    expected = torch.cat([g["a"], torch.zeros(3, dtype=torch.float64)]) + (g["a"] @ g["a"]) / (v @ v) * v
    torch.testing.assert_close(flat(both), expected, rtol=1e-12, atol=1e-12)


def test_a_reference_that_is_zero_or_not_finite() -> None:
    g = draw(1)
    taken, _ = stepped(g, {name: 0.0 * value for name, value in g.items()})
    torch.testing.assert_close(flat(taken), flat(g))
    taken, opt = stepped(g, {**draw(2), "b": torch.full((3,), torch.nan, dtype=torch.float64)})
    assert opt.skipped_count == 1 and not flat(taken).any()


def test_every_second_step_and_none() -> None:
    conflict = {name: -value for name, value in draw(1).items()}
    _, opt = stepped(draw(1), conflict, every=0)
    assert opt.last_passes == 1 and opt.extra_passes() == 0
    _, opt = stepped(draw(1), conflict, every=2)
    assert opt.extra_passes() == 0.5 and opt.last_passes == 2  # step 0 looks


def test_it_edits_the_gradient_of_sharpness_mixins() -> None:
    made = compose(SAM, AGEM, base=torch.optim.SGD)
    assert [part.__name__ for part in parts_of(made)] == ["AGEM", "SAM"]
    with pytest.raises(CompositionError, match="AGEM must stand to the left of SAM"):
        type("Wrong", (SAM, AGEM, torch.optim.SGD), {})


class Spying(TrainerMixin):
    """Keeps what each step drew, and whether it was edited."""

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        edited = self.optimizer.metrics.get("agem_projected", torch.zeros(()))  # type: ignore[attr-defined]
        self.kept = [*getattr(self, "kept", []), (record, float(edited))]


def trained(**options: Any) -> Any:
    cls: Any = type("Learner", (Spying, EpisodicMemory, Trainer), {})
    optimizer = functools.partial(compose(AGEM, base=torch.optim.SGD), lr=0.1)
    made = cls(learning.net(smooth=True), optimizer, prepare=learning.scale, device="cpu", num_tasks=3,
               config=Trainer.Config(batch_size=8, epochs=2, seed=3, accumulation=2), **options)
    made.fit(learning.stream())
    return made


def test_the_memory_holds_earlier_tasks_and_takes_no_part_in_the_loss() -> None:
    made = trained(capacity=9, batch=4)
    classes = {task.id: set(task.classes) for task in learning.stream().tasks}
    for record, _ in made.kept:
        task = record.parts[0].task
        drawn = [part for part in record.parts if part.part == "reference"]
        assert len(drawn) == (task > 0) and list(record.terms) == ["cross_entropy"] and list(record.outputs) == ["stream"]
        for part in drawn:
            seen = set().union(*(classes[k] for k in range(task)))
            assert set(part.targets.tolist()) <= seen and len(part.ids.unique()) == 4
    edited = [flag for record, flag in made.kept if record.parts[0].task > 0]
    assert len(edited) == 16 and sum(edited) > 0
    memory = made.states[EpisodicMemory].store.buffer
    assert torch.bincount(torch.from_numpy(memory.tasks[memory.filled])).tolist() == [3, 3, 3]
    balanced = trained(capacity=12, batch=4, balance="class").states[EpisodicMemory].store.buffer
    assert torch.bincount(torch.from_numpy(balanced.targets[balanced.filled])).tolist() == [2] * 6


def test_one_without_the_other_is_refused() -> None:
    optimizer = functools.partial(compose(AGEM, base=torch.optim.SGD), lr=0.1)
    with pytest.raises(ValueError, match="Trainer: AGEM in the optimizer and no memory in the trainer, must have one to draw"):
        Trainer(learning.net(smooth=True), optimizer, device="cpu")
    Trainer(learning.net(smooth=True), functools.partial(optimizer, every=0), device="cpu")
    cls: Any = type("Learner", (EpisodicMemory, Trainer), {})
    config = Trainer.Config(batch_size=8)
    made = cls(learning.net(smooth=True), learning.PLAIN, device="cpu", config=config, capacity=4)
    with pytest.raises(ValueError, match=r"EpisodicMemory: optimizer .*, must ask for a reference gradient; compose"):
        made.fit(learning.stream())
