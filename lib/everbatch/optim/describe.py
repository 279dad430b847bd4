"""What a composed optimizer does in a step, and what it costs, as text."""

from __future__ import annotations

from everbatch.contract import base_of, parts_of
from everbatch.objective.terms import texts
from everbatch.optim.composed import Composed

__all__ = ["describe"]


def describe(opt: Composed) -> str:
    """Order of the parts by verb, the objective, passes, bytes per owned master element and collectives, per step."""
    cls, costs = type(opt), opt.costs()
    parts, base = parts_of(cls), base_of(cls)
    assert base is not None
    lines = [f"{cls.__name__} = {' > '.join([*(p.__name__ for p in parts), base.__name__])} on {opt.host.title}, "
             f"{opt.host.world} rank{'s' * (opt.host.world > 1)}"]
    for verb in cls.verbs:
        acting = [p.__name__ for p in parts if verb in vars(p)]
        if acting:
            wraps = verb in ("estimate_gradient", "update")
            order = " around ".join(acting) if wraps else ", then ".join(reversed(acting))
            lines.append(f"  {verb:<18} {order}")
    calls = [p.__name__ for p in parts if not any(v in vars(p) for v in cls.verbs)]
    if calls:
        lines.append(f"  {'called by you':<18} {', '.join(calls)}")
    for part in parts:
        config = opt.configs.get(part)
        if config is not None:
            lines.append(f"  {part.__name__:<18} {config!r}".replace(f"{part.__name__}.Config", "").rstrip())
    lines.append(f"  {'objective':<18} L = {' + '.join(['loss', *texts(opt)])}")
    extra = opt.extra_passes()
    state, transient = sum(c.state_bytes for c in costs.values()), sum(c.transient_bytes for c in costs.values())
    scalars = (1 + sum(c.scalar_reductions for c in costs.values())) if opt.host.sharded else int(opt.host.agrees)
    lines.append(f"  passes per step    {1 + extra:g}")
    lines.append(f"  bytes per element  {state:g} kept, {transient:g} inside the step (of the masters this rank owns)")
    lines.append(f"  collectives        {scalars:g} all-reduces of scalars; each of the {extra:g} extra passes: "
                 f"{opt.host.pass_cost}")
    lines += [f"  note               {c.note}" for c in costs.values() if c.note]
    return "\n".join(lines)
