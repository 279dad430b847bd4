"""The composition contract: what cannot work is refused when the class is made, with the line that does."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from everbatch.composition import compose
from everbatch.contract import Contract, base_of, option_names, parts_of, route
from everbatch.errors import CompositionError
from everbatch.optim import EMA, SAM, ClipGradNorm, LookSAM, OptimizerMixin, ShrinkPerturb


class Mask(OptimizerMixin):
    """Stands in for a mixin that masks the gradient."""

    owns = ("masks",)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        gamma: float = 0.5
        max_norm: float = 2.0

    def edit_gradient(self) -> None:
        super().edit_gradient()


class DynamicSparsity(OptimizerMixin):
    """Has the name that ClipGradNorm and EMA must stand left of."""

    owns = ("masks",)

    def edit_gradient(self) -> None:
        super().edit_gradient()


def refused(text: str, make: Any) -> None:
    with pytest.raises(CompositionError) as error:
        make()
    assert text in str(error.value)


def test_order_is_an_error_with_the_corrected_line() -> None:
    refused("Wrong: ClipGradNorm must stand to the left of DynamicSparsity; "
            "write class Wrong(ClipGradNorm, DynamicSparsity, SGD): ...",
            lambda: type("Wrong", (DynamicSparsity, ClipGradNorm, torch.optim.SGD), {}))


def test_a_mixin_behind_its_base_is_an_error_with_the_corrected_line() -> None:
    refused("Wrong: SAM stands to the right of its base SGD; write class Wrong(SAM, SGD): ...",
            lambda: type("Wrong", (torch.optim.SGD, SAM), {}))
    refused("write class Wrong(ClipGradNorm, SAM, SGD): ...",
            lambda: type("Wrong", (ClipGradNorm, torch.optim.SGD, SAM), {}))


def test_two_owners_of_one_resource() -> None:
    refused("DynamicSparsity and Mask both own the masks; keep one of them",
            lambda: compose(DynamicSparsity, Mask, base=torch.optim.SGD))


def test_contradicting_orders() -> None:
    left = type("LeftPart", (OptimizerMixin,), {"left_of": ("RightPart",)})
    right = type("RightPart", (OptimizerMixin,), {"left_of": ("LeftPart",)})
    refused("their orders contradict each other", lambda: compose(left, right, base=torch.optim.SGD))


def test_two_families() -> None:
    class OtherMixin(Contract):
        pass

    class Other(OtherMixin):
        pass

    refused("its mixins belong to 2 families (OptimizerMixin, OtherMixin)", lambda: compose(SAM, Other, base=torch.optim.SGD))


def test_a_verb_without_super() -> None:
    refused("Silent: edit_gradient() never calls super().edit_gradient(...), so it would silence every mixin to its right",
            lambda: type("Silent", (OptimizerMixin,), {"edit_gradient": lambda self: None}))
    refused("Own: update() never calls super().update(...)",
            lambda: type("Own", (SAM, torch.optim.SGD), {"update": lambda self: None}))


@pytest.mark.parametrize("name", OptimizerMixin.final)
def test_the_step_is_final(name: str) -> None:
    refused(f"{name}() is final; override a verb: move_parameters, estimate_gradient",
            lambda: type("Own", (SAM, torch.optim.SGD), {name: lambda self: None}))
    refused(f"overrides {name}(), which is final", lambda: type("Part", (OptimizerMixin,), {name: lambda self: None}))


def test_a_part_defines_no_init_and_inherits_from_no_method() -> None:
    refused("defines __init__; options belong into the nested Config dataclass",
            lambda: type("Part", (OptimizerMixin,), {"__init__": lambda self: None}))
    refused("inherits from SAM; methods share functions and never inherit from each other", lambda: type("Part", (SAM,), {}))


def test_config_and_state_are_what_the_contract_says() -> None:
    @dataclass
    class Loose:
        x: float = 1.0

    @dataclass(frozen=True, kw_only=True)
    class Hidden:
        _x: float

    @dataclass
    class Needy:
        x: float

    refused("Config must be a dataclass(frozen=True, kw_only=True)", lambda: type("Part", (OptimizerMixin,), {"Config": Loose}))
    refused("Config fields must be public", lambda: type("Part", (OptimizerMixin,), {"Config": Hidden}))
    refused("State must be a dataclass whose fields all have defaults",
            lambda: type("Part", (OptimizerMixin,), {"State": Needy}))


def test_an_option_of_a_part_and_of_the_base_is_named_in_full() -> None:
    model, cls = nn.Linear(2, 1), compose(LookSAM, base=torch.optim.RMSprop)
    optimizer = cls(model, lr=0.1, looksam_alpha=0.3, rmsprop_alpha=0.9)
    assert (optimizer.configs[LookSAM].alpha, optimizer.param_groups[0]["alpha"]) == (0.3, 0.9)
    optimizer = cls(model, lr=0.1)
    assert (optimizer.configs[LookSAM].alpha, optimizer.param_groups[0]["alpha"]) == (0.7, 0.99)
    with pytest.raises(ValueError, match="alpha=0.5 is an option of LookSAM and RMSprop, must name one of them; "
                                         "pass looksam_alpha= or rmsprop_alpha="):
        cls(model, lr=0.1, alpha=0.5)
    with pytest.raises(TypeError, match="unknown option 'rmsprop_momentum'"):  # a field of one of them has its plain name
        cls(model, lr=0.1, rmsprop_momentum=0.5)


def test_compose_sorts_and_builds_the_class_a_statement_would() -> None:
    cls = compose(DynamicSparsity, SAM, EMA, ClipGradNorm, base=torch.optim.SGD)
    assert parts_of(cls) == (SAM, EMA, ClipGradNorm, DynamicSparsity)
    assert (cls.__name__, base_of(cls), cls.__module__) == ("SAMEMAClipGradNormDynamicSparsitySGD", torch.optim.SGD, __name__)
    assert compose(SAM, base=torch.optim.SGD, name="Sharp").__name__ == "Sharp"
    bare = compose(base=torch.optim.AdamW)
    assert (parts_of(bare), bare.__bases__) == ((), (OptimizerMixin, torch.optim.AdamW))


def test_compose_refuses_what_is_no_mixin() -> None:
    refused("is not a mixin; pass mixins first and base=...", lambda: compose(torch.optim.SGD, base=torch.optim.Adam))
    refused("is not a mixin", lambda: compose(OptimizerMixin, SAM, torch.nn.Linear, base=torch.optim.SGD))


SGD = torch.optim.SGD
ONE = nn.Linear(1, 1)


@pytest.mark.parametrize(("mixins", "base", "text"), [
    ((SAM,), "sgd", "compose: base='sgd' is not a class; pass base=torch.optim.SGD"),
    ((SAM,), "torch.optim.AdamW", "is not a class; pass base=torch.optim.AdamW"),
    ((SAM,), "sdg", "pass one such as base=torch.optim.SGD; did you mean 'sgd'?"),
    ((SAM,), SGD(ONE.parameters()), "base=an instance of SGD is not a class; pass base=torch.optim.SGD and its options to the "
                                    "class that compose returns"),
    ((SAM,), functools.partial(SGD, lr=0.1), "base=functools.partial(SGD, ...) is not a class; pass base=torch.optim.SGD and its "
                                             "options (lr=0.1) to the class that compose returns"),
    ((SAM,), functools.partial(SGD), "pass base=torch.optim.SGD and its options to the class"),
    ((SAM,), torch.optim, "is not a class; pass one such as base=torch.optim.SGD"),
    ((SAM,), lambda p: SGD(p), "is not a class; pass one such as base=torch.optim.SGD"),
    ((SAM, SGD), None, "torch.optim.SGD is the base, not a mixin; write compose(SAM, base=torch.optim.SGD)"),
    ((SAM, "sgd"), None, "'sgd' is the base, not a mixin; write compose(SAM, base=torch.optim.SGD)"),
    ((SAM, functools.partial(SGD, lr=0.1)), None, "is the base, not a mixin; write compose(SAM, base=torch.optim.SGD)"),
    ((SAM,), None, "no base; name the class that the mixins stand on, as in compose(SAM, base=torch.optim.SGD)"),
    ((SAM,), ClipGradNorm, "base=ClipGradNorm is a mixin; pass it before base="),
    ((SAM,), nn.Linear, "SAMLinear: its base Linear is no optimizer with a step of its own; end the class in one"),
    ((SAM,), torch.optim.Optimizer, "its base Optimizer is no optimizer with a step of its own"),
    ((SAM,), compose(SAM, base=SGD), "SAM is a part of base=SAMSGD already; leave one of them out"),
    ((SAM, ClipGradNorm, SAM), SGD, "SAM is given twice; list it once"),
    (("sam",), SGD, "'sam' is not a mixin; pass the class everbatch.optim.SAM"),
    (("clipgradnrm",), SGD, "is not a mixin; did you mean 'clipgradnorm'?"),
    (([SAM],), SGD, "is not a mixin; pass mixins one by one, compose(A, B, base=...)"),
])
def test_compose_says_in_one_line_which_call_works(mixins: Any, base: Any, text: str) -> None:
    refused(text, lambda: compose(*mixins, base=base))
    with pytest.raises(CompositionError) as error:
        compose(*mixins, base=base)
    assert "\n" not in str(error.value)


def test_a_composed_class_can_be_composed_further() -> None:
    class Sharp(SAM, torch.optim.SGD):
        pass

    class Sharper(ClipGradNorm, Sharp):
        pass

    assert parts_of(Sharper) == (ClipGradNorm, SAM) and base_of(Sharper) is torch.optim.SGD
    opt = Sharper(nn.Linear(2, 1), lr=0.1, rho=0.2, max_norm=3.0)
    assert (opt.configs[SAM].rho, opt.configs[ClipGradNorm].max_norm) == (0.2, 3.0)


def test_an_option_of_two_parts_needs_its_longer_name() -> None:
    cls = compose(ClipGradNorm, Mask, base=torch.optim.SGD)
    with pytest.raises(ValueError, match="max_norm=3 is an option of ClipGradNorm and Mask, must name one of them; "
                                         "pass clipgradnorm_max_norm= or mask_max_norm="):
        cls(nn.Linear(2, 1), lr=0.1, max_norm=3)
    opt: Any = cls(nn.Linear(2, 1), lr=0.1, clipgradnorm_max_norm=3.0, mask_max_norm=4.0, gamma=0.1)
    assert (opt.configs[ClipGradNorm].max_norm, opt.configs[Mask].max_norm, opt.configs[Mask].gamma) == (3.0, 4.0, 0.1)


def test_an_option_given_twice() -> None:
    with pytest.raises(ValueError, match="SAM's rho is given twice"):
        compose(SAM, base=torch.optim.SGD)(nn.Linear(2, 1), lr=0.1, rho=0.1, sam_rho=0.2)


@pytest.mark.parametrize(("wrong", "right"), [("roh", "rho"), ("max_nrom", "max_norm"), ("momentun", "momentum"),
                                               ("sede", "seed")])
def test_an_unknown_option_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(TypeError, match=f"unknown option '{wrong}'; did you mean '{right}'"):
        compose(ClipGradNorm, SAM, base=torch.optim.SGD)(nn.Linear(2, 1), lr=0.1, **{wrong: 1})


def test_routing() -> None:
    cls = compose(ClipGradNorm, EMA, ShrinkPerturb, base=torch.optim.SGD)
    chosen, rest = route(cls, {"max_norm": 1.0, "ema_ema_decay": 0.9, "sigma": 0.1, "lr": 0.1})
    assert chosen == {ClipGradNorm: {"max_norm": 1.0}, EMA: {"ema_decay": 0.9}, ShrinkPerturb: {"sigma": 0.1}}
    assert rest == {"lr": 0.1}
    assert {"max_norm", "ema_decay", "ema_every", "shrink", "sigma", "noise"} <= option_names(cls)


def test_describe_tells_order_passes_and_cost() -> None:
    opt: Any = compose(ClipGradNorm, EMA, SAM, base=torch.optim.SGD)(nn.Linear(2, 1), lr=0.1)
    text = opt.describe()
    assert text.startswith("ClipGradNormEMASAMSGD = ClipGradNorm > EMA > SAM > SGD on plain, 1 rank\n")
    assert "passes per step    2" in text and "estimate_gradient  SAM" in text and "max_norm=1.0" in text
    quiet: Any = compose(SAM, base=torch.optim.SGD)(nn.Linear(2, 1), lr=0.1, rho=0.0)
    assert "passes per step    1" in quiet.describe()
