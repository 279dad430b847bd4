"""The options of the Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from everbatch.data.loader import check_workers
from everbatch.errors import check, check_whole
from everbatch.train.schedule import Schedule

__all__ = ["TrainerConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """See the fields; `Trainer.Config` is this class."""

    batch_size: int = 64
    """Samples of the stream per step, over all ranks and micro-batches; >= 1, divisible by ranks * accumulation."""
    epochs: int = 1
    """Passes over each task; >= 1."""
    accumulation: int = 1
    """Micro-batches per step and rank; >= 1."""
    schedule: Schedule = field(default_factory=Schedule)
    """Learning-rate schedule, restarted at every task."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast on plain, ddp and fsdp2 (masters stay fp32); on DeepSpeed say it in the engine's configuration."""
    seed: int = 0
    """Root of all randomness."""
    decay_vectors: bool = True
    """Weight decay on biases and norm scales too; False for large-batch recipes."""
    reset_optimizer: bool = True
    """Start every task with fresh optimizer moments, as the reference implementations do."""
    eval_batch: int = 256
    """Samples per rank and forward in evaluation; >= 1."""
    eval_future: bool = False
    """Evaluate tasks before they are trained as well (forward transfer)."""
    eval_past: bool = True
    """False: a task is evaluated when it ends, and all are after the last one; other entries under the diagonal are NaN, which
    `everbatch.metrics` refuses. For long streams: their evaluations grow with the square of the number of tasks."""
    checkpoint_every: int = 0
    """Steps between checkpoints beside the one after each task; 0 for none."""
    keep_last: int = 2
    """Checkpoints kept; >= 1."""
    max_bad_steps: int = 10
    """Consecutive steps with a gradient that is not finite before the run stops; >= 1."""
    workers: int = 0
    """Processes per rank that fetch batches ahead; 0 fetches in the trainer's."""
    compile: bool = False
    """Run training passes through torch.compile, where that is sound: see `everbatch.train.compiled`. Weights, names and
    checkpoints are as without; results differ by rounding."""
    label_smoothing: float = 0.0
    """Share of each target spread evenly over all classes, in the stream's cross-entropy; in [0, 1)."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "accumulation", "eval_batch", "keep_last", "max_bad_steps"):
            check_whole("Trainer", name, getattr(self, name), 1)
        for name in ("checkpoint_every", "workers"):
            check_whole("Trainer", name, getattr(self, name), 0)
        check_workers("Trainer", self.workers)
        check(isinstance(self.compile, bool), "Trainer", f"compile={self.compile!r}", "be true or false")
        check(self.precision in ("fp32", "bf16"), "Trainer", f"precision={self.precision!r}", "be fp32 or bf16")
        check(0 <= self.label_smoothing < 1, "Trainer", f"label_smoothing={self.label_smoothing!r}", "be in [0, 1)")
