"""Training steps of jaxtune and of PEFT + transformers, side by side: tokens per second and peak memory.

Both train the same Llama shape from the same weights with LoRA on all linear layers, on the same batches, in float32 on
CPU or bfloat16 on an accelerator. Each side has a process of its own, so that neither's threads or memory are in the
other's way; the two take turns of a few steps, so that whatever else the machine does disturbs both alike. Medians and
minima over all turns are reported, each turn's ratio, and the processor time of a step, which other programs change
less. Two settings are measured:

- ``full``: every position of every row is a token of one document;
- ``useful``: examples of real lengths. PEFT pads each batch to its longest row, as its users do; jaxtune packs. Tokens
  of examples per second are counted, padding is not.

    python benchmarks/train_step.py                    # a 30M-parameter shape, batch 8 × 256
    python benchmarks/train_step.py --shape 1b --dtype bfloat16 --batch 4 --length 512 --json
    python benchmarks/train_step.py --into benchmarks/results/train_step-cpu.json   # beside other processors' results

Needs the extra ``peers`` for the comparison; without torch the peer's columns stay empty.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import machine

SHAPES = {
    "30m": {"hidden_size": 384, "intermediate_size": 1024, "layers": 12, "heads": 6, "kv_heads": 6, "vocab_size": 8192},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "layers": 16,
        "heads": 32,
        "kv_heads": 8,
        "vocab_size": 32768,
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 2, "kv_heads": 2, "vocab_size": 256},
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4
# Lengths of examples in fine-tuning sets are skewed: most are short, some fill the row (log-normal, cut at the row).
LENGTH_SIGMA = 0.6


def make_model(directory: Path, shape: dict[str, int], length: int, *, biases: bool = False) -> None:
    """Writes one checkpoint that both sides read; queries, keys and values have biases in Qwen 2, not in Llama."""
    import jax

    from jaxtune.models import DecoderConfig, random_model, save_model

    config = DecoderConfig(
        family="qwen2" if biases else "llama",
        qkv_bias=biases,
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        num_kv_heads=shape["kv_heads"],
        head_dim=shape["hidden_size"] // shape["heads"],
        max_position_embeddings=length,
    )
    save_model(random_model(config, jax.random.key(0)), directory)


def full_rows(rng: np.random.Generator, vocab: int, batch: int, length: int) -> list[np.ndarray]:
    """Rows without padding, each with one token more than its positions."""
    return [rng.integers(0, vocab, length + 1).astype(np.int32) for _ in range(batch)]


def real_rows(rng: np.random.Generator, vocab: int, batch: int, length: int) -> list[np.ndarray]:
    """Rows of log-normal lengths with a median of a third of the positions."""
    sizes = np.clip(rng.lognormal(np.log(length / 3), LENGTH_SIGMA, batch).astype(int), 8, length)
    return [rng.integers(0, vocab, size + 1).astype(np.int32) for size in sizes]


SETTINGS: dict[str, Callable[..., list[np.ndarray]]] = {"full": full_rows, "useful": real_rows}
"""What makes the rows of a batch."""


def jaxtune_step(
    directory: Path,
    dtype: str,
    rows: Iterator[list[np.ndarray]],
    batch: int,
    length: int,
    pack: bool,
    *,
    rules: Sequence[Any] | None = None,
    optimizer: Any = None,
    remat: str = "none",
) -> Callable[[], int]:
    """A function that does one step and returns how many tokens of examples it trained on.

    Args:
      directory: of the model.
      dtype: of the base.
      rows: of each batch.
      batch: their number.
      length: positions of a row.
      pack: several examples in a row.
      rules: what is trained; LoRA on all linear layers by default.
      optimizer: its section; AdamW by default.
      remat: what the backward pass computes again.
    """
    import jax

    from jaxtune.config.training_sections import TrainConfig
    from jaxtune.data import Example, train_batches
    from jaxtune.models import load_model
    from jaxtune.training import Trainer
    from jaxtune.training.optimizers.adamw import OptimizerConfig
    from jaxtune.updates import UpdatePlan
    from jaxtune.updates.treatments.low_rank import LowRankRule

    examples = [
        Example(
            tokens=tokens,
            weights=np.r_[0.0, np.ones(len(tokens) - 1)].astype(np.float32),
            index=index,
            prompt_length=1,
            fields={},
            completion="",
        )
        for index, tokens in enumerate(tokens for _ in range(64) for tokens in next(rows))
    ]
    trainer = Trainer(
        load_model(directory, dtype=dtype),
        UpdatePlan(rules or [LowRankRule(match="layers.*.{attention,mlp}.*", rank=RANK, alpha=ALPHA)]),
        TrainConfig(steps=10_000, batch_size=batch, sequence_length=length),
        optimizer or OptimizerConfig(learning_rate=LEARNING_RATE),
        remat=remat,
    )
    batches = train_batches(examples, batch_size=batch, sequence_length=length, seed=0, packing=pack)
    state = trainer.init()

    def step() -> int:
        nonlocal state
        host = next(batches)
        state, metrics = trainer.step(state, host)
        jax.block_until_ready(metrics)
        return int(np.count_nonzero(host["segment_ids"]))

    return step


def padded(rows: Sequence[np.ndarray], weights: Sequence[np.ndarray] | None = None) -> tuple[Any, Any, Any]:
    """Rows as PEFT's users batch them: padded to the longest one.

    Args:
      rows: token ids.
      weights: 0 where a token is not learnt; None where all are.

    Returns:
      Tensors ``[rows, longest]``: ids, 1 where there is a token, and ids with -100 where nothing is learnt.
    """
    import torch

    shape = (len(rows), max(len(tokens) for tokens in rows))
    ids, mask, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -100, np.int64)
    for row, tokens in enumerate(rows):
        count = len(tokens)
        ids[row, :count], mask[row, :count] = tokens, 1
        labels[row, :count] = tokens if weights is None else np.where(weights[row] > 0, tokens, -100)
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels)


def peft_loss(model: Any, batch: tuple[Any, Any, Any]) -> Any:
    """The mean loss of a padded batch, on the model's device."""
    ids, mask, labels = (tensor.to(model.device) for tensor in batch)
    # Without padding there is nothing to mask but the future, which is faster.
    whole = bool(batch[1].all())
    return model(input_ids=ids, attention_mask=None if whole else mask, labels=labels, use_cache=False).loss


def peft_lora(base: Any) -> tuple[Any, Any]:
    """PEFT's LoRA on all linear layers of a model, and no optimizer of its own."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))), None


def peft_step(
    directory: Path,
    dtype: str,
    rows: Iterator[list[np.ndarray]],
    adapted: Callable[[Any], tuple[Any, Any]] = peft_lora,
) -> Callable[[], int]:
    """The same for PEFT over transformers; ``adapted`` makes the trained model, and an optimizer if AdamW is not it."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model, optimizer = adapted(base)
    model = model.to(device)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)

    def step() -> int:
        batch = padded(next(rows))
        peft_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return int(batch[1].sum()) - len(batch[1])

    return step


def endless(make: Callable[..., list[np.ndarray]], seed: int, *arguments: int) -> Iterator[list[np.ndarray]]:
    """Batches without end; equal seeds give equal batches."""
    rng = np.random.default_rng(seed)
    while True:
        yield make(rng, *arguments)


def serve(arguments: argparse.Namespace, tell: Callable[[dict[str, Any]], None]) -> None:
    """What a side's process does: as many steps as each line of standard input says, and at its end the peak memory."""
    shape = SHAPES[arguments.shape]
    make = SETTINGS[arguments.setting]
    rows = endless(make, 0, shape["vocab_size"], arguments.batch, arguments.length)
    if arguments.alone == "jaxtune":
        from jaxtune.cli.common import start_devices

        # What every command begins with.
        start_devices()
        pack = arguments.setting == "useful"
        step = jaxtune_step(arguments.folder, arguments.dtype, rows, arguments.batch, arguments.length, pack)
    else:
        step = peft_step(arguments.folder, arguments.dtype, rows)
    take_turns(step, arguments.alone, tell)


def take_turns(step: Callable[[], int], side: str, tell: Callable[[dict[str, Any]], None]) -> None:
    """As many steps as each line of standard input says, and at its end the peak memory.

    Args:
      step: does one and returns its tokens.
      side: ``jaxtune`` or ``peft``.
      tell: takes each answer.
    """
    for line in sys.stdin:
        seconds, processor, tokens = [], [], []
        for _ in range(int(line)):
            begin, used = time.perf_counter(), time.process_time()
            tokens.append(step())
            seconds.append(time.perf_counter() - begin)
            processor.append(time.process_time() - used)
        tell({"seconds": seconds, "processor_seconds": processor, "tokens": tokens})
    tell({"peak": device_peak(side) or process_peak()})


def device_peak(side: str) -> int | None:
    """Most bytes in use on the accelerator; None on CPU."""
    if side == "jaxtune":
        from jaxtune.parallel.platform import device_memory_peak

        return device_memory_peak()
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


class Side:
    """A side's process: it does nothing between its turns.

    Args:
      command: starts it.
    """

    def __init__(self, command: Sequence[str]):
        self._command = " ".join(command)
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[list[float]] = []
        self.processor: list[float] = []
        self.tokens: list[int] = []

    def turn(self, steps: int, *, counts: bool = True) -> None:
        """So many steps, while the other side waits; those of warming up do not count."""
        done = self._asked(f"{steps}\n")
        if counts:
            self.seconds.append(done["seconds"])
            self.processor += done["processor_seconds"]
            self.tokens += done["tokens"]

    def close(self) -> int | None:
        """Ends the process; its peak memory in bytes."""
        return self._asked(None)["peak"]

    def _asked(self, line: str | None) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if line is None:
            self._process.stdin.close()
        else:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self._command} ended with {self._process.wait()}")
        return json.loads(answer)

    def result(self) -> dict[str, Any]:
        """Of all steps that count; ``turns`` has the median of each turn."""
        seconds = [value for turn in self.seconds for value in turn]
        tokens = statistics.mean(self.tokens)
        return {
            "seconds_median": statistics.median(seconds),
            "seconds_minimum": min(seconds),
            "processor_seconds_median": statistics.median(self.processor),
            "tokens_per_step": tokens,
            "tokens_per_second": tokens / statistics.median(seconds),
            "tokens_per_second_best": tokens / min(seconds),
            "turns": [statistics.median(turn) for turn in self.seconds],
        }


def measure(names: Sequence[str], setting: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All sides of a setting, in turns: what :meth:`Side.result` has, and the peak memory."""
    given = [f"--{key}={getattr(arguments, key)}" for key in ("shape", "dtype", "batch", "length")]
    own = [sys.executable, __file__, f"--setting={setting}", f"--folder={folder}", *given]
    return in_turns({name: [*own, f"--alone={name}"] for name in names}, arguments)


def in_turns(commands: Mapping[str, Sequence[str]], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Sides that each command starts, in turns: what :meth:`Side.result` has, and the peak memory."""
    sides = {name: Side(command) for name, command in commands.items()}
    for side in sides.values():
        side.turn(arguments.warmup, counts=False)
    for number in range(arguments.turns):
        # Every other time in reverse, so that neither is always the first.
        for side in list(sides.values())[:: 1 if number % 2 == 0 else -1]:
            side.turn(arguments.steps)
    return {name: {**side.result(), "peak_bytes": side.close()} for name, side in sides.items()}


def process_peak() -> int | None:
    """Peak resident bytes of this process; getrusage would tell the parent's where that is larger. None off Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both settings of both sides, and the ratios of their medians."""
    names = ["jaxtune"] + ["peft"] * all(importlib.util.find_spec(name) for name in ("torch", "peft", "transformers"))
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), SHAPES[arguments.shape], arguments.length)
        found = {setting: measure(names, setting, Path(folder), arguments) for setting in SETTINGS}
    result: dict[str, Any] = {
        side: {
            **found["full"][side],
            **{f"useful_{key}": found["useful"][side][key] for key in ("tokens_per_second", "seconds_median", "turns")},
        }
        if side in names
        else None
        for side in ("jaxtune", "peft")
    }
    ours, theirs = result["jaxtune"], result["peft"]

    def ratio(key: str) -> float | None:
        return None if theirs is None else ours[key] / theirs[key]

    result["ratio"], result["useful_ratio"] = ratio("tokens_per_second"), ratio("useful_tokens_per_second")
    result["peak_ratio"] = ratio("peak_bytes")
    result["ratio_by_turn"] = theirs and [b / a for a, b in zip(ours["turns"], theirs["turns"], strict=True)]
    keys = ("shape", "dtype", "batch", "length", "turns", "steps", "warmup")
    result["setting"] = {**{key: getattr(arguments, key) for key in keys}, "rank": RANK}
    result["load_before"] = load
    result["machine"] = machine(("jax", "jaxlib", "torch", "transformers", "peft"))
    return result


def add_to(path: Path, result: dict[str, Any]) -> None:
    """Writes the result beside those of other processors, in place of the same one's."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    others = [run for run in runs if run["machine"]["processor"] != result["machine"]["processor"]]
    path.write_text(json.dumps({"runs": [*others, result]}, indent=4) + "\n", encoding="utf-8")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="30m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first turn, which do not count")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--into", type=Path, metavar="FILE", help="add the result to this file, by processor")
    parser.add_argument("--alone", choices=("jaxtune", "peft"), help=argparse.SUPPRESS)
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        serve(arguments, lambda answer: print(json.dumps(answer), flush=True))
        return
    result = compare(arguments)
    if arguments.into is not None:
        add_to(arguments.into, result)
    print(json.dumps(result) if arguments.json else as_text(result))


def as_text(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [f"{'':<30}{'jaxtune':>14}{'peft':>14}{'ratio':>8}"]
    names = {
        "tokens_per_second": "tokens/s, full rows (median)",
        "tokens_per_second_best": "tokens/s, full rows (best)",
        "useful_tokens_per_second": "tokens/s, real lengths",
        "peak_bytes": "peak memory, MiB",
    }
    for key, name in names.items():
        cells = [result[side][key] if result[side] else None for side in ("jaxtune", "peft")]
        if key == "peak_bytes":
            cells = [None if cell is None else cell / 2**20 for cell in cells]
        shown = "".join(f"{'–' if cell is None else f'{cell:,.0f}':>14}" for cell in cells)
        ratio = f"{cells[0] / cells[1]:8.2f}" if None not in cells else f"{'–':>8}"
        lines.append(f"{name:<30}{shown}{ratio}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
