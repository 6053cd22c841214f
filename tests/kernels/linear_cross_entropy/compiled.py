"""The linear cross-entropy compiled for devices that are not here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtune_kernels import linear_cross_entropy

from jaxtune.parallel.targets import compile_for_target, target_devices

# Width and vocabulary; the second has a tied head.
SHAPES = {"llama-3-8b": (4096, 128256), "qwen3-0.6b": (1024, 151936)}


def compiled(target, shape, *, rows=8192, dtype="bfloat16", tied=False, trained=False, axes=None, fsdp=False):
    """Value and gradients, compiled for a target.

    Args:
      target: as of `target_devices`.
      shape: a key of `SHAPES`.
      rows: of the whole batch.
      dtype: of hidden states and head.
      tied: the head is ``[vocab, d]``.
      trained: with the head's gradient.
      axes: sizes of the mesh axes ``fsdp`` and ``tensor``; by default one device is used.
      fsdp: the head is also cut over ``fsdp``, along d.
    """
    d, vocabulary = SHAPES[shape]
    axes = axes or (1, 1)
    devices = target_devices(target)[: axes[0] * axes[1]]
    mesh = Mesh(np.array(devices).reshape(axes), ("fsdp", "tensor"))
    spec = ("fsdp" if fsdp else None, "tensor")
    spec = PartitionSpec(*(spec[::-1] if tied else spec))
    by_row = PartitionSpec("fsdp")

    def abstract(size, kind, spec):
        return jax.ShapeDtypeStruct(size, kind, sharding=NamedSharding(mesh, spec))

    def loss(hidden, head, targets, weights, smoothing, z_loss):
        losses = linear_cross_entropy(
            hidden,
            head,
            targets,
            weights,
            transposed=tied,
            label_smoothing=smoothing,
            z_loss=z_loss,
            soft_cap=30.0,
            mesh=mesh,
            row_axes=("data", "fsdp"),
            vocabulary_axis="tensor",
        )
        return jnp.sum(losses * weights)

    batch = 8, rows // 8
    operands = (
        abstract((*batch, d), dtype, by_row),
        abstract((vocabulary, d) if tied else (d, vocabulary), dtype, spec),
        abstract(batch, "int32", by_row),
        abstract(batch, "float32", by_row),
        abstract((), "float32", PartitionSpec()),
        abstract((), "float32", PartitionSpec()),
    )
    gradient = jax.value_and_grad(loss, argnums=(0, 1) if trained else 0)
    return compile_for_target(gradient, *operands)


def check_memory(program, shape, *, rows, shards=1, trained=False, rounded=False):
    """Temporaries beside the head's gradient stay below a third of one device's float32 logits.

    A TPU's matrix unit takes bfloat16: XLA rounds a float32 head once, before the loop over rows (``rounded``).
    """
    d, vocabulary = SHAPES[shape]
    temporaries = program.memory_analysis().temp_size_in_bytes
    if trained:
        temporaries -= d * vocabulary * 4 // shards
    if rounded:
        temporaries -= d * vocabulary * 2 // shards
    assert temporaries < rows * vocabulary * 4 // shards / 3, f"{temporaries / 2**20:.0f} MiB"


def instructions(program) -> str:
    """The compiled program, in which the names of its collectives can be looked for.

    For some TPUs libtpu writes asynchronous collectives in a newer form than jaxlib can print; the serialised program
    has the names too.
    """
    try:
        return program.as_text()
    except jax.errors.JaxRuntimeError:
        return program.runtime_executable().serialize().decode("latin-1")
