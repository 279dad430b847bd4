"""`compose`: a class from a list of mixins, in a legal order; each mistake in the call is one line with the call that works."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from everbatch import methods
from everbatch.contract import Contract, base_of, is_root, parts_of, sort_parts
from everbatch.errors import CompositionError, nearest
from everbatch.optim.mixin import OptimizerMixin

__all__ = ["compose"]


def check_call(mixins: Sequence[Any], base: Any, name: Any) -> None:
    """Refuse what is no mixin, a mixin given twice, and a base that is not the class to stand on."""
    def part(value: Any) -> bool:
        return isinstance(value, type) and issubclass(value, Contract) and base_of(value) is None

    listed = ", ".join(m.__name__ for m in mixins if part(m))
    front = f"compose({listed}, " if listed else "compose("
    for mixin in mixins:
        if part(mixin):
            continue
        whole = _base_class(mixin)
        if whole is not None and base is None:
            raise CompositionError(f"compose: {_said(mixin)} is the base, not a mixin; write {front}base={_path(whole)})")
        hint = _mixin_hint(mixin) or "pass mixins first and base=..."
        raise CompositionError(f"compose: {_said(mixin)} is not a mixin; {hint}")
    twice = sorted({m.__name__ for m in mixins if list(mixins).count(m) > 1})
    if twice:
        raise CompositionError(f"compose: {twice[0]} is given twice; list it once")
    if not isinstance(name, str | None) or name == "":
        raise CompositionError(f"compose: name={name!r}, must be the name of the new class, or be left out")
    _check_base(base, front, part)
    again = [m.__name__ for m in mixins if m in parts_of(base)]
    if again:
        raise CompositionError(f"compose: {again[0]} is a part of base={base.__name__} already; leave one of them out")


def _check_base(base: Any, front: str, part: Any) -> None:
    if base is None:
        raise CompositionError(f"compose: no base; name the class that the mixins stand on, as in {front}base=torch.optim.SGD)")
    if part(base):
        raise CompositionError(f"compose: base={base.__name__} is a mixin; pass it before base=, which names a class such as "
                               "torch.optim.SGD")
    if isinstance(base, type):
        return
    whole = _base_class(base)
    if whole is None:
        hint = f"; {nearest(base, _optimizers())}" if isinstance(base, str) else ""
        raise CompositionError(f"compose: base={_said(base)} is not a class; pass one such as base=torch.optim.SGD{hint}")
    given = ""
    if isinstance(base, functools.partial):
        given = ", ".join([*(repr(a) for a in base.args), *(f"{k}={v!r}" for k, v in base.keywords.items())])
    more = f" and its options ({given}) to the class that compose returns" if given else \
        " and its options to the class that compose returns" if not isinstance(base, str) else ""
    raise CompositionError(f"compose: base={_said(base)} is not a class; pass base={_path(whole)}{more}")


def _base_class(value: Any) -> type | None:
    """The optimizer class that a value stands for: itself, its name in torch.optim, what a partial calls, or an instance's."""
    import torch

    if isinstance(value, functools.partial):
        return _base_class(value.func)
    if isinstance(value, str):
        return _optimizers().get(value.split(".")[-1].lower())
    if isinstance(value, torch.optim.Optimizer):
        from everbatch.contract import base_of

        return base_of(type(value))
    return value if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) else None


def _optimizers() -> dict[str, type]:
    import torch

    found = {k: v for k, v in vars(torch.optim).items() if isinstance(v, type) and issubclass(v, torch.optim.Optimizer)}
    return {k.lower(): v for k, v in found.items() if v is not torch.optim.Optimizer}


def _mixin_hint(value: Any) -> str:
    """The mixin that was meant by a name, or by what holds some."""
    if isinstance(value, list | tuple | set):
        return "pass mixins one by one, compose(A, B, base=...)"
    known = {name.lower(): name for name in methods.names("everbatch.optim")}
    if not isinstance(value, str):
        return ""
    name = known.get(value.lower())
    return f"pass the class everbatch.optim.{name}" if name else nearest(value.lower(), known)


def _path(cls: type) -> str:
    import torch

    return f"torch.optim.{cls.__name__}" if getattr(torch.optim, cls.__name__, None) is cls else cls.__name__


def _said(value: Any) -> str:
    """One short line about a value: an optimizer's own text is many."""
    if isinstance(value, type):
        return _path(value)
    if isinstance(value, functools.partial):
        return f"functools.partial({getattr(value.func, '__name__', value.func)}, ...)"
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"an instance of {type(value).__name__}"


def compose(*mixins: type, base: Any = None, name: str | None = None) -> type:
    """Build the class that lists `mixins` in a legal order over `base`, as a class statement would.

    Args:
        mixins: parts of one family, any order; may be empty for optimizers (the base with the step protocol alone).
        base: the class below them, such as `torch.optim.SGD` or a trainer. Its options go to the class that is built.
        name: name of the new class; by default the names of the parts and of the base, joined.

    Raises:
        CompositionError: two owners of one resource, contradicting orders, a mixin that is none, a base that is no class.

    >>> import torch
    >>> from everbatch import compose
    >>> from everbatch.optim import SAM, ClipGradNorm
    >>> compose(SAM, ClipGradNorm, base=torch.optim.SGD).__name__
    'ClipGradNormSAMSGD'
    """
    check_call(mixins, base, name)
    parts = sort_parts(tuple(mixins))
    roots = tuple(dict.fromkeys(root for part in parts for root in part.__mro__ if is_root(root)))
    if not parts:
        roots = (OptimizerMixin,)
    title = name or "".join(part.__name__ for part in parts) + base.__name__
    module = inspect.currentframe()
    caller = module.f_back.f_globals.get("__name__", __name__) if module and module.f_back else __name__
    return type(title, (*(parts or roots), base), {"__module__": caller})
