"""Reads a PEFT adapter directory as rules and trainable arrays.

A LoRA of linear layers is read; everything else that a PEFT adapter can hold is an error, never ignored.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import ValidationError

from jaxtune.config.hyperparameters import hyperparameters as traced_values
from jaxtune.config.update_rules import LowRankRule
from jaxtune.errors import UserError
from jaxtune.models.architectures import Layout, architectures_of
from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import ArraySpec, declare
from jaxtune.models.decoder import Decoder
from jaxtune.models.families import family_of
from jaxtune.models.tensor_files import DTYPES, TensorEntry, read_header
from jaxtune.parallel.sharding import named_sharding
from jaxtune.updates.peft_format import AdapterConfig, adapter_files, all_modules, parse_tensor_name
from jaxtune.updates.plan import Trainable, UpdatePlan

Tensors = Mapping[str, tuple[TensorEntry, TensorEntry]]
"""A and B of each module, by its name in transformers."""

Modules = Mapping[str, tuple[str, int | None]]
"""Our path of the stack, and the layer, of each linear module by its name in transformers."""

# Says nothing of the computation: where it came from, how it was trained, settings of what is switched off.
_HARMLESS = {
    "auto_mapping", "peft_version", "megatron_core", "loftq_config", "eva_config", "runtime_config",
    "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# These change the base's weights, and the adapter is only right beside the changed ones.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def load_adapter(
    directory: str | Path, model: Decoder | DecoderConfig
) -> tuple[UpdatePlan, Trainable, dict[str, float]]:
    """A PEFT adapter as a plan, its trainable arrays, and the hyperparameters it computes with.

    Modules of the same rank and alpha become one rule for each set of layers. ``plan.resolve(model)`` has the shapes of
    the arrays, so that the adapter can be applied, merged, or trained on.

    Args:
      directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
      model: the base model; the arrays are cut over its mesh.

    Raises:
      UserError: files are missing, damaged or pickles; the adapter is of another type than LoRA on linear layers; or it
        does not fit the model, with every mismatch.
    """
    config = model if isinstance(model, DecoderConfig) else model.config
    rules, tensors, modules = _read(Path(directory), config)
    plan = UpdatePlan(rules)
    mesh = None if isinstance(model, DecoderConfig) else model.mesh
    return plan, _trainable(plan, tensors, modules, config, mesh), traced_values(rules, "update.")


def adapter_rules(directory: str | Path, config: DecoderConfig) -> list[LowRankRule]:
    """What a PEFT adapter is as rules of ``update``, without reading its arrays.

    Args:
      directory: as for :func:`load_adapter`.
      config: of the base model.

    Raises:
      UserError: as :func:`load_adapter`.
    """
    return _read(Path(directory), config)[0]


def _read(directory: Path, config: DecoderConfig) -> tuple[list[LowRankRule], Tensors, Modules]:
    config_file, tensor_file = adapter_files(directory)
    adapter = read_adapter_config(config_file)
    entries, problems = read_header(tensor_file)
    if problems:
        raise UserError("; ".join([f"{directory}: the adapter cannot be read", *problems]))
    modules = all_modules(config, _layout(entries, config))
    tensors = _check_tensors(directory, entries, adapter, modules, declare(config))
    return _rules(adapter, tensors, modules, config), tensors, modules


def _layout(names: Iterable[str], config: DecoderConfig) -> Layout:
    """The names that an adapter's tensors have: those of the class, or of an older release, that it was made with."""
    held = {parsed[0] for parsed in map(parse_tensor_name, names) if parsed is not None}
    family = family_of(config).name
    layouts = [layout for architecture in architectures_of(family) for layout in architecture.layouts]
    return max(layouts, key=lambda layout: len(held & all_modules(config, layout).keys()))


def read_adapter_config(file: Path) -> AdapterConfig:
    """An ``adapter_config.json``.

    Raises:
      UserError: it is damaged, or of another type than LoRA on linear layers.
    """
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: a JSON object is expected")
    kind = values.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{file}: peft_type is {kind!r}; only 'LORA' is supported")
    known = AdapterConfig.model_fields.keys()
    problems = [
        f"{key} {json.dumps(value)}: not supported"
        for key, value in values.items()
        if key not in known | _HARMLESS and value
    ]
    given: dict[str, Any] = {key: value for key, value in values.items() if key in known and value is not None}
    try:
        read = AdapterConfig(**given)
    except ValidationError as error:
        details = {(str(each["loc"][0]), each["msg"]) for each in error.errors()}
        problems += [f"{key} {json.dumps(values.get(key))}: {message}" for key, message in sorted(details)]
        raise UserError(f"{file}: " + "; ".join(problems)) from error
    start = read.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        problems.append(
            f"init_lora_weights {start!r} changes the base's weights; convert the adapter with peft first "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if problems:
        raise UserError(f"{file}: " + "; ".join(problems))
    return read


def _check_tensors(
    directory: Path,
    entries: Mapping[str, TensorEntry],
    adapter: AdapterConfig,
    modules: Modules,
    specs: Mapping[str, ArraySpec],
) -> Tensors:
    """A and B of every module, checked against the model and the adapter's configuration."""
    problems: list[str] = []
    found: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in entries.items():
        module, part = parse_tensor_name(name) or ("", "")
        if name.endswith(".base_layer.weight"):
            problems.append(f"{name} is a weight of the base; save with save_pretrained(save_embedding_layers=False)")
        elif module not in modules:
            problems.append(f"{name} belongs to no linear layer of the model")
        elif entry.dtype not in DTYPES:
            problems.append(f"{name} has the dtype {entry.dtype}, not {', '.join(DTYPES)}")
        else:
            found[module][part] = entry
    for module, (path, _) in modules.items():
        parts = found.get(module, {})
        if not adapter.targets(module):
            problems += [f"{module} has tensors but is not in target_modules"] if parts else []
            continue
        if not parts:
            problems.append(f"{module} is in target_modules but has no tensors")
            continue
        *_, inputs, outputs = specs[f"{path}.kernel"].shape
        rank = adapter.rank(module)
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            if part not in parts:
                problems.append(f"lora_{part} of {module} is missing")
            elif parts[part].shape != shape:
                problems.append(f"lora_{part} of {module} has shape {parts[part].shape}, not {shape}")
    if not found and not problems:
        problems.append("it has no tensors")
    if problems:
        raise UserError(f"{directory}: the adapter does not fit the model: " + "; ".join(problems))
    return {name: (parts["A"], parts["B"]) for name, parts in found.items()}


def _rules(adapter: AdapterConfig, tensors: Tensors, modules: Modules, config: DecoderConfig) -> list[LowRankRule]:
    """A rule for the modules of one rank and one alpha that are adapted in the same layers."""
    layers: dict[tuple[str, int, float], list[int]] = defaultdict(list)
    for module, (path, layer) in modules.items():
        if module in tensors:
            layers[path, adapter.rank(module), adapter.alpha(module)] += [] if layer is None else [layer]
    paths: dict[tuple[int, float, tuple[int, ...]], list[str]] = defaultdict(list)
    for (path, rank, alpha), chosen in layers.items():
        paths[rank, alpha, tuple(chosen)].append(path)
    return [
        LowRankRule(
            match=_match(together, chosen, config.num_layers),
            rank=rank,
            alpha=alpha,
            dropout=adapter.lora_dropout,
            use_rslora=adapter.use_rslora,
            weight_decay=None,
        )
        for (rank, alpha, chosen), together in paths.items()
    ]


def _match(paths: Sequence[str], layers: tuple[int, ...], count: int) -> str:
    """A pattern for modules in some layers: ``layers.{0,2}.{attention.q,mlp.up}``."""
    if not layers:
        return _braced(paths)
    where = "*" if len(layers) == count else _braced([str(layer) for layer in layers])
    return f"layers.{where}.{_braced([path.removeprefix('layers.') for path in paths])}"


def _braced(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else "{" + ",".join(choices) + "}"


def _trainable(
    plan: UpdatePlan, tensors: Tensors, modules: Modules, config: DecoderConfig, mesh: jax.sharding.Mesh | None
) -> Trainable:
    """The arrays of the resolved plan; columns above a module's rank are zero."""
    resolved = plan.resolve(config)
    names = {place: name for name, place in modules.items()}
    axes = resolved.axes()["low_rank"]
    low_rank = {}
    for module in resolved.modules:
        a = np.zeros((len(module.rules), module.inputs, module.capacity), np.float32)
        b = np.zeros((len(module.rules), module.capacity, module.outputs), np.float32)
        for layer in range(len(module.rules)):
            pair = tensors.get(names[module.path, layer if module.stacked else None])
            if pair is not None:
                rank = pair[0].shape[0]
                a[layer, :, :rank], b[layer, :rank] = pair[0].read().T, pair[1].read().T
        arrays = {"a": a, "b": b} if module.stacked else {"a": a[0], "b": b[0]}
        low_rank[module.path] = {part: _placed(arrays[part], axes[module.path][part], mesh) for part in "ab"}
    return {"low_rank": low_rank, "full": {}}


def _placed(array: np.ndarray, axes: tuple[str | None, ...], mesh: jax.sharding.Mesh | None) -> jax.Array:
    if mesh is None:
        return jax.device_put(array)
    sharding = named_sharding(axes, array.shape, mesh)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
