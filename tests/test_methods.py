"""Every optimizer mixin in the plain loop of `recipes/one_method.py`, as a user names it on the command line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

RECIPE = Path(__file__).parents[1] / "recipes" / "one_method.py"


@pytest.fixture(scope="module")
def recipe() -> Any:
    spec = importlib.util.spec_from_file_location("one_method", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("words", [
    "SAM rho=0.05", "ASAM rho=0.2", "GSAM rho=0.05", "GradientNorm", "WSAM rho=0.02", "LookSAM rho=0.05", "StaleSAM rho=0.02",
    "ESAM rho=0.02", "Ignite rho=0.01", "ClipGradNorm EMA", "LARS weight_decay=1e-4 trust_coeff=0.1",
    "LAMB base=AdamW lr=0.01 weight_decay=0.01", "DynamicSparsity density=0.5 update_every=10", "EWC", "SI", "MAS",
    "Refresh gamma=0.0001", "ClipGradNorm DynamicSparsity StaleSAM density=0.5 rho=0.02"])
def test_a_method_learns_digits_in_a_plain_loop(recipe: Any, words: str) -> None:
    assert recipe.main(*words.split()) > 0.3  # chance is 0.1


def test_methods_that_cannot_go_together_say_why(recipe: Any) -> None:
    with pytest.raises(TypeError, match="both own the perturbation"):
        recipe.main("SAM", "LookSAM")
