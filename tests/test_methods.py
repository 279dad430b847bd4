"""Every optimizer mixin in the plain loop of `recipes/one_method.py`, as a user names it on the command line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from everbatch import methods
from rotation import When

RECIPE = Path(__file__).parents[1] / "recipes" / "one_method.py"


@pytest.fixture(scope="module")
def recipe() -> Any:
    spec = importlib.util.spec_from_file_location("one_method", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(key: str) -> str:
    """A method at the first values of its search space, where tuning begins."""
    part = methods.load(key)
    base = f" base={part.bases[0]}" if part.bases else ""
    rate = " lr=0.01" if base.endswith("AdamW") else ""
    given = "".join(f" {name}={values[0]}" for name, values in part.search.items() if isinstance(values, tuple))
    return f"{part.__name__}{base}{rate} weight_decay=1e-4{given}"


KEYS = [key for key, part in methods.optimizer_mixins().items() if not part.in_code]
ALONE = [When(place, 8).param(words(key)) for place, key in enumerate(KEYS)]
MIXES = ["ClipGradNorm EMA", "LARS weight_decay=1e-4 trust_coeff=0.1", "Refresh gamma=0.0001",
         "DynamicSparsity density=0.5 update_every=10", "ClipGradNorm DynamicSparsity StaleSAM density=0.5 rho=0.02"]
MIXED = [When(place, 4).param(mix) for place, mix in enumerate(MIXES)]


@pytest.mark.parametrize("words", [*ALONE, *MIXED])
def test_a_method_learns_digits_in_a_plain_loop(recipe: Any, words: str) -> None:
    assert recipe.main(*words.split()) > 0.3  # chance is 0.1


def test_methods_that_cannot_go_together_say_why(recipe: Any) -> None:
    with pytest.raises(TypeError, match="both own the perturbation"):
        recipe.main("SAM", "LookSAM")
