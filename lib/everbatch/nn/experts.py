"""Low-rank experts with a router inside a linear layer."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from everbatch.errors import check, check_real, check_whole

__all__ = ["MoELoRALinear", "Routing", "leading"]

Routing = Literal["token", "sample", "batch"]

ADDED = ("original", "num_experts", "rank", "scaling", "top_k", "routing", "frozen", "masked", "prior", "keep", "last")
"""What the layer holds beside a linear layer's own attributes."""


class MoELoRALinear(nn.Linear):
    """A linear layer with E low-rank experts, and a router that weighs them for each token:

        y = W x + b + s sum_i w_i(x) B_i A_i x,      w(x) = softmax(R x),      s = alpha / (E rank)

    W and b are the layer's own and frozen. `router` is R (E, d); expert i has two parameters, `down_i` A_i (rank, d) and
    `up_i` B_i (o, rank). A is drawn from N(0, 0.01^2), B is 0: at first the layer computes what it did without experts.

    Args:
        base: the layer whose weight and bias are taken; they are shared, not copied.
        num_experts: E >= 1.
        rank: of each expert, 1 to the width of the inputs.
        alpha: of s; None: 2 E rank, so that s is 2, as released.
        top_k: keep that many of the weights, renormalised; None keeps all. No compute is saved.
        routing: "token", as above. "sample": the mean of w over the tokens of a sample, which is every row of the first
            dimension. "batch": the released code's form, for comparison: one w for all tokens of a call, and products across
            experts, s sum_ij w_i w_j B_j A_i x; in evaluation mode logits are divided by E, `prior` is multiplied in, and only
            then `top_k` of them are kept.
        generator: for A and the router.

    Raises:
        ValueError: an option out of range.

    Source: SAME, arXiv 2602.01990; LoRA, Hu et al. 2021, arXiv 2106.09685. Differs: rank is of each expert, not of all together;
    routing is by token, not by batch.
    Cost: 2 E rank (d + o) + 2 E d operations per token, and a copy of the experts' weights per call.
    """

    original: type[nn.Linear]
    """The class of the layer without experts."""
    num_experts: int
    rank: int
    scaling: float
    top_k: int | None
    routing: Routing
    frozen: tuple[int, ...]
    """Experts that get no gradient."""
    masked: bool
    """Whether those are left out of the routing as well."""
    prior: Tensor | None
    """(E,): see `routing`."""
    keep: bool
    """Whether to keep the weights of each call in `last`, (..., E), detached; with routing="batch" those of each token."""
    last: Tensor | None

    def __init__(
        self, base: nn.Linear, num_experts: int = 4, rank: int = 4, *, alpha: float | None = None, top_k: int | None = None,
        routing: Routing = "token", generator: torch.Generator | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.train(base.training)
        MoELoRALinear.equip(self, num_experts, rank, alpha, top_k, routing, generator)

    @staticmethod
    def equip(
        layer: nn.Linear, num_experts: int, rank: int, alpha: float | None, top_k: int | None, routing: Routing,
        generator: torch.Generator | None,
    ) -> None:
        """Put router and experts into a layer; its class may be a linear layer's still."""
        who, width = "MoELoRALinear", layer.in_features
        check_options(num_experts, rank, alpha, top_k, routing)
        check(rank <= width, who, f"rank={rank}", f"be at most the width of the inputs, {width}")
        # Drawn on the CPU, so that the device makes no difference.
        bound = 1.0 / math.sqrt(width)
        router = torch.rand((num_experts, width), generator=generator, dtype=torch.float64)
        layer.register_parameter("router", nn.Parameter(((2 * router - 1) * bound).to(layer.weight)))
        for i in range(num_experts):
            down = torch.randn((rank, width), generator=generator, dtype=torch.float64)
            layer.register_parameter(f"down_{i}", nn.Parameter((0.01 * down).to(layer.weight)))
            layer.register_parameter(f"up_{i}", nn.Parameter(layer.weight.new_zeros(layer.out_features, rank)))
        kept = vars(layer)
        kept |= {"num_experts": num_experts, "rank": rank, "top_k": top_k, "routing": routing, "frozen": (), "masked": False,
                 "prior": None, "keep": False, "last": None}
        kept["original"] = nn.Linear if isinstance(layer, MoELoRALinear) else type(layer)
        kept["scaling"] = 2.0 if alpha is None else alpha / (num_experts * rank)

    @property
    def names(self) -> list[str]:
        """Names of what was added to the linear layer, the router's first."""
        return ["router", *(f"{kind}_{i}" for i in range(self.num_experts) for kind in ("down", "up"))]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        y = functional.linear(x, self.weight, self.bias)
        weights = self.weigh(x)
        left_out = self.frozen if self.masked else ()
        chosen = [i for i in range(self.num_experts) if i not in left_out]
        # One product for all experts: their matrices are small.
        downs = torch.cat([_held(getattr(self, f"down_{i}"), i in self.frozen) for i in chosen])
        ups = torch.cat([_held(getattr(self, f"up_{i}"), i in self.frozen) for i in chosen], dim=1)
        inner = functional.linear(x, downs)
        inner = inner.view(*inner.shape[:-1], len(chosen), self.rank)
        shares = weights[..., chosen].to(inner.dtype).unsqueeze(-1)
        inner = inner * shares
        if self.routing == "batch":  # the products across experts of the released form
            inner = inner.sum(-2, keepdim=True) * shares
        return y + self.scaling * functional.linear(inner.flatten(-2), ups)

    def weigh(self, x: Tensor) -> Tensor:
        """Weights of the experts, in float32 at least: (..., E); over a sample or a batch its tokens all have the same."""
        logits = functional.linear(x, self.router)  # type: ignore[arg-type]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        released = self.routing == "batch"
        asked = released and not torch.is_grad_enabled()
        weights = (logits / self.num_experts if asked else logits).softmax(-1)
        tokens = weights
        if released:
            weights = weights.reshape(-1, self.num_experts).mean(0)
        elif self.routing == "sample" and x.ndim > 2:
            inner = tuple(range(1, x.ndim - 1))
            weights = weights.mean(inner, keepdim=True)
        if self.masked and self.frozen:
            there = torch.ones(self.num_experts, dtype=weights.dtype, device=weights.device)
            there[list(self.frozen)] = 0.0
            weights = weights * there
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
        if asked and self.prior is not None:
            weights = weights * self.prior.to(weights)
            weights = weights / weights.sum()
        if self.top_k is not None and (asked or not released):
            weights = leading(weights, self.top_k, 1e-8 if released else 0.0)
        weights = weights.expand(*x.shape[:-1], self.num_experts)
        if self.keep:
            self.last = (tokens if released else weights).detach()
        return weights

    def extra_repr(self) -> str:
        """As a linear layer's, and the experts."""
        kept = "all" if self.top_k is None else f"top {self.top_k}"
        return f"{super().extra_repr()}, experts={self.num_experts}, rank={self.rank}, {kept}, routing={self.routing}"


def leading(weights: Tensor, count: int, eps: float = 0.0) -> Tensor:
    """The `count` largest of the last dimension, divided by their sum (+ eps, as released); the others are 0."""
    best = weights.topk(count, dim=-1)
    kept = torch.zeros_like(weights).scatter(-1, best.indices, best.values)
    return kept / (kept.sum(-1, keepdim=True) + eps)


def check_options(num_experts: int, rank: int, alpha: float | None, top_k: int | None, routing: str,
                  who: str = "MoELoRALinear", names: tuple[str, str] = ("num_experts", "rank")) -> None:
    """Refuse options that no layer could have."""
    check_whole(who, names[0], num_experts, 1)
    check_whole(who, names[1], rank, 1)
    if alpha is not None:
        check_real(who, "alpha", alpha, 0.0, open_low=True)
    check(top_k is None or (isinstance(top_k, int) and 1 <= top_k <= num_experts), who, f"top_k={top_k!r}",
          f"be null, or an integer from 1 to the {num_experts} experts")
    check(routing in ("token", "sample", "batch"), who, f"routing={routing!r}", "be token, sample or batch")


def _held(parameter: Tensor, still: bool) -> Tensor:
    """A parameter, or its values alone where it is not to learn."""
    return parameter.detach() if still else parameter
