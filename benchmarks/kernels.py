"""The kernels of jaxtune_kernels, each implementation beside the others, and beside what else there is.

A row tells the median time of a run, what that is in TFLOP/s and GB/s, and which share it is of what the device can do:
the time that the least work would take at the rates of a large matmul and a large copy, measured in the same run, over
the time that was taken. Work and bytes are those that the operation cannot do without, each operand read once and each
result written once, whatever an implementation really moves.

    python benchmarks/kernels.py                                   # everything, at shapes for the device at hand
    python benchmarks/kernels.py --kernel low_rank --shape llama --rank 8 16 --groups 1 8 --json

Implementations that do not run on the device are named below the table with the reason; a kernel that is not installed
is left out. tokamax, Liger, and torch with PEFT, are measured where they are installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from common import Launch, Wait, interleaved, machine
from kernel_cases import KERNELS, LAYERS, RATE, Case, compiled, normal

# Side of the large matmul and bytes of the large copy that tell what a device can do.
LARGE = {"cpu": (1024, 2**26), "gpu": (8192, 2**30), "tpu": (8192, 2**29)}


def ceilings(arguments: argparse.Namespace, dtype: Any) -> dict[str, float]:
    """The rates of a large matmul, in FLOP/s, and of a large copy (read and written), in bytes/s."""
    size, count = LARGE.get(jax.default_backend(), LARGE["cpu"])
    x, y = normal(0, size, size, dtype=dtype), normal(1, size, size, dtype=dtype)
    source = jax.random.bits(jax.random.key(0), (count,), jnp.uint8)
    # A negation moves what a copy moves, and XLA does not leave it out.
    runs = {"matmul": compiled(jnp.matmul, x, y), "copy": compiled(lambda v: ~v, source)}
    times = interleaved(_runnable(runs), arguments.samples, arguments.warmup, arguments.sample_seconds)
    return {
        "flops_per_second": 2 * size**3 / times["matmul"]["seconds_median"],
        "bytes_per_second": 2 * count / times["copy"]["seconds_median"],
    }


def _runnable(runs: dict[str, tuple[Launch, Wait] | str]) -> dict[str, tuple[Launch, Wait]]:
    return {name: run for name, run in runs.items() if not isinstance(run, str)}


def rows_of(case: Case, ceiling: dict[str, float], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures one case."""
    times = interleaved(_runnable(case.runs), arguments.samples, arguments.warmup, arguments.sample_seconds)
    floor = max(case.flops / ceiling["flops_per_second"], case.bytes / ceiling["bytes_per_second"])
    return [
        {
            "kernel": case.kernel,
            "shape": case.shape,
            "implementation": name,
            **found,
            "tflops": case.flops / found["seconds_median"] / 1e12,
            "gigabytes_per_second": case.bytes / found["seconds_median"] / 1e9,
            "share_of_ceiling": floor / found["seconds_median"],
        }
        for name, found in times.items()
    ]


def main() -> None:
    """Measures and prints."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=KERNELS, nargs="*", default=list(KERNELS))
    parser.add_argument("--shape", choices=LAYERS, default="laptop" if on_cpu else "llama")
    parser.add_argument("--rank", type=int, nargs="*", default=[16] if on_cpu else [8, 16])
    parser.add_argument("--groups", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--dropout", action="store_true", help=f"with dropout {RATE} on the low-rank term")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--sample-seconds", type=float, default=0.02)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    dtype = jnp.dtype(arguments.dtype)

    ceiling = ceilings(arguments, dtype)
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for name in arguments.kernel:
        try:
            importlib.import_module(f"jaxtune_kernels.{name}")
        except ModuleNotFoundError as error:
            absent[name] = str(error)
            continue
        for case in KERNELS[name](arguments, dtype):
            rows += rows_of(case, ceiling, arguments)
            absent |= {f"{name} {run}": why for run, why in case.runs.items() if isinstance(why, str)}
            gc.collect()
    result = {
        "rows": rows,
        "absent": absent,
        "ceiling": ceiling,
        "setting": {key: value for key, value in vars(arguments).items() if key != "json"},
        "machine": machine(("jax", "jaxlib", "tokamax", "optax", "torch", "peft")),
    }
    print(json.dumps(result) if arguments.json else as_text(result))


def as_text(result: dict[str, Any]) -> str:
    """The result as a table."""
    ceiling, about = result["ceiling"], result["machine"]
    lines = [
        f"{about['device']}, {about['processor']}, {result['setting']['dtype']}: matmul "
        f"{ceiling['flops_per_second'] / 1e12:,.2f} TFLOP/s, copy {ceiling['bytes_per_second'] / 1e9:,.1f} GB/s",
    ]
    previous = None
    for row in result["rows"]:
        if (row["kernel"], row["shape"]) != previous:
            previous = row["kernel"], row["shape"]
            title = f"{row['kernel']}: {row['shape']}"
            lines += ["", f"{title:<52}{'ms':>10}{'p10–p90':>20}{'TFLOP/s':>10}{'GB/s':>9}{'ceiling':>9}"]
        spread = f"{row['seconds_p10'] * 1e3:,.3f}–{row['seconds_p90'] * 1e3:,.3f}"
        lines.append(
            f"  {row['implementation']:<50}{row['seconds_median'] * 1e3:>10,.3f}{spread:>20}"
            f"{row['tflops']:>10,.3f}{row['gigabytes_per_second']:>9,.1f}{row['share_of_ceiling']:>9.0%}"
        )
    if result["absent"]:
        lines += ["", "Not measured:", *(f"  {name}: {why}" for name, why in result["absent"].items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
