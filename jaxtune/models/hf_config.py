"""``config.json`` of a checkpoint to :class:`DecoderConfig` and back.

Both forms in circulation are read: the published one (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and the one
that transformers 5 writes (``rope_parameters``, ``dtype``). A field either is understood, or stands on a list of fields
that do not change what is computed, or is null or a switch that is off; anything else is an error: ignoring it would
compute another model.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError, nearest
from jaxtune.models.architectures import ARCHITECTURES, Architecture, architectures_of
from jaxtune.models.config import Activation, DecoderConfig
from jaxtune.models.families import FAMILIES, Family, family_of
from jaxtune.models.hf_fields import (
    ACTIVATIONS,
    HARMLESS,
    LAYER_TYPES,
    ROPE_FIELDS,
    WINDOW_FIELDS,
    is_off,
    supported_values,
)
from jaxtune.models.hf_rope import read_ropes, write_rope
from jaxtune.models.quantized_files import readable

_QUANTIZED = "quantization_config"
_NOT_READ = (
    "of quantized weights only bitsandbytes' 4 bits and fp8 in blocks are read; give the checkpoint that these were "
    "made of, and set model.quantize to hold it in as few bits"
)
_REMOTE_CODE = "this checkpoint brings code of its own, which is never run"


def read_config(directory: Path) -> DecoderConfig:
    """The configuration of a checkpoint directory.

    ``generation_config.json``, where there is one, names the tokens that end a generation: instruction-tuned
    checkpoints have more of them than ``config.json`` says.

    Raises:
        UserError: No ``config.json``, or one that is malformed or describes a model that is not supported; every
            offending field is named with its value.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: there is no config.json, so this is no model directory")
    config = decoder_config(_read_json(path), source=str(path))
    generation = directory / "generation_config.json"
    ends = _read_json(generation).get("eos_token_id") if generation.is_file() else None
    if ends is None:
        return config
    if not _are_tokens(ends):
        raise UserError(f"{generation}: eos_token_id = {json.dumps(ends)}: must be a token id or a list of them")
    return dataclasses.replace(config, eos_token_ids=_tokens(ends))


def decoder_config(values: Mapping[str, Any], source: str = "config.json") -> DecoderConfig:
    """Fields of a ``config.json`` as a configuration.

    Args:
        values: The parsed file.
        source: Its name, for messages.

    Raises:
        UserError: As :func:`read_config`.
    """
    kind, architecture = _architecture(values, source)
    outer: Mapping[str, Any] = {}
    if architecture.part is not None:
        outer, values = values, values.get(architecture.part) or {}
        if not isinstance(values, Mapping):
            raise UserError(f"{source}: {architecture.part} must be an object")
    reader = _Reader(FAMILIES[architecture.family], values, outer)
    fields = reader.fields()
    if architecture.part is not None:
        fields["model_type"] = kind
    problems = reader.problems
    if not problems:
        try:
            return DecoderConfig(**fields)
        except ValueError as error:
            problems = [str(error)]
    raise UserError(f"{source}: " + "; ".join(problems))


def read_architecture(directory: Path) -> Architecture:
    """What transformers loads for the ``config.json`` of a checkpoint directory.

    Raises:
        UserError: The file cannot be read, or its ``model_type`` is not supported.
    """
    path = directory / "config.json"
    return _architecture(_read_json(path), str(path))[1]


def _architecture(values: Mapping[str, Any], source: str) -> tuple[str, Architecture]:
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(f"{source}: model_type {kind!r} is not supported{nearest(kind, ARCHITECTURES)}")
    return kind, ARCHITECTURES[kind]


def checkpoint_config(config: DecoderConfig, dtype: str = "float32") -> dict[str, Any]:
    """The fields of ``config.json`` in the form that transformers 5 reads.

    Args:
        config: The configuration.
        dtype: Name of the dtype of the weights.

    Raises:
        UserError: The family's ``config.json`` has no way to say what ``config`` computes.
    """
    family = family_of(config)
    gemma3 = family.local_rope
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    rope = write_rope(config.rope)
    if gemma3:
        rope = {"full_attention": rope, "sliding_attention": write_rope(config.local_rope or config.rope)}
    ends = config.eos_token_ids
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family.name].name],
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "dtype": dtype,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "head_dim": config.head_dim,
        family.activation_key: activations[config.activation],
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": family.name,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if family.qkv_bias is None:
        values["attention_bias"] = config.qkv_bias
    if "mlp_bias" in family.defaults:
        values["mlp_bias"] = config.mlp_bias
    if family.windows != "none":
        # transformers' Gemma builds the mask of the window even where no layer has one.
        values["sliding_window"] = config.window or (family.defaults["sliding_window"] if family.gemma else None)
    if family.windows == "from":
        values["use_sliding_window"] = config.window is not None
        values["max_window_layers"] = next((i for i, window in enumerate(config.windows) if window), config.num_layers)
    if "layer_types" in family.defaults:
        values["layer_types"] = ["sliding_attention" if window else "full_attention" for window in config.windows]
    if family.gemma:
        scalar = config.query_pre_attn_scalar
        whole = scalar is not None and float(scalar).is_integer()
        values["query_pre_attn_scalar"] = int(scalar) if whole and scalar is not None else scalar
        values["final_logit_softcapping"] = config.final_soft_cap
        if "attn_logit_softcapping" in family.defaults:
            values["attn_logit_softcapping"] = config.attention_soft_cap
    _check_round_trip(config, values)
    return dict(sorted(values.items()))


def _check_round_trip(config: DecoderConfig, values: Mapping[str, Any]) -> None:
    read = decoder_config(values)
    lost = [
        f"{field.name} = {getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.compare and getattr(read, field.name) != getattr(config, field.name)
    ]
    if lost:
        raise UserError(f"a {config.family} config.json cannot express {', '.join(lost)}")


class _Reader:
    """Reads fields one by one, remembers which, and collects what is wrong instead of stopping at the first."""

    def __init__(self, family: Family, values: Mapping[str, Any], outer: Mapping[str, Any]):
        self.family = family
        # Of a model of several parts the whole holds the head, so the whole's field ties it, not the language model's.
        tied = {"tie_word_embeddings": outer["tie_word_embeddings"]} if "tie_word_embeddings" in outer else {}
        self.values = {**values, **tied}
        self.outer = outer
        self.problems: list[str] = []

    def fields(self) -> dict[str, Any]:
        """Arguments of :class:`DecoderConfig`; only to be used when there are no problems."""
        self._check_known()
        family, defaults = self.family, self.family.defaults
        layers = self._number("num_hidden_layers", int)
        heads = self._number("num_attention_heads", int)
        hidden = self._number("hidden_size", int)
        head_dim = self._number("head_dim", int, optional=True)
        if head_dim is None and hidden % max(heads, 1):
            self._wrong("hidden_size", hidden, f"{heads} attention heads do not divide it, and there is no head_dim")
        biased = self._flag("attention_bias") if family.qkv_bias is None else family.qkv_bias
        context = self._get("max_position_embeddings")
        rope, local_rope = read_ropes(self.values, local=family.local_rope, context=context, wrong=self._wrong)
        fields: dict[str, Any] = {
            "family": family.name,
            "vocab_size": self._number("vocab_size", int),
            "hidden_size": hidden,
            "intermediate_size": self._number("intermediate_size", int),
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": self._number("num_key_value_heads", int, optional=True) or heads,
            "head_dim": head_dim or hidden // max(heads, 1),
            "norm_eps": self._number("rms_norm_eps", float),
            "norm_plus_one": family.gemma,
            "post_norms": family.gemma,
            "qk_norm": family.qk_norm,
            "qkv_bias": biased,
            "output_bias": biased if family.qkv_bias is None else False,
            "mlp_bias": self._flag("mlp_bias") if "mlp_bias" in defaults else False,
            "activation": self._activation(),
            "tie_embeddings": self._flag("tie_word_embeddings"),
            "windows": self._windows(layers),
            "rope": rope,
            "local_rope": local_rope,
            "max_position_embeddings": self._number("max_position_embeddings", int),
            "initializer_range": self._number("initializer_range", float),
            "bos_token_id": self._token("bos_token_id"),
            "eos_token_ids": self._ends(),
            "pad_token_id": self._token("pad_token_id"),
        }
        if family.gemma:
            fields["query_pre_attn_scalar"] = self._number("query_pre_attn_scalar", float)
            fields["embedding_scale"] = float(hidden) ** 0.5
            fields["final_soft_cap"] = self._number("final_logit_softcapping", float, optional=True)
            if "attn_logit_softcapping" in defaults:
                fields["attention_soft_cap"] = self._number("attn_logit_softcapping", float, optional=True)
        return fields

    def _check_known(self) -> None:
        """Fields that are unknown, or have a value that is not supported."""
        family = self.family
        known = {*HARMLESS, *family.defaults, *family.harmless, *ROPE_FIELDS, *WINDOW_FIELDS, "auto_map"}
        if family.windows == "pattern":
            known |= {"sliding_window_pattern", "_sliding_window_pattern"}
        if family.activation_key != "hidden_act":
            known.add("hidden_act")
        for key, value in self.values.items():
            if value is None:
                continue
            supported = family.only.get(key, supported_values(key))
            if supported is not None:
                if value not in supported:
                    choices = " or ".join(map(json.dumps, supported)) or "null"
                    self._wrong(key, value, f"supported is {choices}")
            elif key not in {*known, _QUANTIZED} and not is_off(key, value):
                self._wrong(key, value, "not a field of this family that is supported" + _near(key, known))
        for values in (self.values, self.outer):
            code = [name for name in values.get("auto_map") or () if name != "AutoTokenizer"]
            if code:
                self._wrong("auto_map", values["auto_map"], _REMOTE_CODE)
            if (quantized := values.get(_QUANTIZED)) is not None and not readable(quantized):
                self._wrong(_QUANTIZED, quantized, _NOT_READ)
        expected = [architecture.name for architecture in architectures_of(family.name)]
        architectures = (self.outer or self.values).get("architectures")
        if architectures and not {*expected} & {*architectures}:
            self._wrong("architectures", architectures, f"supported is {' or '.join(expected)}")

    def _wrong(self, key: str, value: Any, why: str) -> None:
        shown = json.dumps(value)
        self.problems.append(f"{key} = {shown if len(shown) <= 120 else shown[:117] + '...'}: {why}")

    def _get(self, key: str) -> Any:
        default = self.family.defaults.get(key)
        return self.values.get(key, self.outer.get(key, default) if key == "eos_token_id" else default)

    def _number(self, key: str, kind: type[int] | type[float], optional: bool = False) -> Any:
        value = self._get(key)
        if value is None and optional:
            return None
        if isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value):
            return value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        self._wrong(key, value, "must be a whole number" if kind is int else "must be a number")
        return kind(1)

    def _flag(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            self._wrong(key, value, "must be true or false")
        return bool(value)

    def _token(self, key: str) -> int | None:
        value = self._number(key, int, optional=True)
        return None if value is None or value < 0 else value  # -1 is how some files say that there is none

    def _ends(self) -> tuple[int, ...]:
        value = self._get("eos_token_id")
        if value is not None and not _are_tokens(value):
            self._wrong("eos_token_id", value, "must be a token id or a list of them")
            return ()
        return _tokens(value)

    def _activation(self) -> Activation:
        key = self.family.activation_key
        name = self._get(key)
        if key != "hidden_act" and self.values.get("hidden_act") not in (None, name):
            self._wrong("hidden_act", self.values["hidden_act"], f"contradicts {key} = {json.dumps(name)}")
        if name not in ACTIVATIONS:
            self._wrong(key, name, "not supported" + nearest(name, ACTIVATIONS))
        return ACTIVATIONS.get(name, "silu")

    def _windows(self, layers: int) -> tuple[int | None, ...]:
        windows = self._sizes_of_windows(layers)
        self._check_windows(windows)
        return windows

    def _check_windows(self, windows: tuple[int | None, ...]) -> None:
        """Fields about windows that the family does not read: each must say what holds anyway."""
        family, values = self.family, self.values
        has_window = any(window is not None for window in windows)
        names = {windowed: name for name, windowed in LAYER_TYPES.items()}
        off = values.get("use_sliding_window") is False
        holds = {
            # Transformers does not read it either, so beside a size that it does read, "off" would be wrong.
            "use_sliding_window": (off and not (has_window and values.get("sliding_window") is not None))
            or (values.get("use_sliding_window") is True and has_window),
            "sliding_window": off,
            "max_window_layers": off or not has_window,
            "layer_types": values.get("layer_types") == [names[window is not None] for window in windows],
        }
        for key in WINDOW_FIELDS:
            if key not in family.defaults and values.get(key) is not None and not holds[key]:
                why = "not a field of this family, and not what its layers do"
                self._wrong(key, values[key], f"{why}: {'some have' if has_window else 'none has'} a sliding window")

    def _sizes_of_windows(self, layers: int) -> tuple[int | None, ...]:
        family = self.family
        if family.windows == "none":
            return (None,) * layers
        size = self._number("sliding_window", int, optional=True)
        if family.windows == "from" and not self._flag("use_sliding_window"):
            size = None
        types = self._get("layer_types") if "layer_types" in family.defaults else None
        if types is not None:
            if not isinstance(types, list) or len(types) != layers or any(kind not in LAYER_TYPES for kind in types):
                choices = " or ".join(LAYER_TYPES)
                self._wrong("layer_types", types, f"must be {choices} for each of the {layers} layers")
                return (None,) * layers
            slides = [LAYER_TYPES[kind] for kind in types]
        elif family.windows == "all":
            slides = [size is not None] * layers
        elif family.windows == "from":
            first = self._number("max_window_layers", int)
            slides = [size is not None and layer >= first for layer in range(layers)]
        else:
            period = self._period()
            slides = [(layer + 1) % period != 0 for layer in range(layers)]
        if any(slides) and size is None:
            self._wrong("sliding_window", None, "some layers have a sliding window, so its size is needed")
            return (None,) * layers
        return tuple(size if slide else None for slide in slides)

    def _period(self) -> int:
        """Every how many layers one has no window: 2 in Gemma 2, ``sliding_window_pattern`` (6) in Gemma 3."""
        if not self.family.local_rope:
            return 2
        key = "sliding_window_pattern" if "sliding_window_pattern" in self.values else "_sliding_window_pattern"
        value = self.values.get(key, 6)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self._wrong(key, value, "must be a positive whole number")
            return 6
        return value


def _near(key: str, known: set[str]) -> str:
    phrase = nearest(key, sorted(known))
    return phrase if "did you mean" in phrase else ""


def _are_tokens(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items)


def _tokens(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return values
