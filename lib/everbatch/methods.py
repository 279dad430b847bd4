"""The table of methods: a new one is its own file and one line here.

The key is what recipes, `everbatch methods` and search spaces call it. The lines stand in the order
in which recipes compose them, leftmost first, where the parts' own `left_of` leaves it open: LARS and
LAMB complete the base's update and come last. Everything else is what the class declares
(`everbatch.contract.Contract`) and what its docstring says; no class is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from everbatch.contract import Contract, Options, Range
from everbatch.errors import check, nearest

__all__ = ["TABLE", "Facts", "facts", "lazily", "load", "names", "optimizer_mixins", "options",
           "path_of", "search_space", "table", "trainer_mixins"]

TABLE: dict[str, str] = {
    "clip": "everbatch.optim.clip:ClipGradNorm",
    "ema": "everbatch.optim.ema:EMA",
    "semantic_memory": "everbatch.optim.memory.semantic:SemanticMemory",
    "dynamic_sparsity": "everbatch.optim.sparsity.dynamic:DynamicSparsity",
    "refresh": "everbatch.optim.memory.refresh:Refresh",
    "ewc": "everbatch.optim.memory.ewc:EWC",
    "si": "everbatch.optim.memory.si:SI",
    "mas": "everbatch.optim.memory.mas:MAS",
    "agem": "everbatch.optim.memory.agem:AGEM",
    "ncl": "everbatch.optim.memory.ncl:NCL",
    "vcl": "everbatch.optim.memory.vcl:VCL",
    "mean_teacher": "everbatch.optim.restart.mean_teacher:MeanTeacher",
    "shrink_perturb": "everbatch.optim.restart.shrink_perturb:ShrinkPerturb",
    "subspace_projection": "everbatch.optim.subspace.projection:SubspaceProjection",
    "osft": "everbatch.optim.subspace.osft:OSFT",
    "grip": "everbatch.optim.subspace.grip:GRIP",
    "sam": "everbatch.optim.sharpness.sam:SAM",
    "asam": "everbatch.optim.sharpness.sam:ASAM",
    "gsam": "everbatch.optim.sharpness.gsam:GSAM",
    "gradient_norm": "everbatch.optim.sharpness.gradient_norm:GradientNorm",
    "wsam": "everbatch.optim.sharpness.gradient_norm:WSAM",
    "look_sam": "everbatch.optim.sharpness.looksam:LookSAM",
    "esam": "everbatch.optim.sharpness.esam:ESAM",
    "ignite": "everbatch.optim.sharpness.ignite:Ignite",
    "stale_sam": "everbatch.optim.sharpness.stale:StaleSAM",
    "lars": "everbatch.optim.layerwise.lars:LARS",
    "lamb": "everbatch.optim.layerwise.lamb:LAMB",
    "evaluation": "everbatch.train.evaluation:ContinualEvaluation",
    "plasticity": "everbatch.train.plasticity:Plasticity",
    "conadv": "everbatch.train.adversarial.conadv:ConAdv",
    "tent": "everbatch.train.adaptation.tent:Tent",
    "bn_adapt": "everbatch.train.adaptation.bn_adapt:BNAdapt",
    "cotta": "everbatch.train.adaptation.cotta:CoTTA",
    "cls_er": "everbatch.train.memory.cls_er:CLSER",
    "lwf": "everbatch.train.memory.lwf:LwF",
    "cpr": "everbatch.train.memory.cpr:CPR",
    "replay": "everbatch.train.memory.replay:Replay",
    "er_ace": "everbatch.train.memory.er_ace:ErAce",
    "same": "everbatch.train.same.same:SAME",
    "nearest_mean": "everbatch.train.memory.nearest_mean:NearestMean",
    "gdumb": "everbatch.train.memory.gdumb:GDumb",
    "joint": "everbatch.train.memory.joint:Joint",
    "mos": "everbatch.train.mos.mixin:MOS",
    "episodic": "everbatch.train.memory.episodic:EpisodicMemory",
    "consolidate": "everbatch.train.consolidate:Consolidate",
    "warm_start": "everbatch.train.warm_start:WarmStart",
}


def load(key: str) -> type[Contract]:
    """The class of a key.

    Raises:
        ValueError: a key that is not in the table, with the nearest that is.
    """
    check(key in TABLE, "methods", repr(key), "be a key of the table", nearest(key, TABLE))
    module, name = TABLE[key].split(":")
    part: type[Contract] = getattr(importlib.import_module(module), name)
    return part


def names(package: str) -> dict[str, str]:
    """Class names of the methods below a package ("everbatch.optim"), and their keys."""
    below = {key: path for key, path in TABLE.items() if path.startswith(f"{package}.")}
    return {path.split(":")[1]: key for key, path in below.items()}


def lazily(package: str) -> Callable[[str], Any]:
    """A `__getattr__` for a package (PEP 562), by which `from everbatch.optim import SAM` imports
    that one method."""
    known = names(package)

    def get(name: str) -> Any:
        if name not in known:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        part = load(known[name])
        setattr(sys.modules[package], name, part)
        return part

    return get


def optimizer_mixins() -> dict[str, type[Contract]]:
    """Every optimizer mixin by key, leftmost first."""
    return {key: load(key) for key in names("everbatch.optim").values()}


def trainer_mixins() -> dict[str, type[Contract]]:
    """Every trainer mixin by key, leftmost first."""
    return {key: load(key) for key in names("everbatch.train").values()}


def options(part: type[Contract], which: Options, factory: Callable[[], Any]) -> dict[str, Any]:
    """What a part declares as `example` or `off`, with the factory of the bare model where its Config
    has a field for one."""
    given = dict(which if isinstance(which, Mapping) else which.by(factory))
    config = getattr(part, "Config", None)
    if config is not None and "factory" in (field.name for field in fields(config)):
        given.setdefault("factory", factory)
    return given


def path_of(key: str) -> str:
    """Where a recipe has the options of a method: "optimizer.sam", "replay"."""
    return f"optimizer.{key}" if TABLE[key].startswith("everbatch.optim.") else key


def search_space(keys: Iterable[str]) -> dict[str, tuple[Any, ...] | Range]:
    """What tuning varies of some methods, by the path of a recipe's option.

    >>> search_space(["sam", "replay"])["optimizer.sam.rho"]
    (0.05, 0.02, 0.1, 0.2)

    Args:
        keys: of the table. The first of each tuple of values is where to begin.
    """
    found: dict[str, tuple[Any, ...] | Range] = {}
    for key in keys:
        part = load(key)
        found |= {f"{path_of(key)}.{field}": values for field, values in part.search.items()}
    return found


@dataclass(frozen=True)
class Facts:
    """What a reader of a table is told of a method; the last three are of its docstring."""

    key: str
    name: str
    family: str
    does: str
    cost: str
    source: str


def facts(key: str) -> Facts:
    """Of one method: its first line up to an equation, and the first clauses of `Cost:` and
    `Source:`."""
    part = load(key)
    text = inspect.getdoc(part) or ""
    does = re.split(r":  |\.$", text.split("\n\n")[0].replace("\n", " "))[0]
    family = "optimizer" if TABLE[key].startswith("everbatch.optim.") else "trainer"
    return Facts(key, part.__name__, family, does, _clause(text, "Cost"), _clause(text, "Source"))


def _clause(text: str, head: str) -> str:
    """The first clause of what a docstring says under a heading such as "Cost:"."""
    found = re.search(rf"\b{head}(?: of a call)?: (.*?)(?:\n\n|\Z)", text, flags=re.DOTALL)
    words = " ".join(found[1].split()) if found else ""
    first = re.split(r";|(?<! al)\.\s|\.$", words)[0]
    paper = re.match(r".*?arXiv \d{4}\.\d{4,5}", first)
    return paper[0] if paper else first


def table(keys: Iterable[str] | None = None) -> list[Facts]:
    """Facts of the methods, in the order of the table."""
    return [facts(key) for key in (TABLE if keys is None else keys)]
