"""A step that trains half of the layers, beside one that trains all: seconds and memory.

Three sides train one Llama shape on the same batches: ``full`` trains every parameter, ``rules`` every parameter of the
first half of the layers by a rule of method ``full``, ``half`` half of the layers of each matrix by method ``half``;
embeddings, head and last norm are trained by all. Each side has a process of its own, and they take turns of a few
steps, so that whatever else the machine does disturbs all alike. What XLA counts of the compiled steps stands beside.

    python benchmarks/partial_training.py                                        # a 30M-parameter shape, batch 8 × 256
    python benchmarks/partial_training.py --into benchmarks/results/partial_training-cpu.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import machine
from train_step import SHAPES

SIDES = {
    "full": [{"match": "**", "method": "full"}],
    "rules": [
        {"match": "layers.{0..LAST}.**", "method": "full"},
        {"match": "layers.**", "method": "frozen"},
        {"match": "**", "method": "full"},
    ],
    "half": [{"match": "**", "method": "half", "period": 10}],
}


def trainer_of(side: str, shape: dict[str, int], batch: int, length: int) -> Any:
    """The trainer of one side."""
    import jax
    from pydantic import TypeAdapter

    from jaxtune.config.training_sections import TrainConfig
    from jaxtune.config.update_rules import Rule
    from jaxtune.models import DecoderConfig, random_model
    from jaxtune.training import Trainer
    from jaxtune.training.optimizers.adamw import OptimizerConfig
    from jaxtune.updates import UpdatePlan

    last = str(shape["layers"] // 2 - 1)
    rules = [{**rule, "match": rule["match"].replace("LAST", last)} for rule in SIDES[side]]
    config = DecoderConfig(
        "llama",
        shape["vocab_size"],
        shape["hidden_size"],
        shape["intermediate_size"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        num_kv_heads=shape["kv_heads"],
        head_dim=shape["hidden_size"] // shape["heads"],
    )
    return Trainer(
        random_model(config, jax.random.key(0)),
        UpdatePlan([TypeAdapter(Rule).validate_python(rule) for rule in rules]),
        TrainConfig(steps=10_000, batch_size=batch, sequence_length=length),
        OptimizerConfig(learning_rate=1e-5),
    )


def serve(arguments: argparse.Namespace) -> None:
    """A side's process: as many steps as each line of standard input says."""
    from jaxtune.cli.common import start_devices

    start_devices()
    import jax

    from jaxtune.training.memory import compiled_memory

    shape = SHAPES[arguments.shape]
    trainer = trainer_of(arguments.alone, shape, arguments.batch, arguments.length)
    tokens = np.random.default_rng(0).integers(0, shape["vocab_size"], (arguments.batch, arguments.length + 1))
    tokens = tokens.astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones(tokens[:, 1:].shape, np.float32)}
    memory = compiled_memory(trainer.compile_step(batch))
    state = trainer.init()
    moments = [leaf for leaf in jax.tree.leaves(state.moments) if np.issubdtype(leaf.dtype, np.floating)]
    told = {
        "memory": memory,
        "trained_parameters": trainer.plan.trainable_parameters(),
        "moment_bytes": sum(leaf.nbytes for leaf in moments),
    }
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            state, metrics = trainer.step(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - begin)
        print(json.dumps({"seconds": seconds, **told, "traces": dict(trainer.traces)}), flush=True)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All sides, in turns."""
    processes = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--alone", side]
        for key in ("shape", "batch", "length"):
            command += [f"--{key}", str(getattr(arguments, key))]
        processes[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def turn(side: str, steps: int) -> dict[str, Any]:
        process = processes[side]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
        if not (answer := process.stdout.readline()):
            raise SystemExit(f"{side} ended with {process.wait()}")
        return json.loads(answer)

    turns: dict[str, list[float]] = {side: [] for side in SIDES}
    told: dict[str, dict[str, Any]] = {side: turn(side, arguments.warmup) for side in SIDES}
    for number in range(arguments.turns):
        # Every other time in reverse, so that none is always the first.
        for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
            told[side] = turn(side, arguments.steps)
            turns[side].append(statistics.median(told[side].pop("seconds")))
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    ratios = {
        side: statistics.median(own / full for own, full in zip(turns[side], turns["full"], strict=True))
        for side in SIDES
    }
    return {
        side: {**told[side], "seconds": statistics.median(turns[side]), "turns": turns[side], "ratio": ratios[side]}
        for side in SIDES
    }


def main() -> None:
    """Measures and prints, or writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="30m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--into", type=Path, help="file for the result, JSON")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        serve(arguments)
        return
    setting = {key: getattr(arguments, key) for key in ("shape", "batch", "length", "steps", "turns")}
    result = {"setting": setting, "machine": machine(("jax", "jaxlib")), "sides": measure(arguments)}
    if arguments.into:
        arguments.into.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(result))
        return
    for side, found in result["sides"].items():
        print(
            f"{side:6} {found['seconds']:7.3f} s/step, {found['ratio']:.2f} of full; temporaries "
            f"{found['memory']['temporaries'] / 2**20:6.0f} MiB; trained {found['trained_parameters']:,}, moments "
            f"{found['moment_bytes'] / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
