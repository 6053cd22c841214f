"""Writes what was trained as a PEFT adapter.

PEFT takes a directory that does not fit without complaint: a pattern key that matches nothing is passed over, and
tensors that are missing give a warning. So what was written is read back and every module checked before it counts as
saved.

Modules have the names of the class that the base's ``config.json`` loads. Where that class holds more than a language
model they are written in full: the ends of names, such as ``q_proj``, would match its other parts too.

One directory has one ``use_rslora``. Where only some rules use rank-stabilised scaling it is switched off, and their
``alpha_pattern`` entries are alpha · sqrt(rank), which PEFT divides by the rank: the same scale. Parameters that were
trained themselves do not fit an adapter; they need the merged export.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtune.config.update_rules import LowRankRule
from jaxtune.errors import UserError
from jaxtune.files import replaced
from jaxtune.models.architectures import Architecture
from jaxtune.models.config import DecoderConfig
from jaxtune.models.decoder import Decoder
from jaxtune.models.families import architecture_of
from jaxtune.models.hf_config import read_architecture
from jaxtune.models.loading import PACKAGED
from jaxtune.models.tensor_files import TensorToWrite, read_header, write_tensors
from jaxtune.remote_paths import local_path
from jaxtune.updates.low_rank import NO_RULE, Hyperparameters, rule_value, uses_rslora
from jaxtune.updates.peft_base import named_base
from jaxtune.updates.peft_format import (
    CONFIG_FILE,
    TENSOR_FILE,
    AdapterConfig,
    all_modules,
    matching_key,
    tensor_name,
)
from jaxtune.updates.plan import ResolvedPlan, Trainable

_README = """---
base_model: {base}
library_name: peft
tags:
- lora
- jaxtune
---

A LoRA adapter for `{base}`{revision}; load it with `peft.PeftModel.from_pretrained`.
"""
_WITH_BASE = """
Its base lies beside it, in the folder `base`, and `peft.AutoPeftModelForCausalLM.from_pretrained` loads both. PEFT
takes no path from an adapter's own folder: where this one was moved, set `base_model_name_or_path` in
`adapter_config.json` to the new place of `base` (`jaxtune train` or `search` with the `config.yaml` of its run does
that), or give it yourself:

    base = transformers.AutoModelForCausalLM.from_pretrained("THIS_FOLDER/base")
    model = peft.PeftModel.from_pretrained(base, "THIS_FOLDER")
"""


@dataclasses.dataclass(frozen=True)
class _Exported:
    """One module of one layer: its name in transformers, what it is ours, and its two numbers."""

    name: str
    path: str
    layer: int | None
    rank: int
    alpha: float

    @property
    def leaf(self) -> str:
        """The last part of the name, ``q_proj``."""
        return self.name.rpartition(".")[2]


def save_adapter(
    directory: str | Path,
    plan: ResolvedPlan,
    trainable: Trainable,
    hyperparameters: Hyperparameters,
    model: Decoder | DecoderConfig,
    base: str,
    revision: str | None = None,
) -> None:
    """Writes the low-rank terms as a directory that ``peft.PeftModel.from_pretrained`` loads.

    Of a module only the columns up to its rank are written, float32. ``lora_dropout`` is the largest of the rules'.
    With several processes, all must call this; the first writes.

    Args:
      directory: made if it does not exist; the files of an earlier export are replaced, each at once.
      plan: what was trained.
      trainable: the trained arrays.
      hyperparameters: those of the training; a rule's own value where a key is missing.
      model: the base model, or its configuration.
      base: its path or Hub id, which the adapter will name; a model of the package is written beside the adapter.
      revision: of a Hub id.

    Raises:
      UserError: parameters were trained themselves, a rank is above the capacity, the family has no checkpoint format,
        or ``base`` is a directory with a model of another family.
    """
    if plan.full:
        paths = ", ".join(parameter.path for parameter in plan.full)
        raise UserError(
            f"an adapter cannot hold {paths}, which the plan trains in full; export the merged model instead "
            "(jaxtune export --merged, or jaxtune.merge_adapters and jaxtune.save_model)"
        )
    plan.check_ranks(hyperparameters)
    directory = Path(local_path(str(directory)))
    config = model if isinstance(model, DecoderConfig) else model.config
    rooted = {uses_rslora(plan.rules[i]) for module in plan.modules for i in module.used_rules}
    rslora = rooted == {True}
    packaged = base if base.startswith(PACKAGED) else None
    base = named_base(base, directory, write=jax.process_index() == 0)
    architecture = _architecture(base, config)
    exported = _exported(plan, hyperparameters, all_modules(config, architecture.layout), rslora)
    tensors = {
        tensor_name(each.name, part): value
        for each in exported
        for part, value in zip("AB", _arrays(each, trainable), strict=True)
    }
    if jax.process_index() != 0:
        return
    names = _names(config, architecture, exported)
    written = _adapter_config(plan, hyperparameters, names, exported, rslora)
    written = written.model_copy(update={"base_model_name_or_path": base, "revision": revision})
    directory.mkdir(parents=True, exist_ok=True)
    to_write = [
        TensorToWrite(name, value.dtype, value.shape, lambda value=value: value) for name, value in tensors.items()
    ]
    write_tensors(directory / TENSOR_FILE, to_write, {"format": "pt"})
    for name, text in (
        (CONFIG_FILE, json.dumps(written.model_dump(), indent=2, sort_keys=True) + "\n"),
        ("README.md", _readme(packaged or base, revision, written=packaged is not None)),
    ):
        with replaced(directory / name) as file:
            file.write(text.encode())
    _check_written(directory, all_modules(config, architecture.layout), exported, tensors)


def _readme(base: str, revision: str | None, *, written: bool) -> str:
    """What the directory says of itself to people."""
    at = "" if revision is None else f" at revision `{revision}`"
    return _README.format(base=base, revision=at) + (_WITH_BASE if written else "")


def _architecture(base: str, config: DecoderConfig) -> Architecture:
    """What transformers loads for the base: as its ``config.json`` says; where that is not here, as the model's said.

    They differ where a model was read from one place and saved to another: saved models are text-only.
    """
    directory = Path(base)
    if not (directory / "config.json").is_file():
        return architecture_of(config)
    architecture = read_architecture(directory)
    if architecture.family != config.family:
        raise UserError(f"{base}: holds a model of the family {architecture.family}; the adapter's is {config.family}")
    return architecture


def _exported(
    plan: ResolvedPlan,
    hyperparameters: Hyperparameters,
    modules: Mapping[str, tuple[str, int | None]],
    rslora: bool,
) -> list[_Exported]:
    """The modules to write, in the order of the model."""
    adapted = {module.path: module for module in plan.modules}
    exported = []
    for name, (path, layer) in modules.items():
        rule = adapted[path].rules[layer or 0] if path in adapted else NO_RULE
        if rule == NO_RULE:
            continue
        rank = int(rule_value(plan.rules, rule, "rank", hyperparameters))
        alpha = float(rule_value(plan.rules, rule, "alpha", hyperparameters))
        if uses_rslora(plan.rules[rule]) and not rslora:
            alpha *= math.sqrt(rank)
        exported.append(_Exported(name, path, layer, rank, alpha))
    return exported


def _arrays(module: _Exported, trainable: Trainable) -> tuple[np.ndarray, np.ndarray]:
    """A (rank, in) and B (out, rank) as they lie in the file."""
    arrays = trainable["low_rank"][module.path]
    a, b = (_host(arrays[part] if module.layer is None else arrays[part][module.layer]) for part in "ab")
    return np.ascontiguousarray(a[:, : module.rank].T), np.ascontiguousarray(b[: module.rank].T)


def _host(array: jax.Array) -> np.ndarray:
    if not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array, np.float32)


def _adapter_config(
    plan: ResolvedPlan,
    hyperparameters: Hyperparameters,
    names: Mapping[str, str],
    exported: Sequence[_Exported],
    rslora: bool,
) -> AdapterConfig:
    """The configuration with the most common rank and alpha as defaults and patterns for the rest."""
    rank = Counter(each.rank for each in exported).most_common(1)[0][0]
    alpha = Counter(each.alpha for each in exported).most_common(1)[0][0]
    dropouts = [
        float(rule_value(plan.rules, index, "dropout", hyperparameters))
        for index, rule in enumerate(plan.rules)
        if isinstance(rule, LowRankRule)
    ]
    return AdapterConfig(
        r=rank,
        lora_alpha=_number(alpha),
        rank_pattern={names[each.name]: each.rank for each in exported if each.rank != rank},
        alpha_pattern={names[each.name]: _number(each.alpha) for each in exported if each.alpha != alpha},
        target_modules=sorted(set(names.values())),
        lora_dropout=max(dropouts),
        use_rslora=rslora,
    )


def _names(config: DecoderConfig, architecture: Architecture, exported: Sequence[_Exported]) -> dict[str, str]:
    """How the configuration calls each module: ``q_proj`` if all layers have the same numbers, else in full.

    In full, too, where the class has other parts than the language model.
    """
    if architecture.part is not None:
        return {each.name: each.name for each in exported}
    kinds = Counter((each.path, each.rank, each.alpha) for each in exported)
    return {
        each.name: each.leaf
        if each.layer is None or kinds[each.path, each.rank, each.alpha] == config.num_layers
        else each.name
        for each in exported
    }


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _check_written(
    directory: Path, modules: Iterable[str], exported: Sequence[_Exported], tensors: dict[str, np.ndarray]
) -> None:
    """Reads the files as PEFT does and compares them with what they should say."""
    read = AdapterConfig.model_validate_json((directory / CONFIG_FILE).read_text())
    entries, problems = read_header(directory / TENSOR_FILE)
    problems += [
        f"{name} was not written as it is"
        for name, value in tensors.items()
        if name not in entries or not np.array_equal(entries[name].read(), value, equal_nan=True)
    ]
    expected = {each.name for each in exported}
    problems += [
        f"target_modules is wrong about {name}" for name in modules if read.targets(name) != (name in expected)
    ]
    problems += [
        f"rank or alpha of {each.name} is wrong"
        for each in exported
        if (read.rank(each.name), read.alpha(each.name)) != (each.rank, each.alpha)
    ]
    for patterns in (read.rank_pattern, read.alpha_pattern):
        used = {matching_key(patterns, name) for name in expected}
        problems += [f"the pattern {pattern!r} matches nothing" for pattern in patterns if pattern not in used]
    if problems:
        raise RuntimeError(f"{directory}: the adapter was not written right: " + "; ".join(problems))
