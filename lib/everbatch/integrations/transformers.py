"""Composed optimizers in Hugging Face's Trainer, whose loop otherwise runs backward outside of the step."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from everbatch.errors import check
from everbatch.integrations.bridged import composed

__all__ = ["ClosureTrainer"]


class ClosureTrainer(transformers.Trainer):
    """A `transformers.Trainer` whose update is one `opt.step(closure)`, with all passes that mixins ask for; one device or DDP.

    Give `optimizers=(Opt(model, ...), scheduler or None)` and `TrainingArguments(max_grad_norm=0)`: ClipGradNorm clips. Losses
    are scaled as the Trainer does, by the tokens of all ranks where it counts them. Logs hold what mixins measured. A step that
    is skipped moves the scheduler. Cost: the micro-batches of an update stay on the device for its passes.

    Raises:
        ValueError: the optimizer is not composed, or the Trainer clips as well.
        UnsupportedHost: DeepSpeed, FSDP, DataParallel or fp16; or a part that needs a second objective.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        who, clip, kind = type(self).__name__, self.args.max_grad_norm, self.accelerator.distributed_type.value
        plain = kind in ("NO", "MULTI_CPU", "MULTI_GPU") and self.accelerator.scaler is None and self.args.n_gpu <= 1
        self._opt = composed(who, self.optimizer, "optimizers=(Opt(model, ...), None)", plain,
                             f"{kind}, fp16={self.args.fp16}, {self.args.n_gpu} GPUs in this process")
        check(not clip, who, f"max_grad_norm={clip}", "be 0", "clip with ClipGradNorm")

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._micro_batches, count = super().get_batch_samples(*args, **kwargs)
        return self._micro_batches, count

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if inputs is not self._micro_batches[-1]:
            return torch.zeros((), device=self.args.device)
        batches, wrapper = [self._prepare_inputs(batch) for batch in self._micro_batches], self.optimizer
        counted = (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        model.train()

        def closure() -> Tensor:
            total = torch.zeros((), device=self.args.device)
            for batch in self._opt.micro_batches(batches, average=not (counted if scaled is None else scaled)):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, dict(batch), num_items_in_batch=num_items_in_batch)
                total += self._opt.backward(loss)
            return total

        wrapper.step = lambda closure=None: None  # type: ignore  # the loop's own call, which comes when all is done
        return self._opt.step(closure)  # type: ignore[no-any-return]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        measured = {name: float(value) for name, value in self._opt.metrics.items()}
        super().log({**{k: v for k, v in logs.items() if k != "grad_norm"}, **measured}, *args, **kwargs)
