"""What is learned: the loss of a row, how much it counts, and the scores that a run is judged by."""

from everbatch.problems.base import Problem
from everbatch.problems.classification import Classification
from everbatch.problems.language import CausalLM
from everbatch.problems.regression import Regression

__all__ = ["CausalLM", "Classification", "Problem", "Regression"]
