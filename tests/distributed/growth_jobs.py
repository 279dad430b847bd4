"""What the ranks of a launch do with trainers whose model grows; every check compares with another run."""

from __future__ import annotations

import functools
import gc
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import Job, Record, Tensors
from torch import nn

import growing
import learning
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch
from everbatch.experiment import ClassIncremental, Engine, Model, Optimizer, run
from everbatch.nn import PartsHead
from everbatch.optim import EWC
from everbatch.train import Replay, StepRecord, Trainer, TrainerMixin, load_model
from learning import Abandoned, everything, stream, whole


def cut(host: str, folder: Path, after: int, **options: Any) -> None:
    """A run that grows and is left after so many steps."""
    t = growing.trainer(host, growing.WidenedMemory, folder=folder, recorder=learning.recorder(folder, after), **options)
    try:
        t.fit(stream())
    except Abandoned:
        return
    raise AssertionError("the run was not left")


def nothing(record: Record, store: Path, host: str) -> None:
    """Launched anew before every task, with nothing added: bit for bit the run that was not."""
    with record.check(f"nothing/{host}") as found:
        expected = growing.trainer(host, learning.Learner, first=6)
        expected.fit(stream())
        again = growing.trainer(host, growing.Relaunched, first=6)
        again.fit(stream())
        found.require(again.growths == [{"nothing": 1}, {"nothing": 2}], f"{again.growths}")
        found.same_bits(everything(again), everything(expected), "launched anew")


def widened(record: Record, store: Path, host: str) -> None:
    """A head that grows: on every engine the run of plain torch, to rounding; known weights and moments keep their bits when
    it grows, and new ones begin."""
    world = World.current()
    t = growing.trainer(host, growing.Widened, smooth=True, optimizer=growing.ADAMW)
    kept: dict[str, Any] = {}

    def watched(grow: Any, inner: Any = t.relaunch) -> None:
        before = held(t)
        inner(grow)
        kept[f"{len(t.growths)}"] = before, held(t)

    t.relaunch = watched
    t.fit(stream())
    with record.check(f"growth/{host}/bits") as found:
        found.require(list(kept) == ["1", "2"], f"{list(kept)}")
        for before, after in kept.values():
            found.same_bits({n: after[n] for n in before}, before, "what was known")
            new = sorted(after.keys() - before.keys())
            found.require(len(new) == 2 and all(n.startswith("master/3.parts.") for n in new), f"new: {new}")
    with record.check(f"growth/{host}/steps") as found:
        told = t.optimizer.state_dict()["everbatch"]["meta"]["scalars"]
        steps = {name: entry["step"][1] for name, entry in told.items()}
        wanted = {"1.weight": 24, "1.bias": 24, **{f"3.parts.{k}.{p}": 24 - 8 * k for k in range(3) for p in ("weight", "bias")}}
        found.require(steps == wanted, f"{steps}")
        found.require(len(t.optimizer.param_groups) == 3, "not a group for each growth")
    here = whole(t) | {"matrix": torch.tensor([row[: k + 1] + [0.0] * (2 - k) for k, row in enumerate(t.matrix)])}
    if world.size == 1:
        torch.save(here, store / "plain.pt")
        return
    with record.check(f"growth/{host}/plain", 1e-6) as found:
        plain = torch.load(store / "plain.pt", weights_only=True)
        found.require(plain.keys() == here.keys(), f"{plain.keys() ^ here.keys()}")
        # Moments are of gradients; the second ones are squares, and far below one.
        found.measure(max((plain[n].double() - here[n].double()).abs().max().item() for n in plain))


def resumed(record: Record, store: Path, host: str) -> None:
    """Left inside the second and the third task, and resumed by other objects: bit for bit; buffers, dropout, the memory with
    logits of narrower heads, and the growths."""
    folder = store / f"resumed-{World.current().size}-{host}"
    expected = growing.trainer(host, growing.WidenedMemory)
    expected.fit(stream())
    for after in (13, 21):
        with record.check(f"resumed/{host}/{after}") as found:
            place = folder / str(after)
            cut(host, place, after)
            again = growing.trainer(host, growing.WidenedMemory, folder=place, recorder=learning.recorder(place))
            again.fit(stream(), resume=True)
            found.require(again.growths == [{"classes": 2}, {"classes": 2}], f"{again.growths}")
            found.same_bits(everything(again), everything(expected), "resumed")


def held(t: Any) -> Tensors:
    """All that the optimizer holds by name, whole."""
    tensors: Tensors = t.optimizer.state_dict(weights=True)["everbatch"]["tensors"]
    return tensors


def live(kind: type) -> int:
    return sum(isinstance(thing, kind) for thing in gc.get_objects())


def leak(record: Record, store: Path, argument: str) -> None:
    """HOST/TIMES: launched anew so often, one engine and one head are alive."""
    host, _, times = argument.partition("/")
    gc.collect()
    heads = live(PartsHead)
    t = growing.trainer(host, growing.Widened, smooth=True, optimizer=growing.ADAMW)
    batches = list(learning_batches(t))
    with record.check(f"leak/{host}") as found:
        for k in range(int(times)):
            t.relaunch({"nothing": k})
            t.training_step(batches[k % len(batches)])
        gc.collect()
        found.require(live(PartsHead) - heads == 1, f"{live(PartsHead) - heads} heads are alive")
        if host.startswith("zero"):
            from deepspeed.runtime.engine import DeepSpeedEngine

            alive = [e for e in gc.get_objects() if isinstance(e, DeepSpeedEngine) and isinstance(e.module[-1], PartsHead)]
            found.require(len(alive) == 1, f"{len(alive)} engines are alive")


def learning_batches(t: Any) -> Iterator[Any]:
    """Of the first task, for a loop of one's own."""
    from everbatch.train.fit import loader_of

    t.run.stream = stream()
    loader = loader_of(t, stream(), stream().tasks[0])
    t.run.begin_task(loader)
    return iter(loader)


def refused(record: Record, store: Path, host: str) -> None:
    """What cannot be is one error, the same on every rank, and the trainer goes on as it was."""
    world, last = World.current(), World.current().rank == World.current().size - 1
    give: dict[str, Any] = {}

    def build(growths: Any) -> Any:
        return give["build"](growths) if growths else growing.model()

    t = learning.trainer(host, cls=Trainer, model=growing.model(), grown=build, reset_optimizer=False)

    def odd_rank(growths: Any) -> nn.Module:
        return growing.model([{"classes": 2 + last}])

    def odd_bits(growths: Any) -> nn.Module:
        made = growing.model(growths)
        with torch.no_grad():
            made[-1].parts[1].weight.add_(float(last))
        return made

    def raising(growths: Any) -> nn.Module:
        if last:
            raise KeyError("nobody")
        return growing.model(growths)

    def narrow(growths: Any) -> nn.Module:
        return growing.model([{"classes": 2}], first=1)

    def without(growths: Any) -> nn.Module:
        made = growing.model(growths)
        made[1] = nn.Linear(64, 15, bias=False)
        return made

    cases: dict[str, tuple[Any, Any]] = {
        "layout of the grown model differs by rank": (odd_rank, {"classes": 2}),
        "bits of new weights differs by rank": (odd_bits, {"classes": 2}),
        "the growth differs by rank": (growing.model, {"classes": 2, "rank": world.rank}),
        "the factory raised KeyError: 'nobody' (on rank": (raising, {"classes": 2}),
        "have shapes": (narrow, {"classes": 2}),
        "lacks ['1.bias']": (without, {"classes": 2}),
        "gives a list": (lambda growths: [], {"classes": 2}),
        "gives the model in use": (lambda growths: t.module, {"classes": 2}),
        "must be a JSON value": (growing.model, {"classes": torch.ones(2)}),
    }
    before = everything_but_the_matrix(t)
    for text, (make, grow) in cases.items():
        if world.size == 1 and "rank" in text:
            continue
        with record.check(f"refused/{host}/{text[:24]}") as found:
            give["build"] = make
            try:
                t.relaunch(grow)
                found.require(False, "it was accepted")
            except ValueError as error:
                bare = "is sharded" in str(error) or "in it, must be a bare" in str(error) or "are sharded" in str(error)
                found.require(text in str(error) or (text == "gives the model in use" and bare), str(error))
                texts = world.gather(str(error))
                found.require(len(set(texts)) == 1, f"{texts}")
            found.require(t.growths == [], "it counts as grown")
            found.same_bits(everything_but_the_matrix(t), before, "touched")


def everything_but_the_matrix(t: Any) -> dict[str, torch.Tensor]:
    return {n: v for n, v in everything(t).items() if n != "matrix"}


def mixed(record: Record, store: Path, host: str) -> None:
    """One group of old and new parameters: refused by name where a group has one count of steps."""
    import deepspeed

    small, cls = growing.model(smooth=True), growing.ADAMW.func
    options = {k: v for k, v in growing.ADAMW.keywords.items() if k in ("lr", "weight_decay")}
    parts = {k: v for k, v in growing.ADAMW.keywords.items() if k not in options}
    world = World.current()

    def on_engine(made: nn.Module) -> Any:
        config = dict(learning.engine(host, 8, 1, world.size))  # type: ignore[arg-type]
        engine, *_ = deepspeed.initialize(
            model=made, optimizer=torch.optim.AdamW(made.parameters(), **options), config=config)
        return cls.on(engine, **parts), engine

    opt, engine = on_engine(small)

    def closure() -> Any:
        loss = engine.module(torch.ones(4, 64)).square().mean()
        opt.backward(loss)
        return loss

    opt.step(closure)
    saved = opt.state_dict(weights=True)
    wider, _ = on_engine(growing.model([{"classes": 2}], smooth=True))
    with record.check(f"mixed/{host}") as found:
        try:
            wider.load_state_dict(saved, grown=True)
            found.require(False, "it was taken")
        except CheckpointMismatch as error:
            found.require("'3.parts.1.weight'" in str(error) and "one count of steps" in str(error), str(error))


class Stops(TrainerMixin):
    """Sends every rank a signal after a step."""

    at = -1

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        if record.step == Stops.at:
            signal.raise_signal(signal.SIGUSR1)


class Stoppable(ClassIncremental):
    """The recipe, which a signal may stop."""

    def more_mixins(self, world: World) -> dict[type, Any]:
        return {**super().more_mixins(world), Stops: None}


def recipe(record: Record, store: Path, host: str) -> None:
    """The class-incremental recipe with model.head=growing, EWC and DER++: stopped in the second task and resumed, it ends with
    the bytes of the run that was not; its file is one of the plain network."""
    folder = store / f"recipe-{World.current().size}-{host}"

    def ended(name: str, stop: int, **options: Any) -> Any:
        Stops.at = stop
        chosen = Engine(stage=int(host[4:])) if host.startswith("zero") else Engine(kind=host)  # type: ignore[arg-type]
        mixed = Optimizer(base="adamw", lr=0.003, ewc=EWC.Config(strength=1.0))
        return run(Stoppable(
            engine=chosen, optimizer=mixed, tasks=2, output=str(folder / name), model=Model(head="growing"),
            trainer=Trainer.Config(batch_size=64, epochs=2, reset_optimizer=False),
            replay=Replay.Config(capacity=40, replay_batch=32), **options), signals=True)

    with record.check(f"recipe/{host}") as found:
        whole = ended("whole", -1)
        steps = whole.steps
        stopped = ended("cut", steps // 2)  # in the second task; ranks agree within ten steps
        inside = stopped.stop_sign == signal.SIGUSR1 and steps // 2 < stopped.steps < steps
        found.require(inside, f"{stopped}, of {steps} steps")
        again = ended("cut", -1, resume=True)
        matrix = [row.values["accuracy_matrix"] for row in (whole, again)]
        found.require(str(matrix[0]) == str(matrix[1]) and again.steps == steps, f"{matrix}")
        files = [(folder / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
        found.require(files[0] == files[1], "the weights differ")
        model = load_model(folder / "cut" / "model.safetensors")
        found.require(type(model).__name__ == "SmallConv" and model.head.out_features == 10, f"{model}")
        found.require(matrix[0][0][0] > 0.5 and matrix[0][1][1] > 0.5, f"it did not learn: {matrix[0]}")


def jobs(record: Record, store: str, *names: str) -> Iterator[Job]:
    """STORE NAME:ARGUMENT ...: functions of this module."""
    Path(store).mkdir(parents=True, exist_ok=True)
    for name in names:
        job, _, argument = name.partition(":")
        yield name, functools.partial(globals()[job], record, Path(store), argument)
