"""`lb_eq_conadv_*`: concurrent adversarial steps, by the mixin in a trainer of a few lines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from everbatch.composition import compose
from everbatch.data import Batch
from everbatch.distributed import World
from everbatch.nn import convert_split_bn
from everbatch.train import ConAdv, StepRecord
from golden.comparison import Comparison, FormatError, Tolerance, Vectors
from golden.families.nets import build

__all__ = ["check"]


class Loop:
    """The verbs that the mixin extends, over batches in a list."""

    def __init__(self, model: nn.Module, batches: list[tuple[Tensor, Tensor]], seed: int = 0) -> None:
        self.world, self.seed, self.step, self.batches = World.current(), seed, 0, batches
        self.model = self.configure_model(model)

    def configure_model(self, model: nn.Module) -> nn.Module:
        return model

    def on_task_start(self, task: Any) -> None:
        pass

    def augment_batch(self, parts: list[Batch]) -> list[Batch]:
        return parts

    def forward(self, batch: Batch) -> Tensor:
        return self.model(batch.inputs)  # type: ignore[no-any-return]

    def forward_parts(self, parts: list[Batch]) -> list[Tensor]:
        return [self.forward(part) for part in parts]

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"cross_entropy": batch.mean(nn.functional.cross_entropy(outputs, batch.targets, reduction="none"))}

    def after_step(self, record: StepRecord) -> None:
        pass

    def peek(self, ahead: int) -> Batch | None:
        return self.batch(self.step + ahead) if self.step + ahead < len(self.batches) else None

    def batch(self, step: int) -> Batch:
        x, y = self.batches[step]
        rows = torch.arange(len(y)) + step * len(y)
        return Batch(x, y, rows, rows)

    def training_step(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step; its parts' inputs and its terms."""
        self.model.train()
        parts = self.augment_batch([self.batch(self.step)])
        seen: dict[str, Tensor] = {}

        def closure() -> Tensor:
            made = zip(self.forward_parts(parts), parts, strict=True)
            terms = {k: v for out, part in made for k, v in self.loss_terms(out, part).items()}
            loss = torch.stack(list(terms.values())).sum()
            self.optimizer.backward(loss)
            seen.update({k: v.detach() for k, v in terms.items()})
            return loss

        self.optimizer.step(closure)
        self.step += 1
        return {part.part: part.inputs for part in parts}, seen


class Learner(ConAdv, Loop):
    """The class under test."""


def check(file: Vectors, compare: Comparison) -> None:
    """Run all steps; compare weights, statistics, losses and the crafted batches."""
    hp, x = file.hp(), file["x"]
    compare.floats = Tolerance.of(x.dtype)
    if hp.get("norm", "linf") != "linf":
        raise FormatError(f"norm {hp['norm']!r}, must be linf")
    start = {_ours(name): value for name, value in file.under("init/").items()}
    main = {name: value for name, value in start.items() if ".branches." not in name}
    norm = next(name.rpartition(".")[0] for name in start if ".branches." in name).split(".branches.")[0]
    width = main[f"{norm}.weight"].shape[0]
    fresh = {f"{norm}.running_mean": 0 * main[f"{norm}.bias"], f"{norm}.running_var": 0 * main[f"{norm}.bias"] + 1}
    fresh[f"{norm}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64).numpy()
    model = build(main, fresh, eps=hp["bn_eps"], momentum=hp["bn_momentum"])
    assert width and convert_split_bn(model) == 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(start[name].copy()))
    batches = [(torch.from_numpy(a.copy()), torch.from_numpy(b.copy())) for a, b in zip(x, file["y"], strict=True)]
    learner = Learner(
        model, batches, tau=hp["tau"], radius=255 * hp["eps"], step_size=255 * hp["step_size"], first=hp["bootstrap"],
        targeted=hp.get("targeted", False), random_start=float(hp.get("random_start", False)), raw_low=hp["clip_min"],
        raw_high=hp["clip_max"], weight_clean=hp["w_clean"], weight_adversarial=hp["w_adv"])
    learner.optimizer = compose(base=torch.optim.SGD)(
        model, lr=hp["lr"], momentum=hp["momentum"], weight_decay=hp["weight_decay"])
    for t in range(1, len(x) + 1):
        inputs, terms = learner.training_step()
        crafted = inputs.get("adversarial", torch.zeros(0, dtype=batches[0][0].dtype))
        want = file[f"step{t}/x_adv"]
        compare.close(f"step{t}/x_adv", crafted.numpy() if want.size else crafted.numpy().reshape(want.shape), want)
        nothing = torch.tensor(float("nan"), dtype=crafted.dtype)
        compare.close(f"step{t}/loss_clean", terms["cross_entropy"].numpy() / hp["w_clean"], file[f"step{t}/loss_clean"])
        compare.close(f"step{t}/loss_adv", terms.get("adversarial_cross_entropy", nothing).numpy() / hp["w_adv"],
                      file[f"step{t}/loss_adv"])
        state = {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
        for kind in ("param", "buf"):
            for name, value in file.under(f"step{t}/{kind}/").items():
                if not name.endswith("num_batches_tracked"):
                    compare.close(f"step{t}/{kind}/{name}", state[_ours(name)], value)


def _ours(name: str) -> str:
    """bn.main.weight is bn.weight here, bn.adv.weight bn.branches.adversarial.weight."""
    return name.replace(".main.", ".").replace(".adv.", ".branches.adversarial.")
