"""Whether a network takes samples of a shape, found before training and without computing anything."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from everbatch.errors import check

__all__ = ["check_input"]


def check_input(model: nn.Module, sample: Tensor, name: str) -> None:
    """Raise unless a network can be called with images like `sample` (C, H, W).

    Args:
        model: a bare module on the CPU; it is left as it is.
        sample: one un-augmented sample; its shape counts.
        name: of the network, for the message.

    Raises:
        ValueError: a sample that is no image, or an image that is too small, or otherwise of a shape that the network
            refuses; with the network's own reason.

    Cost: one forward on shapes alone. Only where that fails, one of two samples of zeros, because some operations are not
    known for shapes alone.
    """
    shape = tuple(sample.shape)
    check(len(shape) == 3, "model", f"samples of shape {shape}", f"be (C, H, W) images for {name}",
          "use a network of your own with everbatch.train.Trainer")
    try:
        with torch.no_grad():
            functional_call(model, _shapes(model), (torch.empty(2, *shape, device="meta"),))
    except Exception:
        reason = _refusal(model, shape)
        made_for = dict(getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (3, 224, 224)
        check(reason is None, "model", f"{name} cannot take images of shape {shape} ({reason})", "be given images it can take",
              f"set data.image_size={made_for[-1]}, or another size that suits it")


def _shapes(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer without its values; names of one tensor share one."""
    made: dict[int, Tensor] = {}
    found = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: made.setdefault(id(value), torch.empty_like(value, device="meta")) for name, value in found}


def _refusal(model: nn.Module, shape: tuple[int, ...]) -> str | None:
    """What the network says when it is really called; None if it takes the images."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(torch.zeros(2, *shape))
    except Exception as error:  # whatever the network and the operations in it raise
        return (str(error).splitlines() or [type(error).__name__])[0]
    finally:
        for module, training in flags:
            module.training = training
    return None
