"""GRIP: unlearning that leaves the routing of what is retained as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from everbatch import seeds
from everbatch.contract import Cost, Made
from everbatch.errors import check
from everbatch.optim.memory.replica import require_replica
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.subspace.maps import averages_after
from everbatch.optim.subspace.options import GripOptions
from everbatch.optim.subspace.retained import Retained, router_names, tokens_of
from everbatch.optim.subspace.visits import Rows

__all__ = ["GRIP"]


def _example(factory: Callable[[], nn.Module]) -> dict[str, Any]:
    """The last matrix is a router of five experts; half of the margins bind at once."""
    name, weight = [(n, w) for n, w in factory().named_parameters() if w.ndim == 2][-1]
    tokens = seeds.normal(("example", "tokens"), 0, 12 * weight.shape[1]).view(12, -1)
    return {"routers": (name,), "retained": {name: tokens}, "eps_margin": 0.3}


class GRIP(OptimizerMixin):
    """GRIP: routers of experts move only so that every retained token keeps its experts; unlearning must act in the experts.

        D_j: the change of row j of a router since `retain_routing`;  I(n): the top k experts of token n then
        D_j . x_n = 0 in the span of the tokens sent to j;      D_j . x_n <= tau_jn - eps_margin  for n not sent to j
        tau_jn = min over i in I(n) of theta_i . x_n  -  theta_j . x_n

    mode="A" sets D so after every update, whatever the base (see `constrained`). It holds for the tokens as they were: where
    layers below move them, call `refresh_routing` with the same batches every some steps. mode="B" leaves training alone and
    fits the routers afterwards: `correct_routing`. `routing_stability(batches)` is the mean of |I_then and I_now| / k.

    Args (Config): see the fields. Raises `ValueError` for a pattern that matches no trained matrix. A router's trained bias,
    which would move all scores, is put back.

    Cost: of a step, E n d multiply-adds per router of n tokens and one host sync; one all-reduce of the routers where weights
    are sharded. Kept: n (d + E) + E d (k + 1) numbers per router on every rank. In a call, a forward pass per row.
    Order: as SubspaceProjection, beside which it cannot stand. `metrics` has "grip_residual", the worst excess over a bound, and
    "grip_free", the share of directions in which a router may move.
    Source: Zhu et al. 2026, arXiv 2601.16905. Differs: a share of each expert's energy in place of an absolute singular value;
    Kaczmarz within the null space, where theirs alternates; a margin below eps_margin may not shrink; a refresh fits first.
    """

    owns = ("projection",)
    left_of = ("trust ratio",)
    minimizes = False
    in_code = "what it retains comes by a call, with samples"
    example = Made(_example)
    off = Made(lambda factory: {**_example(factory), "strength": 0.0})
    search = {"delta": (0.999, 0.99, 1.0), "eps_margin": (1e-2, 1e-1)}

    @dataclass(frozen=True, kw_only=True)
    class Config(GripOptions):
        __doc__ = GripOptions.__doc__

    State = Retained

    def on_attach(self) -> None:
        """Find the routers, and retain what is given."""
        averages_after(type(self), "GRIP", "update")
        config = self.configs[GRIP]
        router_names(self.host, config)
        if config.retained is not None:
            self.retain_routing(inputs=config.retained)
        elif config.strength:
            require_replica(self.host, config.factory, "GRIP")

    def retain_routing(
        self, batches: Iterable[Rows] | None = None, *, inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take the present routing of these samples as what is to stay. Between two steps, before unlearning. Collective.

        Args:
            batches: this rank's rows of retained data, of which the inputs are used; here and below.
            inputs: in their place the tokens (n, d) of each router by name, the same on every rank.
        """
        config, state = self.configs[GRIP], self.states[GRIP]
        state.take(self.host, config, tokens_of(self.host, config, batches, inputs))

    def refresh_routing(self, batches: Iterable[Rows]) -> None:
        """Fit the routers to the same batches' tokens as they are now, as `correct_routing` does, and hold the routing of before
        from there on. Between two steps. Collective."""
        config, state = self.configs[GRIP], self.states[GRIP]
        tokens = tokens_of(self.host, config, batches)
        state.correct(self.host, config, tokens)
        state.take(self.host, config, tokens, again=True)

    def routing_stability(self, batches: Iterable[Rows]) -> float:
        """Mean of |I_then and I_now| / k over the routers and their tokens. Collective."""
        config, state = self.configs[GRIP], self.states[GRIP]
        return float(state.unchanged(self.host, config, tokens_of(self.host, config, batches)))

    def correct_routing(self, batches: Iterable[Rows]) -> dict[str, float]:
        """Mode "B", after unlearning: fit the routers so that tokens have the scores they had. Returns the cosine of scores
        then and now by router; below `accept_cosine` one is left as it is, with a warning. Collective."""
        config, state = self.configs[GRIP], self.states[GRIP]
        check(config.mode == "B", "GRIP", "correct_routing() in mode 'A'", "be in mode 'B'", "mode 'A' needs no correction")
        return dict(state.correct(self.host, config, tokens_of(self.host, config, batches)))

    def edit_parameters(self) -> None:
        """Hold the routers, in mode "A"."""
        super().edit_parameters()
        config, state = self.configs[GRIP], self.states[GRIP]
        if config.mode == "A" and config.strength and state.kept:
            self.metrics |= state.hold(self.host, config, self.seed, self.step_count)

    def cost(self) -> Cost:
        """Depends on what is retained."""
        return Cost(note="GRIP: routers are held, gathered where sharded")
