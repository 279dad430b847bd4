"""Importance of every weight, from exact per-sample gradients: diagonal Fisher information and output sensitivity.

The model is called as a function of its weights (`torch.func`), so nothing of an engine moves: no `.grad`, no buffer, no
collective inside. Sums of rows are reduced over ranks as sums, together with their number, so that ranks may hold different
numbers of rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional

from everbatch import seeds
from everbatch.distributed import World
from everbatch.engines.shards import wide
from everbatch.errors import check
from everbatch.optim.memory.by_layer import COMPARED, ByLayer, Size, Values, of_one
from everbatch.optim.memory.replica import Call, Factory, Weights, evaluating, replica, require_replica
from everbatch.optim.mixin import OptimizerMixin
from everbatch.problems import Problem
from everbatch.rows import Rows as Inputs
from everbatch.rows import count_of, each

__all__ = ["ESTIMATORS", "Estimator", "Factory", "Rows", "diagonal_fisher", "fisher_sums", "output_sensitivity",
           "sensitivity_sums"]

Rows = tuple[Any, ...]
"""(inputs, targets) or (inputs, targets, ids): inputs as the model takes them, un-augmented, one tensor or several by name; ids
int64, unique in the data."""
Estimator = Literal["reference", "empirical", "sampled", "exact", "batch"]
ESTIMATORS = ("reference", "empirical", "sampled", "exact", "batch")


# ---------------------------------------------------------------------------------------------------------- kernels
def fisher_sums(
    call: Call, weights: Weights, inputs: Inputs, targets: Tensor, estimator: Estimator, *, chunk: int = 16,
    uniform: Tensor | None = None, problem: Problem | None = None, layers: ByLayer | None = None,
) -> Weights:
    """Sum over the rows of one batch of an estimator of the diagonal Fisher information.

        reference:  sum_i p(y_i|x_i) (d ln p(y_i|x_i))^2        the released code of refresh learning and of online EWC
        empirical:  sum_i (d ln p(y_i|x_i))^2
        sampled:    the same with y_i drawn from p(.|x_i)
        exact:      sum_i sum_c p(c|x_i) (d ln p(c|x_i))^2
        batch:      (d mean_i ln p(y_i|x_i))^2                  one term per batch; a biased estimate

    Args:
        call: the model as a function of its weights.
        weights: what to differentiate by; not modified.
        inputs: (n, ...).
        targets: (n,) class indices.
        estimator: which of the above. `reference` <= `exact` in every entry.
        chunk: rows differentiated at once; memory chunk times the weights. 1 needs no vectorisation rule of any layer; where one
            is missing, it is taken for the rest, and a warning says so.
        uniform: (n,) in (0, 1), for `sampled`: the label is the quantile of the predicted distribution.
        problem: whose -losses(row) stand in the place of ln p(y_i|x_i), for `empirical` and `batch`; None: class indices. A row's
            loss is summed over its units, so that importance grows with the square of a sequence's length.
        layers: what an earlier batch of the same model has shown of it; None: this one is asked anew.

    Returns:
        Sums by name, in the weights' dtype, float32 at least.

    Raises:
        ValueError: a label outside the classes.

    Cost: n backward passes in n / chunk calls (`exact`: C times as many; `batch`: one); for models of the layers that `ByLayer`
    knows, and chunk > 1, those of a batch without its weights' gradients, and per layer about as much again.
    """
    if problem is not None:
        return _loss_sums(call, weights, inputs, targets, estimator, chunk, problem, layers)
    with torch.no_grad():  # how many classes there are, one row tells
        logits = call(weights, inputs if estimator == "sampled" else each(lambda v: v[:1], inputs))
    classes = logits.shape[-1]
    odd = targets[(targets < 0) | (targets >= classes)]
    check(not odd.numel(), "fisher_sums", f"label {odd[:1].tolist()}", f"be in [0, {classes})")
    if estimator == "batch":
        gradient = grad(lambda w: functional.cross_entropy(call(w, inputs), targets))(weights)
        return {name: g.to(wide(g)).square() for name, g in gradient.items()}
    if estimator == "sampled":
        assert uniform is not None
        steps = logits.double().softmax(-1).cumsum(-1)
        targets = torch.searchsorted(steps, uniform.to(steps)[:, None]).squeeze(1).clamp(max=classes - 1)
    labels = [torch.full_like(targets, c) for c in range(classes)] if estimator == "exact" else [targets]

    def log_probability(w: Weights, x: Inputs, y: Tensor) -> Tensor:
        return functional.log_softmax(call(w, x), -1).gather(-1, y[:, None])[:, 0]

    sums = {name: torch.zeros_like(w, dtype=wide(w)) for name, w in weights.items()}
    for label in labels:
        _accumulate(sums, log_probability, weights, [inputs, label], chunk, torch.square, layers,
                    weighted=estimator in ("reference", "exact"))
    return sums


def _loss_sums(
    call: Call, weights: Weights, inputs: Inputs, targets: Tensor, estimator: Estimator, chunk: int, problem: Problem,
    layers: ByLayer | None,
) -> Weights:
    """`fisher_sums` of a problem."""
    check(estimator in ("empirical", "batch"), "fisher_sums", f"estimator={estimator!r} and problem={type(problem).__name__}",
          "be empirical or batch", "the others go over the classes of a row")
    if estimator == "batch":
        gradient = grad(lambda w: problem.losses(call(w, inputs), targets).mean())(weights)
        return {name: g.to(wide(g)).square() for name, g in gradient.items()}

    def loss(w: Weights, x: Inputs, y: Tensor) -> Tensor:
        return problem.losses(call(w, x), y)

    sums = {name: torch.zeros_like(w, dtype=wide(w)) for name, w in weights.items()}
    _accumulate(sums, loss, weights, [inputs, targets], chunk, torch.square, layers)
    return sums


def sensitivity_sums(
    call: Call, weights: Weights, inputs: Inputs, *, per_sample: bool = True, chunk: int = 16, layers: ByLayer | None = None,
) -> Weights:
    """Sum of absolute gradients of the squared output norm, which MAS takes for importance; no labels.

        per_sample:  sum_i |d ||u(x_i)||^2|          the original definition
        else:        |d mean_i ||u(x_i)||^2|         one term per batch (Avalanche)

    Args and cost as `fisher_sums`. Source: Aljundi et al. 2018, arXiv 1711.09601.
    """
    if not per_sample:
        count = count_of(inputs)
        gradient = grad(lambda w: call(w, inputs).reshape(count, -1).square().sum(-1).mean())(weights)
        return {name: g.to(wide(g)).abs() for name, g in gradient.items()}

    def output(w: Weights, x: Inputs) -> Tensor:
        return call(w, x).reshape(count_of(x), -1).square().sum(-1)

    sums = {name: torch.zeros_like(w, dtype=wide(w)) for name, w in weights.items()}
    _accumulate(sums, output, weights, [inputs], chunk, torch.abs, layers)
    return sums


def _accumulate(
    sums: Weights, values: Values, weights: Weights, rows: list[Any], chunk: int, size: Size, layers: ByLayer | None, *,
    weighted: bool = False,
) -> None:
    """Add a_i size(d values_i / d w) of every row i to `sums`, `chunk` rows at a time; a_i is exp(values_i) where `weighted`.

    By torch.func; where that has no rule for what the model does, row by row by autograd, and a warning says so; by layer where
    that has shown to give the same.
    """
    def one(w: Weights, *row: Any) -> tuple[Tensor, Tensor]:
        (value,) = values(w, *(each(lambda v: v[None], r) for r in row))
        return value, value

    shared, layers = layers is not None, layers or ByLayer()
    many = vmap(grad(one, has_aux=True), in_dims=(None, *(0,) * len(rows)))
    count, start = count_of(rows[0]), 0
    while start < count:
        rows_now = chunk if layers.fits is not None else min(chunk, COMPARED)
        piece = slice(start, start + rows_now)
        part = [each(lambda v, piece=piece: v[piece], r) for r in rows]  # type: ignore[misc]
        if layers.fits and chunk > 1:
            try:
                _add(sums, layers.sums(values, weights, part, size, weighted=weighted))
                start += rows_now
            except torch.OutOfMemoryError:
                raise
            except Exception:  # the model does other things with these rows; what is wrong with it shows below
                layers.fits = False
            continue
        if chunk == 1:
            gradients, value = of_one(values, weights, [each(lambda v: v[0], r) for r in part])
            gradients, value = {name: g[None] for name, g in gradients.items()}, value[None]
        else:
            try:
                gradients, value = _vectorised(many, weights, part)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                _say_row_by_row(error)
                chunk = 1
                continue
        found = {}
        for name, g in gradients.items():
            sizes = size(g.to(sums[name].dtype))
            found[name] = (sizes * value.exp().view(-1, *(1,) * (g.dim() - 1)) if weighted else sizes).sum(0)
        if layers.fits is None and chunk > 1 and (shared or start + rows_now < count):
            layers.compare(values, weights, part, size, found, weighted=weighted)
        _add(sums, found)
        start += rows_now


def _add(sums: Weights, found: Weights) -> None:
    for name, value in found.items():
        sums[name] += value


def _say_row_by_row(error: Exception) -> None:
    """Tell why several rows at once were not possible."""
    said = (str(error).splitlines() or [type(error).__name__])[0][:200]
    warnings.warn(f"importance: the model does what torch.func cannot for several rows at once ({said}), so it is taken row by "
                  "row, which is slower; chunk=1 says so beforehand", stacklevel=7)


def _vectorised(many: Callable[..., tuple[Weights, Tensor]], weights: Weights, part: list[Any]) -> tuple[Weights, Tensor]:
    """Several rows at once, or an error with the cure: models that look at an attention mask to decide what to run."""
    try:
        return many(weights, *part)
    except RuntimeError as error:
        if "data-dependent control flow" not in str(error):
            raise
        raise ValueError("importance: the model decides by its inputs what it runs, which several rows at once do not allow, "
                         "must be asked row by row: set chunk=1; or leave out the attention mask, which right padding under "
                         "a causal mask does not need") from error


# --------------------------------------------------------------------------------------------------- over an optimizer
def diagonal_fisher(
    opt: OptimizerMixin, batches: Iterable[Rows], estimator: Estimator = "empirical", *, chunk: int = 16,
    denominator: Literal["samples", "loader"] = "samples", factory: Factory | None = None, draw: int = 0,
    problem: Problem | None = None,
) -> Weights:
    """Diagonal Fisher information of the model at its present weights, in evaluation mode, over the rows of all ranks.

    Args:
        opt: a composed optimizer that was built with the module (or on an engine).
        batches: this rank's rows of the task's data, each row on one rank only; ranks may hold different numbers, or none.
        estimator: see `fisher_sums`.
        chunk: rows differentiated at once.
        denominator: "samples" divides by the rows of all ranks; "loader" by batches * size of the first, which counts a short
            last batch as whole (the reference code). The estimator "batch" always divides by the number of batches.
        factory: builds the bare model on the CPU; needed where the weights of the module are sharded (ZeRO-3, FSDP2). A deep
            copy of the module taken before sharding does as well: `factory=lambda: copy`.
        draw: number of this estimate, so that `sampled` draws other labels for each.
        problem: see `fisher_sums`; by default the optimizer's own, `opt.problem`, which `Trainer` sets.

    Returns:
        Whole tensors by name, the same on every rank, in the masters' dtype, float32 at least. Pass them to
        `consolidate_ewc(importance=...)` and `update_fisher(importance=...)` to pay for one estimate where two methods want it.

    Raises:
        ValueError: on every rank: no rows at all, entries that are not finite. On one: labels outside the classes, no ids for
            "sampled".
        UnsupportedHost: sharded weights and no `factory`; an optimizer built without its module.

    Cost: see `fisher_sums`; one copy of the whole model, more where weights are sharded or in bf16 (then the fp32 masters are
    gathered, one replica per rank); one all-reduce of the whole sum.
    """
    who = "diagonal_fisher"
    check(estimator in ESTIMATORS, who, f"estimator={estimator!r}", f"be one of {', '.join(ESTIMATORS)}")
    seen = _Counter(partial_matters=estimator == "batch" or denominator == "loader")

    def sums(call: Call, weights: Weights, rows: Rows) -> Weights:
        check(len(rows) >= 2, who, f"rows of {len(rows)} tensor", "be (inputs, targets), or (inputs, targets, ids)")
        uniform = None
        if estimator == "sampled":
            check(len(rows) == 3, who, "no ids", "be given for estimator='sampled', whose draws are a function of them",
                  "yield (inputs, targets, ids)")
            uniform = torch.from_numpy(seeds.uniform_keys(rows[2].cpu().numpy(), opt.seed, "fisher", draw))
        chosen = opt.problem if problem is None else problem
        return fisher_sums(call, weights, rows[0], rows[1], estimator, chunk=chunk, uniform=uniform, problem=chosen,
                           layers=layers)

    layers = ByLayer()
    count = "batches" if estimator == "batch" else "loader" if denominator == "loader" else "rows"
    return _estimate(opt, batches, sums, seen, count, factory)


def output_sensitivity(
    opt: OptimizerMixin, batches: Iterable[Rows], *, per_sample: bool = True, chunk: int = 16, factory: Factory | None = None,
) -> Weights:
    """Mean absolute gradient of the squared output norm over the rows of all ranks; see `sensitivity_sums` and, for what is
    passed, returned, raised and paid, `diagonal_fisher`. Of each item of `batches` only the inputs are used."""
    seen, layers = _Counter(partial_matters=not per_sample), ByLayer()
    return _estimate(opt, batches, lambda call, weights, rows: sensitivity_sums(
        call, weights, rows[0], per_sample=per_sample, chunk=chunk, layers=layers), seen, "rows" if per_sample else "batches",
        factory)


class _Counter:
    """Rows and batches seen by this rank."""

    def __init__(self, *, partial_matters: bool) -> None:
        self.rows = self.batches = self.first = 0
        self.partial_matters = partial_matters

    def add(self, rows: int) -> None:
        self.first = self.first or rows
        self.rows, self.batches = self.rows + rows, self.batches + 1
        if rows != self.first and self.partial_matters:
            warnings.warn(f"importance: a batch of {rows} rows after one of {self.first} counts as a whole batch here; drop it, "
                          "or use an estimator over samples", stacklevel=6)

    def value(self, what: str) -> int:
        return {"rows": self.rows, "batches": self.batches, "loader": self.batches * self.first}[what]


def _estimate(
    opt: OptimizerMixin, batches: Iterable[Rows], sums: Callable[[Call, Weights, Rows], Weights], seen: _Counter, count: str,
    factory: Factory | None,
) -> Weights:
    """Sum over this rank's batches, then over ranks, then divide."""
    host, world = opt.host, World.current()
    host.publish_if_dirty()
    require_replica(host, factory, "importance")
    call, weights, root = replica(host, factory)
    dtype = next(iter(weights.values())).dtype
    totals = {name: torch.zeros_like(w, dtype=wide(w)) for name, w in weights.items()}
    problem = ""

    def to_host(value: Tensor) -> Tensor:
        return value.to(host.device, dtype if value.is_floating_point() else None)

    with evaluating(root):
        try:
            for rows in batches:
                moved = tuple(each(to_host, r) for r in rows)
                count_here = count_of(rows[0])
                if count_here:
                    seen.add(count_here)
                    for name, value in sums(call, weights, moved).items():
                        totals[name] += value
        except ValueError as error:  # one rank's bad row must not leave the others waiting
            problem = str(error)
    number, failed = world.sum(torch.tensor([seen.value(count), bool(problem)], dtype=torch.float64, device=host.device))
    if failed:
        raise ValueError(next(text for text in world.gather(problem) if text))
    check(number.item() > 0, "importance", "no rows on any rank", "be given the task's data")
    flat = world.sum(torch.cat([t.reshape(-1) for t in totals.values()]))
    flat = flat / number.to(flat.dtype)
    result = {n: part.view(t.shape) for (n, t), part in zip(
        totals.items(), torch.split(flat, [t.numel() for t in totals.values()]), strict=True)}
    odd = [n for n, t in result.items() if not bool(torch.isfinite(t).all())]
    check(not odd, "importance", f"entries of {odd[:5]} are not finite", "be", "look at the weights and the inputs")
    return result
