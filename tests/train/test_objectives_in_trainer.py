"""The trainer gives optimizer mixins the objectives they ask for: its steps are those of a plain loop that gives them by hand."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from everbatch.composition import compose
from everbatch.data import Batch, Loader, Stream, TensorSource, class_incremental
from everbatch.distributed import World
from everbatch.optim import ESAM, SAM, Ignite, Refresh
from everbatch.train import Replay, StepRecord, Trainer, TrainerMixin

LR, BATCH = 0.1, 12


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def stream() -> Stream:
    g = torch.Generator().manual_seed(0)
    sources = [TensorSource(torch.randn(n, 6, generator=g), torch.arange(n) % 4, name=str(n)) for n in (60, 12)]
    return class_incremental(*sources, tasks=1)


def batches(steps: int = 4) -> list[Batch]:
    data = stream()
    loader = Loader(data, data.tasks[0], BATCH, 1, 0, World())
    return [loader.batch(i) for i in range(steps)]


def output_fn(logits: Tensor, batch: Batch) -> Tensor:
    return logits.gather(1, batch.targets[:, None]).mean()


def trained(parts: tuple[type, ...], options: dict[str, Any], *, mixins: tuple[type, ...] = (), **given: Any) -> Trainer:
    """A trainer after four steps."""
    trainer = started(parts, options, mixins=mixins, **given)
    for batch in batches():
        trainer.training_step(batch)
    return trainer


def started(parts: tuple[type, ...], options: dict[str, Any], *, mixins: tuple[type, ...] = (), accumulation: int = 1,
            **given: Any) -> Any:
    learner = type("Learner", (*mixins, Trainer), {})
    return learner(net(), functools.partial(compose(*parts, base=torch.optim.SGD), lr=LR, **options), device="cpu",
                   config=Trainer.Config(batch_size=BATCH, accumulation=accumulation), **given)


def by_hand(parts: tuple[type, ...], options: dict[str, Any], accumulation: int = 1) -> nn.Module:
    """The same steps in a loop of one's own."""
    model = net()
    opt: Any = compose(*parts, base=torch.optim.SGD)(model, lr=LR, **options)
    for batch in batches():
        def total(of: Any, batch: Batch = batch, *, average: bool = False) -> Tensor:
            micros = opt.micro_batches(batch.split(accumulation), average=average)
            return torch.stack([opt.backward(of(micro)) for micro in micros]).sum()

        def loss(micro: Batch) -> Tensor:
            return micro.mean(functional.cross_entropy(model(micro.inputs), micro.targets, reduction="none"))

        def per_sample(rows: Tensor | None = None, batch: Batch = batch) -> Tensor:
            chosen = slice(None) if rows is None else rows
            return functional.cross_entropy(model(batch.inputs[chosen]), batch.targets[chosen], reduction="none")

        opt.step(lambda total=total, loss=loss: total(loss), data=lambda total=total, loss=loss: total(loss),
                 output=lambda total=total: total(lambda m: output_fn(model(m.inputs), m), average=True), per_sample=per_sample)
    return model


CASES: dict[str, tuple[tuple[type, ...], dict[str, Any], dict[str, Any]]] = {
    "ignite": ((Ignite,), {"rho": 0.5, "rate": 0.1, "budget": 0.01, "multiplier": 0.1}, {"output_fn": output_fn}),
    "refresh": ((Refresh,), {"loss": "current_ce", "every": 1, "gamma": 0.05}, {}),
    "refresh, normalized": ((Refresh,), {"loss": "current_ce", "form": "normalized", "every": 2, "delta": 0.01}, {}),
    "esam": ((ESAM,), {"rho": 0.3, "gamma": 0.5, "beta": 0.7}, {}),
}


@pytest.mark.parametrize(("case", "accumulation"), [*((c, 1) for c in CASES), ("ignite", 3), ("refresh", 3)])
def test_steps_are_those_of_a_plain_loop(case: str, accumulation: int) -> None:
    parts, options, given = CASES[case]
    trainer = trained(parts, options, accumulation=accumulation, **given)
    expected = by_hand(parts, options, accumulation)
    moved = net()
    for p, q, start in zip(trainer.module.parameters(), expected.parameters(), moved.parameters(), strict=True):
        assert torch.equal(p, q) and not torch.equal(p, start)


def test_micro_batches_change_nothing() -> None:
    parts, options, given = CASES["ignite"]
    one, three = (trained(parts, options, accumulation=k, **given) for k in (1, 3))
    for p, q in zip(one.module.parameters(), three.module.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # fp32, sums in another order


def test_data_is_the_stream_alone() -> None:
    """With a memory in the batch, Refresh ascends the loss of the new samples only."""
    seen: list[set[str]] = []

    class Watched(Trainer):
        def forward(self, batch: Batch) -> Tensor:
            if batch.part in ("stream", "replay"):  # not in evaluation
                seen[-1].add(batch.part)
            return super().forward(batch)

        def forward_parts(self, parts: Sequence[Batch]) -> Iterable[Tensor]:  # once a micro-batch
            seen.append(set())
            return super().forward_parts(parts)

    learner: Any = type("Learner", (Replay, Watched), {})
    trainer = learner(net(), functools.partial(compose(Refresh, base=torch.optim.SGD), lr=LR, loss="current_ce", every=1),
                      device="cpu", config=Trainer.Config(batch_size=BATCH), capacity=20, method="er", replay_batch=4)
    trainer.fit(stream())
    assert trainer.step == 5 and seen[:2] == [{"stream"}] * 2 and seen[2:] == [{"stream"}, {"stream", "replay"}] * 4


def test_esam_leaves_a_record_of_its_first_pass() -> None:
    records: list[StepRecord] = []

    class Kept(Trainer):
        def after_step(self, record: StepRecord) -> None:
            records.append(record)

    parts, options, _ = CASES["esam"]
    trainer = Kept(net(), functools.partial(compose(*parts, base=torch.optim.SGD), lr=LR, **options), device="cpu",
                   config=Trainer.Config(batch_size=BATCH))
    model, batch = net(), batches(1)[0]
    trainer.training_step(batch)
    logits = model(batch.inputs)
    loss = functional.cross_entropy(logits, batch.targets)
    assert torch.equal(records[0].outputs["stream"], logits)
    torch.testing.assert_close(records[0].loss, loss.detach(), rtol=1e-6, atol=0)  # a mean of rows, not cross-entropy's own
    torch.testing.assert_close(records[0].terms["cross_entropy"], loss.detach(), rtol=1e-6, atol=0)


def test_only_what_is_needed_is_given() -> None:
    given: list[set[str]] = []
    for parts, options in (((SAM,), {}), ((Refresh,), {"loss": "full"}), ((Refresh,), {"loss": "current_ce"}), ((ESAM,), {})):
        trainer = started(parts, options)
        step = trainer.optimizer.step
        trainer.optimizer.step = lambda closure, s=step, **others: (given.append(set(others)), s(closure, **others))[1]
        trainer.training_step(batches(1)[0])
    assert given == [set(), set(), {"data"}, {"per_sample"}]


def test_what_cannot_be_given_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="Trainer: Ignite in the optimizer and output_fn=None, must be given .*output_fn="):
        started((Ignite,), {})
    with pytest.raises(ValueError, match="Trainer: accumulation=2 with ESAM, must be 1"):
        started((ESAM,), {}, accumulation=2)
    with pytest.raises(ValueError, match="Trainer: ESAM in the optimizer and Replay in the trainer, must not both be used"):
        started((ESAM,), {}, mixins=(Replay,))


def test_terms_and_parts_that_have_no_rows_are_refused() -> None:
    class Whole(Trainer):
        def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
            return {**super().loss_terms(outputs, batch), "norm": outputs.square().mean()}

    class Twice(Trainer):
        def augment_batch(self, parts: list[Batch]) -> list[Batch]:
            parts = super().augment_batch(parts)
            return [*parts, Batch(**{**vars(parts[0]), "part": "copy"})]

    for kind, text in ((Whole, "loss terms .'norm'. of one number, must be reduced by batch.mean"),
                       (Twice, "parts stream, copy with ESAM, must be the stream alone")):
        trainer = kind(net(), functools.partial(compose(ESAM, base=torch.optim.SGD), lr=LR), device="cpu",
                       config=Trainer.Config(batch_size=BATCH))
        with pytest.raises(ValueError, match=text):
            trainer.training_step(batches(1)[0])


@pytest.mark.parametrize(("term", "said"), [
    (lambda o: o.mean(1), r"'mine' of shape \(12,\)"), (lambda o: o.mean(0)[:2], r"'mine' of shape \(2,\)"),
    (lambda o: 0.5, "'mine' that is a float")])
def test_a_term_that_is_not_one_number_is_named(term: Any, said: str) -> None:
    class Mine(TrainerMixin):
        def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Any]:
            terms: dict[str, Any] = super().loss_terms(outputs, batch)  # type: ignore[misc]
            return {**terms, "mine": term(outputs)}

    trainer = started((), {}, mixins=(Mine,))
    before = [p.detach().clone() for p in trainer.module.parameters()]
    with pytest.raises(ValueError, match=f"Trainer: a loss term {said}, must be a tensor without dimensions .*; reduce it"):
        trainer.training_step(batches(1)[0])
    assert all(torch.equal(p, old) for p, old in zip(trainer.module.parameters(), before, strict=True))
