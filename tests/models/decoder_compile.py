"""The gradient of a small decoder, compiled for devices that are not here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.models import Decoder, DecoderConfig, merge, split
from jaxtune.models.declarations import abstract_params
from jaxtune.parallel import make_mesh
from jaxtune.parallel.targets import compile_for_target, target_devices


def compiled_gradient(
    target, *, head_dim, windows, length=256, remat="dots", dtype="bfloat16", fsdp=1, tensor=1
) -> str:
    """The compiled text; one row for each device that rows are cut over."""
    mesh = make_mesh(1, fsdp, tensor, target_devices(target)[: fsdp * tensor])
    config = DecoderConfig(
        "gemma3_text", 512, 256, 512, num_layers=max(2, len(windows)), num_heads=4, num_kv_heads=2,
        head_dim=head_dim, windows=windows,
    )  # fmt: skip
    static, params = split(Decoder(config, abstract_params(config, dtype, mesh), mesh))
    by_row = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    integers = jax.ShapeDtypeStruct((fsdp, length), jnp.int32, sharding=by_row)

    def loss(params, tokens, segments):
        states = merge(static, params).hidden(tokens, None, segments, remat=remat)
        return jnp.sum(states.astype(jnp.float32))

    return compile_for_target(jax.grad(loss), params, integers, integers).as_text()
