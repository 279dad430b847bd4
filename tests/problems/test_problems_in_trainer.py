"""Problems under the Trainer and its methods, in one process: against loops by hand, and what is refused."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import texts
import torch
from torch import Tensor
from torch.nn import functional

import learning
from everbatch import compose
from everbatch.data import Loader, RowSource, class_incremental, iid, validation
from everbatch.distributed import World
from everbatch.optim import EMA, ESAM, EWC, GSAM, MAS, SAM, SI, GradientNorm, Ignite, LookSAM, Refresh, StaleSAM
from everbatch.optim.memory.fisher import fisher_sums
from everbatch.problems import CausalLM, Classification, Regression
from everbatch.train import ConAdv, Replay, StepRecord, Trainer
from everbatch.train.memory import replay as replay_module


def by_hand(t: Any, stream: Any, loss_of: Any, epochs: int = 1) -> dict[str, Tensor]:
    """Plain SGD with momentum over the same batches, the loss of a batch as one says it."""
    model = t.module
    optimizer = torch.optim.SGD(model.parameters(), lr=texts.LR if t.problem.in_units else 0.05, momentum=0.9)
    position = 0
    for task in stream.tasks:
        optimizer.state.clear()
        loader = Loader(stream, task, 8, epochs, 1, World(), position0=position)
        for batch in loader:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        position = loader.end_position
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_loss_of_a_language_model_is_a_mean_over_tokens() -> None:
    def loss_of(model: Any, batch: Any) -> Tensor:
        logits, aim = model(batch.inputs)[:, :-1], batch.targets[:, 1:]
        return functional.cross_entropy(logits.flatten(0, 1), aim.flatten())  # torch's own mean leaves -100 out

    want = by_hand(texts.trainer(), texts.stream(), loss_of)
    for accumulation in (1, 2, 4):
        t = texts.trainer(accumulation=accumulation)
        t.fit(texts.stream())
        assert texts.far(want, texts.weights(t)) < 1e-6, accumulation
    assert list(t.scores[1][0]) == ["token_accuracy", "token_loss", "perplexity"]
    assert t.matrix[1] == [scores["token_accuracy"] for scores in t.scores[1]]


@pytest.mark.parametrize("outputs", [1, 2])
def test_regression_is_what_torch_calls_mse(outputs: int) -> None:
    stream = texts.regression_stream(outputs)

    def loss_of(model: Any, batch: Any) -> Tensor:
        return functional.mse_loss(model(batch.inputs), batch.targets.view(8, -1))

    want = by_hand(texts.regressor(outputs=outputs), stream, loss_of, epochs=4)
    t = texts.regressor(outputs=outputs, epochs=4)
    t.fit(stream)
    assert texts.far(want, texts.weights(t)) < 1e-6 and t.scores[0][0]["r2"] > 0.5 and t.matrix == [[t.scores[0][0]["r2"]]]
    assert t.matrix[0][0] == pytest.approx(1 - t.scores[0][0]["mse"] / float(stream.rows(stream.tasks[0].test_ids)[1].var(
        unbiased=False)), rel=1e-5) or outputs > 1


def test_classification_by_default_is_classification_said() -> None:
    """And a step has no collective of its own then: nothing asks for units."""
    runs = []
    for problem in (None, Classification()):
        t: Any = type("Learner", (Replay, Trainer), {})(
            learning.net(), learning.OPTIMIZER, device="cpu", config=Trainer.Config(batch_size=8, accumulation=2),
            prepare=learning.scale, problem=problem, **learning.REPLAY)
        t.fit(learning.stream())
        runs.append({**learning.whole(t), **learning.memory(t), "matrix": torch.tensor(t.matrix, dtype=torch.float64)})
        assert [[s["accuracy"] for s in row] for row in t.scores] == [row[: k + 1] for k, row in enumerate(t.matrix)]
    assert runs[0].keys() == runs[1].keys() and "rows/aim" not in runs[0]
    assert all(torch.equal(runs[0][k].nan_to_num(), runs[1][k].nan_to_num()) for k in runs[0])


@pytest.mark.parametrize(("make", "stream", "extra"), [
    (texts.trainer, texts.stream, 5), (texts.regressor, texts.regression_stream, 0)])
def test_one_all_reduce_of_float64_in_a_step_with_units(make: Any, stream: Any, extra: int, monkeypatch: Any) -> None:
    counted: list[Tensor] = []
    plain = World.sum

    def summed(world: World, value: Tensor) -> Tensor:
        counted.append(value.clone())
        return plain(world, value)

    monkeypatch.setattr(World, "sum", summed)
    t = make(accumulation=2)
    stream = stream()
    loader = Loader(stream, stream.tasks[0], 8, 1, 1, World())
    for step in range(5):
        t.training_step(loader.batch(step))
    assert ("1 all-reduce of a float64" in t.describe()) == bool(extra)
    units = [value for value in counted if value.dtype == torch.float64 and value.ndim == 1]
    assert len(units) == extra and all(value.shape == (1,) for value in units)
    assert len(counted) == extra


def test_a_batch_without_a_token_moves_nothing() -> None:
    empty = iid(texts.source(0, 8, first=8), texts.source(1, 4, first=4))
    t = texts.trainer(momentum=0.0)
    before, records = texts.weights(t), list[StepRecord]()
    t.after_step = records.append
    with pytest.warns(UserWarning) as said:
        t.fit(empty)
    assert [str(w.message).partition(" counts, so")[0] for w in said] == [
        "CausalLM: no unit of the batch of step 0, of task 0,", "CausalLM: no unit of the test samples of task 0"]
    assert texts.far(before, texts.weights(t)) == 0.0 and float(records[0].loss) == 0.0 and records[0].applied


NAMED = ((SAM, {}), (GSAM, {}), (LookSAM, {}), (StaleSAM, {}), (GradientNorm, {}), (EMA, {"ema_decay": 0.9}), (SI, {}),
         (EWC, {"ewc_strength": 0.1}), (MAS, {"mas_strength": 0.01}), (Refresh, {"refresh_estimator": "empirical"}))


@pytest.mark.parametrize(("part", "options"), NAMED, ids=[part.__name__ for part, _ in NAMED])
def test_each_method_trains_a_language_model_and_a_regression(part: type, options: dict[str, Any]) -> None:
    """Micro-batches change nothing but rounding, also through extra passes and named inputs."""
    found = []
    for accumulation in (1, 2):
        t = texts.trainer(parts=(part,), options=options, accumulation=accumulation)
        t.fit(texts.stream(named=True))
        found.append(texts.weights(t))
    assert 0 < texts.far(texts.weights(texts.trainer()), found[0]) and texts.far(*found) < 2e-5
    r = texts.regressor(parts=(part,), options=options, epochs=4)
    assert r.fit(texts.regression_stream())[0][0] > 0.0


def test_ignite_bounds_the_mean_prediction_of_a_regression_by_itself() -> None:
    runs = []
    for given in ({}, {"output_fn": lambda outputs, batch: outputs.mean()}):
        t = texts.regressor(parts=(Ignite,), more=given)
        t.fit(texts.regression_stream())
        runs.append(texts.weights(t))
    assert texts.far(*runs) == 0.0
    with pytest.raises(ValueError, match="Ignite in the optimizer and output_fn=None"):
        texts.trainer(parts=(Ignite,))


def test_esam_is_refused_where_rows_have_units_and_works_elsewhere() -> None:
    with pytest.raises(ValueError, match=r"ESAM with problem=CausalLM, must be another: it chooses rows .*; use SAM"):
        texts.trainer(parts=(ESAM,))
    assert texts.regressor(parts=(ESAM,), epochs=12, lr=0.01).fit(texts.regression_stream())[0][0] > 0.0


@pytest.mark.parametrize("estimator", ["reference", "sampled", "exact"])
def test_estimators_that_go_over_classes_are_refused(estimator: str) -> None:
    text = rf"EWC with estimator='{estimator}' and problem=Regression, must be empirical, batch or given; .* set ewc_estimator="
    with pytest.raises(ValueError, match=text):
        texts.regressor(parts=(EWC,), options={"ewc_estimator": estimator})
    texts.regressor(parts=(EWC,), options={"ewc_estimator": estimator, "ewc_strength": 0.0})  # switched off
    with pytest.raises(ValueError, match="Refresh with estimator='reference' and problem=CausalLM"):
        texts.trainer(parts=(Refresh,))


def test_importance_is_the_square_of_each_rows_gradient() -> None:
    model, problem = texts.Speaker(), CausalLM()
    ids, targets = texts.padded(0, 7, first=1)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def call(w: Any, x: Any) -> Any:
        return torch.func.functional_call(model, w, (), x) if isinstance(x, dict) else torch.func.functional_call(model, w, (x,))

    want = {name: torch.zeros_like(p) for name, p in weights.items()}
    for row in range(7):
        model.zero_grad()
        problem.losses(model(ids[row : row + 1]), targets[row : row + 1]).sum().backward()
        for name, p in model.named_parameters():
            want[name] += p.grad.square()  # type: ignore[union-attr]
    named = {"input_ids": ids, "mask": torch.ones(7, texts.LENGTH)}
    for inputs, chunk in ((ids, 1), (ids, 8), (ids, 3), (named, 3)):
        found = fisher_sums(call, weights, inputs, targets, "empirical", chunk=chunk, problem=problem)  # type: ignore[arg-type]
        assert all(torch.allclose(found[name], want[name], rtol=1e-4, atol=1e-6) for name in want)


def test_a_model_that_looks_at_its_mask_is_asked_row_by_row() -> None:
    class Looking(texts.Speaker):
        def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Any:
            return super().forward(input_ids, None if mask is None or bool(mask.all()) else mask)

    options = {"ewc_strength": 1.0, "ewc_chunk": 4}
    with pytest.raises(ValueError, match="must be asked row by row: set chunk=1; or leave out the attention mask"):
        texts.trainer(parts=(EWC,), options=options, model=Looking()).fit(texts.stream(named=True))
    t = texts.trainer(parts=(EWC,), options={**options, "ewc_chunk": 1}, model=Looking())
    t.fit(texts.stream(named=True))
    assert t.optimizer.states[EWC].tasks == 2


# ---------------------------------------------------------------------------------------------------------- replay
REPLAY = {"replay_capacity": 12, "replay_replay_batch": 4}


@pytest.mark.parametrize("method", ["er", "dark_er", "dark_er_pp"])
@pytest.mark.parametrize("named", [False, True])
def test_replay_gives_back_what_it_was_given(method: str, named: bool) -> None:
    drawn: list[Any] = []

    stream = texts.stream(named=named)
    t = texts.trainer(mixins=(Replay,), more={**REPLAY, "replay_method": method})
    t.after_step = lambda record: (drawn.extend(record.parts[1:]), type(t).after_step(t, record))
    t.fit(stream)
    store = t.states[Replay].store
    assert drawn and ("logits" in store.names) == (method != "er") and "aim" in store.names
    for batch in drawn:
        raw, targets = stream.rows(batch.ids)
        assert torch.equal(batch.targets, targets) and batch.targets.dtype == torch.int64
        held = batch.inputs if named else {"raw": batch.inputs}
        assert all(torch.equal(value, (raw if named else {"raw": raw})[key]) for key, value in held.items())


def test_replay_keeps_targets_that_are_no_integers() -> None:
    t = texts.regressor(mixins=(Replay,), more=REPLAY, epochs=2)
    stream = texts.regression_stream()
    t.fit(stream)
    rows = t.states[Replay].store.draw(12, 0, "check")
    assert torch.equal(rows["aim"], stream.rows(rows["ids"])[1]) and rows["aim"].dtype == torch.float32
    assert bool((rows["aim"] != rows["aim"].round()).all())


def test_terms_of_replay_are_those_of_the_problem() -> None:
    problem, g = CausalLM(), torch.Generator().manual_seed(0)
    _, targets = texts.padded(0, 4)
    outputs, stored = (torch.randn(4, texts.LENGTH, texts.VOCABULARY, generator=g) for _ in range(2))
    t = texts.trainer(mixins=(Replay,), more={**REPLAY, "replay_alpha": 0.3, "replay_beta": 0.7})
    dark, label = Replay.terms(t)
    batch = next(iter(Loader(texts.stream(), texts.stream().tasks[0], 8, 1, 1, World())))
    batch = type(batch)(stored, targets, batch.ids[:4], batch.position[:4], part="dark",
                        weight=1.0 / problem.units(targets).sum().expand(4), extras={"logits": stored})
    real = targets[:, 1:] != -100
    apart = (outputs - stored).square().mean(-1)[:, :-1]
    torch.testing.assert_close(dark.value(outputs, batch), 0.3 * apart[real].mean())
    want = functional.cross_entropy(outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    torch.testing.assert_close(label.value(outputs, batch), 0.7 * want)
    assert "CE(logits, tokens) + 0.3 E_dark ||outputs - stored||^2" in t.describe()


@dataclass(frozen=True, kw_only=True)
class Halved(Classification):
    """Half of the cross-entropy: a classification whose losses are its own."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().losses(outputs, targets) / 2


def test_a_classification_with_losses_of_its_own_keeps_them_in_every_method() -> None:
    """Twice the learning rate makes up for half the loss, also in the terms of a memory; nothing takes cross-entropy for it."""
    runs = []
    for problem, lr, alpha in ((Classification(), 0.1, 0.3), (Halved(), 0.2, 0.15)):
        optimizer = functools.partial(compose(base=torch.optim.SGD), lr=lr)
        t: Any = type("Learner", (Replay, Trainer), {})(
            learning.net(smooth=True), optimizer, device="cpu", config=Trainer.Config(batch_size=8), prepare=learning.scale,
            problem=problem, **{**learning.REPLAY, "alpha": alpha})
        t.fit(learning.stream())
        assert "rows/aim" not in learning.memory(t)
        runs.append(learning.whole(t))
    assert texts.far(*runs) < 1e-5
    with pytest.raises(ValueError, match="EWC with estimator='exact' and problem=Halved"):
        texts.trainer(parts=(EWC,), options={"ewc_estimator": "exact"}, problem=Halved())


def test_a_stream_of_ones_own_that_knows_labels_alone_is_trained_on() -> None:
    stream = learning.stream()
    names = ("tasks", "train", "test", "num_classes", "kind", "classes", "targets", "fetch", "seen_classes", "fingerprint",
             "label_map", "__len__")
    own: Any = type("Own", (), {name: getattr(stream, name) for name in names} | {"__len__": lambda self: len(stream)})()
    t = learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN)
    assert t.fit(own)[-1] == learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN).fit(stream)[-1]


def test_classification_refuses_targets_beside_its_labels() -> None:
    """It would train on the targets, and be scored among the labels, all "0"."""
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    rows = RowSource(x, targets=(x[:, 0] > 0).long())
    with pytest.raises(ValueError, match=r"targets of its own and problem=Classification, .* give them as labels="):
        texts.regressor(problem=Classification(), outputs=2).fit(iid(rows, rows))
    with pytest.raises(ValueError, match=r"torch.float32, must be integers; .* goes into everbatch.data.RowSource"):
        iid((x, x[:, 0]), (x, x[:, 0]))


@dataclass(frozen=True, kw_only=True)
class Columns(Regression):
    """Forgets to average over the columns."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets[:, None]).square()


def test_losses_that_are_not_one_for_each_row_are_refused() -> None:
    """Under weights of rows, with accumulation or a memory, they would be summed over pairs of rows."""
    with pytest.raises(ValueError, match=r"Columns: losses\(\) of shape \(4, 1\), must be one for each of 4 rows"):
        texts.regressor(problem=Columns(), accumulation=2).fit(texts.regression_stream())


def test_regression_refuses_labels_that_are_numbered_anew() -> None:
    """Class-incremental streams number labels in the order of their classes; labels as they are may be learned as numbers."""
    x, y = torch.randn(16, 5, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4
    for order, refused in (([2, 0, 3, 1], True), ([0, 1, 2, 3], False)):
        stream = class_incremental((x, y), (x, y), tasks=2, class_order=order)
        if refused:
            with pytest.raises(ValueError, match=r"problem=Regression and labels .* numbered anew, .*RowSource"):
                texts.regressor().fit(stream)
        else:
            texts.regressor().fit(stream)


def test_stored_logits_above_the_limit_are_refused_before_the_first_step(monkeypatch: Any) -> None:
    monkeypatch.setattr(replay_module, "MOST_BYTES", 12 * texts.LENGTH * texts.VOCABULARY * 4 - 1)
    t = texts.trainer(mixins=(Replay,), more=REPLAY)
    with pytest.raises(ValueError, match=r"method='dark_er_pp' and outputs of \(12, 37\) for each of 12 samples, .*method='er'"):
        t.fit(texts.stream())
    assert t.step == 0
    texts.trainer(mixins=(Replay,), more={**REPLAY, "replay_method": "er"}).fit(texts.stream())


@pytest.mark.parametrize("named", [False, True])
def test_a_run_with_a_memory_resumes_bit_for_bit(named: bool, tmp_path: Any) -> None:
    """Left inside the second task, after the memory has rows by name and stored logits."""
    stream, runs = texts.stream(named=named), []

    class Stops(Trainer):
        stops = False

        def after_step(self, record: StepRecord) -> None:
            super().after_step(record)
            if self.stops and self.step == 7:
                raise InterruptedError

    for stops in (False, True):
        options = {**REPLAY, "folder": tmp_path / str(stops)}
        for resume in ((False, True) if stops else (False,)):
            t = texts.trainer(mixins=(Replay,), parts=(SAM,), more=options, cls=Stops, checkpoint_every=2)
            t.stops = stops and not resume
            try:
                t.fit(stream, resume=resume)
            except InterruptedError:
                continue
        assert t.step == 10
        runs.append({**learning.whole(t), **learning.memory(t)})
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0]) and any(k.startswith("rows/raw") for k in runs[0])


# ------------------------------------------------------------------------------------------------------ adversaries
ATTACK = {"conadv_radius": 0.02, "conadv_embedding": "embed"}


@pytest.mark.parametrize("named", [False, True])
def test_the_embedding_of_a_language_model_is_attacked(named: bool) -> None:
    """The attack goes up the problem's own loss, and trains alike in micro-batches."""
    records: list[StepRecord] = []
    t = texts.trainer(mixins=(ConAdv,), more={**ATTACK, "conadv_tau": 0})
    t.after_step = records.append
    t.fit(texts.stream(named=named))
    terms = records[0].terms
    assert terms["adversarial_token_cross_entropy"] > terms["token_cross_entropy"] + 1e-4
    with pytest.raises(ValueError, match="targeted=True with problem=CausalLM, must be False"):
        texts.trainer(mixins=(ConAdv,), more={**ATTACK, "conadv_targeted": True})
    with pytest.raises(ValueError, match="whose inputs are ids, must be attacked behind an embedding"):
        texts.trainer(mixins=(ConAdv,), more={"conadv_radius": 0.02})
    if named:
        t = texts.trainer(mixins=(ConAdv,), more={**ATTACK, "conadv_placement": "process"})
        with pytest.raises(ValueError, match=r"inputs by name with placement='process', .* set placement='inline' or 'stream'"):
            t.fit(texts.stream(named=True))


def test_the_inputs_of_a_regression_are_attacked() -> None:
    records: list[StepRecord] = []
    t = texts.regressor(mixins=(ConAdv,), more={"conadv_radius": 25.5, "conadv_tau": 0, "conadv_raw_low": -9.0,
                                                "conadv_raw_high": 9.0})
    t.after_step = records.append
    t.fit(texts.regression_stream())
    x, y = records[0].parts[0].inputs, records[0].parts[0].targets
    moved = records[0].parts[1].inputs
    assert float((moved - x).abs().max()) == pytest.approx(0.1, abs=1e-6)  # type: ignore[operator]
    assert records[0].terms["adversarial_error"] > records[0].terms["error"] and y.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------- data
def test_one_group_can_be_held_out_and_nothing_is_said_of_classes(capsys: pytest.CaptureFixture[str]) -> None:
    stream = validation(texts.regression_stream(), 0.25, seed=3)
    assert len(stream.tasks[0].test_ids) == 16 and len(stream.tasks[0].train_ids) == 48
    texts.regressor().fit(stream)
    assert "one class only" not in capsys.readouterr().err


def test_a_recorder_tells_scores_by_their_names(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from everbatch.report.recorder import Recorder, read_scalars

    for make, stream, text, name in (
            (texts.trainer, texts.stream(), "token accuracy by task, %:", "perplexity/task_1"),
            (texts.regressor, texts.regression_stream(), "r2 by task:", "mse/task_0")):
        recorder = Recorder(tmp_path / name.partition("/")[0], tensorboard=False)
        make(more={"recorder": recorder}).fit(stream)
        recorder.close()
        out = capsys.readouterr()
        assert text in out.out + out.err
        assert any(name in row for row in read_scalars(tmp_path / name.partition("/")[0] / "scalars.jsonl"))


def test_float_rows_of_several_shapes(monkeypatch: Any) -> None:
    """Inputs by name stay as they are, and a model's floats are not ids."""
    seen: list[Any] = []

    class Adds(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def forward(self, x: Tensor, place: Tensor) -> Tensor:
            seen.append((x.dtype, place.dtype))
            return self.layer(x) + place[:, None] * 0.1

    g = torch.Generator().manual_seed(0)
    rows = RowSource({"x": torch.randn(32, 3, generator=g), "place": torch.arange(32)}, torch.randn(32, generator=g).double())
    t = texts.trainer(model=Adds(), problem=Regression(loss="huber"), lr=0.01)
    t.fit(iid(rows, rows))
    assert set(seen) == {(torch.float32, torch.int64)}
    predicted = t.predict({"x": torch.zeros(2, 3), "place": torch.arange(2)})
    assert predicted.shape == (2, 1) and float(predicted[1] - predicted[0]) == pytest.approx(0.1, abs=1e-6)
    assert functools.reduce(max, [len(row) for row in t.matrix]) == 1
