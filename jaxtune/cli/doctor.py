"""``jaxtune doctor``."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from pathlib import Path
from typing import Any

from jaxtune.cli.common import add_json_argument, emit, start_devices, table
from jaxtune.telemetry.environment import version

EXAMPLE = "jaxtune doctor"

# Package -> the module that it brings.
_REQUIRED = {
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax.nnx",
    "optax": "optax",
    "orbax-checkpoint": "orbax.checkpoint",
    "grain": "grain",
    "pyarrow": "pyarrow.parquet",
    "tensorflow-datasets": "tensorflow_datasets",
    "transformers": "transformers",
    "scikit-optimize": "skopt",
}
_OPTIONAL = {
    "jax-cuda13-plugin": "NVIDIA GPUs: pip install 'jaxtune[cuda]'",
    "libtpu": "TPUs: pip install 'jaxtune[tpu]'",
    "datasets": "saved Hugging Face datasets: pip install 'jaxtune[datasets]'",
    "wandb": "Weights & Biases: pip install 'jaxtune[wandb]'",
    "optuna": "search.method tpe and hyperband: pip install 'jaxtune[optuna]'",
    "ray": "trials on several machines: pip install 'jaxtune[distributed]'",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Tells versions and devices; exit code 1 if a package cannot be imported or a matrix product is wrong."""
    start_devices()

    import jax
    import jax.numpy as jnp
    import numpy as np

    left = np.random.default_rng(0).standard_normal((256, 256), dtype=np.float32)
    got = np.asarray(jnp.asarray(left) @ jnp.asarray(left))
    error = float(np.abs(got - left.astype(np.float64) @ left).max())
    cache = Path(jax.config.jax_compilation_cache_dir or "")  # pyright: ignore[reportAttributeAccessIssue]
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jaxtune", *_REQUIRED)},
        "broken": {name: why for name, module in _REQUIRED.items() if (why := _import_error(module)) is not None},
        "optional": {name: version(name) for name in _OPTIONAL},
        "backend": jax.default_backend(),
        "devices": [f"{device.platform} {device.device_kind}" for device in jax.devices()],
        "processes": jax.process_count(),
        "compilation_cache": {"path": str(cache), "writable": _writable(cache)},
        # On accelerators float32 products may be done in lower precision: this bound only tells garbage from numbers.
        "matmul": {"largest_error": error, "ok": error < 1.0},
    }
    broken = {name: f" CANNOT BE IMPORTED: {why}" for name, why in result["broken"].items()}
    rows = [{"": name, "found": f"{found}{broken.get(name, '')}"} for name, found in result["versions"].items()]
    rows += [
        {"": name, "found": version or f"not installed ({_OPTIONAL[name]})"}
        for name, version in result["optional"].items()
    ]
    rows.append({"": "python", "found": result["python"]})
    rows.append({"": "devices", "found": f"{len(result['devices'])} × {result['devices'][0]}"})
    rows.append({"": "processes", "found": str(result["processes"])})
    writable = "writable" if result["compilation_cache"]["writable"] else "NOT writable: every start compiles again"
    rows.append({"": "compilation cache", "found": f"{cache} ({writable})"})
    rows.append({"": "matrix product", "found": "right" if result["matmul"]["ok"] else f"WRONG by {error:.3g}"})
    emit(result, arguments.json, table(rows))
    return 0 if result["matmul"]["ok"] and not broken else 1


def _import_error(module: str) -> str | None:
    """Why a module cannot be imported, in a line; None where it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a package of the wrong version does while it is read
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def _writable(path: Path) -> bool:
    # os.path.exists answers where Path.exists raises: below a folder that is not ours to look into.
    existing = next(part for part in (path, *path.parents) if os.path.exists(part))
    return os.access(existing, os.W_OK)
