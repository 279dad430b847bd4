"""A head that grows before each task by the classes that come with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from everbatch.data import Task
from everbatch.errors import check
from everbatch.nn.heads import PartsHead, head_of
from everbatch.train.mixin import TrainerMixin

__all__ = ["GrowingHead"]


class GrowingHead(TrainerMixin):
    """Before a task with classes beyond the head's, the trainer is launched anew with one more part of it:

        class Learner(GrowingHead, Replay, Trainer): ...
        build = lambda growths: grow_head(make_model(first), [g["classes"] for g in growths])
        Learner(build(()), optimizer, grown=build)

    Stands leftmost, so that all others begin the task on the new engine. The growth is {"classes": n}.

    Raises:
        ValueError: at construction: no `grown`, a head that is not in parts, eval_future (a head has no
            logits of classes to come).

    Cost: that of `Trainer.relaunch`, once a task. Source: the class-incremental literature's usual
    head; that the parts are apart is ours, see `everbatch.nn.PartsHead`.
    """

    if TYPE_CHECKING:
        relaunch: Any
        growth: Any
        stream: Any
        module: nn.Module
        config: Any

    def configure_model(self, model: nn.Module) -> nn.Module:
        """Refuse what could not grow."""
        model = super().configure_model(model)  # type: ignore[misc]
        growth = getattr(self, "growth", None)
        check(growth is not None and growth.build is not None, "GrowingHead", "no factory of the model",
              "have one", "pass grown=f to the trainer")
        check(not self.config.eval_future, "GrowingHead", "eval_future=True", "be without it",
              "the head has no logits of classes to come")
        kind = type(model.get_submodule(head_of(model))).__name__
        check(kind == PartsHead.__name__, "GrowingHead", f"a head of {kind}", "be in parts",
              "everbatch.nn.grow_head(model, []) puts it into one")
        return model

    def notes(self) -> str:
        """For describe(): the head by now."""
        head: Any = self.module.get_submodule(head_of(self.module))
        return f"a head of {head.sizes} classes, one more part before a task that brings some"

    def on_task_start(self, task: Task) -> None:
        """Grow, then let the task begin."""
        wanted = max(self.stream.seen_classes(task.id)) + 1
        head: Any = self.module.get_submodule(head_of(self.module))
        if wanted > sum(head.sizes):
            self.relaunch({"classes": wanted - sum(head.sizes)})
        super().on_task_start(task)  # type: ignore[misc]
