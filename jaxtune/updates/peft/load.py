"""Reads a PEFT adapter directory as rules and trainable arrays.

What a method of the package, or of an installed one, can be is read; everything else that a PEFT adapter can hold is an
error, never ignored.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from pydantic import ValidationError

from jaxtune.config.hyperparameters import hyperparameters as traced_values
from jaxtune.config.rule import RuleConfig
from jaxtune.errors import UserError
from jaxtune.models.adapter_set import AdapterSet
from jaxtune.models.architectures import Layout, architectures_of
from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import Params, adaptable_modules, declare
from jaxtune.models.decoder import Decoder, split
from jaxtune.models.families import family_of
from jaxtune.models.tensor_files import DTYPES, INDICES, TensorEntry, read_header
from jaxtune.parallel.sharding import named_sharding
from jaxtune.updates import treatments
from jaxtune.updates.patterns import pattern_of
from jaxtune.updates.peft.beside import beside_names, beside_rules, bias_names, bias_rules
from jaxtune.updates.peft.format import (
    LORA,
    AdapterConfig,
    adapter_files,
    all_modules,
    other_modules,
    parse_tensor_name,
    tensor_name,
)
from jaxtune.updates.plan import UpdatePlan
from jaxtune.updates.resolved import ResolvedPlan, Trainable
from jaxtune.updates.treatments.base import HEAD, Matched, Treatment, zeros

Tensors = Mapping[str, Mapping[str, TensorEntry]]
"""By the end of their names, those of each module, by its name in transformers; of none, what all modules share."""

Modules = Mapping[str, tuple[str, int | None]]
"""Our path of the stack, and the layer, of each linear module by its name in transformers."""


class Adapter(NamedTuple):
    """A PEFT adapter as it is trained on.

    Attributes:
      plan: rules of its methods.
      trainable: the arrays of the resolved plan that the optimizer moves.
      values: the hyperparameters that it computes with.
      fixed: the arrays beside them that the adapter brings; others follow from the base.
    """

    plan: UpdatePlan
    trainable: Trainable
    values: dict[str, float]
    fixed: Trainable


# Says nothing of the computation: where it came from, how it was trained, settings of what is switched off.
_HARMLESS = {
    "auto_mapping", "peft_version", "megatron_core", "loftq_config", "eva_config", "runtime_config",
    "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# So many rows of a table are compared.
_COMPARED = 16
# These change the base's weights, and the adapter is only right beside the changed ones.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def load_adapter(
    directory: str | Path, model: Decoder | DecoderConfig
) -> tuple[UpdatePlan, Trainable, dict[str, float]]:
    """A PEFT adapter as a plan, its trainable arrays, and the hyperparameters it computes with.

    Modules of the same numbers become one rule for each set of layers. ``plan.resolve(model)`` has the shapes of the
    arrays, so that the adapter can be applied, merged, or trained on. Of one that brings fixed arrays,
    :func:`read_adapter` gives these too.

    Args:
      directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
      model: the base model; the arrays are cut over its mesh.

    Raises:
      UserError: files are missing, damaged or pickles; the adapter is of a kind that no method reads, or does not fit
        the model, with every mismatch.
    """
    read = read_adapter(directory, model)
    return read.plan, read.trainable, read.values


def read_adapter(directory: str | Path, model: Decoder | DecoderConfig) -> Adapter:
    """All that a PEFT adapter holds; see :func:`load_adapter`."""
    if isinstance(model, DecoderConfig):
        config, params, mesh = model, None, None
    else:
        config, params, mesh = model.config, split(model)[1], model.mesh
    rules, tensors, modules = _read(Path(directory), config, params)
    plan = UpdatePlan(rules)
    trainable, fixed = _arrays(plan.resolve(config), tensors, modules, mesh)
    return Adapter(plan, trainable, traced_values(rules, "update."), fixed)


def load_adapters(adapters: Mapping[str, str | Path], model: Decoder) -> AdapterSet:
    """Several PEFT adapters on one base: to change between, or to answer each row of a batch with its own.

    Args:
      adapters: directories by the names that the adapters are to have.
      model: the base.

    Raises:
      UserError: there is none, one of them is no plain LoRA, or cannot be read, or does not fit the model, as
        :func:`load_adapter` tells.
    """
    if not adapters:
        raise UserError("adapters: at least one is needed, as a name and its PEFT directory")
    params, applied = split(model)[1], {}
    for name, directory in adapters.items():
        read = read_adapter(directory, model)
        plan = read.plan.resolve(model.config)
        if not plan.adapters_only:
            changed = ", ".join(part.path for part in plan.parts if part.changes_parameters)
            raise UserError(f"adapter {name!r}: it also changes {changed}; take it by itself (jaxtune.load_adapter)")
        applied[name] = plan.apply(params, read.trainable, read.values, fixed=read.fixed)[1]
    return AdapterSet(params, applied)


def adapter_rules(directory: str | Path, config: DecoderConfig) -> list[RuleConfig]:
    """What a PEFT adapter is as rules of ``update``, without reading its arrays.

    Args:
      directory: as for :func:`load_adapter`.
      config: of the base model.

    Raises:
      UserError: as :func:`load_adapter`.
    """
    return _read(Path(directory), config)[0]


def _read(
    directory: Path, config: DecoderConfig, params: Params | None = None
) -> tuple[list[RuleConfig], Tensors, Modules]:
    config_file, tensor_file = adapter_files(directory)
    values = read_adapter_values(config_file)
    adapter = AdapterConfig.model_validate(_targets(values) if values["peft_type"] != LORA else values)
    entries, problems = read_header(tensor_file)
    if problems:
        raise UserError("; ".join([f"{directory}: the adapter cannot be read", *problems]))
    layout = _layout(entries, config)
    readers = _treatments(config_file, values)
    modules, others = all_modules(config, layout), other_modules(config, layout)
    beside, problems = beside_names(entries, adapter, modules | others, config)
    biases, more = bias_names(entries, adapter, modules, config)
    problems += more
    names = {name for names in beside.values() for name in names.values()} | {*biases.values()}
    rest = {name: entry for name, entry in entries.items() if name not in names}
    treated = {
        name: treatment
        for name, (path, _) in (modules | others).items()
        if name not in beside and (treatment := _serving(readers, path, config)) is not None
    }
    tables = _tables(rest, config, layout)
    tensors, more = _sorted({name: rest[name] for name in rest.keys() - tables.keys()}, adapter, treated)
    problems += more + _changed_tables(tables, config, params or {})
    rules = [
        rule
        for treatment in dict.fromkeys(treated.values())
        for rule in _rules(
            treatment,
            values,
            {name: held for name, held in tensors.items() if treated.get(name) is treatment},
            modules | others,
            config,
        )
    ]
    if not rules and values["peft_type"] == readers[0].alone and "" in tensors:
        # What is in no module is in front of all.
        rules = [readers[0].Section(match="embed", weight_decay=None, **readers[0].read_section(values, ""))]
    if not rules and not problems:
        problems.append("it has no tensors")
    rules = bias_rules(biases, modules, config) + rules + beside_rules(beside, adapter, modules | others, config)
    held = {module: {end: entries[name] for end, name in ends.items()} for module, ends in beside.items()}
    for module, name in biases.items():
        held[module] = {**tensors.get(module, {}), "bias": entries[name]}
    tensors = {**tensors, **held}
    if rules:
        problems += _misfits(UpdatePlan(rules).resolve(config), tensors, modules | others)
    if problems:
        raise UserError(f"{directory}: the adapter does not fit the model: " + "; ".join(problems))
    return rules, tensors, modules | others


def _layout(names: Iterable[str], config: DecoderConfig) -> Layout:
    """The names that an adapter's tensors have: those of the class, or of an older release, that it was made with."""
    family, names = family_of(config).name, list(names)
    layouts = [layout for architecture in architectures_of(family) for layout in architecture.layouts]

    def known(layout: Layout) -> int:
        modules = all_modules(config, layout)
        return sum(bool((parse_tensor_name(name, modules) or ("",))[0]) for name in names)

    return max(layouts, key=known)


def _readers() -> list[type[Treatment]]:
    """The methods that read adapters; other packages' behind our own."""
    readers = (one for one in treatments.known() if _kinds(one))
    return [one for one in readers if one.restored is not Treatment.restored]


def _kinds(treatment: type[Treatment]) -> set[str]:
    """Of the adapters that may hold what a method trains."""
    return {kind for kind in (treatment.peft_type, treatment.alone) if kind is not None}


def _treatments(file: Path, values: Mapping[str, Any]) -> list[type[Treatment]]:
    kind = values["peft_type"]
    if not (found := [one for one in _readers() if kind in _kinds(one) and one.reads(values)]):
        raise UserError(f"{file}: no method reads a {kind} of this kind")
    return found


def _serving(readers: Iterable[type[Treatment]], path: str, config: DecoderConfig) -> type[Treatment] | None:
    """The first method that serves a module, by our path of it."""
    if (matrix := adaptable_modules(config).get(path)) is None:
        return None
    spec = declare(config)[matrix]
    array = Matched(matrix, spec.shape, spec.axes, (0,))
    return next((one for one in readers if one.serves(array)), None)


def _tables(
    entries: Mapping[str, TensorEntry], config: DecoderConfig, layout: Layout
) -> dict[str, tuple[str, TensorEntry]]:
    """What PEFT writes of the base itself beside adapters of embeddings and head, unless it is told not to."""
    names = {
        path: module for module, (path, _) in (all_modules(config, layout) | other_modules(config, layout)).items()
    }
    places = {tensor_name(names[path], "base_layer.weight"): path for path in ("embed", HEAD) if path in names}
    return {name: (path, entries[name]) for name, path in places.items() if name in entries}


def _changed_tables(tables: Mapping[str, tuple[str, TensorEntry]], config: DecoderConfig, params: Params) -> list[str]:
    """Which of them are not the model's, as far as their shapes and some rows of them tell."""
    problems, shape = [], (config.vocab_size, config.hidden_size)
    for name, (path, entry) in tables.items():
        ours = params.get(adaptable_modules(config)[path])
        if entry.shape != shape:
            problems.append(f"{name} has shape {entry.shape}, and the model's has {shape}")
        elif ours is not None and ours.is_fully_addressable:
            rows = np.asarray(ours[:_COMPARED] if path == "embed" else ours[:, :_COMPARED].T, np.float32)
            theirs = np.asarray(entry.read(slice(0, _COMPARED)), np.float32)
            if not np.allclose(rows, theirs, rtol=0.02, atol=0.02 * float(np.abs(rows).max())):
                problems.append(f"{name} is another table than the model's: it was changed, or is of another base")
    return problems


def read_adapter_config(file: Path) -> AdapterConfig:
    """What an ``adapter_config.json`` says of its base and its modules, of whatever kind the adapter is.

    Raises:
      UserError: it is damaged, or of a kind that no method reads.
    """
    values = read_adapter_values(file)
    return AdapterConfig.model_validate(values if values["peft_type"] == LORA else _targets(values))


def _targets(values: Mapping[str, Any]) -> dict[str, Any]:
    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    names += ("base_model_name_or_path", "revision")
    return {"target_modules": []} | {name: values[name] for name in names if values.get(name) is not None}


def read_adapter_values(file: Path) -> dict[str, Any]:
    """An ``adapter_config.json``, checked.

    Raises:
      UserError: it is damaged, or of a kind that no method reads.
    """
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: a JSON object is expected")
    kind, kinds = values.get("peft_type"), sorted({kind for treatment in _readers() for kind in _kinds(treatment)})
    if kind not in kinds:
        if (instead := treatments.INSTEAD.get(str(kind).lower())) is not None:
            raise UserError(f"{file}: peft_type is {kind!r}, which is not supported: {instead}")
        raise UserError(f"{file}: peft_type is {kind!r}; only {', '.join(map(repr, kinds))} are supported")
    try:
        read, problems = _checked(values) if kind == LORA else (AdapterConfig(**_targets(values)), [])
    except ValidationError as error:
        details = {(str(each["loc"][0]), each["msg"]) for each in error.errors()}
        problems = [f"{key} {json.dumps(values.get(key))}: {message}" for key, message in sorted(details)]
        raise UserError(f"{file}: " + "; ".join(problems)) from error
    if problems:
        raise UserError(f"{file}: " + "; ".join(problems))
    if kind != LORA:
        return values
    unwritten = ("exclude_modules", "trainable_token_indices")
    return read.model_dump() | {name: getattr(read, name) for name in unwritten}


def _checked(values: Mapping[str, Any]) -> tuple[AdapterConfig, list[str]]:
    """A LoRA's configuration, and what of it is not read."""
    known = AdapterConfig.model_fields.keys()
    problems = [
        f"{key} {json.dumps(value)}: not supported"
        for key, value in values.items()
        if key not in known | _HARMLESS and value
    ]
    read = AdapterConfig(**{key: value for key, value in values.items() if key in known and value is not None})
    start = read.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        problems.append(
            f"init_lora_weights {start!r} changes the base's weights; convert the adapter with peft first "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return read, problems


def _sorted(
    entries: Mapping[str, TensorEntry], adapter: AdapterConfig, modules: Collection[str]
) -> tuple[Tensors, list[str]]:
    """The tensors of every module, and which of them, or of the configuration's modules, are not as they should be."""
    problems: list[str] = []
    found: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in entries.items():
        module, end = parse_tensor_name(name, modules) or ("", "")
        if module not in modules and (module or not end):
            problems.append(f"{name} belongs to no linear layer of the model")
        elif entry.dtype not in DTYPES | INDICES:
            problems.append(f"{name} has the dtype {entry.dtype}, not {', '.join(DTYPES)}")
        else:
            found[module][end] = entry
    for module in modules:
        if not adapter.targets(module):
            problems += [f"{module} has tensors but is not in target_modules"] if module in found else []
            found.pop(module, None)
        elif module not in found:
            problems.append(f"{module} is in target_modules but has no tensors")
    return found, problems


def _misfits(plan: ResolvedPlan, tensors: Tensors, modules: Modules) -> list[str]:
    """What the tensors are not that the method would write."""
    names = {place: name for name, place in modules.items()} | {("", None): ""}
    kinds = {kind for part in plan.parts if (kind := plan.alone or part.peft_type) is not None}
    expected: dict[str, dict[str, tuple[int, ...]]] = {}
    for part in plan.parts:
        for each in plan.tensors(part, zeros(part.arrays()), zeros(part.fixed()), {}):
            shapes = expected.setdefault(names[each.path, each.layer], {})
            for end, array in each.tensors.items():
                # What all share is as large as whoever has most of it needs.
                shape: tuple[int, ...] = array.shape
                shapes[end] = tuple(map(max, shapes.get(end, shape), shape))
    problems = []
    for module in dict.fromkeys([*expected, *tensors]):
        held, shapes, of = tensors.get(module, {}), expected.get(module, {}), f" of {module}" if module else ""
        problems += [f"{end}{of} belongs to no {' or '.join(kinds)}" for end in held.keys() - shapes.keys()]
        for end, shape in shapes.items():
            if end not in held:
                problems.append(f"{end}{of} is missing")
            elif held[end].shape != shape:
                problems.append(f"{end}{of} has shape {held[end].shape}, not {shape}")
    return problems


def _rules(
    treatment: type[Treatment], values: Mapping[str, Any], tensors: Tensors, modules: Modules, config: DecoderConfig
) -> list[RuleConfig]:
    """A rule for the modules of the same numbers that are adapted in the same layers."""
    numbers: dict[str, dict[str, Any]] = {}
    layers: dict[tuple[str, str], list[int]] = defaultdict(list)
    for module, (path, layer) in modules.items():
        if module in tensors:
            section = treatment.read_section(values, module)
            numbers[repr(section)] = section
            layers[path, repr(section)] += [] if layer is None else [layer]
    paths: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for (path, section), chosen in layers.items():
        paths[section, tuple(chosen)].append(path)
    return [
        treatment.Section(match=pattern_of(together, chosen, config.num_layers), weight_decay=None, **numbers[section])
        for (section, chosen), together in paths.items()
    ]


def _arrays(
    plan: ResolvedPlan, tensors: Tensors, modules: Modules, mesh: jax.sharding.Mesh | None
) -> tuple[Trainable, Trainable]:
    """The arrays of the plan, as the tensors have them."""
    places, once = {place: name for name, place in modules.items()}, tensors.get("", {})
    axes, fixed_axes = plan.axes(), plan.fixed_axes()
    trainable: Trainable = {store: {} for store in axes}
    fixed: Trainable = {}
    for part in plan.parts:
        held: dict[int, dict[str, np.ndarray]] = {}
        for layer in range(len(part.rules)):
            entries = tensors.get(places[part.module, layer if part.layered else None], {})
            if entries or plan.alone is not None:
                held[layer] = {end: entry.read() for end, entry in {**once, **entries}.items()}
        arrays, kept = part.restored(held)
        trainable[part.store][part.path] = _placed(arrays, axes[part.store][part.path], mesh)
        if kept:
            fixed.setdefault(part.store, {})[part.path] = _placed(kept, fixed_axes[part.store][part.path], mesh)
    return trainable, fixed


def _placed(arrays: Any, axes: Any, mesh: jax.sharding.Mesh | None) -> Any:
    def put(array: np.ndarray, axes: tuple[str | None, ...]) -> jax.Array:
        if mesh is None:
            return jax.device_put(array)
        sharding = named_sharding(axes, array.shape, mesh)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, arrays, axes)
