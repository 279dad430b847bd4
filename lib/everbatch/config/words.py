"""What was meant by a key or a word that is none of the options': the names that other libraries use, and near misses."""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Collection, Iterable
from typing import Any

__all__ = ["close_word", "plain_numbers", "respelled", "suggestion"]

_SYNONYMS = {
    "lr": "learning_rate learningrate eta step_size base_lr peak_lr max_lr",
    "weight_decay": "wd decay l2 l2_reg weightdecay",
    "momentum": "mom mu",
    "batch_size": "bs batch batchsize train_batch_size per_device_train_batch_size",
    "global_batch": "global_batch_size batch_size bs batch batchsize train_batch_size total_batch_size",
    "micro_batch": "micro_batch_size microbatch microbatch_size per_device_batch_size",
    "epochs": "epoch n_epochs num_epochs max_epochs nb_epochs num_train_epochs",
    "tasks": "n_tasks num_tasks nb_tasks ntasks n_experiences task_count",
    "rounds": "n_rounds num_rounds",
    "seeds": "n_seeds num_seeds repeats repetitions",
    "workers": "num_workers nw n_workers dataloader_num_workers",
    "accumulation": "accumulate grad_accum accumulation_steps grad_accum_steps gradient_accumulation gradient_accumulation_steps "
                    "accumulate_grad_batches",
    "label_smoothing": "smoothing ls",
    "eval_batch": "eval_batch_size test_batch_size val_batch_size",
    "checkpoint_every": "save_every checkpoint_interval save_steps save_interval",
    "keep_last": "save_total_limit max_checkpoints",
    "replay.capacity": "buffer_size memory_size mem_size buffer memory_capacity",
    "replay.replay_batch": "minibatch_size replay_batch_size buffer_batch_size batch_size_mem",
    "model.name": "arch architecture model_name network backbone net",
    "model.pretrained": "pretrain imagenet",
    "data.source": "dataset data_set dataset_name data_dir data_path data_root root path folder",
    "data.image_size": "img_size imgsize input_size resolution resize size",
    "data.augment": "augmentation aug auto_augment aa",
    "optimizer.base": "opt optim optimizer_name optimizer_type type",
    "output": "out out_dir output_dir save_dir logdir log_dir results run_dir outdir",
    "resume": "restart continue resume_from resume_from_checkpoint auto_resume checkpoint ckpt",
    "clip.max_norm": "clip_grad grad_clip gradient_clipping max_grad_norm clip_norm gradient_clip_val grad_clip_norm clip",
    "schedule.warmup_epochs": "warmup warmup_steps warm_up warmup_ratio",
    "schedule.kind": "scheduler lr_schedule lr_scheduler sched schedule_type",
    "precision": "amp bf16 fp16 dtype mixed_precision autocast",
    "engine.stage": "zero_stage zero zero_optimization",
    "engine.kind": "backend strategy accelerator engine_name parallel distributed",
    "engine.deepspeed": "deepspeed_config ds_config",
    "ema.decay": "ema_decay model_ema_decay",
    "seed": "random_seed manual_seed rng_seed",
    "dry_run": "dryrun dry",
}
"""Tail of an option's path, and what others call it."""


def suggestion(key: str, paths: Iterable[str]) -> str | None:
    """The path that an unknown key most likely means, or None."""
    known = list(paths)
    tail = _bare(key.rpartition(".")[2])
    meant = [path for name, others in _SYNONYMS.items() if tail in map(_bare, others.split()) for path in known
             if f".{path}".endswith(f".{name}")]
    same = [path for path in known if _bare(path.rpartition(".")[2]) == tail]
    for choices in (meant, same):
        if choices:
            return max(choices, key=lambda path: (_shared(key, path), -path.count("."), _likeness(key, path)))
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    near = difflib.get_close_matches(tail, {path.rpartition(".")[2] for path in known}, n=1, cutoff=0.75)
    if near:
        return suggestion(f"{key.rpartition('.')[0]}.{near[0]}".lstrip("."), known)
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.4)), None)


def _bare(text: str) -> str:
    """The letters of a word, whatever its case and dashes."""
    return re.sub("[-_ ]", "", text).casefold()


def _shared(key: str, path: str) -> bool:
    return key.rpartition(".")[0] == path.rpartition(".")[0]


def _likeness(key: str, path: str) -> float:
    return difflib.SequenceMatcher(None, key, path).ratio()


def respelled(value: Any, choices: Collection[Any], spellings: typing.Mapping[str, str]) -> Any:
    """The choice that a text means: another spelling of it by name, or the same letters in another case, with other dashes."""
    if not isinstance(value, str) or value in choices:
        return value
    named = {_bare(name): choice for name, choice in spellings.items()}
    named |= {_bare(choice): choice for choice in choices if isinstance(choice, str)}
    return named.get(_bare(value), value)


def close_word(value: Any, choices: Collection[Any]) -> str:
    """ "; did you mean ...?" where one of the choices is like the value, else nothing."""
    words = [choice for choice in choices if isinstance(choice, str)]
    near = difflib.get_close_matches(value.casefold(), words, n=1, cutoff=0.5) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


_INFINITY = re.compile(r"([-+]?)\.?inf(inity)?", re.IGNORECASE)


def plain_numbers(value: Any) -> Any:
    """The value with "inf", as Python and torch write it, read as a number (YAML writes .inf), in lists too."""
    if isinstance(value, list):
        return [plain_numbers(item) for item in value]
    found = _INFINITY.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return value
    return -math.inf if found[1] == "-" else math.inf
