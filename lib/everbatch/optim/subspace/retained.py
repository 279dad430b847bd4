"""The routing that GRIP retains: tokens of every router, the experts they were sent to, and what holds them there."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from everbatch import seeds
from everbatch.distributed import World
from everbatch.engines.host import Host
from everbatch.engines.named import Whole
from everbatch.errors import check
from everbatch.optim.subspace.maps import agreed, gathered
from everbatch.optim.subspace.options import GripOptions
from everbatch.optim.subspace.routing import (
    bounds,
    constrained,
    corrected,
    equality_bases,
    free_squares,
    margins,
    routed,
    stability,
)
from everbatch.optim.subspace.visits import Rows, chosen, visit

__all__ = ["Retained", "router_names", "tokens_of"]


def router_names(host: Host, options: GripOptions) -> list[str]:
    """The trained matrices that are routers.

    Raises:
        ValueError: a pattern without a match, fewer experts than `top_k`.
    """
    layout = host.master_layout()
    matrices = [name for name, (_, shape) in layout.items() if len(shape) == 2]
    names = chosen("GRIP", matrices, "routers", options.routers)
    for name in names:
        experts = layout[name][1][0]
        check(experts >= options.top_k, "GRIP", f"top_k={options.top_k} of the {experts} experts of {name}", "be at most as many")
    return names


def _bias_of(name: str) -> str:
    """The name of the bias beside a router's matrix."""
    return f"{name.rpartition('.')[0]}.bias"


def tokens_of(
    host: Host, options: GripOptions, batches: Iterable[Rows] | None, given: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Tokens (n, d) of every router, the same on every rank: those given, or seen while the model runs. Collective.

    Raises:
        ValueError: on every rank: both or neither; names or widths that do not fit; no tokens, or some that are not finite.
    """
    check((batches is None) != (given is None), "GRIP", "both or neither of batches and inputs", "be exactly one")
    names = router_names(host, options)
    if given is not None:
        odd = sorted(set(names) ^ set(given))
        check(not odd, "GRIP", f"inputs of {odd[:3]} are missing or too much", f"name the routers {names[:3]}")
        found = {name: given[name].detach().to(host.device) for name in names}
    else:
        assert batches is not None
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        visit(host, names, batches, options.factory, "GRIP", lambda name, x, _: seen[name].append(x))
        found = {name: _together(host, seen[name], host.master_layout()[name][1][1], options.tokens) for name in names}
    for name, x in found.items():
        width = host.master_layout()[name][1][1]
        check(x.dim() == 2 and x.shape[1] == width and len(x) > 0, "GRIP", f"tokens of {name} of shape {tuple(x.shape)}",
              f"be (n, {width}), n > 0")
        check(bool(torch.isfinite(x).all()), "GRIP", f"tokens of {name} that are not finite", "be finite",
              "look at the layers below it")
    return found


def _together(host: Host, seen: list[Tensor], width: int, most: int) -> Tensor:
    """Rows of all ranks, in rank order, thinned evenly to `most`."""
    mine = torch.cat(seen) if seen else torch.zeros(0, width, device=host.device)
    world = World.current() if host.title != "plain" else World()
    room = max(1, most // world.size)
    if len(mine) > room:
        mine = mine[torch.linspace(0, len(mine) - 1, room, device=mine.device).round().long()]
    counts = [int(str(n)) for n in world.gather(len(mine))]
    rows = torch.zeros(sum(counts), width, dtype=mine.dtype, device=host.device)
    start = sum(counts[: world.rank])
    rows[start : start + len(mine)] = mine
    return world.sum(rows)


@dataclass(eq=False)
class _Held:
    """Of one router, what a step needs."""

    x: Tensor
    router: Tensor
    bias: Tensor
    basis: Tensor
    bound: Tensor
    free: Tensor
    room: Tensor
    """Share of the directions that are in no basis, over its rows."""


@dataclass
class Retained:
    """State of GRIP."""

    kept: Whole = field(default_factory=Whole)
    """By "router/part": inputs (n, d), selected (n, E), router (E, d), bias (E,) and basis (E, d, k). Replaced, never edited."""

    def __post_init__(self) -> None:
        self._known: tuple[Whole, dict[str, _Held]] | None = None

    def selected(self) -> dict[str, Tensor]:
        """Which experts each token was sent to, by router."""
        end = "/selected"
        return {key.removesuffix(end): t.bool() for key, t in self.kept.items() if key.endswith(end)}

    @torch.no_grad()
    def take(self, host: Host, options: GripOptions, tokens: Mapping[str, Tensor], *, again: bool = False) -> None:
        """Retain the routing of these tokens: as it is, or, of the same tokens `again`, as it was. Collective."""
        routers = _routers(host, tokens)
        before, found = self.selected() if again else {}, dict[str, Tensor]()
        for name, given in tokens.items():
            theta, bias = routers[name]
            x = given.to(theta)
            selected = before[name] if name in before else routed(x @ theta.T + bias, options.top_k)
            found |= {f"{name}/inputs": x, f"{name}/selected": selected.to(torch.uint8), f"{name}/router": theta,
                      f"{name}/bias": bias, f"{name}/basis": equality_bases(x, selected, options.delta)}
        self.kept = Whole(agreed(host, None, found)[1])

    def unchanged(self, host: Host, options: GripOptions, tokens: Mapping[str, Tensor]) -> float:
        """Mean stability of the routers for the same tokens as they are now. Collective."""
        check(bool(self.kept), "GRIP", "no retained routing", "be retained first", "call retain_routing(batches)")
        routers, shares = _routers(host, tokens), []
        for name, was in self.selected().items():
            theta, bias = routers[name]
            now = tokens[name].to(theta)
            check(len(now) == len(was), "GRIP", f"{len(now)} tokens of {name} where {len(was)} were retained",
                  "be those of the same batches")
            shares.append(float(stability(was, routed(now @ theta.T + bias, options.top_k))))
        return sum(shares) / len(shares)

    @torch.no_grad()
    def hold(self, host: Host, options: GripOptions, seed: int, step: int) -> dict[str, Tensor]:
        """Put the routers' changes back where routing stays. Collective where sharded.

        Returns:
            "grip_residual", what is still beyond a bound at worst, and "grip_free", the share of directions in which rows may
            move, of the router with the fewest: 0 where the retained tokens span all, which freezes it.
        """
        layout = host.master_layout()  # a router may have been frozen since
        held = {name: kept for name, kept in self._held(options.eps_margin).items() if name in layout}
        worst, new = [], dict[str, Tensor]()
        now = gathered(host, list(held), {s.name: (s, s.data) for s in host.shards if s.name in held})
        for name, theta in now.items():
            kept = held[name]
            draws = seeds.generator(seed, "grip", name, step)
            change, over = constrained(theta - kept.router, kept.basis, kept.x, kept.bound, kept.free,
                                       options.kaczmarz_iters, draws)
            new[name] = kept.router + change
            new[_bias_of(name)] = kept.bias
            worst.append(over)
        _write(host, new, options.strength)
        if not held:
            return {}
        free = torch.stack([kept.room for kept in held.values()]).amin()
        return {"grip_residual": torch.stack([over.float() for over in worst]).amax(), "grip_free": free}

    def _held(self, least: float) -> dict[str, _Held]:
        if self._known is None or self._known[0] is not self.kept:  # taken anew, or loaded
            found = {}
            for name, selected in self.selected().items():
                x, basis = self.kept[f"{name}/inputs"], self.kept[f"{name}/basis"]
                router, bias = self.kept[f"{name}/router"], self.kept[f"{name}/bias"]
                bound = bounds(margins(x @ router.T + bias, selected), least)
                room = 1.0 - basis.square().sum((1, 2)).mean() / x.shape[1]
                found[name] = _Held(x, router, bias, basis, bound, free_squares(x, basis), room.float())
            self._known = self.kept, found
        return self._known[1]

    @torch.no_grad()
    def correct(self, host: Host, options: GripOptions, tokens: Mapping[str, Tensor]) -> dict[str, float]:
        """Fit the routers to the same tokens as they are now; the cosine of scores by name. Collective."""
        check(bool(self.kept), "GRIP", "no retained routing", "be retained first", "call retain_routing(batches)")
        cosines, new = dict[str, float](), dict[str, Tensor]()
        for name in self.selected():
            x, router = self.kept[f"{name}/inputs"], self.kept[f"{name}/router"]
            check(len(tokens[name]) == len(x), "GRIP", f"{len(tokens[name])} tokens of {name} where {len(x)} were retained",
                  "be those of the same batches")
            found, cosines[name] = corrected(router, x, tokens[name].to(router), options.ridge)
            if cosines[name] >= options.accept_cosine:
                new[name], new[_bias_of(name)] = found, self.kept[f"{name}/bias"]
            else:
                warnings.warn(f"GRIP: {name} is left as it is: corrected scores have a cosine of {cosines[name]:.3f} with those "
                              f"of before, must be at least {options.accept_cosine:g}", stacklevel=4)
        _write(host, new)
        host.publish_if_dirty()
        return cosines


def _routers(host: Host, names: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Routers and biases, whole; zeros where none is trained. Collective where sharded."""
    layout = host.master_layout()
    wanted = [n for name in names for n in (name, _bias_of(name)) if n in layout]
    whole = host.gather(list(host.weights()), wanted)
    result = {}
    for name in names:
        bias = whole.get(_bias_of(name))
        result[name] = whole[name], whole[name].new_zeros(len(whole[name])) if bias is None else bias
    return result


def _write(host: Host, new: Mapping[str, Tensor], strength: float = 1.0) -> None:
    """Take whole tensors as masters, or go a share of the way there: this rank's slices of them."""
    for s in host.shards:
        if s.name in new:
            mine = new[s.name].reshape(-1)[s.start : s.start + s.numel].view(s.data.shape).to(s.data)
            s.data.copy_(mine if strength == 1.0 else torch.lerp(s.data, mine, strength))
    if new:
        host.touch()
