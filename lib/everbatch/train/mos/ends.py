"""Where a task ends, and where the next begins with new adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everbatch import seeds
from everbatch.data import Task, evaluation_batches
from everbatch.evaluate.evaluator import evaluating
from everbatch.nn.adapter_values import AdapterLayout, reading_adapters
from everbatch.nn.adapters import BottleneckAdapter, adapters_of
from everbatch.rows import Rows, each
from everbatch.train.mos.alignment import drawn, fit_head
from everbatch.train.mos.gaussians import Moments, Sampler
from everbatch.train.mos.head import Head
from everbatch.train.mos.merging import Places
from everbatch.train.mos.options import Archive, Options

__all__ = ["End", "begin_anew"]


@dataclass(frozen=True)
class End:
    """What happens when a task ends. Every method is a collective."""

    trainer: Any
    config: Options
    state: Archive
    layout: AdapterLayout
    head: Head

    def of(self, task: Task) -> None:
        """Archive the adapters, take the statistics of the task's classes, align the head."""
        state, config = self.state, self.config
        self.archive()
        first, count = (state.ends[-1] if state.ends else 0), len(task.classes)
        moments = Moments(count, "diagonal" if config.covariance == "diagonal" else "outer")
        self.collect(task, first, state.archive[-1], moments)
        near = moments
        if task.id:
            near = Moments(count, None)
            self.collect(task, first, state.archive[0], near)
        state.means = _grown(state.means, moments.means(first))
        state.spread = _grown(state.spread, moments.spread(config.covariance, config.covariance_rank, first))
        state.prototypes = _grown(state.prototypes, near.means(first))
        state.ends = [*state.ends, first + count]
        state.inside = False
        if task.id and config.align_epochs:
            self.align(task)

    def archive(self) -> None:
        """One more row: the adapters as they are trained."""
        state, host = self.state, self.trainer.optimizer.host
        pieces = [(shard, shard.data) for shard in host.shards if shard.name in self.layout.shapes]
        vector = self.layout.flat(host.gather(pieces, self.layout.names))
        before = state.archive.to(vector) if len(state.archive) else vector.new_zeros(0, len(vector))
        state.archive = torch.cat([before, vector[None]])
        state.prefix = vector.double() + (state.prefix.to(vector.device) if len(state.prefix) else 0.0)

    @torch.no_grad()
    def collect(self, task: Task, first: int, values: Tensor, moments: Moments) -> None:
        """Sums over the features of the task's training samples with these adapters. Every rank makes as many forwards."""
        trainer = self.trainer
        device, reading = trainer.device, reading_adapters(trainer.module, values)
        with evaluating(trainer.module, trainer.world), reading, self.head.features() as held:
            for batch in evaluation_batches(trainer.stream, task, self.config.rows, trainer.world, ids=task.train_ids):
                raw: Rows = each(lambda value: value.to(device), batch.inputs)
                trainer.logits(trainer.engine.call, trainer.inputs_of(raw))
                assert batch.weight is not None
                labels, real = (batch.targets - first).to(device), (batch.weight > 0).to(device)
                moments.add(held.value.flatten(1).float(), labels, real)
        moments.reduce(trainer.world)

    def align(self, task: Task) -> None:
        """Train the head on what the Gaussians draw, on rank 0, and give it to all."""
        config, state, host, world = self.config, self.state, self.trainer.optimizer.host, self.trainer.world
        weight, bias = self.head.whole(host)
        made: tuple[Tensor, Tensor | None] = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        if world.rank == 0:
            count = config.align_samples or 5 * getattr(getattr(self.trainer, "config", None), "batch_size", 64)
            sampler = Sampler(state.means, state.spread, config.covariance)
            epochs = drawn(sampler, config.align_epochs, count, seeds.generator(self.trainer.seed, "mos", "alignment", task.id))
            group = host.groups()[host.group_index()[next(iter(self.head.shapes))]]
            made = fit_head(
                weight.float().cpu(), None if bias is None else bias.float().cpu(), epochs, config.align_epochs,
                seen=state.ends[-1], lr=config.align_lr, weight_decay=float(group.get("weight_decay", 0.0)))
        weight = world.sum(made[0].to(weight))
        bias = None if bias is None or made[1] is None else world.sum(made[1].to(bias))
        self.head.write(host, weight, bias)
        host.touch()
        host.publish_if_dirty()


def begin_anew(trainer: Any, layout: AdapterLayout, task: Task) -> None:
    """New values for the live adapters, and no memory of the old ones' gradients. Collective."""
    host, values = trainer.optimizer.host, dict[str, Tensor]()
    for name, adapter in adapters_of(trainer.module).items():
        generator = seeds.generator(trainer.seed, "adapter", name, task.id)
        fresh = BottleneckAdapter(adapter.width, adapter.rank, generator=generator)
        values |= {f"{name}.{part}": p for part, p in fresh.named_parameters()}
    places = Places(layout.shapes)
    mine = places.mine(host.shards)
    for shard, value in zip(mine, places.slices(mine, layout.flat(values)), strict=True):
        shard.data.copy_(value)
        for moment in shard.moments.values():
            moment.zero_()
    host.touch()
    host.publish_if_dirty()


def _grown(before: Tensor, new: Tensor) -> Tensor:
    """Rows of classes that were there, and new ones: float32."""
    return new.float() if not len(before) else torch.cat([before.to(new.device), new.float()])
