"""Where ConAdv's crafting runs: in the step, on a side stream, in a process beside the trainer, on ranks of their own."""

from everbatch.train.adversary.attack import Attack
from everbatch.train.adversary.fifo import Fifo
from everbatch.train.adversary.pipeline import Pipeline
from everbatch.train.adversary.ranks import Role, current_role, split_ranks
from everbatch.train.adversary.server import serve

__all__ = ["Attack", "Fifo", "Pipeline", "Role", "current_role", "serve", "split_ranks"]
