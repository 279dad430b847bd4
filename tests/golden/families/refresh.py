"""`refresh_derpp*`: the released refresh learning before DER++'s steps, with the noise and the draws of the file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from everbatch.data import Batch, ReplayStore
from everbatch.optim import Refresh
from everbatch.train.memory.replay import Replay
from everbatch.train.record import StepRecord
from golden.comparison import Comparison, FormatError, Tolerance, Vectors
from golden.families.buffers import RecordedDraws
from golden.families.nets import build
from golden.families.replay import Recorded, Replaying, content

__all__ = ["check"]

GUARD = 1e-20
"""`hp_norm_eps` of all files: what the released code adds to a norm."""


def check(file: Vectors, compare: Comparison) -> None:
    """The weights before, inside and after every step, what moved them, and the memory."""
    tasks = sorted(name for name in file.groups() if name.startswith("task"))
    if not tasks:
        raise FormatError("no key task0/x")
    compare.floats = Tolerance.of(file[f"{tasks[0]}/x"].dtype)
    if float(file["hp_norm_eps"]) != GUARD:
        raise FormatError(f"hp_norm_eps is {float(file['hp_norm_eps'])}, the library's is {GUARD}")
    model = build(file.under("theta_init/"))
    opt: Any = _RefreshSGD(
        model, lr=float(file["hp_lr"]), weight_decay=float(file["hp_weight_decay"]), form="normalized", loss="current_ce",
        every=1, delta=float(file["hp_delta"]), fisher_coef=float(file["hp_fisher_coef"]),
        noise_coef=float(file["hp_noise_coef"]), fisher_decay=float(file["hp_tau"]), estimator="reference", denominator="loader")
    injected = file.under("fisher_injected/")
    if injected:
        opt.update_fisher(importance={name: torch.from_numpy(value.copy()) for name, value in injected.items()})
    capacity = file.integer("hp_buffer_size")
    trainer: Any = _Trainer(
        model, opt, method="dark_er_pp", capacity=capacity, replay_batch=file.integer("hp_minibatch"),
        alpha=float(file["hp_alpha"]), beta=float(file["hp_beta"]))
    memory = Recorded(capacity)
    trainer.states[Replay].store = store = ReplayStore(memory, trainer.world)
    for task in tasks:
        x, y = (torch.from_numpy(file[f"{task}/{key}"].copy()) for key in ("x", "y"))
        if x.shape[1] != file.integer("hp_batch"):
            raise FormatError(f"{task}/x has batches of {x.shape[1]}, hp_batch says {file.integer('hp_batch')}")
        for i, rows in enumerate(zip(x, y, strict=True)):
            at = f"{task}/step{i}"
            memory.draws = RecordedDraws(f"{at}/reservoir_randint", file[f"{at}/reservoir_randint"])
            memory.choices = list(file.under(f"{at}/buffer_choice").values())
            opt.noise = {name: torch.from_numpy(value.copy()) for name, value in file.under(f"{at}/noise/").items()}
            fisher = opt.states[Refresh].fisher
            used = {name: fisher.get(name, torch.zeros_like(p)) for name, p in model.named_parameters()}
            loss = trainer.train(*rows)
            memory.draws.finish()
            compare.close(f"{at}/loss", loss.numpy(), file[f"{at}/loss"])
            for kind, values in {**trainer.seen, "fisher_used": used, "theta_after": dict(model.named_parameters())}.items():
                for name, value in values.items():
                    compare.close(f"{at}/{kind}/{name}", value.detach().numpy(), file[f"{at}/{kind}/{name}"])
            for name, rows_kept in content(store).items():
                compare.close(f"{at}/{name}", rows_kept, file[f"{at}/{name}"])
            compare.close(f"{at}/buffer_num_seen", trainer.rows, file[f"{at}/buffer_num_seen"])
        opt.update_fisher(zip(x, y, strict=True))
        for name, value in opt.states[Refresh].fisher.items():
            compare.close(f"{task}/fisher_after_end_task/{name}", value.numpy(), file[f"{task}/fisher_after_end_task/{name}"])


class _RefreshSGD(Refresh, torch.optim.SGD):
    """With the noise of the file."""

    noise: dict[str, Tensor]

    def refresh_noise(self, shard: Any, iteration: int) -> Tensor:
        return self.noise[shard.name]


class _Trainer(Replaying):
    """Passes the current batch's loss as well, and looks at what the unlearning pass and the step begin with."""

    def train(self, x: Tensor, y: Tensor) -> Tensor:
        """One step; returns its loss."""
        position = torch.arange(self.rows, self.rows + len(y))
        parts = self.draw_batch([Batch(x, y, position, position)])
        outputs: dict[str, Tensor] = {}
        terms: dict[str, Tensor] = {}
        self.seen: dict[str, dict[str, Tensor]] = {}

        def weights() -> dict[str, Tensor]:
            return {name: p.detach().clone() for name, p in self.model.named_parameters()}

        def data() -> Tensor:
            self.seen["theta_before"] = weights()
            loss = nn.functional.cross_entropy(self.model(x), y)
            self.opt.backward(loss)
            self.seen["grad_ce"] = {s.name: g.clone() for s, g in self.opt.host.gradient()}
            return loss

        def closure() -> Tensor:
            self.seen["theta_unlearned"] = weights()
            for part in parts:
                outputs[part.part] = logits = self.model(part.inputs)
                terms.update(self.loss_terms(logits, part))
            loss = torch.stack(list(terms.values())).sum()
            self.opt.backward(loss)
            return loss

        loss: Tensor = self.opt.step(closure, data=data)
        kept = {name: value.detach() for name, value in outputs.items()}
        self.after_step(StepRecord(self.step, self.opt.last_applied, loss, terms, parts, kept))
        self.rows += len(y)
        return loss
