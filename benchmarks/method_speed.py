"""Steps of an update method and of LoRA, ours and PEFT's, in turns; as a script it is one of these sides."""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from method_cases import Method, methods, shaped
from method_peers import peer
from train_step import SHAPES, endless, full_rows, in_turns, jaxtune_step, make_model, peft_step, take_turns

from jaxtune.models.config import DecoderConfig

REFERENCE = "low_rank"
REMAT = ("none", "dots")
PEERS = ("torch", "peft", "transformers")


def measured(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A method beside LoRA.

    Args:
      name: of the method.
      arguments: ``shape``, ``batch``, ``length``, ``turns``, ``steps``, ``warmup``.

    Returns:
      Of ``jaxtune`` by what the backward pass computes again, and of ``peft``: tokens per second of both, ``ratio`` of
      the seconds of a step to LoRA's (median of the turns' ratios), and peak memory.
    """
    own = methods()[name]
    there = peer(name) is not None and all(importlib.util.find_spec(package) for package in PEERS)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), SHAPES[arguments.shape], arguments.length, biases=biased(own, arguments.shape))
        given = [f"--{key}={getattr(arguments, key)}" for key in ("shape", "batch", "length")]
        alone = [sys.executable, __file__, f"--folder={folder}", *given]
        sides = [("jaxtune", remat) for remat in REMAT] + [("peft", "none")] * there
        commands = {
            f"{side} {remat} {which}": [*alone, side, which, remat]
            for side, remat in sides
            for which in dict.fromkeys((REFERENCE, name))
        }
        found = in_turns(commands, arguments)

    def compared(side: str, remat: str) -> dict[str, Any]:
        mine, lora = (found[f"{side} {remat} {which}"] for which in (name, REFERENCE))
        turns = [one / other for one, other in zip(mine["turns"], lora["turns"], strict=True)]
        return {
            "tokens_per_second": mine["tokens_per_second"],
            "lora_tokens_per_second": lora["tokens_per_second"],
            "ratio": statistics.median(turns),
            "ratio_by_turn": turns,
            "processor_ratio": mine["processor_seconds_median"] / lora["processor_seconds_median"],
            "peak_bytes": mine["peak_bytes"],
        }

    result: dict[str, Any] = {"jaxtune": {remat: compared("jaxtune", remat) for remat in REMAT}}
    result["peft"] = compared("peft", "none") if there else None
    return result


def biased(method: Method, shape: str) -> bool:
    """Whether the method trains nothing of a shape but biases, which it then gets."""
    sizes = SHAPES[shape]
    plain = DecoderConfig(
        family="llama",
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"],
        head_dim=sizes["hidden_size"] // sizes["heads"],
    )
    return shaped(method, plain) != plain


def main() -> None:
    """Serves steps of one side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("jaxtune", "peft"))
    parser.add_argument("method")
    parser.add_argument("remat", choices=REMAT)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    for key in ("batch", "length"):
        parser.add_argument(f"--{key}", type=int, required=True)
    given = parser.parse_args()
    method = methods()[given.method]
    rows = endless(full_rows, 0, SHAPES[given.shape]["vocab_size"], given.batch, given.length)
    if given.side == "jaxtune":
        from jaxtune.cli.common import start_devices

        start_devices()
        options = {"rules": method.rules, "optimizer": method.optimizer, "remat": given.remat}
        step = jaxtune_step(given.folder, "float32", rows, given.batch, given.length, False, **options)
    else:
        adapted = peer(given.method)
        assert adapted is not None
        step = peft_step(given.folder, "float32", rows, lambda base: adapted(base, method.rules[0]))
    take_turns(step, given.side, lambda answer: print(json.dumps(answer), flush=True))


if __name__ == "__main__":
    main()
