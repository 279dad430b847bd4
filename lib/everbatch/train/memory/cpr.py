"""Classifier-projection regularisation: outputs that are not sure of themselves, for wide minima."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from everbatch.data import Batch
from everbatch.errors import check, check_real
from everbatch.objective.table import cpr
from everbatch.objective.terms import OutputTerm, evaluate
from everbatch.train.mixin import TrainerMixin

__all__ = ["CPR"]


class CPR(TrainerMixin):
    """Draw the stream's outputs towards the uniform distribution:  L <- L + strength * mean_i KL(p_i || uniform).

    That is strength * (ln C - H(p)), an entropy bonus but for a constant; p is the softmax of the logits that the stream's loss
    is over. Made to stand beside a penalty on the weights (EWC, MAS), whose minima it widens.

    Cost: one softmax of the logits. Order: right of mixins that choose among the classes (LwF).
    Limits: classification; of the stream's own samples, not of those that other mixins add.
    Source: Cha et al. 2021, arXiv 2006.07326, eq. 4.
    """

    example = {"strength": 0.5}
    off = {"strength": 0.0}
    search = {"strength": (0.1, 0.03, 0.3, 1.0)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        strength: float = 0.1
        """Weight of the divergence, beta; >= 0, 0 switches it off."""

        def __post_init__(self) -> None:
            check_real("CPR", "strength", self.strength, 0.0)

    def terms(self) -> tuple[OutputTerm, ...]:
        """The divergence."""
        return cpr(self.configs[CPR].strength)

    def configure_model(self, model: nn.Module) -> nn.Module:
        """Refuse what has no classes."""
        problem = getattr(self, "problem", None)
        check(problem is None or problem.cross_entropy, "CPR", f"problem={problem!r}", "be classification")
        return super().configure_model(model)  # type: ignore[misc, no-any-return]

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """One more term, of the stream's part."""
        terms: dict[str, Tensor] = super().loss_terms(outputs, batch)  # type: ignore[misc]
        return terms | evaluate([term for term in CPR.terms(self) if term.weight], outputs, batch)
