"""Which case runs on which host, and when: in every round, in turn, or with the wide matrix.

Each run has eight cases on two of four hosts each, all four in two runs; half of the others on one of them; and every other
host with one case, in turn; the checks about hosts as well. `--wide` adds, in turn, the rest of the matrix.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import hosts
from cases import BF16, BY_CASE, CASES, DEEPSPEED, FORKED, FP32, MIX, PAIRS, UNREACHED, Case

from rotation import Round, When

CORE = ("SAM", "ClipGradNorm", "EMA", "ShrinkPerturb", "ShrinkPerturb(fresh_init)", "ClipGradNorm+SAM", MIX,
        "EMA+ShrinkPerturb+SAM")
"""Cases that run on half of FEW in every round, on all of it in two."""
MOVED = tuple(name for name in CORE if "+" in name)
"""Of them, those that move to other hosts; the last also over AdamW."""
FEW = ("ddp", "fsdp2", "zero2", "zero3")
HALF = ("zero0-bf16", "zero2-bf16-offload", "zero3-bf16-fp32acc")
"""Hosts in bf16 without --wide."""
RING = [(FP32[i - 4], FP32[i]) for i in range(len(FP32))]
"""Moves between hosts four apart: another engine and, mostly, another stage."""
ACROSS = (("zero3", "fsdp2"), ("ddp", "zero2"))
"""Moves of the cases outside the core."""
HALVES, TURNS, LONG_TURNS, WIDE_TURNS = 2, 4, 8, 16
"""Rounds after which everything has run: cases of the core on FEW; other numbers of ranks; what else the default plan has, the
other cases on FEW among it; and the wide one."""

LIFE = ("absent", "parity", "resume", "skipped")
HOST_CHECKS = ("restore", "residue", "interrupted", "collectives", "accumulation", "dropout", "statistics", "skipped_buffers",
               "tiny", "forks")

Life = tuple[str, str, str]
"""Host, case, base: through LIFE, and saved for moves."""
Move = tuple[str, str, str, str]
"""Source, host, case, base: saved by two ranks at the source, loaded here."""


@dataclass
class Plan:
    """What a launch of the worker does, or may do, and when."""

    lives: dict[Life, When] = field(default_factory=dict)
    moves: dict[Move, When] = field(default_factory=dict)
    hosts: dict[str, When] = field(default_factory=dict)
    """Hosts that go through HOST_CHECKS."""

    def now(self, round: Round, *, wide: bool) -> Plan:
        """What is due, of the default plan or of what `wide` adds to it."""
        def kept(part: dict[Any, When]) -> dict[Any, When]:
            return {key: when for key, when in part.items() if when.slow == wide and when.due(round)}

        return Plan(kept(self.lives), kept(self.moves), kept(self.hosts))

    def keys(self) -> Iterator[tuple[str, When]]:
        """Every check/host/case that this plan promises."""
        for (host, case, base), when in self.lives.items():
            for check in LIFE:
                if not (check == "absent" and hosts.BY_NAME[host].bf16):
                    yield f"{check}/{host}/{case}-{base}", when
        for (source, host, case, base), when in self.moves.items():
            yield f"moved from {source}/{host}/{case}-{base}", when
        for host, when in self.hosts.items():
            for check in HOST_CHECKS:
                if check != "forks" or hosts.BY_NAME[host].stage < 3:
                    yield f"{check}/{host}/{MIX}-sgd", when
            if host in DEEPSPEED:
                yield f"self_check/{host}/SAM-sgd", when


@functools.cache
def plan(world: int) -> Plan:
    """Everything that so many ranks do: two carry the matrix; one and three show what else the world size may be."""
    return {1: _one, 2: _two, 3: _three}[world]()


def _two() -> Plan:
    made = Plan()
    _default_lives(made.lives)
    _wide_lives(made.lives)
    wanted = [(s, h, case, "sgd", False) for s, h in RING for case in MOVED]
    wanted += [(s, h, MOVED[-1], "adamw", False) for s, h in RING]
    wanted += [(s, h, case, base, base == "sgd") for s, h in RING for case, base in UNREACHED]
    others = [c for c in CASES if c.name not in CORE]
    wanted += [(s, h, c.name, c.bases[0], False) for s, h in ACROSS for c in others]
    wanted += [(s, h, c.name, c.bases[0], True) for s, h in RING for c in CASES if c.name not in MOVED]
    for place, (source, host, case, base, wide) in enumerate(wanted):
        made.moves.setdefault((source, host, case, base), _follow(made.lives[source, case, base], place, wide))
    for place, host in enumerate((*FP32, *HALF)):
        made.hosts[host] = When(FEW.index(host), HALVES) if host in FEW else When(place, LONG_TURNS)
    for place, host in enumerate(h for h in BF16 if h not in HALF):
        made.hosts[host] = When(place, WIDE_TURNS, slow=True)
    return made


def _default_lives(lives: dict[Life, When]) -> None:
    for case, host in itertools.product(CORE, FP32):
        columns, turns = (FEW, HALVES) if host in FEW else (FP32, LONG_TURNS)
        lives[host, case, BY_CASE[case].bases[0]] = _shifted(CORE, case, columns, host, turns)
    others = [c.name for c in CASES if c.name not in CORE]
    for case, host in itertools.product(others, FEW):
        # Neighbours in other rounds, and a case on one host after the other: four rounds of eight have it.
        place = others.index(case) + LONG_TURNS // len(FEW) * FEW.index(host)
        lives[host, case, BY_CASE[case].bases[0]] = When(place % LONG_TURNS, LONG_TURNS)
    more = [(MIX, "adamw"), (MOVED[-1], "adamw"), *UNREACHED]
    for (case, base), host in itertools.product(more, FP32):
        lives[host, case, base] = _shifted(more, (case, base), FP32, host, LONG_TURNS)
    for place, host in enumerate(HALF):
        lives[host, MIX, "sgd"] = When(place, HALVES)


def _wide_lives(lives: dict[Life, When]) -> None:
    rest = [(h, c.name, c.bases[0]) for h in FP32 for c in CASES]
    rest += [(h, c.name, "adamw") for h in FP32 for c in CASES if "adamw" in c.bases[1:]]
    rest += [(h, c.name, base) for h in FP32 for c in FORKED for base in c.bases]
    rest += [(h, c.name, c.bases[0]) for h in BF16 for c in CASES + FORKED]
    hosts_in_turn = itertools.cycle(FP32[1:])  # each pair on two, so that every host meets every mixin
    rest += [(next(hosts_in_turn), p.name, p.bases[0]) for p in PAIRS.values() if isinstance(p, Case) for _ in range(2)]
    for place, life in enumerate(rest):
        lives.setdefault(life, When(place, WIDE_TURNS, slow=True))


def _three() -> Plan:
    made = Plan()
    for place, host in enumerate(("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3", "zero3-persistent")):
        made.lives[host, MIX, "sgd"] = When(place, TURNS)
    for place, (host, case) in enumerate(itertools.product(FP32[1:], CASES)):
        made.lives.setdefault((host, case.name, case.bases[0]), When(place, WIDE_TURNS, slow=True))
    _arrivals(made, [("zero3", "zero1"), ("ddp", "zero3"), ("zero1", "fsdp2")], [(MIX, "sgd")])
    for place, host in enumerate(("ddp", "fsdp2", "zero1", "zero3")):
        made.hosts[host] = When(place, TURNS)
    return made


def _one() -> Plan:
    made = Plan()
    for place, host in enumerate(("plain", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")):
        made.lives[host, MIX, "sgd"] = When(place, TURNS)
    routes = [("zero3", "plain"), ("ddp", "zero2"), ("zero2-offload", "zero3"), ("fsdp2", "ddp")]
    _arrivals(made, routes, [(MIX, "sgd"), (MOVED[-1], "adamw")])
    return made


def _arrivals(made: Plan, routes: list[tuple[str, str]], cases: list[tuple[str, str]]) -> None:
    """Moves from two ranks to another number of them."""
    saved = plan(2).lives
    for place, ((source, host), (case, base)) in enumerate(itertools.product(routes, cases)):
        made.moves[source, host, case, base] = _follow(saved[source, case, base], place, wide=False)


def _follow(source: When, place: int, wide: bool) -> When:
    """When a move may run: with the life that saves what it loads, or in turn where that one always runs."""
    wide = wide or source.slow
    if source.turns > 1:
        return When(source.place, source.turns, wide)
    return When(place, WIDE_TURNS if wide else TURNS, wide)


def _shifted(rows: Sequence[Any], row: Any, columns: Sequence[str], column: str, turns: int) -> When:
    """Turns along the diagonals of a table, so that a round has something of every row and column."""
    return When((rows.index(row) + columns.index(column)) % turns, turns)
