"""Cooperative mixins over a final step: the contract both families obey, checked when a class is created.

A *part* is one method: a class that inherits from its family's root only. A *composed* class lists parts, leftmost
outermost, and ends in a base the parts are built on (a `torch.optim` class, a trainer). Parts override verbs and call `super()`;
nobody overrides the final step. Whatever cannot work is refused here, by name, with the corrected class line.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from everbatch.declared import Cost, Made, Options, Range, Space, check_kinds
from everbatch.errors import CompositionError, check, nearest

__all__ = ["DECLARED", "Contract", "Cost", "Made", "Options", "Range", "Space", "base_of",
           "parts_of"]

DECLARED = ("example", "off", "search", "bases", "call", "called_by", "in_code", "between_tasks",
            "from_data", "makes", "asked", "wants", "idle", "fixed", "needs_boundaries", "at_task_end",
            "observes")
"""What a part says of itself, beside `left_of`, `owns` and `free`."""

AT_BOUNDARIES = ("at_task_end", "configure_stream", "consolidate", "on_task_start", "on_task_end")
"""Functions of a part that are called where tasks begin and end, or change what tasks hold."""


class Contract:
    """Base of both families: option routing, composition checks, configs and states by part.

    A family's root sets `verbs` (names a part may override, cooperatively) and `final` (names nobody may).
    A part may nest `Config` (a frozen, keyword-only dataclass of options) and `State` (a dataclass of what must be saved),
    and may set `left_of` (parts, or owners of a resource, that must stand to its right) and `owns` (resources with one owner).
    What it declares beside that is all that recipes, the contract suite, the README and `everbatch methods` know of it.
    A part that adds to the loss may define `terms()`: its terms of `everbatch.objective.terms`, which `describe()` prints.
    """

    verbs: ClassVar[tuple[str, ...]] = ()
    final: ClassVar[tuple[str, ...]] = ()
    left_of: ClassVar[tuple[str, ...]] = ()
    owns: ClassVar[tuple[str, ...]] = ()
    free: ClassVar[tuple[str, ...]] = ()
    """Options that change where or how safely a part works, and no bit of what it gives: a resumed run may change them."""

    example: ClassVar[Options] = {}
    """Options at which a few steps show what the part does; the contract suite runs them."""
    off: ClassVar[Options] = {}
    """Options at which it leaves the bits of the class it stands on."""
    search: ClassVar[Space] = {}
    """What tuning varies. Empty where there is nothing to tune."""
    bases: ClassVar[tuple[str, ...]] = ()
    """Names of the classes it can stand on; empty: any."""
    call: ClassVar[str] = ""
    """A method without arguments that is called between steps, when a task starts; what it does is
    all that the part does."""
    called_by: ClassVar[str] = ""
    """Key of the trainer mixin that calls it at a task's start or end, and is composed with it."""
    in_code: ClassVar[str] = ""
    """Why no file and no command line can give what it needs; recipes leave such a part out."""
    between_tasks: ClassVar[bool] = False
    """Whether it acts only when a task has ended or a later one begins, so that beside a single task
    it does nothing."""
    observes: ClassVar[bool] = False
    """Whether it only looks: at any options every bit of the training is as without it."""
    from_data: ClassVar[Mapping[str, str]] = {}
    """Trainer mixins: fields that are no options of a recipe, and the property of its `Data` that
    each follows; "": the trainer knows."""
    makes: ClassVar[Mapping[str, Mapping[str, Any]] | None] = None
    """Methods of the literature by the name that a recipe's `method=` takes, and the options of each:
    fields of the part and, with a dot, other options of the recipe by path. None: one method, of the
    part's key and defaults; empty: none of its own."""

    configs: dict[type, Any]
    states: dict[type, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Contract in cls.__bases__ or _finished(cls) is not None:
            return
        base = base_of(cls)
        if base is None:
            _check_part(cls)
        else:
            _check_composed(cls, base)
            for name in DECLARED:
                if hasattr(base, name):  # what a part declares hides nothing of the base
                    setattr(cls, name, inspect.getattr_static(base, name))

    @classmethod
    def asked(cls, config: Any) -> bool:
        """Whether these options alone ask for the part. Where its default options do not, a recipe
        composes it with the parts that are `called_by` it."""
        return True

    @classmethod
    def wants(cls, config: Any) -> tuple[str, ...]:
        """Auxiliary objectives that these options use, beside those that the class always `needs`."""
        return ()

    @classmethod
    def idle(cls, config: Any) -> dict[str, str]:
        """Fields that have no effect beside the others, and why; a user who gives one is told."""
        return {}

    @classmethod
    def fixed(cls, config: Any) -> str:
        """Why these options cannot be beside a model that grows between tasks, and what can; "": they
        can. What a part keeps by parameter name begins anew for a new one."""
        return ""

    @classmethod
    def needs_boundaries(cls, config: Any) -> str:
        """Why these options have to know where tasks begin and end, "": they need not; a task-free
        stream refuses those that have to. By default a part that acts there has to."""
        where = [name for name in AT_BOUNDARIES if name in vars(cls)]
        return f"it acts there, in {where[0]}()" if where else ""

    def at_task_end(self, rows: Any) -> None:
        """Called of each part that defines it, when a task's last step is done; collective.

        Args:
            rows: this rank's share of the task's training samples, without augmentation: an
                iterable of (inputs, targets, ids).
        """

    def _configure(self, options: dict[str, Any]) -> dict[str, Any]:
        """Take every part's options out of `options`, build configs and fresh states; return what is left."""
        chosen, rest = route(type(self), options)
        for part, values in chosen.items():
            if values:
                check_kinds(part, values)
        self.configs = {part: part.Config(**values) for part, values in chosen.items() if hasattr(part, "Config")}
        self.states = {part: part.State() for part in parts_of(type(self)) if hasattr(part, "State")}
        return rest


def _finished(cls: type) -> type | None:
    """The composed class that `cls` only imitates, as Lightning and Fabric make `type(..., (Wrapper, type(opt)), {})` for their
    wrappers. A class in front that shares a base with it, as an optimizer does, is no wrapper: it stands in a wrong place."""
    front, *rest = cls.__bases__
    if issubclass(front, Contract):
        return None
    whole = [_finished(b) or b for b in rest if issubclass(b, Contract) and base_of(b) is not None]
    return next((b for b in whole if set(front.__mro__) & set(b.__mro__) == {object}), None)


def base_of(cls: type) -> type | None:
    """The class the parts stand on: the first in the method resolution order outside the contract; None for a part."""
    cls = _finished(cls) or cls
    for entry in cls.__mro__:
        if not issubclass(entry, Contract) and entry is not object:
            return entry
    return None


def parts_of(cls: type) -> tuple[type, ...]:
    """The parts of a class, leftmost (outermost) first."""
    return tuple(c for c in cls.__mro__ if issubclass(c, Contract) and base_of(c) is None and not is_root(c))


def route(cls: type, options: dict[str, Any]) -> tuple[dict[type, dict[str, Any]], dict[str, Any]]:
    """Sort keyword options to the parts that own them.

    A field that one part owns is a plain keyword, `rho=`; `sam_rho=` does as well, and is the only form where two parts own
    the field, or a part and the base: `looksam_alpha=` and `rmsprop_alpha=`. Returns the fields by part, and the options no
    part owns.
    """
    owners: dict[str, list[type]] = {}
    prefixed: dict[str, tuple[type, str]] = {}
    parts, base = parts_of(cls), base_of(cls)
    for part in parts:
        for name in _fields(part):
            owners.setdefault(name, []).append(part)
            prefixed[f"{part.__name__.lower()}_{name}"] = (part, name)
    assert base is not None
    for name in owners.keys() & inspect.signature(base.__init__).parameters.keys():  # type: ignore[misc]
        owners[name].append(base)
        prefixed[f"{base.__name__.lower()}_{name}"] = (base, name)
    chosen: dict[type, dict[str, Any]] = {part: {} for part in (*parts, base)}
    rest: dict[str, Any] = chosen[base]
    for name, value in options.items():
        if name in owners:
            names = [part.__name__ for part in owners[name]]
            longer = " or ".join(f"{n.lower()}_{name}=" for n in names)
            check(len(names) == 1, cls.__name__, f"{name}={value!r} is an option of {' and '.join(names)}",
                  "name one of them", f"pass {longer}")
            owner, field = owners[name][0], name
        else:
            owner, field = prefixed.get(name, (base, name))
        check(field not in chosen[owner], cls.__name__, f"{owner.__name__}'s {field} is given twice", "be given once")
        chosen[owner][field] = value
    return {part: chosen[part] for part in parts}, rest


def option_names(cls: type) -> set[str]:
    """Every keyword `route` accepts for `cls`, flat forms only."""
    return {name for part in parts_of(cls) for name in _fields(part)}


def reject_unknown(cls: type, rest: dict[str, Any], allowed: set[str]) -> None:
    """Raise `TypeError` for the first option that neither a part nor `allowed` knows, naming the nearest one."""
    for name in rest:
        if name not in allowed:
            raise TypeError(f"{cls.__name__}: unknown option {name!r}; {nearest(name, allowed | option_names(cls))}")


def sort_parts(parts: tuple[type, ...]) -> tuple[type, ...]:
    """Order parts by their `left_of` declarations, leftmost first; otherwise keep the given order.

    Raises `CompositionError` when the declarations contradict each other.
    """
    left, result = list(parts), []
    while left:
        free = [p for p in left if not any(_is_left_of(q, p) for q in left if q is not p)]
        if not free:
            raise CompositionError(f"{', '.join(p.__name__ for p in left)}: their orders contradict each other")
        left.remove(free[0])
        result.append(free[0])
    return tuple(result)


def _is_left_of(part: Any, other: Any) -> bool:
    """Whether `part` declares that `other`, by name or by what it owns, must stand to its right."""
    return not {other.__name__, *other.owns}.isdisjoint(part.left_of)


def is_root(cls: type) -> bool:
    return cls is Contract or Contract in cls.__bases__


def _fields(part: type) -> tuple[str, ...]:
    config = getattr(part, "Config", None)
    return tuple(field.name for field in dataclasses.fields(config)) if config else ()


def _check_part(cls: type[Contract]) -> None:
    """Refuse a part that could not cooperate."""

    def refuse(why: str) -> None:
        raise CompositionError(f"{cls.__name__}: {why}")

    bases = [b for b in cls.__bases__ if not is_root(b)]
    if bases:
        refuse(f"inherits from {bases[0].__name__}; methods share functions and never inherit from each other")
    if "__init__" in vars(cls):
        refuse("defines __init__; options belong into the nested Config dataclass")
    config = vars(cls).get("Config")
    if config is not None:
        params = getattr(config, "__dataclass_params__", None)
        if params is None or not params.frozen or not all(f.kw_only for f in dataclasses.fields(config)):
            refuse("Config must be a dataclass(frozen=True, kw_only=True)")
        required = [f.name for f in dataclasses.fields(config) if _no_default(f)]
        if required and any(name.startswith("_") for name in required):
            refuse("Config fields must be public")
    state = vars(cls).get("State")
    if state is not None and (not dataclasses.is_dataclass(state) or any(_no_default(f) for f in dataclasses.fields(state))):
        refuse("State must be a dataclass whose fields all have defaults")
    for name in ("example", "off", "search"):
        told = vars(cls).get(name, {})
        unknown = sorted(set(told) - set(_fields(cls))) if isinstance(told, Mapping) else []
        if unknown:
            hint = nearest(unknown[0], _fields(cls))
            refuse(f"{name} has {unknown[0]!r}, which is no field of its Config; {hint}")
    for method, made in (vars(cls).get("makes") or {}).items():
        unknown = sorted({name for name in made if "." not in name} - set(_fields(cls)))
        if unknown:
            refuse(f"makes {method!r} of {unknown[0]!r}, which is no field of its Config; {nearest(unknown[0], _fields(cls))}")
    for name in cls.final:
        if name in vars(cls):
            refuse(f"overrides {name}(), which is final; override a verb: {', '.join(cls.verbs)}")
    for name in cls.verbs:
        if name in vars(cls) and not _calls_super(vars(cls)[name]):
            refuse(f"{name}() never calls super().{name}(...), so it would silence every mixin to its right")


def _no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _calls_super(function: Any) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is None or "super" in code.co_names or any("super" in getattr(c, "co_names", ()) for c in code.co_consts)


def _check_composed(cls: type[Contract], base: type) -> None:
    """Refuse a class whose parts are in a wrong place or order, or fight over a resource."""
    parts = parts_of(cls)
    line = f"class {cls.__name__}({', '.join([*(p.__name__ for p in _repaired(parts)), base.__name__])}): ..."
    order = list(cls.__mro__)
    behind = [part.__name__ for part in parts if order.index(part) > order.index(base)]
    if behind:
        raise CompositionError(f"{cls.__name__}: {', '.join(behind)} stands to the right of its base {base.__name__}; "
                               f"write {line}")
    for name in cls.final:
        if name in vars(cls):
            raise CompositionError(f"{cls.__name__}: {name}() is final; override a verb: {', '.join(cls.verbs)}")
    for name in cls.verbs:
        if name in vars(cls) and not _calls_super(vars(cls)[name]):
            raise CompositionError(f"{cls.__name__}: {name}() never calls super().{name}(...)")
    families = [c for c in order if is_root(c) and c is not Contract]
    if len(families) > 1:
        raise CompositionError(f"{cls.__name__}: its mixins belong to {len(families)} families "
                               f"({', '.join(f.__name__ for f in families)}); compose each family over its own base")
    owners: dict[str, type] = {}
    for part in parts:
        for resource in part.owns:  # type: ignore[attr-defined]
            if resource in owners:
                raise CompositionError(f"{cls.__name__}: {owners[resource].__name__} and {part.__name__} both own the "
                                       f"{resource}; keep one of them")
            owners[resource] = part
    for i, part in enumerate(parts):
        for other in parts[:i]:
            if _is_left_of(part, other):
                raise CompositionError(f"{cls.__name__}: {part.__name__} must stand to the left of {other.__name__}; "
                                       f"write {line}")


def _repaired(parts: tuple[type, ...]) -> tuple[type, ...]:
    try:
        return sort_parts(parts)
    except CompositionError:
        return parts
