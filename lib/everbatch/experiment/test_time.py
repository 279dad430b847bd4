"""A trained network in use: what it makes of corrupted images that come in an order, adapting without labels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from everbatch import config
from everbatch.checkpoint.folder import together
from everbatch.config.strict_yaml import dump_text
from everbatch.data import CORRUPTIONS, Stream
from everbatch.errors import check, check_real, check_whole, nearest
from everbatch.experiment.base import Experiment, Result
from everbatch.experiment.job import Job, recorded
from everbatch.experiment.pretraining import Pretraining
from everbatch.experiment.served import ARMS, Served, corrupted, launched
from everbatch.report.plots import compare_curves
from everbatch.report.recorder import versions
from everbatch.train import BNAdapt, CoTTA, Tent

__all__ = ["CorruptedStream", "UnMix"]

ArmName = Literal["source", "bn_adapt", "unmix", "tent", "cotta"]


@dataclass(frozen=True, kw_only=True)
class UnMix:
    """The UnMix-TNS layers of the arms that have them; see `everbatch.nn.convert_unmix_tns`."""

    num_components: int = 16
    """K; 16 for one domain after another, 128 where domains are mixed; >= 1."""
    alpha: float = 0.5
    """Share of the source's variance that the first components' means are spread by; in [0, 1]."""
    batch_size_max: int = 64
    """Batch at which components move by the batch norm's own momentum; >= 1."""
    balanced: bool = True
    """The first components have the source's mean and variance exactly; false: in expectation alone, as published."""
    synchronised: bool = True
    """Components move by the samples of all ranks; false: each rank follows its own share of the stream."""

    def __post_init__(self) -> None:
        check_whole("unmix", "num_components", self.num_components, 1)
        check_real("unmix", "alpha", self.alpha, 0.0, 1.0)
        check_whole("unmix", "batch_size_max", self.batch_size_max, 1)


@dataclass(frozen=True, kw_only=True)
class CorruptedStream(Experiment):
    """Options of this recipe."""

    title: ClassVar[str] = "test_time"

    pretraining: Pretraining = field(default_factory=lambda: Pretraining(classes=1.0, rotations=False, epochs=15))
    """What the network has learned before, of clean images."""
    arms: tuple[ArmName, ...] = ("source", "bn_adapt", "unmix", "tent", "cotta")
    """What is compared: the network as it is; by its batches' statistics; with UnMix-TNS layers; these under Tent and CoTTA."""
    norms: Literal["unmix", "batch"] = "unmix"
    """What Tent and CoTTA stand on: UnMix-TNS layers or statistics of the batch."""
    unmix: UnMix = field(default_factory=UnMix)
    families: tuple[str, ...] = tuple(CORRUPTIONS)
    """Corruptions, a domain each, in this order."""
    severity: int = 5
    """Of the corruptions; 1 to 5."""
    order: Literal["dirichlet", "iid"] = "dirichlet"
    """dirichlet: labels come in runs. iid: they are shuffled."""
    concentration: float = 0.1
    """Of the Dirichlet order: the smaller, the longer the runs; > 0."""
    reset: bool = True
    """Begin each domain from the source; false: the stream goes on, and no method is told where a domain begins."""
    held: float = 0.05
    """Share of each domain's samples that are kept apart, to see what is left of it when later ones have come; in (0, 1)."""
    output: str = "runs/test_time"
    """Folder of this run: result.json, config.yaml, the figure, checkpoints and model-ARM.safetensors by arm; model.safetensors
    is the last arm's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        who = "test_time"
        check(bool(self.arms), who, "arms=()", "name at least one")
        check(len(set(self.arms)) == len(self.arms), who, f"arms={list(self.arms)}", "name each once")
        check(bool(self.families), who, "families=()", "name at least one")
        for family in self.families:
            check(family in CORRUPTIONS, who, f"families has {family!r}", "be a corruption", nearest(family, CORRUPTIONS))
        check_whole(who, "severity", self.severity, 1, 5)
        check_real(who, "concentration", self.concentration, 0.0, open_low=True)
        check_real(who, "held", self.held, 0.0, 1.0, open_low=True, open_high=True)
        check(self.trainer.epochs == 1, who, f"trainer.epochs={self.trainer.epochs}", "be 1", "a stream comes once")
        check(self.init is None, who, f"init={self.init!r}", "be left out", "set pretraining.weights")
        check(self.model.head == "fixed", who, "model.head=growing", "be fixed")
        for name, part in (("tent", Tent), ("bn_adapt", BNAdapt), ("cotta", CoTTA)):
            given = getattr(self, name)
            check(given is None or given.active, who, f"{name}.active=false", "be left out", f"leave {part.__name__} out of arms")

    def unused(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why."""
        found = super().unused()
        found.pop("optimizer.mean_teacher", None)
        for name in ("tent", "bn_adapt", "cotta"):
            if name not in self.arms:
                found[name] = f"arms has no {name}"
        if self.order == "iid":
            found["concentration"] = "it is of order=dirichlet"
        used = "unmix" in self.arms or (self.norms == "unmix" and {"tent", "cotta"} & set(self.arms))
        if not used:
            found["unmix"] = "no arm has UnMix-TNS layers"
        if not {"tent", "cotta"} & set(self.arms):
            found["norms"] = "arms has neither tent nor cotta"
        return found

    def stream(self) -> Stream:
        """The corrupted test samples, a domain for each family."""
        return corrupted(self)

    def conduct(self, job: Job) -> Result:
        """Every arm over the same stream."""
        if self.dry_run:
            if job.world.rank == 0:
                print(dump_text(config.resolved(self)))
            return Result({}, job.folder, 0)
        return _compared(self, job)

    def headlines(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        """Online accuracy of each arm, and the seconds."""
        means = {arm: found["accuracy"] for arm, found in values["online"].items()}
        return {**means, "seconds": values["seconds"]}

    def unit_of(self, headline: str) -> str:
        """Accuracies are shares."""
        return super().unit_of(headline) or "%"


def _compared(options: CorruptedStream, job: Job) -> Result:
    """All arms, and the report."""
    world, folder, begun = job.world, job.folder, time.perf_counter()
    job.goes_on = bool(world.gather(job.resume and (folder / "arms").is_dir())[0])
    job.begin()
    recorder = job.recorder
    assert recorder is not None
    stream, served = options.stream(), dict[str, Served]()
    with recorded(options, folder / "config.yaml", resume=job.goes_on, write=world.rank == 0):
        for arm in options.arms:
            served[arm] = launched(options, job, stream, arm)
            if served[arm].stop_sign:
                return Result({}, folder, served[arm].steps, stop_sign=served[arm].stop_sign)
            recorder.say(f"{ARMS[arm]:<32} online accuracy {100 * served[arm].accuracy:6.2f} %, {served[arm].seconds:.0f} s")
    online = {arm: {"accuracy": found.accuracy, "by_family": dict(zip(options.families, found.online, strict=True)),
                    "kept_apart": found.matrix[-1], "seconds": found.seconds, "describe": found.describe}
              for arm, found in served.items()}
    seconds = time.perf_counter() - begun
    values: Any = world.gather({
        "online": online, "accuracies": {arm: found.online for arm, found in served.items()}, "seconds": seconds,
        "steps": sum(found.steps for found in served.values()),
        "seed": options.trainer.seed, "world_size": world.size, "stream": stream.fingerprint(), "versions": versions(),
        "left_out": next(iter(served.values())).left_out, "configuration": config.resolved(options)})[0]
    together(world, folder, lambda: recorder.result(values))
    curves = {ARMS[arm]: (range(1, len(found.online) + 1), found.online) for arm, found in served.items()}
    if world.rank == 0:
        drawn = compare_curves(curves, x="corruption, as they come", y="online accuracy", title=stream.train.name)
        recorder.figure("online_accuracy", drawn, 0)
    recorder.say("\n".join([*_table(options, served), f"{seconds:.0f} s; see {folder}/result.json, model-ARM.safetensors and "
                            f"{folder}/figures/online_accuracy.png"]))
    job.close()
    return Result(values, folder, values["steps"])


def _table(options: CorruptedStream, served: Mapping[str, Served]) -> list[str]:
    """Online error by family and arm, in percent."""
    lines = ["online error, %".ljust(20) + "".join(f"{arm:>10}" for arm in served)]
    for place, family in enumerate(options.families):
        errors = [100 - 100 * found.online[place] for found in served.values()]
        lines.append(family.replace("_", " ").ljust(20) + "".join(f"{error:10.1f}" for error in errors))
    means = [100 - 100 * statistics.fmean(found.online) for found in served.values()]
    lines.append("mean".ljust(20) + "".join(f"{mean:10.1f}" for mean in means))
    left = next(iter(served.values())).left_out
    return [*lines, f"{left} samples of incomplete last batches are in none of these"] if left else lines
