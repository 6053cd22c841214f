"""What a quantized base costs: validation loss with nf4, int8 and fp8 beside float32, untuned and after one LoRA run.

All kinds train the same adapters on the same batches, from the same start. A gap is the difference of the losses per
token, with the standard error of paired examples.

    python benchmarks/quantization.py                                   # babyllama on attribute extraction
    python benchmarks/quantization.py model.path=DIRECTORY train.steps=16 --results FILE

With ``--results`` each kind is written once it is measured, and those that are there already are not measured again.

A model whose weights were quantized before says little by itself: that they lie on some grid already may help or harm.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import machine

CONFIG = Path(__file__).parents[1] / "configs" / "attribute_extraction.yaml"
LINEAR = "layers.*.{attention,mlp}.*.kernel"
UPDATE = {"match": LINEAR, "method": "low_rank", "rank": 16, "alpha": 32, "dropout": 0.0}
SETTING = ("search=null", "evaluation.task=none", f"update=[{json.dumps(UPDATE)}]", "optimizer.learning_rate=3e-3")
KINDS = ("none", "nf4", "int8", "fp8")


def measured(kind: str, overrides: list[str]) -> dict[str, Any]:
    """Losses of one kind before and after training, with those of single examples."""
    from jaxtune.config import load_config
    from jaxtune.training.memory import compiled_memory
    from jaxtune.training.opened_config import OpenedConfig

    quantize = "null" if kind == "none" else kind
    config = load_config(CONFIG, [*SETTING, *overrides, f"model.quantize={quantize}"])
    opened = OpenedConfig(config, parts=("train", "validation"))
    trainer = opened.trainer()
    batches = opened.validation_batches or ()
    state = trainer.init()
    untuned = trainer.evaluate(state, batches)
    iterator, batch = opened.batches(), None
    for _ in range(trainer.config.steps or 0):
        batch = next(iterator)
        state, _ = trainer.step(state, batch)
    trained = trainer.evaluate(state, batches)
    return {
        "untuned": told(untuned),
        "trained": told(trained),
        "memory": compiled_memory(trainer.compile_step(batch or {})),
        "setting": {
            "model": Path(config.model.path).name,
            "steps": trainer.config.steps,
            "batch_size": trainer.config.batch_size,
            "sequence_length": trainer.config.sequence_length,
            "learning_rate": trainer.hyperparameters["optimizer.learning_rate"],
            "rank": UPDATE["rank"],
            "trained_parameters": trainer.plan.trainable_parameters(),
        },
    }


def told(result: Any) -> dict[str, Any]:
    """A loss, and the sums and weights of its examples."""
    sums, weights = (each.astype(float).round(5).tolist() for each in (result.example_sums, result.example_weights))
    return {"loss": result.loss, "sums": sums, "weights": weights}


def gap(result: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """The difference of two losses over the same examples, and its standard error."""
    weights = np.array(result["weights"])
    count, weight = len(weights), weights.sum()
    difference = np.array(result["sums"]) - np.array(reference["sums"])
    mean = difference.sum() / weight
    spread = np.sqrt(count / (count - 1) * np.sum((difference - mean * weights) ** 2)) / weight
    return {"gap": float(mean), "gap_standard_error": float(spread)}


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"of {CONFIG.name}")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which, in order; the first is the reference")
    parser.add_argument("--results", type=Path, help="a JSON file to write to, and to go on with")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    given = parser.parse_args(arguments)
    kinds = given.kinds.split(",")
    file: Path | None = given.results
    report: dict[str, Any] = json.loads(file.read_text()) if file is not None and file.is_file() else {"kinds": {}}
    for kind in kinds:
        if kind in report["kinds"]:
            continue
        row = measured(kind, given.overrides)
        setting = row.pop("setting")
        if report.setdefault("setting", setting) != setting:
            parser.error(f"{file} was measured in another setting: {report['setting']}")
        if report["kinds"]:
            reference = next(iter(report["kinds"].values()))
            for when in ("untuned", "trained"):
                row[when] |= gap(row[when], reference[when])
        report["kinds"][kind] = row
        report["machine"] = machine(("jaxtune", "jax", "jaxlib"))
        print(f"{kind}: {row['untuned']['loss']:.4f} → {row['trained']['loss']:.4f}", file=sys.stderr)
        if file is not None:
            file.write_text(json.dumps(report, indent=1) + "\n")
    if given.json:
        print(json.dumps(report))
        return 0
    for kind, row in report["kinds"].items():
        gaps = [
            f"{row[when]['loss']:.4f}" + (f" ({row[when]['gap']:+.4f})" if "gap" in row[when] else "")
            for when in ("untuned", "trained")
        ]
        print(f"{kind:5} {'  '.join(gaps)}  arguments {row['memory']['arguments'] / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
