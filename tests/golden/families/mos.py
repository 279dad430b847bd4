"""`mos_*`: adapters, their merging, class statistics, the identity contrast, classifier alignment, and retrieval."""

from __future__ import annotations

import torch
from torch import Tensor

from everbatch.distributed import World
from everbatch.train.mos.alignment import fit_head
from everbatch.train.mos.gaussians import Moments
from everbatch.train.mos.merging import merge_, merges_per_step
from everbatch.train.mos.terms import identity_contrast
from golden.comparison import Array, Comparison, Vectors

__all__ = ["check_alignment", "check_contrast", "check_drift", "check_merging", "check_statistics"]


def check_merging(file: Vectors, compare: Comparison) -> None:
    """Four tasks of merges, what is stored of them, and the sums over what is stored."""
    prefix = torch.zeros_like(_t(file["before"])[0])
    for task, given in enumerate(file["before"]):
        for times, key in ((1, "after_one_merge"), (3, "after_three_merges")):
            own = _t(given)
            if task:
                merge_([own], [prefix / task], float(file["alpha"]), times)
            compare.close(key, _n(own), file[key][task])
        compare.close("stored_adapters", _n(own), file["stored_adapters"][task])
        prefix = prefix + own
        compare.close("prefix_sums", _n(prefix), file["prefix_sums"][task])
    size = 2 * file.integer("d_model") * file.integer("bottleneck") + file.integer("d_model") + file.integer("bottleneck")
    compare.close("before", tuple(file["before"].shape), _ints(4, file.integer("depth"), size))


def check_drift(file: Vectors, compare: Comparison) -> None:
    """The released code's merges at evaluation: one for each block of a batch's forward, so that a stored adapter, and with it
    the features, move from batch to batch. The library makes as many in a training step of merging="released" alone."""
    steps = file["adapter2_before_and_after_each_batch"]
    own, mean = _t(steps[0]), _t(file["prefix_mean_of_adapters_0_1"])
    for want in steps[1:]:
        merge_([own], [mean], float(file["alpha"]), merges_per_step("released", file.integer("depth")) - 1)
        compare.close("adapter2_before_and_after_each_batch", _n(own), want)
    compare.close("note_adapter_index", 2, file["note_adapter_index"])  # adapters 0 and 1 come before it
    # The network that gave the features is not in the file: that they drift is all there is to see.
    moved = _t(file["features_each_batch"]).diff(dim=0).abs().amax((1, 2))
    compare.close("features_each_batch", (moved > 1e-6).numpy(), _ints(*[1] * len(moved)).astype(bool))


def check_statistics(file: Vectors, compare: Comparison) -> None:
    """Means and covariances by class, in both forms of the released code."""
    features, labels = _t(file["features"]), _t(file["labels"])
    for squares, covariance, key in (("outer", "full", "covariance"), ("diagonal", "diagonal", "variance")):
        moments = Moments(int(labels.max()) + 1, squares)  # type: ignore[arg-type]
        for rows in torch.arange(len(labels)).split(10):
            moments.add(features[rows], labels[rows], torch.ones(len(rows), dtype=torch.bool))
        moments.reduce(World())
        compare.close(f"{key}_mean", _n(moments.means()), file[f"{key}_mean"])
        spread = moments.spread(covariance, 0)  # type: ignore[arg-type]
        compare.close(f"{key}_cov", _n(spread), file[f"{key}_cov"])
    centred = _t(file["covariance_cov"]).diagonal(dim1=1, dim2=2) - float(file["ridge"])
    compare.close("covariance_cov", _n(centred + 1e-4), file["variance_cov"])


def check_contrast(file: Vectors, compare: Comparison) -> None:
    """The loss and its gradient, without class means and with them."""
    for key, means in (("empty", torch.zeros(0, 5)), ("prev", _t(file["prev_means"]))):
        features = _t(file["features"]).requires_grad_()
        loss = float(file["reg"]) * identity_contrast(features, means)
        loss.backward()
        compare.close(f"loss_{key}", _n(loss), file[f"loss_{key}"])
        compare.close(f"grad_{key}", _n(features.grad), file[f"grad_{key}"])
    same = identity_contrast(_t(file["features"]), _t(file["prev_means"]))
    logits = torch.cat([_t(file["prev_means"]), _t(file["features"])])
    logits = logits @ logits.T / float(file["temperature"])
    plain = (logits.logsumexp(1) - logits.diagonal()).mean()
    compare.close("temperature", _n(same), plain.numpy())


def check_alignment(file: Vectors, compare: Comparison) -> None:
    """The head after the epochs of the file's batches."""
    epochs = file.integer("epochs")
    batches = [list(zip(_t(x), _t(y), strict=True)) for x, y in zip(file["batches"], file["labels"], strict=True)]
    weight, bias = fit_head(
        _t(file["init_weight"]), _t(file["init_bias"]), batches, epochs, seen=file.integer("total_classes"),
        lr=float(file["lr"]), weight_decay=float(file["weight_decay"]))
    compare.close("final_weight", _n(weight), file["final_weight"])
    compare.close("final_bias", _n(bias), file["final_bias"])
    compare.close("momentum", 0.9, file["momentum"])
    _statistics_of_the_batches(file, compare)


def _statistics_of_the_batches(file: Vectors, compare: Comparison) -> None:
    """What the file's batches were drawn from goes with them: as many rows of every class, of these means, in each epoch."""
    for x, y in zip(file["batches"], file["labels"], strict=True):
        counts = torch.bincount(_t(y).flatten())
        compare.close("labels", counts.numpy(), _ints(*[file.integer("samples_per_class")] * len(file["cls_mean"])))
        for label, (mean, covariance) in enumerate(zip(file["cls_mean"], file["cls_cov"], strict=True)):
            rows = _t(x)[_t(y) == label]
            # Six standard errors: a mean of the file's own would be far off.
            error = (rows.mean(0) - _t(mean)).abs() / (_t(covariance).diagonal() / len(rows)).sqrt()
            compare.close("cls_mean", bool((error < 6).all()), _ints(1).astype(bool)[0])


def _n(tensor: Tensor | None) -> Array:
    assert tensor is not None
    return tensor.detach().numpy()


def _t(array: Array) -> Tensor:
    return torch.from_numpy(array.copy())


def _ints(*values: int) -> Array:
    return torch.tensor(values).numpy()
