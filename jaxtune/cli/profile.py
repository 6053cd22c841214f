"""``jaxtune profile``."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxtune.cli.common import add_config_arguments, emit, path_argument, start, table
from jaxtune.layout import RunFiles

EXAMPLE = "jaxtune init tfds && jaxtune profile tfds.yaml --steps 20"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_config_arguments(parser)
    parser.add_argument("--steps", type=int, default=10, help="measured steps (default: 10)")
    parser.add_argument(
        "--trace", metavar="DIR", type=path_argument, help="where the trace goes (default: RUN_DIR/profile)"
    )
    parser.add_argument("--no-trace", action="store_true", help="measure only")


def run(arguments: argparse.Namespace) -> int:
    """Measures training steps on real batches and records a profiler trace; the run itself is not touched."""
    config = start(arguments)

    import jax
    import numpy as np

    from jaxtune.errors import UserError
    from jaxtune.files import check_writable
    from jaxtune.parallel.platform import device_memory_peak, peak_flops
    from jaxtune.telemetry.profiling import record_trace, time_steps
    from jaxtune.training.memory import checked_memory, compiled_memory
    from jaxtune.training.opened_config import OpenedConfig

    if arguments.steps < 1:
        raise UserError(f"--steps: {arguments.steps} is not a positive number")
    folder = Path(arguments.trace or RunFiles(config.directory).profile_path)
    if not arguments.no_trace:
        check_writable(folder, "--trace")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--trace: {folder} is a file, not a directory")
    opened = OpenedConfig(config, parts=("train",))
    trainer = opened.trainer()
    if arguments.dry_run:
        emit({"checked": True, "memory": checked_memory(opened, trainer)}, arguments.json, "the step compiles")
        return 0
    batches = opened.batches()
    host_batch = next(batches)
    batches.close()
    compiled = trainer.compile_step(host_batch)
    batch, state = trainer.place(host_batch), trainer.init()

    def step() -> object:
        nonlocal state
        state, metrics = trainer.step(state, batch)
        return metrics

    times = time_steps(step, steps=arguments.steps)
    positions = host_batch["tokens"].size
    flops, peak = trainer.step_flops().total, peak_flops()
    result = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "seconds_per_step": {"median": times.median, "minimum": times.minimum},
        "positions_per_second": positions / times.median,
        "tokens_per_second": int(np.count_nonzero(host_batch["segment_ids"])) / times.median,
        "flops_per_step": flops,
        "flops_per_second": flops / times.median,
        "mfu": None if peak is None else flops / times.median / (peak * jax.device_count()),
        "memory": compiled_memory(compiled),
        "peak_device_bytes": device_memory_peak(),
        "trace": None,
    }
    if not arguments.no_trace:
        result["trace"] = str(record_trace(step, folder))
    rows = [
        {"": name, "value": value}
        for name, value in result.items()
        if name not in ("seconds_per_step", "memory", "trace") and value is not None
    ]
    rows += [{"": f"seconds per step, {name}", "value": value} for name, value in result["seconds_per_step"].items()]
    rows += [{"": f"bytes, {name}", "value": value} for name, value in result["memory"].items()]
    text = table(
        rows, title=f"{arguments.steps} steps of {trainer.config.batch_size} × {trainer.config.sequence_length}"
    )
    if result["trace"]:
        text += f"\ntrace in {result['trace']} (tensorboard --logdir, or ui.perfetto.dev)"
    emit(result, arguments.json, text)
    return 0
