"""The golden vectors, and the runner itself: it passes other vectors in the same formats and fails altered ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from golden.check import check_file, main
from golden.families import FAMILIES

GOLDEN = Path(__file__).parent / "golden"
Named = dict[str, Tensor]


def report(capsys: pytest.CaptureFixture[str], folder: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    code = main([str(folder), "--json"])
    return code, {entry["file"]: entry for entry in json.loads(capsys.readouterr().out)}


@pytest.mark.distributed
def test_the_library_reproduces_the_golden_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    code, files = report(capsys, GOLDEN)
    assert code == 0
    for name, entry in files.items():
        assert entry["status"] == "pass" and entry["error"] <= 1 and entry["arrays"] > 0, entry
        partly = name == "grip_analytic.npz"  # its projections are in the library, its unlearning is not
        assert partly or all(key.endswith(("num_batches_tracked", "numpy_seed", "_BUGGY")) for key in entry["unchecked"]), entry


# ------------------------------------------------------------------------------------------------- altered vectors
def save(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]


def altered(name: str, folder: Path, change: Callable[[dict[str, NDArray[Any]]], None]) -> Path:
    """A copy of a golden file with something changed."""
    with np.load(GOLDEN / name) as archive:
        arrays = dict(archive)
    change(arrays)
    save(folder / name, arrays)
    return folder / name


CASES = [
    *(("lb_sam_sgd_f64.npz", f"step{t}/{kind}") for t in (1, 5) for kind in (
        "param/fc2.weight", "g1/fc1.bias", "g2/fc1.weight", "perturbed/fc2.bias", "loss1", "loss2", "gradnorm1")),
    ("lb_sam_sgd_f32.npz", "step3/param/fc1.weight"), ("lb_sam_adamw_f64.npz", "step2/param/fc1.bias"),
    *(("lb_sam_bn_sgd_f64.npz", f"step2/{kind}") for kind in (
        "param/bn.weight", "param_buf/bn.running_var", "perturbed_buf/bn.running_mean")),
    ("lb_sam_sgd_f64.npz", "init/fc1.weight"), ("lb_sam_sgd_f64.npz", "x"),
    *(("continual_evaluation_metrics.npz", key) for key in (
        "1/ref_wc_acc", "0/ref_lca10", "1/ref_WF10_per_task", "0/exact_WP100_final_per_task",
        "window/0/exact_rise")),
    ("cl_metrics.npz", "1/forgetting_pycil"), ("cl_metrics.npz", "2/fwt"), ("cl_metrics.npz", "0/random_init_acc"),
    *(("replay_er_der_derpp.npz", key) for key in (
        "er/step1/loss", "der/step3/theta_after/fc2.weight", "derpp/step4/buffer_logits", "derpp/step2/buffer_examples",
        "hp_alpha", "hp_beta", "hp_lr")),
    *(("refresh_derpp_injected_fisher.npz", key) for key in (
        "task0/step1/theta_unlearned/fc2.bias", "task1/step2/grad_ce/fc1.weight", "hp_tau", "hp_delta")),
    ("refresh_derpp_large_delta.npz", "task0/fisher_after_end_task/fc1.weight"),
    *(("regularizers_ewc_si_lwf_cpr.npz", key) for key in (
        "ewc_on/task1/step0/penalty_before", "ewc_on_cpr/task0/step2/loss", "ewc_on/hp_gamma", "ewc_on_cpr/hp_cpr_beta",
        "si_repo/task2/big_omega/fc1.bias", "si_repo/hp_xi", "lwf/1/temperature", "cpr/mean_entropy")),
    ("si_path_integral.npz", "task1/step3/theta_after/fc1.weight"), ("si_path_integral.npz", "hp_c"),
    *(("unified_objective.npz", key) for key in (
        "0/kl_p_q", "1/vcl_kl", "2/ncl_theta_next", "0/refresh_traj", "1/refresh_Fdiag")),
]


@pytest.mark.parametrize(("name", "key"), CASES)
def test_one_altered_value_fails(name: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(arrays: dict[str, NDArray[Any]]) -> None:
        value = arrays[key] = np.array(arrays[key])
        value.reshape(-1)[-1] += 1e-3

    altered(name, tmp_path, change)
    assert main([str(tmp_path)]) == 1
    assert f"FAIL    {name}: largest error" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["reservoir/1/index", "reservoir/0/content_stream_ids", "ring/index", "balancoir/index",
                                 "balancoir/final_labels", "quota/max_size", "priority_reservoir/chunk2/content",
                                 "priority_reservoir/after_resize3", "priority_reservoir/chunk1/content_weights"])
def test_one_altered_choice_fails(key: str, tmp_path: Path) -> None:
    def change(arrays: dict[str, NDArray[Any]]) -> None:
        value = arrays[key] = np.array(arrays[key])
        value.reshape(-1)[-1] += 1

    result = check_file(altered("buffers.npz", tmp_path, change))
    assert result.status == "fail" and result.error is not None and result.error > 1, result


def drop(key: str) -> Callable[[dict[str, NDArray[Any]]], None]:
    return lambda arrays: arrays.pop(key)  # type: ignore[return-value]


def put(key: str, value: object) -> Callable[[dict[str, NDArray[Any]]], None]:
    return lambda arrays: arrays.update({key: np.asarray(value)})


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("lb_sam_sgd_f64.npz", drop("step4/param/fc1.bias"), "key 'step4/param/fc1.bias' is missing"),
        ("lb_sam_sgd_f64.npz", drop("hp_json"), "key 'hp_json' is missing"),
        ("lb_sam_sgd_f64.npz", put("hp_json", '{"lr": 0.1, "roh": 1}'), "unknown option 'roh'; did you mean 'rho'?"),
        ("lb_sam_sgd_f64.npz", put("hp_json", '{"lr": 0.1, "base": "lion"}'), "base 'lion' in hp_json"),
        ("lb_sam_sgd_f64.npz", put("hp_json", '{"dtype": "torch.float32"}'), "dtype torch.float32, x is float64"),
        ("lb_sam_sgd_f64.npz", put("hp_json", '{"world_size": 3}'), "for world_size 3"),
        ("lb_sam_sgd_f64.npz", put("init/head.weight", np.ones((2, 2))), "layer 'head'"),
        ("lb_sam_sgd_f64.npz", put("step1/param/fc1.bias", np.ones(2)), "has shape (2,), the library gives (8,)"),
        ("lb_sam_sgd_f64.npz", put("x", np.array([{}], dtype=object)), "cannot be read: ValueError: Object arrays"),
        ("cl_metrics.npz", put("1/acc_matrix_full", 200 * np.eye(5)), "must be in [0, 100]"),
        ("buffers.npz", put("reservoir/0/randint_draws", np.zeros(3, np.int64)), "the library draws more"),
        ("buffers.npz", put("reservoir/0/n_stream", 7), "holds 35 integers, the library draws 2"),
        ("replay_er_der_derpp.npz", put("hp_minibatch", 5), "a recorded draw of 4 samples, the library takes 5"),
        ("replay_er_der_derpp.npz", drop("hp_weight_decay_derpp"), "hp_weight_decay"),
    ],
)
def test_a_file_against_its_format_is_named(
    name: str, change: Callable[[dict[str, NDArray[Any]]], None], text: str, tmp_path: Path,
) -> None:
    result = check_file(altered(name, tmp_path, change))
    assert result.status == "fail" and text in result.message, result


def test_a_nan_is_no_match(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    altered("cl_metrics.npz", tmp_path, put("0/bwt", np.nan))
    code, files = report(capsys, tmp_path)
    assert code == 1 and files["cl_metrics.npz"]["status"] == "fail" and files["cl_metrics.npz"]["error"] is None


@pytest.mark.parametrize("keep", [0, 20_000])
def test_a_damaged_file_fails_and_hides_no_other(keep: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lb_sam_sgd_f64.npz").write_bytes((GOLDEN / "lb_sam_sgd_f64.npz").read_bytes()[:keep])
    shutil.copy(GOLDEN / "cl_metrics.npz", tmp_path)
    assert main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PASS    cl_metrics.npz")
    assert lines[1].startswith("FAIL    lb_sam_sgd_f64.npz: cannot be read: ")


def test_files_of_later_methods_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "lb_future_sgd_f64.npz", x=np.ones(3))
    assert main([str(tmp_path)]) == 2
    assert f"known prefixes: {', '.join(FAMILIES)}" in capsys.readouterr().err
    shutil.copy(GOLDEN / "cl_metrics.npz", tmp_path)
    assert main([str(tmp_path)]) == 0
    assert "not yet lb_future_sgd_f64.npz: no family of this prefix" in capsys.readouterr().out


def test_nothing_to_check_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert main([str(tmp_path / "missing")]) == 2
    assert "is no folder" in capsys.readouterr().err


# --------------------------------------------------------------------- other vectors in the format of the lb_sam files
def forward(p: Named, x: Tensor, stats: Named | None) -> Tensor:
    """fc1 (tanh, or batch norm and ReLU), fc2, tanh, fc3, ... by hand; moves `stats` when given some."""
    layers = sum(name.startswith("fc") and name.endswith("weight") for name in p)
    for k in range(1, layers + 1):
        x = x @ p[f"fc{k}.weight"].T + p[f"fc{k}.bias"]
        if k == 1 and "bn.weight" in p:
            mean, var, n = x.mean(0), x.var(0, correction=0), len(x)
            if stats is not None:
                stats["bn.running_mean"] += 0.1 * (mean.detach() - stats["bn.running_mean"])
                stats["bn.running_var"] += 0.1 * (var.detach() * n / (n - 1) - stats["bn.running_var"])
            x = ((x - mean) / (var + 1e-5).sqrt() * p["bn.weight"] + p["bn.bias"]).clamp(min=0)
        elif k < layers:
            x = x.tanh()
    return x


def gradient(p: Named, x: Tensor, y: Tensor, stats: Named | None = None) -> tuple[Tensor, Named]:
    p = {n: v.clone().requires_grad_() for n, v in p.items()}
    u = forward(p, x, stats)
    loss = (u.logsumexp(1) - u[torch.arange(len(y)), y]).mean()
    return loss.detach(), dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))


def mean_gradient(p: Named, parts: list[tuple[Tensor, Tensor]], stats: Named | None = None) -> tuple[Tensor, Named]:
    """Loss of the first part, and the gradient averaged over all: over the ranks."""
    each = [gradient(p, x, y, stats) for x, y in parts]
    return each[0][0], {n: torch.stack([g[n] for _, g in each]).mean(0) for n in p}


def update(base: str, p: Named, g: Named, kept: Named, t: int, hp: dict[str, Any]) -> None:
    """SGD with momentum and coupled decay, or AdamW, as their papers have them."""
    for n, w in p.items():
        if base == "sgd":
            d = g[n] + hp["weight_decay"] * w
            kept[n] = hp["momentum"] * kept[n] + d if n in kept else d
            w -= hp["lr"] * kept[n]
        else:
            b1, b2 = hp["betas"]
            kept[n] = b1 * kept.get(n, torch.zeros_like(w)) + (1 - b1) * g[n]
            kept[n + "^2"] = b2 * kept.get(n + "^2", torch.zeros_like(w)) + (1 - b2) * g[n] ** 2
            w *= 1 - hp["lr"] * hp["weight_decay"]
            w -= hp["lr"] * kept[n] / (1 - b1**t) / ((kept[n + "^2"] / (1 - b2**t)).sqrt() + hp["eps"])


def make(path: Path, widths: list[int], batch: int, steps: int, *, bn: bool = False, dtype: torch.dtype = torch.float64,
         ranks: int = 0, seed: int = 0, **hp: Any) -> None:
    """Write a file of SAM steps, computed here without the library."""
    kind: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)}
    shape = (steps, ranks, batch) if ranks else (steps, batch)
    x, y = torch.randn(*shape, widths[0], **kind).to(dtype), torch.randint(widths[-1], shape, **kind)
    p: Named = {}
    for k, (a, b) in enumerate(zip(widths, widths[1:], strict=False), start=1):
        p[f"fc{k}.weight"] = torch.randn(b, a, **kind).to(dtype) / a**0.5
        p[f"fc{k}.bias"] = torch.randn(b, **kind).to(dtype)
        if bn and k == 1:
            p |= {"bn.weight": 1 + 0.1 * torch.randn(b, **kind).to(dtype), "bn.bias": torch.zeros(b, dtype=dtype)}
    stats: Named = {"bn.running_mean": torch.zeros(widths[1], dtype=dtype),
                    "bn.running_var": torch.ones(widths[1], dtype=dtype)} if bn else {}
    out: Named = {"x": x, "y": y} | {f"init/{n}": v.clone() for n, v in p.items()}
    out |= {f"init_buf/{n}": v.clone() for n, v in stats.items()}
    out |= {"init_buf/bn.num_batches_tracked": torch.tensor(0)} if bn else {}
    kept: Named = {}
    for t in range(1, steps + 1):
        parts = list(zip(x[t - 1], y[t - 1], strict=True)) if ranks else [(x[t - 1], y[t - 1])]
        loss1, g1 = mean_gradient(p, parts, stats if bn else None)
        norm = torch.cat([g.flatten() for g in g1.values()]).norm()
        moved = {n: v + hp["rho"] * g1[n] / (norm + 1e-12) for n, v in p.items()}
        loss2, g2 = mean_gradient(moved, parts)
        update(hp.get("base", "sgd"), p, g2, kept, t, hp)
        now = {"g1": g1, "g2": g2, "perturbed": moved, "param": p, "param_buf": stats, "final_grad": g2}
        out |= {f"step{t}/{kind}/{n}": v.clone() for kind, values in now.items() for n, v in values.items()}
        if not ranks:
            out |= {f"step{t}/loss1": loss1, f"step{t}/loss2": loss2, f"step{t}/gradnorm1": norm}
    text = json.dumps({**hp, "dtype": str(dtype), **({"world_size": ranks, "perturbation": "global"} if ranks else {})})
    save(path, {"hp_json": np.asarray(text), **{n: v.numpy() for n, v in out.items()}})


SGD = {"base": "sgd", "lr": 0.3, "momentum": 0.5, "weight_decay": 0.02}
ADAMW = {"base": "adamw", "lr": 0.03, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1}
OTHERS: dict[str, dict[str, Any]] = {
    "lb_sam_wide.npz": {"widths": [11, 23, 7], "batch": 4, "steps": 9, "rho": 0.3, **SGD},
    "lb_sam_deep.npz": {"widths": [3, 5, 4, 2], "batch": 17, "steps": 3, "rho": 0.001, **ADAMW},
    "lb_sam_bn_other.npz": {"widths": [5, 6, 4], "batch": 8, "steps": 4, "rho": 0.7, "bn": True, **ADAMW},
    "lb_sam_f32_other.npz": {"widths": [2, 9, 3], "batch": 12, "steps": 6, "rho": 0.1, "dtype": torch.float32, **SGD},
    "lb_sam_ddp3_other.npz": {"widths": [4, 3, 2], "batch": 5, "steps": 2, "rho": 0.2, "ranks": 3, **SGD},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.distributed, pytest.mark.rotated(0, 3)] if "ranks" in o else ())
             for n, o in OTHERS.items()])
def test_other_vectors_of_the_same_format_pass(name: str, tmp_path: Path) -> None:
    make(tmp_path / name, **OTHERS[name])
    result = check_file(tmp_path / name)
    assert result.status == "pass", result
    assert all(key.endswith("num_batches_tracked") for key in result.unchecked), result
    kinds = 6 if OTHERS[name].get("bn") else 5
    assert result.arrays > kinds * OTHERS[name]["steps"] * 4


def test_one_task_has_no_transfer(tmp_path: Path) -> None:
    nothing = {f"0/{key}": np.asarray(np.nan) for key in ("bwt", "fwt", "forgetting_mammoth", "forgetting_pycil")}
    averages = {f"0/{key}_accuracy": np.asarray(41.5) for key in ("final_average", "average_incremental")}
    save(tmp_path / "cl_metrics_one.npz", {"0/acc_matrix_full": np.asarray([[41.5]]), **nothing, **averages})
    result = check_file(tmp_path / "cl_metrics_one.npz")
    assert result.status == "pass" and result.arrays == 6, result
