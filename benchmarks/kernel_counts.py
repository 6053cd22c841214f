"""What kernels/README.md counts: bytes and memory of programs for accelerators that are not here. Nothing is timed.

The kernels' bytes are those that their blocks fetch and store; all others are of XLA's ``cost_analysis``, which takes a
kernel's own count for it, and the memory is of its ``memory_analysis``.

    python benchmarks/kernel_counts.py --json > benchmarks/results/kernel-counts.json

From the repository's root; needs the extra ``targets`` and some minutes.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from common import machine
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtune_kernels import Selection, linear_cross_entropy, low_rank_matmul, masked_update
from jaxtune_kernels.low_rank.tpu_tiles import Problem, Tiles, choose_tiles, hbm_bytes, vmem_bytes

from jaxtune.parallel.mesh import make_mesh
from jaxtune.parallel.targets import compile_for_target, target_devices

TPU, GPU = "v5e:2x4", "h200:8"
ROWS, WIDTH, RANK = 8192, 4096, 16
VOCABULARY = 128_256
MASKED = (4096, 14_336)


@functools.cache
def _sharding(target: str) -> NamedSharding:
    return NamedSharding(make_mesh(1, 1, 1, devices=target_devices(target)[:1]), P())


def struct(target: str, *shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An array on one device of a target."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=_sharding(target))


def bytes_accessed(compiled: jax.stages.Compiled) -> float:
    """XLA's count, without what kernels do."""
    cost: Any = compiled.cost_analysis()
    return float((cost[0] if isinstance(cost, list) else cost)["bytes accessed"])


def temporaries(compiled: jax.stages.Compiled) -> int:
    """Memory that the program takes beside its arguments and results."""
    memory: Any = compiled.memory_analysis()
    return int(memory.temp_size_in_bytes)


def low_rank() -> dict[str, Any]:
    """Bytes of a layer on a v5e, in bfloat16 with float32 adapters: the kernel, XLA's form, the frozen matmul alone."""
    x, g, w = struct(TPU, ROWS, WIDTH), struct(TPU, ROWS, WIDTH), struct(TPU, WIDTH, WIDTH)
    f32 = jnp.float32
    adapter = struct(TPU, WIDTH, RANK, dtype=f32), struct(TPU, RANK, WIDTH, dtype=f32), struct(TPU, dtype=f32)

    def layer(implementation: Any, x: Any, a: Any, b: Any, scale: Any, w: Any) -> jax.Array:
        return low_rank_matmul(x, w, a, b, scale, implementation=implementation)

    forms: dict[str, tuple[Callable[..., jax.Array], tuple[Any, ...]]] = {
        "kernel": (functools.partial(layer, "tpu"), adapter),
        "xla": (functools.partial(layer, "xla"), adapter),
        "frozen": (lambda x, w: x @ w, ()),
    }
    found: dict[str, Any] = {}
    for name, (product, trained) in forms.items():

        def both(x: Any, *rest: Any, product: Any = product) -> Any:
            *trained, w, g = rest
            y, back = jax.vjp(lambda *v: product(*v, w), x, *trained)
            return y, back(g)

        forward = compile_for_target(product, x, *trained, w)
        found[name] = {
            "forward": bytes_accessed(forward),
            "whole": bytes_accessed(compile_for_target(both, x, *trained, w, g)),
            "temporaries": temporaries(forward),
        }
    problem = Problem(1, ROWS, WIDTH, WIDTH, RANK, 2, 2)
    tiles: Tiles = choose_tiles(problem)
    launch = hbm_bytes(problem, tiles)
    # Forward and backward are launches of one shape here: K = N.
    counted = {"launch": launch, "launches": 2 * launch, "tiles": tiles._asdict(), "vmem": vmem_bytes(problem, tiles)}
    found["kernel"] |= counted
    return found


def masked() -> dict[str, Any]:
    """Bytes of AdamW on one float32 tensor: what must be touched, and what XLA counts for its own form on a v5e."""
    found: dict[str, Any] = {}
    for share in (0.5, 1.0):
        block = (128, None)
        count = round(share * MASKED[0] / 128)
        optimizer = masked_update("adamw", implementation="xla")
        param = struct(TPU, *MASKED, dtype=jnp.float32)
        selection = Selection(struct(TPU, count, dtype=jnp.int32), block)
        state = jax.tree.map(
            lambda leaf: struct(TPU, *leaf.shape, dtype=leaf.dtype), jax.eval_shape(optimizer.init, param, selection)
        )
        grads = struct(TPU, *state.moments[0].shape, dtype=jnp.float32)

        def step(param: Any, state: Any, grads: Any, rate: Any, optimizer: Any = optimizer) -> Any:
            return optimizer.apply(grads, state, param, rate, weight_decay=0.1)

        rate = struct(TPU, dtype=jnp.float32)
        compiled = compile_for_target(step, param, state, grads, rate, donate_argnums=(0, 1))
        touched = 7 * 4 * count * 128 * MASKED[1]
        found[f"{share:g}"] = {"must_touch": touched, "xla": bytes_accessed(compiled)}
    return found


def cross_entropy() -> dict[str, Any]:
    """Temporaries of the loss of Llama-3-8B's head and its gradients, in bfloat16, on either accelerator."""
    found: dict[str, Any] = {}
    for name, target in (("v5e", TPU), ("h200", GPU)):
        operands = (
            struct(target, ROWS, WIDTH),
            struct(target, WIDTH, VOCABULARY),
            struct(target, ROWS, dtype=jnp.int32),
            struct(target, ROWS, dtype=jnp.float32),
        )

        def loss(hidden: Any, head: Any, targets: Any, weights: Any, implementation: Any = None) -> Any:
            return linear_cross_entropy(hidden, head, targets, weights, implementation=implementation) @ weights

        held = functools.partial(loss, implementation="reference")
        found[name] = {
            "held": temporaries(compile_for_target(jax.value_and_grad(held), *operands)),
            "frozen_head": temporaries(compile_for_target(jax.value_and_grad(loss), *operands)),
            "trained_head": temporaries(compile_for_target(jax.value_and_grad(loss, (0, 1)), *operands)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    counts = {"low_rank": low_rank(), "masked_update": masked(), "linear_cross_entropy": cross_entropy()}
    result = {**counts, **machine(["jax", "jaxlib", "libtpu", "jax-cuda13-plugin"])}
    print(json.dumps(result) if arguments.json else json.dumps(counts, indent=4))


if __name__ == "__main__":
    main()
