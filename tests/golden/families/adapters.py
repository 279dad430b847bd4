"""`mos_adapter_forward`, `mos_vit_features`, `mos_retrieval`: an adapter, adapters in a network, and which one to take."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from everbatch.nn import BottleneckAdapter, attach_adapters, load_adapters, retrieve
from everbatch.nn.retrieval import MOST
from golden.comparison import Array, Comparison, Vectors

__all__ = ["check_adapter", "check_network", "check_retrieval"]

PARTS = {"down.weight": "down_proj_weight", "down.bias": "down_proj_bias", "up.weight": "up_proj_weight",
         "up.bias": "up_proj_bias"}
NORM = {"norm.weight": "adapter_layer_norm_before_weight", "norm.bias": "adapter_layer_norm_before_bias"}


def check_adapter(file: Vectors, compare: Comparison) -> None:
    """Without a layer norm, and with one of what comes in and of what goes out."""
    x = _t(file["x"])
    for norm in ("none", "in", "out"):
        adapter = BottleneckAdapter(x.shape[-1], file.integer("bottleneck"), scale=float(file["scale"]), norm=norm)
        adapter = adapter.double().eval()
        taken = PARTS | (NORM if norm != "none" else {})
        adapter.load_state_dict({ours: _t(file[f"{norm}_{theirs}"]) for ours, theirs in taken.items()})
        compare.close(f"y_{norm}_noresidual", _n(adapter(x)), file[f"y_{norm}_noresidual"])
        compare.close(f"y_{norm}_residual", _n(x + adapter(x)), file[f"y_{norm}_residual"])


def check_network(file: Vectors, compare: Comparison) -> None:
    """Features of the class token with and without adapters, and logits."""
    x = _t(file["x"])
    classes, width = file["base_head_weight"].shape
    size, patch = x.shape[-1], file.integer("patch_size")
    model = VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=width, depth=file.integer("depth"), num_heads=file.integer("heads"),
        mlp_ratio=float(file["mlp_ratio"]), num_classes=classes).double().eval()
    compare.close("ln_eps", model.norm.eps, file["ln_eps"])
    model.load_state_dict({name: _weight(file, name) for name in model.state_dict()})
    compare.close("features_no_adapter", _n(_features(model, x)), file["features_no_adapter"])
    rank = file["ad_0_down_proj_bias"].shape[0]
    blocks = attach_adapters(model, rank, scale=float(file["adapter_scale"]))
    vector = torch.cat([_t(file[f"ad_{k}_{part}"]).flatten() for k in range(len(blocks)) for part in PARTS.values()])
    load_adapters(model, vector)
    compare.close("features_adapter", _n(_features(model, x)), file["features_adapter"])
    compare.close("logits_adapter", _n(model(x)), file["logits_adapter"])


class Table:
    """A trunk that looks its features up: rows, tasks, width."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def first(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.features[inputs, 0], inputs

    def again(self, start: Tensor, tasks: Tensor) -> Tensor:
        return self.features[start, tasks]


def check_retrieval(file: Vectors, compare: Comparison) -> None:
    """Scores and paths, of all rows together and of each alone."""
    features, weight, bias = (_t(file[key]) for key in ("features", "head_weight", "head_bias"))
    tasks, each = file.integer("num_tasks"), file.integer("classes_per_task")
    cls2task = torch.arange(file.integer("total_classes")) // each
    compare.close("max_iter", MOST * torch.ones(()).long().numpy(), file["max_iter"])
    labels = _t(file["labels"])
    for rows in (torch.arange(len(features)), *torch.arange(len(features)).unsqueeze(1)):
        found = retrieve(Table(features), rows, lambda f: F.linear(f, weight, bias), _t(file["prototypes"]), cls2task, tasks,
                         ensemble=bool(file.integer("ensemble")))
        compare.close("outputs", _n(found.scores), file["outputs"][rows.numpy()])
        compare.close("adapter_path", _n(found.path), file["adapter_path"][rows.numpy()])
        best = found.scores.topk(file["topk_pred"].shape[1], 1).indices
        compare.close("topk_pred", _n(best), file["topk_pred"][rows.numpy()])
        hits, want = (best == labels[rows, None]).sum(1), (file["topk_pred"] == file["labels"][:, None]).sum(1)
        compare.close("labels", _n(hits), want[rows.numpy()])


def _weight(file: Vectors, name: str) -> Tensor:
    """timm's tensor of this name; queries, keys and values are one layer there."""
    key = "base_" + name.replace(".", "_").replace("mlp_", "")
    if "attn_qkv" in key:
        return torch.cat([_t(file[key.replace("qkv", f"{part}_proj")]) for part in "qkv"])
    return _t(file[key])


def _features(model: VisionTransformer, x: Tensor) -> Tensor:
    found: Tensor = model.forward_head(model.forward_features(x), pre_logits=True)
    return found


def _n(tensor: Tensor) -> Array:
    return tensor.detach().numpy()


def _t(array: Array) -> Tensor:
    return torch.from_numpy(array.copy())
