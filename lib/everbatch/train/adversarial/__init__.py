"""Where ConAdv's crafting runs: in the step, on a side stream, in a process beside the trainer, on ranks of their own."""

from everbatch.train.adversarial.attack import Attack
from everbatch.train.adversarial.fifo import Fifo
from everbatch.train.adversarial.pipeline import Pipeline
from everbatch.train.adversarial.ranks import Role, current_role, split_ranks
from everbatch.train.adversarial.server import serve

__all__ = ["Attack", "Fifo", "Pipeline", "Role", "current_role", "serve", "split_ranks"]
