"""Sharpness methods written by hand for one model on one device: what a step costs at least.

Nothing here is general: every parameter is reached in every step, all have one type, nothing is checked, no buffer is looked
after, and copies of the weights lie in memory that is kept, one tensor with views into it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["LOOPS", "Loop"]


class Flat:
    """One tensor with a view for each parameter."""

    def __init__(self, like: list[Tensor]) -> None:
        self.whole = torch.empty(sum(t.numel() for t in like))
        self.views = list(torch._C._nn.unflatten_dense_tensors(self.whole, like))

    def read(self, tensors: list[Tensor]) -> Tensor:
        torch._foreach_copy_(self.views, tensors)
        return self.whole

    def write(self, tensors: list[Tensor]) -> None:
        torch._foreach_copy_(tensors, self.views)


class Loop:
    """A model, torch's optimizer, and a loss; `pass_()` leaves gradients."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
        self.optimizer, self.loss, self.count = optimizer, loss, 0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.weights = [p.data for p in self.parameters]
        self.saved, self.moved, self.first, self.kept = (Flat(self.weights) for _ in range(4))

    def pass_(self) -> list[Tensor]:
        self.optimizer.zero_grad()
        self.loss().backward()
        return [p.grad for p in self.parameters if p.grad is not None]

    def pass_at(self, direction: Tensor, rho: float) -> list[Tensor]:
        """Gradients at the weights moved by rho along a direction; the weights are back afterwards."""
        old = self.saved.read(self.weights)
        torch.add(old, direction * (rho / (direction.norm() + 1e-12)), out=self.moved.whole)
        self.moved.write(self.weights)
        gradients = self.pass_()
        self.saved.write(self.weights)
        return gradients

    def sgd(self) -> None:
        self.pass_()
        self.optimizer.step()

    def sam(self, rho: float = 0.05) -> None:
        self.pass_at(self.first.read(self.pass_()), rho)
        self.optimizer.step()

    def look_sam(self, rho: float = 0.05, every: int = 5, alpha: float = 0.7) -> None:
        gradients = self.pass_()
        g = self.first.read(gradients)
        if self.count % every == 0:
            h = self.kept.read(self.pass_at(g, rho))
            h -= g * (h.dot(g) / g.dot(g))
        else:
            g += self.kept.whole * (alpha * g.norm() / (self.kept.whole.norm() + 1e-12))
            self.first.write(gradients)
        self.count += 1
        self.optimizer.step()

    def stale_sam(self, rho: float = 0.05) -> None:
        gradients = self.pass_at(self.kept.whole, rho) if self.count else self.pass_()
        self.kept.read(gradients)
        self.count += 1
        self.optimizer.step()

    def gradient_norm(self, radius: float = 0.05, mix: float = 0.8) -> None:
        g = self.first.read(self.pass_())
        gradients = self.pass_at(g, radius)
        h = self.kept.read(gradients)
        h.mul_(mix).add_(g, alpha=1 - mix)
        self.kept.write(gradients)
        self.optimizer.step()


LOOPS: dict[str, Callable[[Loop], None]] = {
    "SAM": Loop.sam, "LookSAM k=5": Loop.look_sam, "StaleSAM": Loop.stale_sam, "GradientNorm": Loop.gradient_norm,
}
