"""Bottleneck adapters beside the MLPs of a vision transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everbatch import seeds
from everbatch.errors import check, check_real, check_whole

__all__ = ["AdaptedBlock", "BottleneckAdapter", "UnsupportedAdapterTarget", "adapters_of", "attach_adapters", "detach_adapters"]

Norm = Literal["none", "in", "out"]
SUPPORTED = "the standard block of timm's vision transformers (timm.models.vision_transformer.Block): ViT, DeiT, AugReg, DINOv2"


class UnsupportedAdapterTarget(ValueError):
    """A network, or a block in it, that adapters cannot be put into."""


@dataclass
class Given:
    """Values that an adapter reads in place of its own."""

    values: Tensor
    """(P_block,) of one adapter for all samples, or (T, P_block) of several."""
    tasks: Tensor | None
    """Which of them each sample reads: (n,)."""


@dataclass
class Shared:
    """What of a forward the first block's adapter does not change: kept by one pass, taken by others."""

    attended: Tensor | None = None
    without: Tensor | None = None


class BottleneckAdapter(nn.Module):
    """A small branch that begins as zero.

        adapter(h) = s (U dropout(relu(D h + b_D)) + b_U),    D (rank, width), U (width, rank)

    D is uniform in +-1/sqrt(width), all else 0. Its parameters, in the order of a flat vector: down.weight, down.bias, up.weight,
    up.bias, then norm.weight and norm.bias, and gain, where there are any.

    Args:
        width: of the tokens.
        rank: 1 to `width`.
        scale: s; None for a learned one, `gain`, that begins at 1.
        dropout: probability in training, in [0, 1).
        norm: a layer norm of what comes "in", or of what goes "out"; by default none.
        generator: for D.

    Raises:
        ValueError: an option out of range.

    Source: MOS, arXiv 2412.09441. Cost: 4 rank width operations per token.
    """

    def __init__(
        self, width: int, rank: int = 16, *, scale: float | None = 0.1, dropout: float = 0.1, norm: Norm = "none",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        who = "BottleneckAdapter"
        check_whole(who, "rank", rank, 1)
        check(rank <= width, who, f"rank={rank}", f"be at most the width of the tokens, {width}")
        check_real(who, "dropout", dropout, 0.0, 1.0, open_high=True)
        check(norm in ("none", "in", "out"), who, f"norm={norm!r}", "be none, in or out")
        if scale is not None:
            check_real(who, "scale", scale)
        self.width, self.rank = width, rank
        self.scale, self.dropout, self.norm_at = scale, dropout, norm
        self.down, self.up = _empty(width, rank), _empty(rank, width)
        self.norm = nn.LayerNorm(width) if norm != "none" else None
        self.gain = nn.Parameter(torch.ones(1)) if scale is None else None
        self.given: Given | None = None
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5), generator=generator)
            for zero in (self.down.bias, self.up.weight, self.up.bias):
                zero.zero_()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters, in the order of a flat vector; whole ones, however they are sharded."""
        d, r = self.width, self.rank
        found: dict[str, tuple[int, ...]] = {"down.weight": (r, d), "down.bias": (r,), "up.weight": (d, r), "up.bias": (d,)}
        found |= {"norm.weight": (d,), "norm.bias": (d,)} if self.norm is not None else {}
        return found | ({"gain": (1,)} if self.gain is not None else {})

    @property
    def made_of(self) -> dict[str, Any]:
        """Options of `attach_adapters` for one like this."""
        return {"rank": self.rank, "scale": self.scale, "dropout": self.dropout, "norm": self.norm_at}

    @property
    def size(self) -> int:
        """Number of the parameters."""
        return sum(map(math.prod, self.shapes.values()))

    def forward(self, h: Tensor) -> Tensor:
        """(..., width) to (..., width); with one adapter per sample, (n, tokens, width)."""
        return self._live(h) if self.given is None else self._reading(h, self.given)

    def _live(self, h: Tensor) -> Tensor:
        # Layers are called, never their parameters read: engines gather what is sharded in the call.
        x: Tensor = self.norm(h) if self.norm is not None and self.norm_at == "in" else h
        x = F.dropout(F.relu(self.down(x)), self.dropout, self.training)
        x = self.up(x) * (self.gain if self.scale is None else self.scale)
        out: Tensor = self.norm(x) if self.norm is not None and self.norm_at == "out" else x
        return out

    def _reading(self, h: Tensor, given: Given) -> Tensor:
        values, tasks = given.values, given.tasks
        if tasks is None:
            return self._of(h, self._parts(values.to(h.dtype)))
        check(h.ndim == 3 and len(h) == len(tasks), "adapters", f"tokens {tuple(h.shape)} and {len(tasks)} tasks",
              "be of as many samples: (n, tokens, width) and (n,)")
        return self._of(h, self._parts(values.index_select(0, tasks).to(h.dtype)))

    def _parts(self, flat: Tensor) -> dict[str, Tensor]:
        """Parameters out of (..., P_block), by name."""
        shapes = self.shapes
        pieces = torch.split(flat, [math.prod(shape) for shape in shapes.values()], dim=-1)
        named = zip(shapes.items(), pieces, strict=True)
        return {name: piece.reshape(*flat.shape[:-1], *shape) for (name, shape), piece in named}

    def _of(self, h: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        x = self._normed(h, parts) if self.norm_at == "in" else h
        x = F.relu(_linear(x, parts["down.weight"], parts["down.bias"]))
        x = F.dropout(x, self.dropout, self.training)
        x = _linear(x, parts["up.weight"], parts["up.bias"])
        x = x * (self.scale if self.scale is not None else _by_token(parts["gain"], x))
        return self._normed(x, parts) if self.norm_at == "out" else x

    def _normed(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        assert self.norm is not None
        plain = F.layer_norm(x, (self.width,), eps=self.norm.eps)
        return plain * _by_token(parts["norm.weight"], x) + _by_token(parts["norm.bias"], x)

    def extra_repr(self) -> str:
        return f"width={self.width}, rank={self.rank}, scale={self.scale}, dropout={self.dropout}, norm={self.norm_at}"


def _empty(inputs: int, outputs: int) -> nn.Linear:
    """A layer without values, for which nothing is drawn from torch's global generator."""
    return nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One layer for all samples, or for each its own."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


def _by_token(value: Tensor, x: Tensor) -> Tensor:
    """A vector for all samples as it is; (n, k), one for each sample, beside tokens (n, tokens, ...)."""
    return value.unsqueeze(1) if value.ndim == 2 and x.ndim == 3 else value


class AdaptedBlock(nn.Module):
    """timm's standard block with an adapter parallel to the MLP, fed with the stream after the attention, before norm2:

        h   = x + drop_path1(ls1(attn(norm1(x))))
        out = h + drop_path2(ls2(mlp(norm2(h)))) + adapter(h)

    A block becomes one by `attach_adapters`, in place, and is never built otherwise."""

    norm1: nn.Module
    attn: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module
    adapter: BottleneckAdapter
    original: type[nn.Module]
    shared: Shared | None = None
    """Filled by a forward where it is empty, else taken in place of the block's input."""

    def start(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> tuple[Tensor, Tensor]:
        """What does not depend on the adapter: h, and h with its MLP branch."""
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        h = x + self.drop_path1(self.ls1(attended))
        return h, h + self.drop_path2(self.ls2(self.mlp(self.norm2(h))))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        shared = self.shared
        if shared is None or shared.attended is None or shared.without is None:
            h, without = self.start(x, attn_mask, is_causal)
        else:
            h, without = shared.attended, shared.without
        if shared is not None:
            shared.attended, shared.without = h, without
        adapted: Tensor = self.adapter(h)
        return without + adapted


def attach_adapters(
    model: nn.Module, rank: int = 16, *, scale: float | None = 0.1, dropout: float = 0.1, norm: Norm = "none", seed: int = 0,
) -> list[str]:
    """Put a `BottleneckAdapter` into every block of a timm vision transformer, in place. Fresh ones add exactly 0.

    Blocks change their class to `AdaptedBlock` and keep their identity, hooks, names and weights: a state dict of the network
    without adapters loads with strict=False. `detach_adapters` undoes it.

    Args:
        model: a bare network; its `blocks` are all standard ones.
        rank, scale, dropout, norm: see `BottleneckAdapter`.
        seed: of the adapters' initial values; the same on every rank.

    Returns:
        Names of the adapters, in order.

    Raises:
        UnsupportedAdapterTarget: a network without blocks, or with one of another kind, by name; one that has adapters. Nothing
            is changed then.
        ValueError: an option out of range.
    """
    blocks = _standard_blocks(model)
    made = {}
    for name, block in blocks.items():
        first = next(block.parameters())
        generator = seeds.generator(seed, "adapter", name)
        adapter = BottleneckAdapter(_width(block), rank, scale=scale, dropout=dropout, norm=norm, generator=generator)
        made[name] = adapter.to(first.device, first.dtype).train(block.training)
    for name, block in blocks.items():
        original = type(block)
        block.__class__ = AdaptedBlock
        block.original = original  # type: ignore[assignment]
        block.adapter = made[name]
    return [f"{name}.adapter" for name in blocks]


def detach_adapters(model: nn.Module) -> list[str]:
    """Undo `attach_adapters`, in place; everything else stays as it is.

    Returns:
        Names of the adapters that are gone.
    """
    gone = []
    for name, block in model.named_modules():
        if type(block) is AdaptedBlock:
            original = block.original
            del block.adapter
            block.__dict__.pop("original")
            block.__class__ = original  # type: ignore[assignment]
            gone.append(f"{name}.adapter")
    return gone


def adapters_of(model: nn.Module) -> dict[str, BottleneckAdapter]:
    """The adapters of a model by name, in the order of a flat vector."""
    return {name: part for name, part in model.named_modules() if isinstance(part, BottleneckAdapter)}


def _standard_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Every block of the network by name, all of them standard ones."""
    from timm.models.vision_transformer import Block

    kind = type(model).__name__
    if adapters_of(model):
        raise UnsupportedAdapterTarget(f"adapters: a {kind} that has adapters, must have none; call detach_adapters first")
    blocks: dict[str, nn.Module] = {
        name: part for name, part in model.named_modules() if type(part) is Block and "forward" not in part.__dict__}
    beside = [part for path in {name.rpartition(".")[0] for name in blocks} | {"blocks"} for part in _children(model, path)]
    others = {type(part).__name__ for part in beside if part not in blocks.values()}
    if not blocks or others:
        found = f"{kind} with blocks {sorted(others)}" if others else f"{kind}, which has no such block"
        raise UnsupportedAdapterTarget(f"adapters: a {found}, must have {SUPPORTED}")
    return blocks


def _children(model: nn.Module, path: str) -> list[nn.Module]:
    """Of the module of this name, where there is one."""
    return list(dict(model.named_modules()).get(path, nn.Module()).children()) if path else []


def _width(block: nn.Module) -> int:
    """Of the tokens."""
    return int(block.attn.proj.out_features)  # type: ignore[union-attr, arg-type]
