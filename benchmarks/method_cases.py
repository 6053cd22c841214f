"""Update methods on models that are not here: what a step trains, computes and needs, from shapes and compilers alone.

As a script it compiles one step and prints the memory that it needs: ``method_cases.py METHOD CASE REMAT DIRECTORY``.
Whoever starts it reads what the compiler writes into the directory meanwhile; see :func:`compiled`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxtune.config.optimizer_section import OptimizerSection
from jaxtune.config.rule import RuleConfig
from jaxtune.config.schema import Config
from jaxtune.errors import UserError
from jaxtune.models.config import DecoderConfig, RopeConfig
from jaxtune.updates import treatments
from jaxtune.updates.treatments.low_rank import RankRule

CONFIGS = Path(__file__).parents[1] / "configs" / "methods"
RANK = 16
GIB = 2**30

_LLAMA_8B = DecoderConfig(
    family="llama",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope=RopeConfig(theta=500_000.0),
)
_QWEN_600M = DecoderConfig(
    family="qwen3",
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    qk_norm=True,
    tie_embeddings=True,
    rope=RopeConfig(theta=1_000_000.0),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on devices, and the batch of a step.

    Attributes:
      model: its shape.
      target: of :func:`jaxtune.parallel.targets.target_devices`; the weights are cut over all of its devices.
      rows: of a batch.
      length: positions of a row.
    """

    model: DecoderConfig
    target: str
    rows: int
    length: int = 2048

    @property
    def ended_early(self) -> bool:
        """Whether all is known before the compiler generates code, which takes it nine tenths of its time."""
        return not self.target.startswith("h")


CASES = {
    "8b-v5e-16": Case(_LLAMA_8B, "v5e:4x4", rows=16),
    "8b-h200": Case(_LLAMA_8B, "h200:1", rows=4),
    "0.6b-v5e": Case(_QWEN_600M, "v5e:1x1", rows=4),
    "0.6b-h200": Case(_QWEN_600M, "h200:1", rows=4),
}
"""Llama 3 8B and Qwen 3 0.6B, by their published shapes."""


@dataclasses.dataclass(frozen=True)
class Method:
    """What a file of ``configs/methods`` says of a method.

    Attributes:
      rules: of ``update``, of one rank where that means the same, without dropout: one lever a row.
      optimizer: the section of that key.
    """

    rules: tuple[RuleConfig, ...]
    optimizer: OptimizerSection


def methods() -> dict[str, Method]:
    """All methods by name: each that trains has a file of its name.

    Raises:
      UserError: one has none.
    """
    files = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    for name, treatment in treatments.own().items():
        if treatment.trains and name not in files:
            raise UserError(f"method {name} has no {CONFIGS / name}.yaml")
    first = sorted(files, key=lambda name: name != "low_rank")
    return {name: _method(files[name]) for name in first}


def _method(path: Path) -> Method:
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = Config.model_validate({**given, "run_dir": "run"})
    return Method(tuple(_levelled(rule) for rule in config.update), config.optimizer)


def _levelled(rule: RuleConfig) -> RuleConfig:
    changed: dict[str, Any] = {}
    if "dropout" in type(rule).model_fields:
        changed["dropout"] = 0.0
    if isinstance(rule, RankRule):
        changed["rank"] = RANK
    if (tokens := getattr(rule, "tokens", None)) is not None:
        # Ids of the file's own model.
        changed["tokens"] = list(range(len(tokens)))
    return rule.model_copy(update=changed)


def shaped(method: Method, model: DecoderConfig) -> DecoderConfig:
    """The model, with biases of queries, keys and values where the method finds nothing else to train."""
    from jaxtune.updates import UpdatePlan

    try:
        UpdatePlan(method.rules).resolve(model)
    except UserError:
        model = dataclasses.replace(model, qkv_bias=True)
        UpdatePlan(method.rules).resolve(model)
    return model


def abstract_trainer(method: Method, case: Case, remat: str, devices: Sequence[Any], dtype: str = "bfloat16") -> Any:
    """A trainer of arrays that are not there."""
    from jaxtune.config.training_sections import TrainConfig
    from jaxtune.models.declarations import abstract_params
    from jaxtune.models.decoder import Decoder
    from jaxtune.parallel import make_mesh
    from jaxtune.training import Trainer
    from jaxtune.updates import UpdatePlan

    mesh = make_mesh(1, len(devices), 1, devices)
    model = shaped(method, case.model)
    return Trainer(
        Decoder(model, abstract_params(model, dtype, mesh), mesh),
        UpdatePlan(method.rules),
        TrainConfig(steps=1, batch_size=case.rows, sequence_length=case.length),
        method.optimizer,
        remat=remat,
    )


def step_shapes(trainer: Any) -> tuple[Any, ...]:
    """The arguments of its step: shapes and how they are cut."""
    import jax

    from jaxtune.data import batch_shapes
    from jaxtune.parallel import named_sharding, replicated

    mesh = trainer.mesh

    def shape(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    batch = {
        name: shape(array, named_sharding(("batch", None), array.shape, mesh))
        for name, array in batch_shapes(trainer.config.batch_size, trainer.config.sequence_length).items()
    }
    number = jax.ShapeDtypeStruct((), "float32", sharding=replicated(mesh))
    state = jax.tree.map(shape, trainer.abstract_state(), trainer.state_shardings)
    return trainer.params, state, batch, dict.fromkeys(trainer.hyperparameters, number)


def counted(method: Method, case: Case, remat: str) -> dict[str, Any]:
    """What a step trains and computes, from its trace.

    Returns:
      ``trained_parameters`` and their ``share``, ``optimizer_bytes``, ``model_flops`` as a dry run tells them, and
      ``traced_flops`` of the products of the traced step: what is computed again is among them, and attention by
      blocks, which is more than the half of the square.
    """
    import jax
    import numpy as np
    from jax.interpreters.partial_eval import dce_jaxpr

    trainer = abstract_trainer(method, case, remat, jax.devices("cpu")[:1])
    plan = trainer.plan
    trained, everything = (row["parameters"] for row in plan.table()[-2:])
    traced = jax.jit(trainer.program.step).trace(*step_shapes(trainer)).jaxpr
    # What nothing reads is in the trace, and not in the program.
    used, _ = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return {
        "trained_parameters": trained,
        "share": trained / everything,
        "optimizer_bytes": sum(
            int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainer.abstract_state().moments)
        ),
        "model_flops": trainer.step_flops().total,
        "traced_flops": product_flops(used, case.rows * case.length, min(plan.weight_shares().values(), default=1.0)),
        "biases": shaped(method, case.model) != case.model,
    }


def product_flops(jaxpr: Any, rows: int, taken: float = 1.0) -> float:
    """FLOPs of the products of a program, the bodies of loops as often as they run.

    Args:
      jaxpr: traced.
      rows: positions of a batch. A loop whose length is data is the loss's, over blocks of these.
      taken: how often the larger branch is taken of two, as where some layers are trained and others are not.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = float(_product(left[axis] for axis in contracted))
            total += 2.0 * depth * _product(equation.outvars[0].aval.shape)
            continue
        inner = [product_flops(each, rows, taken) for each in _inner(parameters)]
        if name == "cond":
            total += taken * max(inner) + (1 - taken) * min(inner)
        elif name == "while":
            blocks = [block for each in _inner(parameters) if (block := _first_rows(each))]
            total += sum(inner) * max(1, rows // blocks[0]) if blocks else 0.0
        else:
            total += sum(inner) * (parameters["length"] if name == "scan" else 1)
    return total


def _first_rows(jaxpr: Any) -> int | None:
    """Rows of the first product of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            return int(equation.outvars[0].aval.shape[0])
        for each in _inner(equation.params):
            if (rows := _first_rows(each)) is not None:
                return rows
    return None


def _product(sizes: Any) -> float:
    total = 1.0
    for size in sizes:
        total *= size
    return total


def _inner(parameters: Mapping[str, Any]) -> list[Any]:
    """The programs in an equation's parameters."""
    found = []
    for value in parameters.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                found.append(each)
    return found


def compiled(name: str, case: str, remat: str, seconds: float) -> dict[str, Any]:
    """Bytes on a device that a compiled step needs; the compiler is ended where it has said so before its end.

    Args:
      name: of the method.
      case: of :data:`CASES`.
      remat: what the backward pass computes again.
      seconds: after which it is given up.

    Returns:
      ``arguments``, ``temporaries`` and ``peak``; of what does not fit ``peak`` and ``limit``.

    Raises:
      UserError: it failed, or took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, name, case, remat, folder]
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True)
            end = time.monotonic() + seconds
            try:
                while process.poll() is None and time.monotonic() < end:
                    if CASES[case].ended_early and (found := _reported(Path(folder))):
                        return found
                    time.sleep(0.5)
            finally:
                process.kill()
                code = process.wait()
            said.seek(0)
            output = said.read()
    if over := re.search(r"\(([\d.]+)([GM])\) exceeds available HBM \(([\d.]+)G\)", output):
        needed = float(over[1]) * (GIB if over[2] == "G" else 2**20)
        return {"peak": int(needed), "limit": int(float(over[3]) * GIB)}
    lines = output.splitlines()
    if code == 0 and lines and lines[-1].startswith("{"):
        return json.loads(lines[-1])
    raise UserError(f"{name}, {case}: the compiler ended with {code}\n" + "\n".join(lines[-8:]))


def _reported(folder: Path) -> dict[str, Any] | None:
    """What libtpu has written of a finished program; None before that, its text being written last."""
    if not list(folder.glob("*jit_step*after_optimizations_after_buffer_assignment.txt")):
        return None
    (usage,) = folder.glob("*jit_step*after_optimizations-memory-usage-report.txt")
    (buffers,) = folder.glob("*jit_step*after_optimizations-buffer-assignment.txt")
    told = re.search(r"Total bytes: (\d+)", usage.read_text(encoding="utf-8"))
    assert told is not None
    sizes = re.findall(r"^allocation \d+: size (\d+),[^\n]* parameter \d+", buffers.read_text(encoding="utf-8"), re.M)
    peak, arguments = int(told[1]), sum(map(int, sizes))
    return {"arguments": arguments, "temporaries": peak - arguments, "peak": peak}


def _compile(name: str, case: Case, remat: str, folder: str) -> None:
    """Compiles a step, and prints what it needs."""
    import jax

    jax.config.update("jax_platforms", "cpu")

    from jaxtune.parallel import replicated
    from jaxtune.parallel.targets import compile_for_target, target_devices
    from jaxtune.training.memory import compiled_memory

    trainer = abstract_trainer(methods()[name], case, remat, target_devices(case.target))
    program = compile_for_target(
        trainer.program.step,
        *step_shapes(trainer),
        donate_argnums=1,
        out_shardings=(trainer.state_shardings, replicated(trainer.mesh)),
        compiler_options={"xla_dump_to": folder} if case.ended_early else None,
    )
    memory = compiled_memory(program)
    print(json.dumps({key: memory[key] for key in ("arguments", "temporaries")} | {"peak": memory["total"]}))


if __name__ == "__main__":
    _compile(sys.argv[1], CASES[sys.argv[2]], sys.argv[3], sys.argv[4])
