"""Names of keys in other tools (transformers, peft, TRL, axolotl, …) and of ours in the wrong section, and our keys."""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from jaxtune.config.schema import Config
from jaxtune.config.section import Section, Sections
from jaxtune.config.update_rules import rule_sections

_ALIASES: dict[str, tuple[str, ...]] = {
    "run_dir": ("output_dir", "out_dir", "save_dir", "logdir", "log_dir"),
    "name": ("run_name", "experiment_name"),
    "model.path": (
        "model_name_or_path", "model_name", "model_id", "model_path", "base_model", "base_model_name_or_path",
        "pretrained", "checkpoint",
    ),
    "model.tokenizer": ("tokenizer_name", "tokenizer_name_or_path", "tokenizer_path"),
    "model.revision": ("model_revision", "base_model_revision"),
    "model.dtype": ("torch_dtype", "compute_dtype", "precision", "mixed_precision", "bf16", "fp16"),
    "model.remat": ("gradient_checkpointing", "activation_checkpointing", "use_gradient_checkpointing"),
    "data.train": ("dataset", "datasets", "dataset_name", "train_file", "train_data", "train_dataset", "dataset_path"),
    "data.validation": (
        "validation_file", "validation_data", "eval_file", "eval_data", "eval_dataset", "valid", "dev", "val",
        "val_file", "val_set_size", "test_size",
    ),
    "data.test": ("test_file", "test_data", "test_dataset"),
    "data.prompt": ("prompt_template", "instruction_template", "template"),
    "data.completion": ("response", "response_template", "answer", "target", "text_column", "dataset_text_field"),
    "data.chat": ("chat_template", "apply_chat_template"),
    "data.packing": ("sample_packing", "pack"),
    "data.too_long": ("truncation", "truncate", "excess_length_strategy"),
    "train.steps": ("max_steps", "num_steps", "num_train_steps", "total_steps", "iterations", "max_iters", "iters"),
    "train.epochs": ("num_train_epochs", "num_epochs", "n_epochs", "epoch", "max_epochs"),
    "train.batch_size": (
        "per_device_train_batch_size", "train_batch_size", "micro_batch_size", "global_batch_size", "bs", "batch",
        "n_batch", "batch_size_training",
    ),
    "train.accumulate": (
        "gradient_accumulation_steps", "accumulate_grad_batches", "grad_accum", "accumulation_steps",
        "gradient_accumulation",
    ),
    "train.sequence_length": (
        "max_seq_length", "max_seq_len", "max_length", "seq_length", "seq_len", "sequence_len", "cutoff_len",
        "context_length", "model_max_length", "max_source_length",
    ),
    "train.seed": ("random_seed", "data_seed", "random_state"),
    "train.evaluate_every": ("eval_steps", "eval_every", "evaluation_steps", "val_check_interval", "eval_interval"),
    "train.checkpoint_every": ("save_steps", "save_every", "checkpointing_steps", "save_interval"),
    "train.keep.latest": ("save_total_limit", "max_to_keep", "keep_checkpoints"),
    "train.log_every": ("logging_steps", "log_steps", "log_interval", "log_every_n_steps"),
    "train.patience": ("early_stopping_patience", "early_stopping"),
    "train.label_smoothing": ("label_smoothing_factor",),
    "train.neftune_alpha": ("neftune_noise_alpha", "neftune", "noisy_embedding_alpha"),
    "optimizer.learning_rate": ("lr", "peak_lr", "base_lr", "max_lr"),
    "optimizer.schedule": ("lr_scheduler_type", "lr_scheduler", "scheduler", "lr_schedule"),
    "optimizer.warmup": ("warmup_ratio", "warmup_steps", "num_warmup_steps", "lr_warmup_steps"),
    "optimizer.final_scale": ("min_lr", "min_lr_ratio", "lr_end", "final_lr"),
    "optimizer.weight_decay": ("wd", "decay", "l2"),
    "optimizer.kind": ("optim", "optimizer_name", "optimizer_type"),
    "optimizer.beta1": ("adam_beta1", "b1", "betas"),
    "optimizer.beta2": ("adam_beta2", "b2"),
    "optimizer.epsilon": ("adam_epsilon", "eps"),
    "optimizer.clip_norm": ("max_grad_norm", "gradient_clipping", "grad_clip", "clip_grad_norm", "gradient_clip_val"),
    "update": ("peft", "lora", "peft_config"),
    "update.0.match": ("target_modules", "lora_target_modules", "lora_target", "modules_to_save"),
    "update.0.method": ("peft_type", "use_lora", "use_dora", "init_lora_weights", "finetuning_type", "use_peft"),
    "update.0.rank": ("r", "lora_r", "lora_rank"),
    "update.0.alpha": ("lora_alpha", "scaling"),
    "update.0.dropout": ("lora_dropout",),
    "update.0.use_rslora": ("rslora",),
    "parallel.fsdp": ("fsdp_config", "zero_stage", "deepspeed"),
    "parallel.tensor": ("tp", "tensor_parallel", "tensor_parallel_size"),
    "evaluation.batch_size": ("per_device_eval_batch_size", "eval_batch_size", "val_batch_size"),
    "evaluation.max_new_tokens": ("generation_max_length", "max_tokens", "max_gen_len"),
    "search.trials": ("n_trials", "num_trials", "max_trials", "num_samples"),
    "search.space": ("hp_space", "search_space", "parameters", "sweep"),
    "search.acquisition": ("acq_func", "acquisition_function"),
    "search.method": ("algorithm", "sampler", "search_alg", "tuner"),
    "telemetry.wandb": ("report_to", "wandb_project", "project", "project_name"),
    "telemetry.tensorboard": ("tensorboard_dir", "logging_dir"),
}  # fmt: skip
"""Our key, and what other tools call what it does."""


def our_keys(name: str) -> list[str]:
    """The dotted keys that a key's name stands for, ours first of all; none if nobody is known to use it.

    Args:
      name: the last part of a key.
    """
    plain = name.strip().lower().replace("-", "_")
    ours = _by_last_part().get(plain, [])
    return ours or [key for key, names in _ALIASES.items() if plain in names]


@functools.cache
def _by_last_part() -> dict[str, list[str]]:
    """Our keys by their last part, those of a first rule of any method among them."""
    found: dict[str, list[str]] = {}
    for key in dict.fromkeys(_keys(Config, "")):
        found.setdefault(key.rpartition(".")[2], []).append(key)
    return found


def _keys(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        yield key
        if key == "update":
            for rule in rule_sections():
                yield from _keys(rule, "update.0.")
        elif not prefix.startswith("study."):
            for inner in sections_of(field.annotation):
                yield from _keys(inner, f"{key}.")


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The configuration sections among the alternatives of a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [*annotation.choices()] if issubclass(annotation, Section) else [annotation]
    origin = typing.get_origin(annotation)
    if marks := [mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, Sections)]:
        return list(marks[0].of())
    if origin in (list, dict, tuple) or annotation is None:
        return []
    return [section for argument in typing.get_args(annotation) for section in sections_of(argument)]
