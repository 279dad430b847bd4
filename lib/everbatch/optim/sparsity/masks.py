"""The masks at work: which layers have one, where it comes from, and what it does to gradients,
moves and weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from everbatch.engines.host import Host
from everbatch.engines.named import ByName
from everbatch.engines.shards import Shard, Vector
from everbatch.errors import check, nearest
from everbatch.optim.sparsity.agreement import digest, verify
from everbatch.optim.sparsity.densities import draw_mask, exact_counts, layer_densities
from everbatch.optim.sparsity.layers import maskable
from everbatch.optim.sparsity.options import WHO, Kept, Options

__all__ = ["Masks"]


class Masks:
    """Layers, their counts, and what is made of the masks for a step. The masks themselves are
    saved, so they are in `Kept`.

    Args:
        options: of `DynamicSparsity`.
        host: its host, asked once for shapes and layers.
        seed: root of the first masks and of those of later tasks.
    """

    def __init__(self, options: Options, host: Host, seed: int) -> None:
        self.options, self.seed = options, seed
        layout = {name: tuple(shape) for name, (_, shape) in host.master_layout().items()}
        self.shapes = maskable(layout, host.module, include=options.include, exclude=options.exclude)
        self.plan = layer_densities(
            self.shapes, options.density, distribution=options.distribution, power=options.erk_power,
            first_dense=options.first_dense, own=options.densities)
        self.counts = exact_counts(self.shapes, self.plan, min_fan_in=options.min_fan_in)
        self.told: set[str] = set()
        """What a user has been warned of."""

        # Made of masks when first asked for; each is held beside the masks that it was made of.
        self._factors: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._frozen: dict[str, tuple[Tensor, tuple[Tensor, ...], Tensor]] = {}
        self._whole: tuple[ByName, dict[str, Tensor]] | None = None
        self._used: tuple[ByName, int, dict[str, Tensor]] | None = None

    # --------------------------------------------------------------------------------------- layers
    def size(self, name: str) -> int:
        """Entries of a whole layer."""
        return int(torch.Size(self.shapes[name]).numel())

    def sparse(self) -> list[str]:
        """Layers that are not left dense."""
        return [name for name in self.shapes if self.counts[name] < self.size(name)]

    def shards(self, host: Host, kept: Kept) -> list[Shard]:
        """This rank's slices that have a mask."""
        return [shard for shard in host.shards if shard.name in kept.masks]

    def slice_of(self, shard: Shard, whole: Tensor) -> Tensor:
        """This rank's slice of a whole mask: a copy."""
        data = shard.data
        part = whole.reshape(-1)[shard.start : shard.start + data.numel()]
        return part.to(data.device).view(data.shape).clone()

    # ------------------------------------------------------------------------ where masks come from
    def draw(self, host: Host, task: int, names: list[str]) -> dict[str, Tensor]:
        """This rank's slices of fresh random masks of these layers: a function of (seed, task,
        name)."""
        options, result = self.options, {}
        for shard in host.shards:
            name = shard.name
            if name in names:
                whole = draw_mask(
                    self.shapes[name], self.counts[name], (self.seed, "mask", task, name),
                    density=self.plan[name] if options.bernoulli else None, min_fan_in=options.min_fan_in)
                result[name] = self.slice_of(shard, whole)
        return result

    def given(self, host: Host, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's slices of whole masks that a user gives."""
        return {s.name: self.slice_of(s, masks[s.name]) for s in host.shards if s.name in masks}

    def check(self, masks: Mapping[str, Tensor]) -> None:
        """Refuse whole masks that do not fit."""
        odd = [n for n in masks if n not in self.shapes]
        check(not odd, WHO, f"masks of {odd[:5]}", "be of masked layers", nearest(odd[0], self.shapes) if odd else "")
        odd = [n for n, m in masks.items() if tuple(m.shape) != self.shapes[n]]
        check(not odd, WHO, f"masks of {odd[:5]} have shapes {[tuple(masks[n].shape) for n in odd[:5]]}",
              f"have the weights' shapes {[self.shapes[n] for n in odd[:5]]}")
        odd = [n for n, m in masks.items() if m.dtype != torch.bool or not bool(m.any())]
        check(not odd, WHO, f"masks of {odd[:5]}", "be bool tensors with an active entry")

    @torch.no_grad()
    def install(
        self, host: Host, kept: Kept, masks: Mapping[str, Tensor], who: str, names: list[str] | None = None,
    ) -> None:
        """Take masks (slices) as they are, and zero the weights and moments that they leave out.

        Args:
            who: the optimizer, for the error of ranks that differ.
            names: the layers that are masked from here on; None: those that are, and those that are
                not left dense.

        Collective where weights are sharded.
        """
        layers = names or [n for n in self.shapes if n in kept.active or self.counts[n] < self.size(n)]
        kept.masks = ByName({**kept.masks, **masks})
        kept.scores = ByName()
        if self.options.grow == "random_unfired":
            kept.fired = ByName({n: m.clone() for n, m in kept.masks.items()})
        found = digest(self.shards(host, kept), kept.masks, layers, host.device)
        kept.active = verify(host, who, found, layers)
        self.enforce(host, kept, moments=True)
        host.publish_if_dirty()

    # ------------------------------------------------------------------------- what ended tasks use
    def used(self, kept: Kept) -> dict[str, Tensor] | None:
        """Entries that ended tasks use, by name; None before the first has ended."""
        if not kept.done:
            return None
        last = kept.task_masks[-1]
        if self._used is None or self._used[0] is not last or self._used[1] != kept.done:
            union = {n: m.bool() for n, m in kept.task_masks[0].items()}
            for later in kept.task_masks[1:]:
                union = {n: m | later[n] for n, m in union.items()}
            self._used = (last, kept.done, union)
        return self._used[2]

    def stored(self, kept: Kept, shard: Shard) -> Tensor | None:
        """Values with which entries of earlier tasks become active; zero elsewhere."""
        used = self.used(kept)
        if used is None or self.options.as_released:
            return None
        return torch.where(used[shard.name], kept.store[shard.name], torch.zeros_like(shard.data))

    # -------------------------------------------------------------------------------- masks at work
    def mask_gradient_(self, shards: Iterable[Shard], gradients: Iterable[Tensor], kept: Kept) -> None:
        """Zero what masks leave out in the gradients of these shards, and what is frozen."""
        used, kind = self.used(kept), "gradient"
        if self.options.dense_moments:
            if used is None:
                return
            kind = "frozen"
        for shard, gradient in zip(shards, gradients, strict=True):
            gradient.mul_(self._factor(kept, shard.name, gradient.dtype, kind, used))

    def of_move(self, vector: Vector, host: Host, kept: Kept) -> list[Tensor | None]:
        """Factors of a displacement that leave out what masks do, and what is frozen.

        Its slices are this rank's, or whole tensors where a rank moves its own copy of the weights.
        """
        used = self.used(kept)
        whole = vector.host is not host and host.sharded
        masks = self._whole_masks(host, kept, used) if whole else kept.masks
        factors: list[Tensor | None] = []
        for shard in vector.shards:
            if shard.name not in masks:
                factors.append(None)
            elif whole:
                factors.append(masks[shard.name])
            else:
                factors.append(self._factor(kept, shard.name, shard.owner.dtype, "gradient", used))
        return factors

    def _whole_masks(self, host: Host, kept: Kept, used: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Whole masks without frozen entries, gathered once for each change."""
        if self._whole is None or self._whole[0] is not kept.masks:
            held = []
            for shard in self.shards(host, kept):
                mask = kept.masks[shard.name]
                held.append((shard, mask if used is None else mask & ~used[shard.name]))
            names = list(kept.active)
            whole = host.gather(held, names, dict.fromkeys(names, torch.bool))
            self._whole = (kept.masks, whole)
        return self._whole[1]

    def _factor(self, kept: Kept, name: str, dtype: torch.dtype, kind: str, used: dict[str, Tensor] | None) -> Tensor:
        """What to multiply with: the mask without frozen entries for "gradient", all but those for
        "frozen". A factor of the gradient's type on CPU, where torch multiplies by bytes six times
        slower."""
        mask, made = kept.masks[name], self._factors.get((name, kind))
        if made is None or made[0] is not mask or made[1].dtype not in (dtype, torch.bool):
            value = mask
            if used is not None:
                value = ~used[name] if kind == "frozen" else mask & ~used[name]
            made = self._factors[name, kind] = (mask, value if mask.is_cuda else value.to(dtype))
        return made[1]

    @torch.no_grad()
    def enforce(self, host: Host, kept: Kept, *, moments: bool = False) -> None:
        """Zero what masks leave out in the weights, and with `moments` in the base's state; put
        frozen weights back."""
        for shard in self.shards(host, kept):
            off = ~kept.masks[shard.name]
            shard.data.masked_fill_(off, 0.0)
            for moment in shard.moments.values() if moments else ():
                moment.masked_fill_(off, 0.0)
        self.thaw(host, kept)
        host.touch()

    def thaw(self, host: Host, kept: Kept) -> None:
        """Copy stored values back into the active weights that earlier tasks use: exact under any
        decay or momentum."""
        used = self.used(kept)
        if used is None or not kept.task or self.options.as_released:
            return
        for shard in self.shards(host, kept):
            name, mask = shard.name, kept.masks[shard.name]
            made = self._frozen.get(name)
            if made is None or made[0] is not mask:
                at = (mask & used[name]).nonzero(as_tuple=True)
                made = self._frozen[name] = (mask, at, kept.store[name][at])
            shard.data[made[1]] = made[2]
        host.touch()
