"""Losses, units and scores of each problem against loops over rows and tokens, and scikit-learn; outputs of every dress."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import texts
import torch
from torch import Tensor, nn
from torch.nn import functional

from everbatch.errors import CheckpointMismatch
from everbatch.problems import CausalLM, Classification, Problem, Regression
from everbatch.train import Trainer


def by_tokens(outputs: Tensor, targets: Tensor, *, shift: bool, ignore: int = -100) -> list[list[tuple[float, bool]]]:
    """Loss and hit of each token that counts, row by row."""
    rows = []
    for u, y in zip(outputs.double(), targets, strict=True):
        found = []
        for t in range(len(y) - shift):
            aim = int(y[t + shift])
            if aim != ignore:
                found.append((-float(u[t].log_softmax(0)[aim]), int(u[t].argmax()) == aim))
        rows.append(found)
    return rows


@pytest.mark.parametrize("shift", [True, False])
def test_a_language_model_counts_tokens(shift: bool) -> None:
    problem = CausalLM(shift=shift)
    _, targets = texts.padded(0, 9, first=2)
    outputs = torch.randn(9, texts.LENGTH, texts.VOCABULARY)
    tokens = by_tokens(outputs, targets, shift=shift)
    assert problem.units(targets).tolist() == [len(row) for row in tokens]
    want = torch.tensor([sum(loss for loss, _ in row) for row in tokens])
    torch.testing.assert_close(problem.losses(outputs, targets), want)
    places = torch.arange(float(texts.LENGTH)).expand(9, -1)
    pooled = [sum(t for t in range(texts.LENGTH - shift) if y[t + shift] != -100) for y in targets]
    assert problem.pool(places, targets).tolist() == pooled

    weight = torch.tensor([1.0] * 6 + [0.0] * 3)
    every = [token for row in tokens[:6] for token in row]
    scores = problem.scores(problem.sums(outputs, targets, weight))
    mean = sum(loss for loss, _ in every) / len(every)
    assert scores == pytest.approx({"token_accuracy": sum(hit for _, hit in every) / len(every), "token_loss": mean,
                                    "perplexity": math.exp(mean)})
    assert all(math.isnan(v) for v in problem.scores(problem.sums(outputs, targets, weight * 0)).values())
    assert problem.scores(torch.tensor([0.0, 1e4, 10.0]))["perplexity"] == math.inf


def test_tokens_of_any_integer_type() -> None:
    outputs, tokens = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    assert torch.equal(CausalLM().losses(outputs, tokens.int()), CausalLM().losses(outputs, tokens))


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression_scores_as_scikit_learn_does(outputs: int) -> None:
    from sklearn.metrics import mean_squared_error, r2_score

    u, y = torch.randn(20, outputs), torch.randn(20, outputs) + 1000.0
    problem = Regression()
    sums = problem.sums(u[:12], y[:12], torch.ones(12)) + problem.sums(u[12:], y[12:], torch.ones(8))
    assert problem.scores(sums) == pytest.approx({"r2": r2_score(y, u), "mse": mean_squared_error(y, u)}, rel=1e-6)
    torch.testing.assert_close(problem.losses(u, y), (u - y).square().mean(1))
    huber = Regression(loss="huber", delta=0.5)
    away = (u - y / 1000).abs()
    want = torch.where(away <= 0.5, away.square() / 2, 0.5 * (away - 0.25)).mean(1)
    torch.testing.assert_close(huber.losses(u, y / 1000), want)
    flat = torch.full((4, outputs), 2.0)
    assert problem.scores(problem.sums(flat, flat, torch.ones(4)))["r2"] == 1.0
    assert problem.scores(problem.sums(flat + 1, flat, torch.ones(4)))["r2"] == 0.0


def test_problems_are_values() -> None:
    assert CausalLM() == CausalLM() != CausalLM(ignore=0) and Classification() != Regression()
    assert repr(CausalLM(ignore=0)) == "CausalLM(output=None, ignore=0, shift=True)"
    for wrong in (lambda: Regression(loss="absolute"), lambda: Regression(delta=0.0),  # type: ignore[arg-type]
                  lambda: Classification(label_smoothing=1.0)):
        with pytest.raises(ValueError, match="must be"):
            wrong()


@dataclass(frozen=True, kw_only=True)
class Focal(Classification):
    """Classification with losses of its own."""

    gamma: float = 2.0
    term: ClassVar[str] = "focal"

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        plain = functional.cross_entropy(outputs, targets, reduction="none")
        return (1 - (-plain).exp()) ** self.gamma * plain


def test_losses_of_ones_own_are_no_cross_entropy() -> None:
    assert Classification.cross_entropy and not Focal.cross_entropy and Focal.labels
    assert CausalLM.in_units and not Regression.in_units and Regression.bounded and not CausalLM.bounded
    for verb, arguments in (("losses", 2), ("units", 1), ("sums", 3), ("scores", 1), ("output_fn", 2)):
        with pytest.raises(NotImplementedError, match=rf"Problem\.{verb}\(\) is not there"):
            getattr(Problem(), verb)(*[torch.zeros(1)] * arguments)


@dataclass
class Said:
    logits: Tensor
    aux: Tensor


@pytest.mark.parametrize(("dress", "problem", "text"), [
    (lambda u: u, CausalLM(), ""), (lambda u: {"logits": u, "aux": u}, CausalLM(), ""), (lambda u: Said(u, u), CausalLM(), ""),
    (lambda u: (u, u), CausalLM(output=0), ""), (lambda u: {"said": u}, CausalLM(output="said"), ""),
    (lambda u: (u, u), CausalLM(), "output='logits' and a network that returns tuple"),
    (lambda u: {"said": u}, CausalLM(), "output='logits' and a network that returns dict with 'said'"),
    (lambda u: u[:, :3], CausalLM(), r"outputs of shape \(8, 3, 37\) for targets of \(8, 12\)"),
    (lambda u: u[:, 0], CausalLM(), r"must be logits \(n, L, V\)"),
    (lambda u: {"logits": u}, Regression(), r"returns dict with 'logits'.*must return logits; name them"),
    (lambda u: u, Regression(), "must be as many numbers for each row")])
def test_outputs_of_every_dress(dress: Any, problem: Problem, text: str) -> None:
    class Dressed(texts.Speaker):
        def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Any:
            return dress(super().forward(input_ids.long(), mask))

    t = texts.trainer(model=Dressed(), problem=problem)
    if text:
        with pytest.raises(ValueError, match=text):
            t.fit(texts.stream())
    else:
        assert t.fit(texts.stream())[-1] == texts.trainer().fit(texts.stream())[-1]


def test_transformers_and_torchvision_outputs() -> None:
    modeling = pytest.importorskip("transformers.modeling_outputs")
    googlenet = pytest.importorskip("torchvision.models.googlenet")
    for dress in (lambda u: modeling.CausalLMOutput(logits=u), lambda u: googlenet.GoogLeNetOutputs(u, u, u)):
        class Dressed(texts.Speaker):
            def forward(self, input_ids: Tensor, mask: Tensor | None = None, dress: Any = dress) -> Any:
                return dress(super().forward(input_ids, mask))

        assert texts.trainer(model=Dressed()).fit(texts.stream())[-1] == texts.trainer().fit(texts.stream())[-1]


def test_targets_that_are_labels_are_refused_by_a_language_model() -> None:
    from everbatch.data import TensorSource, iid

    ids, _ = texts.padded(0, 16)
    one = TensorSource(ids, torch.zeros(16, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"targets of shape \(8,\) .* must be token ids \(n, L\); .*RowSource"):
        texts.trainer().fit(iid(one, one))


def test_a_problem_is_an_object_and_says_smoothing_itself() -> None:
    with pytest.raises(ValueError, match=r"must be one of everbatch\.problems; say problem=CausalLM\(\), an object"):
        texts.trainer(problem=CausalLM)
    optimizer = texts.trainer().optimizer
    with pytest.raises(ValueError, match="label_smoothing=0.1 beside problem="):
        Trainer(nn.Linear(2, 2), __import__("functools").partial(type(optimizer), lr=0.1), device="cpu",
                config=Trainer.Config(batch_size=8, label_smoothing=0.1), problem=Classification())


def test_a_run_resumes_with_an_equal_problem_alone(tmp_path: Any) -> None:
    texts.trainer(more={"folder": tmp_path}).fit(texts.stream())
    again = texts.trainer(more={"folder": tmp_path})
    assert len(again.fit(texts.stream(), resume=True)) == 2 and len(again.scores[1]) == 2
    with pytest.raises(CheckpointMismatch, match=r"made with problem='CausalLM\(output=None, ignore=-100"):
        texts.trainer(problem=CausalLM(ignore=0), more={"folder": tmp_path}).fit(texts.stream(), resume=True)
