"""Puts what was trained into the weights, for a model that needs no adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtune_kernels import Quantized
from jaxtyping import Array, Float

from jaxtune.errors import UserError
from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import adaptable_modules, declare
from jaxtune.models.decoder import Decoder, merge, split
from jaxtune.models.linear import Adapter
from jaxtune.models.weight import dequantized, quantized_stack
from jaxtune.updates.resolved import ResolvedPlan, Trainable, overlaid
from jaxtune.updates.treatments.base import HEAD, KERNEL, Values

_HEAD = f"{HEAD}{KERNEL}"


def merge_adapters(
    model: Decoder,
    plan: ResolvedPlan,
    trainable: Trainable,
    hyperparameters: Values,
    fixed: Trainable | None = None,
) -> Decoder:
    """A decoder that needs no adapters: their layers have other weights, as ``W + scale · A B``, and perhaps biases.

    It also holds the parameters that were trained themselves. The sum is float32 and then rounded to the model's dtype:
    exact to rounding for a float32 model. With a bfloat16 one a small update may vanish in part, so load the base with
    ``dtype="float32"`` where that counts. A quantized base becomes bfloat16: W is then what its codes stand for. Where
    the embedding table has an adapter and the head is tied to it, the head becomes a matrix of its own, the base's
    table: an adapter of embeddings does not reach the head.

    Args:
      model: the base; not changed.
      plan: what was trained.
      trainable: the trained arrays.
      hyperparameters: those of the training; a rule's own value where a key is missing.
      fixed: what is fixed with them; what is missing is as the base has it.

    Raises:
      UserError: a rank is above the capacity, or a soft prompt was trained.
    """
    plan.check(hyperparameters)
    static, params = split(model)
    given = fixed or {}
    if any(parts.keys() - given.get(store, {}).keys() for store, parts in plan.fixed_axes().items()):
        fixed = overlaid(plan.start(jax.random.key(0), params, hyperparameters)[1], given)
    merged, adapters = plan.apply(params, trainable, hyperparameters, fixed=fixed)
    config, matrices = model.config, adaptable_modules(model.config)
    if config.tie_embeddings and "embed" in adapters:
        config, merged = _untied(config, merged, model.mesh)
    if any(adapter.virtual_tokens for adapter in adapters.values()):
        raise UserError(
            "update: a soft prompt stands in front of the tokens and cannot be merged into weights; export it as an "
            "adapter, with nothing else trained beside it"
        )
    for path, adapter in adapters.items():
        names = matrices[path], f"{path}.bias"
        weights: dict[str, Any] = {name: merged[name] for name in names if name in merged}
        places = {name: array.sharding for name, array in weights.items()}
        if (stack := quantized_stack(merged, names[0])) is not None:
            weights[names[0]], places[names[0]] = stack, stack.codes.sharding
        # One module at a time: what is computed is as large as its kernels, in float32.
        made = jax.jit(_merged, static_argnames="names", out_shardings=places)(weights, adapter, names=names)
        merged.update(made)
    if config.quantization is not None:
        return Decoder(*dequantized(config, merged), model.mesh)
    return merge(static, merged) if config is model.config else Decoder(config, merged, model.mesh)


def _untied(
    config: DecoderConfig, params: dict[str, Any], mesh: jax.sharding.Mesh | None
) -> tuple[DecoderConfig, dict[str, Any]]:
    """The same model whose head is a matrix of its own."""
    config = dataclasses.replace(config, tie_embeddings=False)
    place = None if mesh is None else declare(config)[_HEAD].sharding(mesh)
    head = jax.jit(jnp.transpose, out_shardings=place)(params["embed.table"])
    return config, params | {_HEAD: head}


def _merged(weights: dict[str, Any], adapter: Adapter, names: tuple[str, str]) -> dict[str, Float[Array, "..."]]:
    whole = adapter.unscanned()

    def one(adapter: Adapter, kernel: Array, bias: Array | None) -> tuple[Array, Array | None]:
        return adapter.joined(whole).merged(kernel, bias)

    held = weights[names[0]]
    if isinstance(held, Quantized):
        return _merged_layers(held, weights.get(names[1]), one, adapter.scanned(), names)
    kernel, bias = (weights[name].astype(jnp.float32) if name in weights else None for name in names)
    assert kernel is not None
    made = (jax.vmap(one) if kernel.ndim > 2 else one)(adapter.scanned(), kernel, bias)
    return {
        name: value.astype(weights[name].dtype) for name, value in zip(names, made, strict=True) if value is not None
    }


def _merged_layers(
    kernel: Quantized, bias: Array | None, one: Callable[..., Any], adapters: Adapter, names: tuple[str, str]
) -> dict[str, Float[Array, "..."]]:
    """As :func:`_merged`, a layer at a time, so that one kernel in float32 is there, and rounded to bfloat16."""

    def layer(scanned: tuple[Adapter, Quantized, Array | None]) -> dict[str, Array]:
        adapter, kernel, bias = scanned
        made = one(adapter, kernel.dequantized(jnp.float32), None if bias is None else bias.astype(jnp.float32))
        return {name: value.astype(jnp.bfloat16) for name, value in zip(names, made, strict=True) if value is not None}

    return jax.lax.map(layer, (adapters, kernel, bias))
