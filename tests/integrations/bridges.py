"""Jobs of the bridges' launch: each framework's loop against a loop of our own on the micro-batches that it saw. See worker.py.

OUT.json, by key: "update/FRAMEWORK" the largest difference of any weight after all steps; "resume/FRAMEWORK" that of any weight,
moment or average between a run that was resumed and one that was not. "refused/..." the error of what cannot work. A text
elsewhere is an error.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import lightning
import torch
import transformers
from accelerate import Accelerator
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from record import Job, Record
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from everbatch import compose
from everbatch.distributed import World
from everbatch.integrations.lightning import ClosureModule
from everbatch.integrations.transformers import ClosureTrainer
from everbatch.optim import EMA, SAM, ClipGradNorm, Ignite

BASE = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
MIXINS = {"rho": 0.05, "max_norm": 0.5, "ema_decay": 0.9}
Opt: Any = compose(SAM, ClipGradNorm, EMA, base=torch.optim.SGD, name="Opt")
build = functools.partial(Opt, lr=0.1, momentum=0.9, **MIXINS)
MICRO_BATCHES = 2
Batches = list[Sequence[Any]]
"""Of each update its micro-batches."""


def scheduled(opt: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))


def difference(a: Any, b: Any) -> float:
    """The largest between two nested states; names and shapes must be the same."""
    if isinstance(a, Tensor):
        assert a.shape == b.shape
        return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    if isinstance(a, dict):
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        return max((difference(a[k], b[k]) for k in a), default=0.0)
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        return max(map(difference, a, b), default=0.0)
    assert a == b, (a, b)
    return 0.0


def own_loop(model: nn.Module, updates: Batches, loss_of: Callable[[nn.Module, Any], Tensor], average: bool = True) -> nn.Module:
    """The loop that a user of this library writes, over DDP."""
    ddp = DistributedDataParallel(model)
    opt = build(ddp)
    schedule = scheduled(opt)
    for micro_batches in updates:
        def closure(micro_batches: Sequence[Any] = micro_batches) -> Tensor:
            losses = [opt.backward(loss_of(ddp, b)) for b in opt.micro_batches(micro_batches, average=average)]
            return torch.stack(losses).sum()

        opt.step(closure)
        schedule.step()
    return model


# --------------------------------------------------------------------------------------------------- transformers
class Seen(ClosureTrainer):
    """Keeps the micro-batches of every update, and how many tokens of all ranks they count."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.updates = [*getattr(self, "updates", []), [(dict(b), count) for b in batches]]
        return batches, count


def decoder() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, use_cache=False))


def texts() -> list[dict[str, Tensor]]:
    """Rows of which unequally many tokens count."""
    ids = torch.randint(32, (32, 10), generator=torch.Generator().manual_seed(1))
    length = torch.arange(32) % 7 + 3
    labels = ids.where(torch.arange(10) < length[:, None], -100)
    return [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]


def trained(folder: Path, epochs: int = 2, resume: str | None = None) -> Seen:
    model = decoder()
    opt = build(model)
    args = transformers.TrainingArguments(
        str(folder), max_grad_norm=0, gradient_accumulation_steps=MICRO_BATCHES, per_device_train_batch_size=4, use_cpu=True,
        num_train_epochs=epochs, report_to=[], logging_steps=1, save_strategy="steps", save_steps=3, disable_tqdm=True)
    trainer = Seen(model, args, train_dataset=texts(), optimizers=(opt, scheduled(opt)))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def transformers_update(folder: Path, whole: list[Seen]) -> float:
    trainer = trained(folder)
    whole.append(trainer)
    assert len(trainer.updates) == 4 and all(len(u) == MICRO_BATCHES for u in trainer.updates)
    world = World.current().size
    model = own_loop(decoder(), trainer.updates, lambda m, b: m(**b[0], num_items_in_batch=b[1]).loss * world, average=False)
    return difference(trainer.model.state_dict(), model.state_dict())


def transformers_resume(folder: Path, whole: list[Seen]) -> float:
    again = trained(folder, resume=str(folder / "checkpoint-3"))
    pairs = [(t.model.state_dict(), t._opt.state_dict()) for t in (*whole, again)]
    return difference(*pairs)


# ------------------------------------------------------------------------------------------------------ lightning
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return functional.cross_entropy(model(x), y)


def rows(batch_size: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator))
    return DataLoader(data, batch_size, sampler=DistributedSampler(data, shuffle=False))  # type: ignore[arg-type]


class Module(ClosureModule, lightning.LightningModule):
    accumulate = MICRO_BATCHES

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def loss(self, batch: Any) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        opt = build(self)
        return {"optimizer": opt, "lr_scheduler": scheduled(opt)}


def fitted(folder: Path, epochs: int, resume: Path | None = None) -> tuple[Any, Any]:
    module = Module()
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=epochs, logger=False, callbacks=[keep],
                                enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, rows(), ckpt_path=resume)
    assert trainer.global_step == 3 * epochs, trainer.global_step
    return module.state_dict(), trainer.optimizers[0].state_dict()


def epochs_of(loader: DataLoader[Any], epochs: int) -> Batches:
    """Five micro-batches an epoch: the last update of each has one."""
    batches = list(loader)
    return epochs * [batches[0:2], batches[2:4], batches[4:5]]


def lightning_update(folder: Path) -> float:
    weights, _ = fitted(folder, 2)
    model = own_loop(net(), epochs_of(rows(), 2), loss_of)
    return difference(weights, {f"net.{k}": v for k, v in model.state_dict().items()})


def lightning_resume(folder: Path) -> float:
    fitted(folder / "cut", 1)
    return difference(fitted(folder / "again", 2, folder / "cut" / "epoch=0.ckpt"), fitted(folder / "whole", 2))


# --------------------------------------------------------------------------------------- loops of the user's own
def accelerate_update() -> float:
    """Their model, their backward, the optimizer inside of their wrapper."""
    model, accelerator = net(), Accelerator(cpu=True)
    wrapped, opt = accelerator.prepare(model, build(model))
    schedule = scheduled(opt.optimizer)
    updates = epochs_of(rows(), 2)
    for micro_batches in updates:
        def closure(micro_batches: Sequence[Any] = micro_batches) -> Tensor:
            losses = [opt.optimizer.backward(loss_of(wrapped, b)) for b in opt.optimizer.micro_batches(micro_batches)]
            return torch.stack(losses).sum()

        opt.optimizer.step(closure)
        schedule.step()
    return difference(model.state_dict(), own_loop(net(), updates, loss_of).state_dict())


def fabric_update() -> float:
    fabric, model = Fabric(accelerator="cpu", devices=2, strategy="ddp"), net()
    fabric.launch()
    wrapped, opt = fabric.setup(model, build(model))
    schedule = scheduled(opt.optimizer)
    updates = epochs_of(rows(), 2)
    for micro_batches in updates:
        def closure(micro_batches: Sequence[Any] = micro_batches) -> Tensor:
            total = torch.zeros(())
            for i, batch in enumerate(micro_batches, 1):
                with fabric.no_backward_sync(wrapped, enabled=i < len(micro_batches)):
                    loss = loss_of(wrapped, batch) / len(micro_batches)
                    fabric.backward(loss)
                total += loss.detach()
            return total

        opt.step(closure)
        schedule.step()
    return difference(model.state_dict(), own_loop(net(), updates, loss_of).state_dict())


def deepspeed_update(stage: int) -> float:
    """On the engine that accelerate prepares: `Opt.on(engine)`, never their backward."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 1,
              "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    accelerator, model = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config)), net()
    engine, _ = accelerator.prepare(model, BASE(model.parameters()))
    opt = Opt.on(engine, **MIXINS)
    schedule = scheduled(opt)
    updates = epochs_of(rows(), 2)
    for micro_batches in updates:
        def closure(micro_batches: Sequence[Any] = micro_batches) -> Tensor:
            losses = [opt.backward(loss_of(engine.module, b)) for b in opt.micro_batches(micro_batches)]
            return torch.stack(losses).sum()

        opt.step(closure)
        schedule.step()
    return difference(model.state_dict(), own_loop(net(), updates, loss_of).state_dict())


# ------------------------------------------------------------------------------------------------------- refusals
def arguments(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(str(folder), use_cpu=True, report_to=[], **options)


def wrong_trainers(folder: Path) -> dict[str, Callable[[], Any]]:
    model = decoder()

    def made(opt: Any, **options: Any) -> Callable[[], Any]:
        return lambda: ClosureTrainer(model, arguments(folder, **options), optimizers=(opt, None))

    twice = compose(Ignite, base=torch.optim.SGD)(model, lr=0.1, rho=0.1)
    return {
        "no mixins": made(BASE(model.parameters()), max_grad_norm=0),
        "no optimizer": made(None, max_grad_norm=0),
        "clips as well": made(build(model)),
        "second objective": made(twice, max_grad_norm=0),
    }


class Plateau(Module):
    def configure_optimizers(self) -> Any:
        opt = build(self)
        return {"optimizer": opt, "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(opt), "monitor": "train_loss"}


class Plain(Module):
    def configure_optimizers(self) -> Any:
        return BASE(self.parameters())


class Forgetful(lightning.LightningModule):
    """Automatic optimization, which accumulates outside of the closure."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def training_step(self, batch: Any, _: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        return build(self)


def fit(module: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(accelerator="cpu", devices=2, max_epochs=1, strategy="ddp", **quiet, **options)
    return trainer.fit(module, rows())


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def jobs(record: Record, folder: str) -> Iterator[Job]:
    warnings.simplefilter("ignore")
    base, whole = Path(folder), list[Seen]()
    yield record.noted("update/transformers", transformers_update, base / "hf", whole)
    yield record.noted("resume/transformers", transformers_resume, base / "hf", whole)
    yield record.noted("update/lightning", lightning_update, base / "lightning")
    yield record.noted("resume/lightning", lightning_resume, base / "lightning")
    yield record.noted("update/fabric", fabric_update)
    yield record.noted("update/accelerate", accelerate_update)
    for name, action in wrong_trainers(base / "hf").items():
        yield record.noted(f"refused/transformers, {name}", refusal, action)
    yield record.noted("refused/lightning, no mixins", refusal, lambda: fit(Plain()))
    yield record.noted("refused/lightning, plateau", refusal, lambda: fit(Plateau()))
    yield record.noted("refused/lightning, automatic", refusal, lambda: fit(Forgetful(), accumulate_grad_batches=2))
    yield record.noted("update/accelerate on ZeRO-2", deepspeed_update, 2)  # last: accelerate keeps one engine per process


assert deepspeed  # imported before torch.distributed starts
