"""Training steps of jaxtune and of PEFT + transformers, side by side: tokens per second and peak memory.

Both train the same Llama shape from the same weights with LoRA on all linear layers, on the same batches, in float32 on
CPU or bfloat16 on an accelerator. Steps are interleaved, so that whatever else the machine does disturbs both alike;
medians and minima are reported. Two settings are measured:

- ``full``: every position of every row is a token of one document;
- ``useful``: examples of real lengths. PEFT pads each batch to its longest row, as its users do; jaxtune packs. Tokens
  of examples per second are counted, padding is not.

    python benchmarks/train_step.py                    # a 30M-parameter shape, batch 8 × 256
    python benchmarks/train_step.py --shape 1b --dtype bfloat16 --batch 4 --length 512 --json

Needs the extra ``peers`` for the comparison; without torch the peer's columns stay empty.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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


def make_model(directory: Path, shape: dict[str, int], length: int) -> None:
    """Writes one checkpoint that both sides read."""
    import jax

    from jaxtune.models import DecoderConfig, random_model, save_model

    config = DecoderConfig(
        family="llama",
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


def jaxtune_step(
    directory: Path, dtype: str, rows: Iterator[list[np.ndarray]], batch: int, length: int, pack: bool
) -> Callable[[], int]:
    """A function that does one step and returns how many tokens of examples it trained on."""
    import jax

    from jaxtune.config.training_sections import TrainConfig
    from jaxtune.config.update_rules import LowRankRule
    from jaxtune.data import Example, train_batches
    from jaxtune.models import load_model
    from jaxtune.training import Trainer
    from jaxtune.training.optimizers.adamw import OptimizerConfig
    from jaxtune.updates import UpdatePlan

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
        UpdatePlan([LowRankRule(match="layers.*.{attention,mlp}.*", rank=RANK, alpha=ALPHA)]),
        TrainConfig(steps=10_000, batch_size=batch, sequence_length=length),
        OptimizerConfig(learning_rate=LEARNING_RATE),
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


def peft_step(directory: Path, dtype: str, rows: Iterator[list[np.ndarray]]) -> Callable[[], int] | None:
    """The same for PEFT over transformers, or None without torch."""
    try:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))).to(device)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)

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


def measure(sides: dict[str, Callable[[], int] | None], steps: int, warmup: int) -> dict[str, Any]:
    """Interleaved steps of all sides: median and minimum seconds, tokens per second."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, list[int]] = {name: [] for name in sides}
    for number in range(warmup + steps):
        for name, step in sides.items():
            if step is None:
                continue
            begin = time.perf_counter()
            count = step()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - begin)
                tokens[name].append(count)
    return {
        name: None
        if not seconds[name]
        else {
            "seconds_median": statistics.median(seconds[name]),
            "seconds_minimum": min(seconds[name]),
            "tokens_per_step": statistics.mean(tokens[name]),
            "tokens_per_second": statistics.mean(tokens[name]) / statistics.median(seconds[name]),
            "tokens_per_second_best": statistics.mean(tokens[name]) / min(seconds[name]),
        }
        for name in sides
    }


def peak_memory(arguments: argparse.Namespace) -> dict[str, int | None]:
    """Peak bytes of each side alone, each in a process of its own: of the device, or of the process on CPU."""
    import subprocess

    peaks: dict[str, int | None] = {}
    for side in ("jaxtune", "peft"):
        command = [sys.executable, __file__, "--alone", side, "--shape", arguments.shape, "--dtype", arguments.dtype]
        command += ["--batch", str(arguments.batch), "--length", str(arguments.length), "--steps", "3"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        peaks[side] = json.loads(done.stdout)["peak"] if done.returncode == 0 and done.stdout else None
    return peaks


def alone(arguments: argparse.Namespace, directory: Path) -> int | None:
    """Runs one side for a few steps and returns its peak memory in bytes."""
    shape = SHAPES[arguments.shape]
    rows = endless(full_rows, 0, shape["vocab_size"], arguments.batch, arguments.length)
    if arguments.alone == "jaxtune":
        step = jaxtune_step(directory, arguments.dtype, rows, arguments.batch, arguments.length, pack=False)
    else:
        step = peft_step(directory, arguments.dtype, rows)
    if step is None:
        return None
    for _ in range(arguments.steps):
        step()
    if arguments.alone == "jaxtune":
        from jaxtune.parallel.platform import device_memory_peak

        on_device = device_memory_peak()
    else:
        import torch

        on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return on_device if on_device is not None else process_peak()


def process_peak() -> int | None:
    """Peak resident bytes of this process; getrusage would tell the parent's where that is larger. None off Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="30m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--alone", choices=("jaxtune", "peft"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    batch, length, vocab = arguments.batch, arguments.length, shape["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        make_model(directory, shape, length)
        if arguments.alone:
            print(json.dumps({"peak": alone(arguments, directory)}))
            return
        found: dict[str, Any] = {}
        for setting, make in (("full", full_rows), ("useful", real_rows)):
            sides = {
                "jaxtune": jaxtune_step(
                    directory,
                    arguments.dtype,
                    endless(make, 0, vocab, batch, length),
                    batch,
                    length,
                    pack=setting == "useful",
                ),
                "peft": peft_step(directory, arguments.dtype, endless(make, 0, vocab, batch, length)),
            }
            found[setting] = measure(sides, arguments.steps, arguments.warmup)
    peaks = peak_memory(arguments)
    result: dict[str, Any] = {
        side: None
        if found["full"][side] is None
        else {
            **found["full"][side],
            "useful_tokens_per_second": found["useful"][side]["tokens_per_second"],
            "peak_bytes": peaks[side],
        }
        for side in ("jaxtune", "peft")
    }
    both = result["peft"] is not None
    ours, theirs = result["jaxtune"], result["peft"]
    result["ratio"] = ours["tokens_per_second"] / theirs["tokens_per_second"] if both else None
    result["useful_ratio"] = ours["useful_tokens_per_second"] / theirs["useful_tokens_per_second"] if both else None
    result["peak_ratio"] = ours["peak_bytes"] / theirs["peak_bytes"] if both else None
    result["setting"] = {
        "shape": arguments.shape,
        "dtype": arguments.dtype,
        "batch": batch,
        "length": length,
        "rank": RANK,
        "steps": arguments.steps,
        "warmup": arguments.warmup,
    }
    result["machine"] = machine(("jax", "jaxlib", "torch", "transformers", "peft"))
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
