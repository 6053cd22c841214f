"""Writes what was trained as a PEFT adapter.

PEFT takes a directory that does not fit without complaint: a pattern key that matches nothing is passed over, and
tensors that are missing give a warning. So what was written is read back and every module checked before it counts as
saved.

Modules have the names of the class that the base's ``config.json`` loads. Where that class holds more than a language
model they are written in full: the ends of names, such as ``q_proj``, would match its other parts too.

A directory holds modules of one kind (``peft_type``). Biases that were trained of modules that a LoRA adapts are theirs
(``bias``). Of a LoRA it has one ``use_rslora``. Where only some rules use
rank-stabilised scaling it is switched off, and their ``alpha_pattern`` entries are alpha · sqrt(rank), which PEFT
divides by the rank: the same scale. Modules whose parameters were trained themselves stand beside, whole
(``modules_to_save``, by full names: PEFT takes any module whose name ends so); alone they need the merged export.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtune.errors import UserError
from jaxtune.models.architectures import Architecture
from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import adaptable_modules
from jaxtune.models.decoder import Decoder
from jaxtune.models.families import architecture_of
from jaxtune.models.hf_config import read_architecture
from jaxtune.models.loading import PACKAGED
from jaxtune.models.tensor_files import read_header
from jaxtune.remote_paths import local_path
from jaxtune.updates.peft.base import named_base
from jaxtune.updates.peft.files import write_adapter
from jaxtune.updates.peft.format import (
    CONFIG_FILE,
    LORA,
    TENSOR_FILE,
    AdapterConfig,
    all_modules,
    is_named,
    matching_key,
    other_modules,
    tensor_name,
)
from jaxtune.updates.resolved import ResolvedPlan, Trainable
from jaxtune.updates.treatments.base import BIAS, NAME, Exported, Treatment, Values, zeros

Place = tuple[str, int | None]
"""Our path of a module, and its layer; None if it is not stacked."""

_README = """---
base_model: {base}
library_name: peft
tags:
- {tag}
- jaxtune
---

A {kind} adapter for `{base}`{revision}; load it with `peft.PeftModel.from_pretrained`.
"""
_QUANTIZED = """
It was trained beside a base whose linear modules were held as {kind} codes. On a base that is not quantized, or
otherwise, it gives nearly the same answers and not the same.
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
class _Module:
    """One module of one layer: its name in transformers, and what the adapter holds of it.

    Attributes:
      name: in transformers; empty for what stands once for all modules.
      exported: by its treatment.
      rank: of a low-rank term; 0 for others.
      alpha: as the configuration says it.
      beside: it is no target: it is saved as it is.
    """

    name: str
    exported: Exported
    rank: int
    alpha: float
    beside: bool = False

    @property
    def leaf(self) -> str:
        """The last part of the name, ``q_proj``."""
        return self.name.rpartition(".")[2]

    @property
    def numbers(self) -> tuple[Any, ...]:
        """What modules of one name in the configuration have in common."""
        return self.exported.path, self.rank, self.alpha


def save_adapter(
    directory: str | Path,
    plan: ResolvedPlan,
    trainable: Trainable,
    hyperparameters: Values,
    model: Decoder | DecoderConfig,
    base: str,
    revision: str | None = None,
    fixed: Trainable | None = None,
) -> None:
    """Writes what was trained as a directory that ``peft.PeftModel.from_pretrained`` loads.

    Of a low-rank term only the columns up to its rank are written, float32. ``lora_dropout`` is the largest of the
    rules'. With several processes, all must call this; the first writes.

    Args:
      directory: made if it does not exist; the files of an earlier export are replaced, each at once.
      plan: what was trained.
      trainable: the trained arrays.
      hyperparameters: those of the training; a rule's own value where a key is missing.
      model: the base model, or its configuration.
      base: its path or Hub id, which the adapter will name; a model of the package is written beside the adapter.
      revision: of a Hub id.
      fixed: what is fixed with the trained arrays.

    Raises:
      UserError: parameters were trained that an adapter does not hold, or by methods of several kinds; a rank is above
        the capacity, the family has no checkpoint format, or ``base`` is a directory with a model of another family.
    """
    if held := plan.unexported:
        paths = ", ".join(part.path for part in held)
        methods = ", ".join(sorted({part.sections[rule].method for part in held for rule in part.used_rules}))
        raise UserError(
            f"an adapter cannot hold {paths}, which the plan trains by method {methods}: it takes parameters of "
            "modules beside those that it adapts, but no table that the head is tied to; export the merged model "
            "instead (jaxtune export --merged, or jaxtune.merge_adapters and jaxtune.save_model)"
        )
    plan.check(hyperparameters)
    directory = Path(local_path(str(directory)))
    config = model if isinstance(model, DecoderConfig) else model.config
    packaged = base if base.startswith(PACKAGED) else None
    base = named_base(base, directory, write=jax.process_index() == 0)
    architecture = _architecture(base, config)
    places = all_modules(config, architecture.layout) | other_modules(config, architecture.layout)
    adaptable = adaptable_modules(config)
    kind, exported = _exported(plan, trainable, fixed or {}, hyperparameters, places)
    tensors = {tensor_name(each.name, end): value for each in exported for end, value in each.exported.tensors.items()}
    if jax.process_index() != 0:
        return
    names = _names(config, architecture, exported)
    written = _adapter_config(kind, names, exported) | {"base_model_name_or_path": base, "revision": revision}
    readme = _readme(
        written["peft_type"], packaged or base, revision, config.quantization, written=packaged is not None
    )
    write_adapter(directory, written, tensors, readme)
    _check_written(directory, [name for name, (path, _) in places.items() if path in adaptable], exported, tensors)


def _readme(kind: str, base: str, revision: str | None, quantization: str | None, *, written: bool) -> str:
    """What the directory says of itself to people."""
    at = "" if revision is None else f" at revision `{revision}`"
    told = {"tag": kind.lower(), "kind": "LoRA" if kind == LORA else kind}
    held = "" if quantization is None else _QUANTIZED.format(kind=quantization)
    return _README.format(base=base, revision=at, **told) + held + (_WITH_BASE if written else "")


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
    trainable: Trainable,
    fixed: Trainable,
    hyperparameters: Values,
    modules: Mapping[str, tuple[str, int | None]],
) -> tuple[str, list[_Module]]:
    """The kind of the adapter, and the modules to write, in the order of the model."""

    def tensors(parts: Iterable[Treatment]) -> Iterator[Exported]:
        for part in parts:
            arrays, kept = (tree.get(part.store, {}).get(part.path, {}) for tree in (trainable, fixed))
            yield from plan.tensors(part, jax.tree.map(_host, arrays), jax.tree.map(_host, kept), hyperparameters)

    adapters = [part for part in plan.parts if (plan.alone or part.peft_type) is not None]
    others = [part for part in plan.parts if part not in adapters]
    adapted = {part.path for part in adapters}
    # Where modules that are adapted have trained biases, all trained biases are held as these are.
    together = any(part.module in adapted for part in others)
    biases = [part for part in others if together and part.path.endswith(BIAS)]
    found = _by_place(tensors(adapters))
    targets = found.keys()
    found = _with_biases(found, _by_place(tensors(part for part in others if part not in biases)), tensors(biases))
    kinds = [plan.alone] if plan.alone else sorted({str(part.peft_type) for part in adapters})
    if len(kinds) > 1:
        raise UserError(
            f"an adapter's directory holds modules of one kind, and the plan trains {' and '.join(kinds)}; export the "
            "merged model instead (jaxtune export --merged, or jaxtune.merge_adapters and jaxtune.save_model)"
        )
    rslora = all(found[place].config.get("use_rslora", False) for place in targets)
    ordered = {name: found[place] for name, place in modules.items() if place in found}
    once = [("", each) for (path, _), each in found.items() if not path]
    return kinds[0], [
        _module(kinds[0], name, each, rslora)
        if (each.path, each.layer) in targets
        else _Module(name, each, 0, 0.0, beside=True)
        for name, each in (*once, *ordered.items())
    ]


def exported_bytes(plan: ResolvedPlan, hyperparameters: Values) -> int:
    """Bytes of the tensors of an adapter that holds what a plan trains, whatever it has learnt."""
    parts = ((part, zeros(part.arrays()), zeros(part.fixed())) for part in plan.parts)
    tensors = (each for part, arrays, fixed in parts for each in plan.tensors(part, arrays, fixed, hyperparameters))
    return sum(np.asarray(array).nbytes for each in _by_place(tensors).values() for array in each.tensors.values())


def _by_place(tensors: Iterable[Exported]) -> dict[Place, Exported]:
    """What is held of each module of each layer, whichever parts it is of."""
    found: dict[Place, Exported] = {}
    for each in tensors:
        place = each.path, each.layer
        found[place] = _joined(found[place], each) if place in found else each
    return found


def _with_biases(
    adapted: Mapping[Place, Exported], saved: Mapping[Place, Exported], biases: Iterable[Exported]
) -> dict[Place, Exported]:
    """All that is held: of modules that are adapted, that are saved whole, and of which the bias alone is trained.

    PEFT's ``bias`` is ``lora_only`` where only modules that are adapted have trained biases, and else ``all``.
    """
    found, kind = {**adapted, **saved}, "lora_only"
    for each in biases:
        place, (bias,) = (each.path, each.layer), each.tensors.values()
        if place in adapted:
            tensors = {**found[place].tensors, "base_layer.bias": bias}
            found[place] = dataclasses.replace(found[place], tensors=tensors)
        elif place in saved:
            found[place] = _joined(found[place], each)
        else:
            found[place], kind = dataclasses.replace(each, config={}), "all"
    held = any("base_layer.bias" in each.tensors for each in found.values())
    for place in adapted if held else ():
        found[place] = dataclasses.replace(found[place], config={**found[place].config, "bias": kind})
    return found


def _joined(one: Exported, other: Exported) -> Exported:
    """All tensors of a module; what stands once for all modules is that of the module that has most of it."""
    tensors = {**one.tensors, **other.tensors}
    for name in one.tensors.keys() & other.tensors.keys():
        tensors[name] = max(one.tensors[name], other.tensors[name], key=np.size)
    return dataclasses.replace(one, tensors=tensors)


def _module(kind: str, name: str, exported: Exported, rslora: bool) -> _Module:
    if kind != LORA:
        return _Module(name, exported, 0, 0.0)
    rank, alpha = exported.config["r"], exported.config["lora_alpha"]
    if exported.config["use_rslora"] and not rslora:
        alpha *= math.sqrt(rank)
    return _Module(name, exported, rank, alpha)


def _host(array: jax.Array) -> np.ndarray:
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    held = np.asarray(array)
    return held.astype(np.float32) if np.issubdtype(held.dtype, np.floating) else held


def _adapter_config(kind: str, names: Mapping[str, str], exported: Sequence[_Module]) -> dict[str, Any]:
    """The configuration; ranks and alphas with the most common ones as defaults, and patterns for the rest."""
    named = [each for each in exported if each.name and not each.beside]
    told = {"peft_type": kind, **_common(kind, names, exported)}
    if named:
        told["target_modules"] = sorted(set(names.values()))
    if kind != LORA:
        return {"task_type": "CAUSAL_LM", "inference_mode": True, **told}
    tokens = {key: told.pop(key) for key in ("trainable_token_indices",) if key in told}
    rank = Counter(each.rank for each in named).most_common(1)[0][0]
    alpha = Counter(each.alpha for each in named).most_common(1)[0][0]
    written = AdapterConfig(
        **told,
        r=rank,
        lora_alpha=_number(alpha),
        rank_pattern={names[each.name]: each.rank for each in named if each.rank != rank},
        alpha_pattern={names[each.name]: _number(each.alpha) for each in named if each.alpha != alpha},
    )
    return written.model_dump() | tokens


def _common(kind: str, names: Mapping[str, str], exported: Sequence[_Module]) -> dict[str, Any]:
    """What the configuration says once for all modules."""
    told: dict[str, Any] = {}
    lora = kind == LORA
    for each in exported:
        for key, value in each.exported.config.items():
            if lora and key in ("r", "lora_alpha"):
                continue
            if isinstance(value, list):
                value = sorted(
                    {*told.get(key, []), *(names.get(each.name, each.name) if one == NAME else one for one in value)}
                )
            elif lora and key in ("lora_dropout", "use_rslora"):
                value = (max if key == "lora_dropout" else min)(value, told.get(key, value))
            elif told.get(key, value) != value:
                raise UserError(
                    f"an adapter of the kind {kind} has one {key} for all modules, and the rules have "
                    f"{told[key]} and {value}; give them the same, or export the merged model (jaxtune export --merged)"
                )
            told[key] = value
    return told


def _names(config: DecoderConfig, architecture: Architecture, exported: Sequence[_Module]) -> dict[str, str]:
    """How the configuration calls each module: ``q_proj`` if all layers have the same numbers, else in full.

    In full, too, where the class has other parts than the language model.
    """
    named = [each for each in exported if each.name and not each.beside]
    if architecture.part is not None:
        return {each.name: each.name for each in named}
    kinds = Counter(each.numbers for each in named)
    return {
        each.name: each.leaf if each.exported.layer is None or kinds[each.numbers] == config.num_layers else each.name
        for each in named
    }


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _check_written(
    directory: Path, modules: Iterable[str], exported: Sequence[_Module], tensors: dict[str, np.ndarray]
) -> None:
    """Reads the files as PEFT does and compares them with what they should say."""
    told = json.loads((directory / CONFIG_FILE).read_text())
    entries, problems = read_header(directory / TENSOR_FILE)
    problems += [
        f"{name} was not written as it is"
        for name, value in tensors.items()
        if name not in entries or not np.array_equal(entries[name].read(), value, equal_nan=True)
    ]
    expected = {each.name for each in exported if each.name and not each.beside}
    problems += [
        f"target_modules is wrong about {name}"
        for name in modules
        if is_named(name, told.get("target_modules", [])) != (name in expected)
    ]
    if told["peft_type"] == LORA:
        read = AdapterConfig.model_validate(told)
        problems += [
            f"rank or alpha of {each.name} is wrong"
            for each in exported
            if not each.beside and (read.rank(each.name), read.alpha(each.name)) != (each.rank, each.alpha)
        ]
        for patterns in (read.rank_pattern, read.alpha_pattern):
            used = {matching_key(patterns, name) for name in expected}
            problems += [f"the pattern {pattern!r} matches nothing" for pattern in patterns if pattern not in used]
    if problems:
        raise RuntimeError(f"{directory}: the adapter was not written right: " + "; ".join(problems))
