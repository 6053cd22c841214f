"""Rotary embeddings in ``config.json``: the published ``rope_theta`` and ``rope_scaling``, and ``rope_parameters``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.errors import nearest
from jaxtune.models.config import RopeConfig
from jaxtune.models.hf_fields import LAYER_TYPES, ROPE_KEYS

Wrong = Callable[[str, Any, str], None]
"""Is told a field, its value and what is wrong with it."""


def read_ropes(
    values: Mapping[str, Any], *, local: bool, context: Any, wrong: Wrong
) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotary embedding of all layers and None; of the layers without and with a window where they differ.

    Args:
        values: The fields of ``config.json``.
        local: The layers with a window have a base of their own (Gemma 3).
        context: ``max_position_embeddings``.
        wrong: Is told of what is not supported; what is returned is then not to be used.
    """
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    theta = values.get("rope_theta")
    if new and old and new != old:
        wrong("rope_scaling", old, "contradicts rope_parameters")
    given = new or old or {}
    key = "rope_parameters" if new else "rope_scaling"
    if not isinstance(given, dict):
        wrong(key, given, "must be an object")
        given = {}
    if not local:
        if values.get("rope_local_base_freq") is not None:
            wrong("rope_local_base_freq", values["rope_local_base_freq"], "only Gemma 3 has it")
        return _rope(key, given, 10_000.0 if theta is None else theta, context, wrong), None
    base = 1_000_000.0 if theta is None else theta
    local_base = values.get("rope_local_base_freq")
    local_base = 10_000.0 if local_base is None else local_base
    if new:
        # transformers 5.0 to 5.12 write a rope_theta of null beside the objects of the layers.
        given = {name: part for name, part in given.items() if part is not None}
        unknown = set(given) - set(LAYER_TYPES)
        if unknown or not all(isinstance(part, dict) for part in given.values()):
            wrong(key, given, f"must hold one object for each of {' and '.join(LAYER_TYPES)}")
            given = {}
        whole, windowed = given.get("full_attention", {}), given.get("sliding_attention", {})
    else:
        whole, windowed = given, {}
    return _rope(key, whole, base, context, wrong), _rope(key, windowed, local_base, context, wrong)


def _rope(key: str, given: Mapping[str, Any], theta: Any, context: Any, wrong: Wrong) -> RopeConfig:
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_KEYS:
        wrong(key, dict(given), f"rope type {kind!r} is not supported{nearest(kind, ROPE_KEYS)}")
        return RopeConfig()
    needed = ROPE_KEYS[kind]
    values = {name: given[name] for name in needed if given.get(name) is not None}
    if kind == "llama3":
        values.setdefault("original_max_position_embeddings", context)
    values["theta"] = given["rope_theta"] if given.get("rope_theta") is not None else theta
    # Null and a switch that is off say nothing.
    said = {name for name, value in given.items() if value is not None and value is not False}
    unknown = said - {*needed, "rope_theta", "rope_type", "type"}
    if given.get("partial_rotary_factor") == 1:
        unknown.discard("partial_rotary_factor")
    missing = [name for name in needed if name not in values]
    mistyped = [name for name, value in values.items() if isinstance(value, bool) or not isinstance(value, int | float)]
    for names, why in ((sorted(unknown), "is not supported"), (missing, "is missing"), (mistyped, "must be a number")):
        if names:
            wrong(key, dict(given), f"{', '.join(names)} {why} for rope type {kind!r}")
    if unknown or missing or mistyped:
        return RopeConfig()
    numbers: dict[str, Any] = {name: float(value) for name, value in values.items()}
    if kind == "llama3":
        numbers["original_max_position_embeddings"] = int(values["original_max_position_embeddings"])
    try:
        return RopeConfig(kind=kind, **numbers)
    except ValueError as error:
        wrong(key, dict(given), str(error))
        return RopeConfig()


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """An entry of ``rope_parameters``."""
    return {"rope_theta": rope.theta, "rope_type": rope.kind} | {
        key: getattr(rope, key) for key in ROPE_KEYS[rope.kind]
    }
