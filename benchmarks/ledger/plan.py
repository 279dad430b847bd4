"""Which cells a claim has: those that tune, then those that are compared."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.ledger.cells import Cell, Damaged, Store
from benchmarks.ledger.claim import Claim
from benchmarks.ledger.samples import prepare
from everbatch import config
from everbatch.errors import check, check_whole
from everbatch.report.recorder import write_json

__all__ = ["Plan", "Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What of a claim is run."""

    scale: Any
    arms: tuple[str, ...]
    """Those that are run; the verdict wants all that the rule names."""
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, claim: Claim, options: Mapping[str, Any] | None = None, *, seeds: int | None = None,
           arms: Sequence[str] | None = None) -> Settings:
        """The claim's own, with what is asked for.

        Raises:
            ValueError: an option that the claim's scale lacks, or an arm that it has not.
        """
        scale = config.build(type(claim.scale), dict(options or {}), base=claim.scale)
        claim.check_arms(scale)
        known = claim.arms_of(scale)
        for name in arms or ():
            check(name in known, claim.title, f"arm {name!r}", f"be one of {', '.join(known)}")
        check_whole(claim.title, "seeds", claim.seeds if seeds is None else seeds, 1)
        return cls(scale=scale, arms=tuple(arms or known), seeds=tuple(range(claim.seeds if seeds is None else seeds)))


@dataclass
class Plan:
    """The cells of a claim at given settings, and what is known of them."""

    name: str
    claim: Claim
    settings: Settings
    store: Store
    data: str = ""
    damaged: list[str] = field(default_factory=list)
    """What could not be read when it was last looked at."""

    @classmethod
    def of(cls, name: str, claim: Claim, settings: Settings, store: Store) -> Plan:
        """Opens the data, for its hash."""
        source = getattr(settings.scale, "data", None)
        size = getattr(settings.scale, "image_size", None)
        return cls(name, claim, settings, store, "" if source is None else prepare(source, size, store.home))

    @property
    def folder(self) -> Path:
        """Of the claim's report and settings."""
        return self.store.home / self.name

    def save(self) -> None:
        """Keep what was asked for, for `report`."""
        write_json(self.folder / "settings.json", {
            "scale": config.resolved(self.settings.scale), "arms": list(self.settings.arms), "seeds": len(self.settings.seeds)})

    @classmethod
    def saved(cls, name: str, claim: Claim, store: Store) -> Plan | None:
        """As it was last run; None for never.

        Raises:
            ValueError: a run whose options the claim has not any more, or whose samples are gone.
        """
        path = store.home / name / "settings.json"
        if claim.needs or not path.exists():
            return None
        kept = json.loads(path.read_text())
        settings = Settings.of(claim, kept["scale"], seeds=kept["seeds"], arms=kept["arms"])
        return cls.of(name, claim, settings, store)

    # ---------------------------------------------------------------------------------------------------------------- cells
    def tuning(self) -> list[Cell]:
        """Cells that choose an option; none where nothing is tuned."""
        tuning = self.claim.tuning
        if tuning is None:
            return []
        seeds = range(tuning.first_seed, tuning.first_seed + tuning.seeds)
        arms = [arm for arm in tuning.arms if arm in self.settings.arms]
        return [self._tuned(arm, value, seed) for seed in seeds for arm in arms for value in tuning.values_of(arm)]

    def _tuned(self, arm: str, value: float, seed: int) -> Cell:
        assert self.claim.tuning is not None
        return self._cell(arm, seed, {self.claim.tuning.option: value}, held_out=True)

    def compared(self) -> list[Cell] | None:
        """Cells of the comparison, seed by seed, so that the load of the machine meets all arms alike; None before all
        that tune are there."""
        chosen = self.chosen()
        if chosen is None:
            return None
        return [self._cell(arm, seed, chosen.get(arm, {})) for seed in self.settings.seeds for arm in self.settings.arms]

    def _cell(self, arm: str, seed: int, more: Mapping[str, Any], *, held_out: bool = False) -> Cell:
        options = {**self.claim.arms_of(self.settings.scale)[arm].options, **more}
        scale = {key: value for key, value in config.resolved(self.settings.scale).items() if key != "data"}
        told = "".join(f" {key}={value:g}" for key, value in more.items())
        label = f"{self.name}  {arm}{told}  seed {seed}{', held out' if held_out else ''}"
        return Cell(run=self.claim.runner, scale=scale, options=options, seed=seed, held_out=held_out, data=self.data,
                    label=label)

    # -------------------------------------------------------------------------------------------------------------- results
    def record(self, cell: Cell) -> dict[str, Any] | None:
        """Of a finished cell; None for one that is missing, and for a damaged one, which is told in `damaged`."""
        try:
            return self.store.read(cell)
        except Damaged as error:
            self.damaged.append(str(error))
            return None

    def table(self) -> dict[str, dict[float, float]] | None:
        """Mean held-out statistic by arm and value of the tuned option; None before all are there."""
        tuning = self.claim.tuning
        if tuning is None:
            return {}
        found: dict[str, dict[float, float]] = {}
        for arm in (arm for arm in tuning.arms if arm in self.settings.arms):
            found[arm] = {}
            for value in tuning.values_of(arm):
                seeds = range(tuning.first_seed, tuning.first_seed + tuning.seeds)
                records = [self.record(self._tuned(arm, value, seed)) for seed in seeds]
                if None in records:
                    return None
                each = [record["values"][self.claim.statistic] for record in records if record is not None]
                found[arm][value] = float("-inf") if None in each else statistics.fmean(each)
        return found

    def chosen(self) -> dict[str, dict[str, float]] | None:
        """The tuned option of each arm: the best mean, the smallest of equals; None before all are there."""
        table = self.table()
        if table is None or self.claim.tuning is None:
            return None if table is None else {}
        return {arm: {self.claim.tuning.option: max(row, key=lambda value: row[value])} for arm, row in table.items()}
