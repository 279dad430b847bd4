"""The option that names a network, and the networks built from it: tried on one batch before anything else is built."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from everbatch import seeds
from everbatch.errors import check, nearest
from everbatch.experiment.timm_cache import cached_weights
from everbatch.nn import SmallConv, grow_head
from everbatch.nn.probe import check_input

__all__ = ["Factory", "Model"]

_COMPUTED = {"num_classes": "the data", "in_chans": "the data", "pretrained": "model.pretrained"}


@dataclass(frozen=True, kw_only=True)
class Model:
    """The network."""

    name: str = "small_conv"
    """small_conv, or any model of timm."""
    pretrained: bool = False
    """Load timm's pretrained weights."""
    options: dict[str, Any] | None = None
    """What timm.create_model is given beside classes, channels and, where the model takes one, the size of the data's images:
    model.options.drop_path_rate=0.1."""
    output: str | None = None
    """Key, attribute or place of the logits, where the network returns a dictionary, an object or a tuple."""
    head: Literal["fixed", "growing"] = "fixed"
    """fixed: as wide as the stream. growing: as the classes seen so far, one more part before each task that brings some."""

    def __post_init__(self) -> None:
        if self.name == "small_conv":
            given = [f"{name}={getattr(self, name)}" for name in ("pretrained", "options", "output") if getattr(self, name)]
            check(not given, "model", f"{', '.join(given)} with name=small_conv", "be left out", "they are for models of timm")
        for name, source in _COMPUTED.items():
            check(name not in (self.options or {}), "model", f"options.{name}", "be left out", f"it follows from {source}")

    def build(self, sample: Tensor, num_classes: int, seed: int, *, tried: bool = True) -> nn.Module:
        """A model for inputs like `sample` (C, H, W), initialised under `seed`, the same on every rank.

        Args:
            tried: run it once on two rows of zeros, so that a model that does not fit the data is found here.

        Raises:
            ValueError: an unknown name or option, weights that cannot be had, or a model that does not map inputs of this shape
                to logits of this many classes.
            ImportError: timm is needed and not installed.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive(seed, "model"))
            check(sample.ndim == 3, "model", f"samples of shape {tuple(sample.shape)}", "be images (C, H, W)",
                  "save grey ones as (N, 1, H, W)")
            if self.name == "small_conv":
                with _told("model", f"small_conv on inputs of shape {tuple(sample.shape)}", "take images of this size",
                           "set data.image_size"):
                    model: nn.Module = SmallConv(sample.shape[0], num_classes, sample.shape[-1])
            else:
                model = self._timm(sample, num_classes)
            if self.head == "growing":
                grow_head(model, [])
            if tried:
                self._try(model, sample, num_classes)
        if self.output is not None:
            model.register_forward_hook(functools.partial(_logits, self.output))
        return model

    def _timm(self, sample: Tensor, num_classes: int) -> nn.Module:
        try:
            import timm
        except ImportError as error:
            raise ImportError("model: timm is not installed; pip install everbatch[vision]") from error
        known = [*timm.list_models(), *timm.list_models(pretrained=True), "small_conv"]
        check(self.name in known or timm.is_model(self.name), "model", f"name={self.name!r}", "be small_conv or a model of timm",
              nearest(self.name, known))
        options = dict(self.options or {})
        shown = f"name={self.name!r}" + f", options={options}" * bool(options) + ", pretrained=true" * self.pretrained
        with _told("model", shown, "name weights that timm knows", "leave out what follows the dot"):
            fixed = getattr(timm.get_pretrained_cfg(self.name), "fixed_input_size", False)
        side = sample.shape[-1] if sample.shape[-1] == sample.shape[-2] else tuple(sample.shape[-2:])
        sized = fixed and "img_size" not in options
        given: dict[str, Any] = {
            "pretrained": self.pretrained, "num_classes": num_classes, "in_chans": sample.shape[0], **options}
        cure = f"set data.image_size or model.options.img_size; inputs are {tuple(sample.shape)}"
        if self.pretrained:
            cure = "where there is no internet, weights must be in the cache (HF_HOME); they must fit model.options"
            if (file := cached_weights(self.name)) is not None:  # what is here is taken without asking the network
                given["pretrained_cfg_overlay"] = {"file": str(file), "custom_load": False}
        with _told("model", shown, "be built by timm", cure):
            try:
                return timm.create_model(self.name, **({**given, "img_size": side} if sized else given))
            except TypeError as error:  # a size that it has and does not take
                if not sized or "'img_size'" not in str(error):
                    raise
            return timm.create_model(self.name, **given)

    def _try(self, model: nn.Module, sample: Tensor, num_classes: int) -> None:
        """One forward in evaluation mode: whether the model takes the data and gives their logits."""
        check_input(model, sample, self.name)
        modes = {module: module.training for module in model.modules()}
        shape = tuple(sample.shape)
        with torch.no_grad(), _told("model", f"name={self.name!r} on inputs of shape {shape}", "take inputs of this size",
                                    "set data.image_size (or model.options.img_size, where the model has it)"):
            outputs = model.eval()(torch.zeros(2, *shape))
        for module, mode in modes.items():
            module.training = mode
        kind = _names(outputs)
        if self.output is not None:
            check(kind is not None, "model", f"output={self.output!r}, and {self.name} returns one tensor", "be left out")
            check(self.output in (kind or ()), "model", f"output={self.output!r}", "be a name of what the model returns",
                  nearest(self.output, kind or ()))
            outputs = _named(outputs, self.output)
        check(isinstance(outputs, Tensor), "model", f"{self.name} returns {type(outputs).__name__} of {', '.join(kind or ())}",
              "return logits", "name them: model.output=...")
        check(tuple(outputs.shape) == (2, num_classes), "model",
              f"{self.name} maps 2 inputs of shape {shape} to {tuple(outputs.shape)}", f"give logits (2, {num_classes})",
              "choose a model for classification")


def _names(outputs: Any) -> list[str] | None:
    """Names of the parts of what a model returned; None for a tensor."""
    if isinstance(outputs, Tensor):
        return None
    if isinstance(outputs, Mapping):
        return [str(key) for key in outputs]
    if isinstance(outputs, tuple | list):
        return [*map(str, range(len(outputs))), *getattr(outputs, "_fields", ())]
    if dataclasses.is_dataclass(outputs):
        return [item.name for item in dataclasses.fields(outputs)]
    return [name for name in getattr(outputs, "__dict__", {}) if not name.startswith("_")]


def _named(outputs: Any, name: str) -> Any:
    if isinstance(outputs, Mapping):
        return outputs[name]
    if isinstance(outputs, tuple | list) and name.isdecimal():
        return outputs[int(name)]
    return getattr(outputs, name)


def _logits(name: str, module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """A forward hook that leaves the named part; a model that returns one tensor in one of its modes is left alone in it."""
    return outputs if isinstance(outputs, Tensor) else _named(outputs, name)


@contextmanager
def _told(who: str, got: str, must: str, cure: str) -> Iterator[None]:
    """Whatever another library raises inside, in one line of ours."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # assertions, KeyError, AttributeError, errors of the network: whatever it thinks of
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else 'without a word'}"
        check(False, who, f"{got} ({reason[:200]})", must, cure)


@dataclass(frozen=True, kw_only=True)
class Factory:
    """Builds the recipe's model anew, following torch's global random stream: what some optimizer mixins ask for.

    A value, not a closure: its text is the same on every rank and in a resumed run, as an option's must be.
    """

    model: Model
    shape: tuple[int, ...]
    """(C, H, W) of a sample."""
    num_classes: int
    """Of the head as it begins."""

    def __call__(self, growths: Sequence[Any] = ()) -> nn.Module:
        """A new model on the CPU. `Model.build` seeds itself; a seed drawn from the ambient stream makes it follow that.

        Args:
            growths: {"classes": n} for each part that a growing head has got since.
        """
        model = replace(self.model, pretrained=False)
        made = model.build(torch.empty(self.shape), self.num_classes, int(torch.randint(2**31, ())), tried=False)
        return grow_head(made, [growth["classes"] for growth in growths]) if growths else made
