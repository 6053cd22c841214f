"""The study of the makespan benchmark: one configuration, and the same task as plain arrays for the peer.

Everything is written to a folder that the ways read, each in a process of its own: ``config.yaml`` for jaxtune, and
``task.json`` with ``examples.npz`` for whoever knows nothing of jaxtune.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from train_step import LENGTH_SIGMA, SHAPES, make_model

ROOT = Path(__file__).resolve().parent.parent
# The tasks whose model and data are pretrained and real, the first whose files are there. The last needs none.
CONFIGS = ("configs/attribute_extraction.yaml", "configs/quickstart.yaml")
# Rules of random models; a pretrained model's are in its configuration.
RULE = {"match": "layers.*.{attention,mlp}.*", "method": "low_rank", "rank": 16, "alpha": 32.0, "dropout": 0.0}
SPACE = {
    "optimizer.learning_rate": {"log_uniform": [1e-5, 1e-3]},
    "optimizer.warmup": {"uniform": [0.0, 0.3]},
    "update.0.rank": {"power_of_two": [4, 32]},
    "update.0.alpha": {"log_uniform": [8, 128]},
}
# What PEFT calls the modules of our rules.
PEFT_MODULES = {
    "layers.*.attention.{q,v}": ("q_proj", "v_proj"),
    RULE["match"]: ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
# An answer of this many words is generated for each question of the decoding setting, after a prompt of so many.
ANSWER, QUESTION = 32, 64


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
      name: in the table and in the JSON.
      rows: ``real``: examples of real lengths, which jaxtune packs and the peer pads to the longest of a batch;
        ``full``: every row is one example that fills it, so that neither has padding; ``answers``: questions whose
        answers are generated, trials being scored by them.
      examples: in a step, on average where they are packed.
      length: positions in a row; None for the configuration's.
      shape: a random model of :data:`train_step.SHAPES` over random words; None for the pretrained model and its task.
      dtype: of computation.
      model: directory of the pretrained model; None for the configuration's.
    """

    name: str
    rows: str
    examples: int
    length: int | None = None
    shape: str | None = None
    dtype: str = "float32"
    model: str | None = None

    @property
    def with_peer(self) -> bool:
        """Whether the peer does this: its users score by loss."""
        return self.rows != "answers"


PRESETS = {
    "cpu": [Setting("real", "real", 16), Setting("full", "full", 8)],
    "h200": [
        Setting("4 x 512", "full", 4, 512, "1b", "bfloat16"),
        Setting("4 x 512 real", "real", 12, 512, "1b", "bfloat16"),
        Setting("1 x 256", "full", 1, 256, "1b", "bfloat16"),
        Setting("decoding", "answers", 16, 128, "1b", "bfloat16"),
    ],
    "tiny": [Setting("real", "real", 8, 64, "tiny"), Setting("full", "full", 2, 64, "tiny")],
}
"""Settings by preset, the one that the headline is of first."""


def prepare(setting: Setting, search: Mapping[str, int | float], steps: int, validation: int, folder: Path) -> None:
    """Writes the study to ``folder``.

    Args:
      setting: what is trained.
      search: ``trials``, ``promote``, ``fraction``, ``population``.
      steps: of a whole trial.
      validation: rows of the source that trials are scored on.
      folder: an empty one.
    """
    from jaxtune.cli.common import start_devices
    from jaxtune.config import dump_config, with_overrides
    from jaxtune.training.opened_config import OpenedConfig

    start_devices()
    make = _pretrained if setting.shape is None else _random
    config = make(setting, validation, folder)
    common = {
        "run_dir": str(folder / "run"),
        "train.steps": steps,
        "train.evaluate_every": None,
        "data.test": None,
        "model.dtype": setting.dtype,
        "telemetry.tensorboard": False,
        # As the peer does that stops at the same fraction: as many are finished, straight to the end.
        "search.finish": [1.0],
        **{f"search.{name}": value for name, value in search.items()},
    }
    config = with_overrides(config, common)
    config = with_overrides(config, {"search.reference": _reference(config)})
    examples = OpenedConfig(config).examples
    config = with_overrides(config, {"train.batch_size": _rows(setting.examples, examples["train"], config)})
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    opened = OpenedConfig(config)
    if setting.with_peer:
        _for_peer(opened, setting, folder)
    trainer = opened.trainer()
    loss = trainer.evaluate(trainer.init(), opened.validation_batches or []).loss
    described = {
        "untuned_loss": loss,
        "rows_per_step": config.train.batch_size,
        "sequence_length": config.train.sequence_length,
        "validation_examples": len(examples["validation"]),
        "model": config.model.path if setting.shape is None else f"random {setting.shape}",
        "data": config.data.train.path if setting.shape is None else "random words",
    }
    (folder / "described.json").write_text(json.dumps(described))


def _rows(examples: int, train: Sequence[Any], config: Any) -> int:
    """Rows that hold so many examples on average, packed as jaxtune packs them."""
    from jaxtune.data.pipeline import Plan

    plan = Plan(
        train, sequence_length=config.train.sequence_length, seed=config.train.seed, packing=config.data.packing
    )
    return max(1, round(examples * len(plan.rows(0)) / len(train)))


def _reference(config: Any) -> dict[str, Any]:
    """Trial 0: what the configuration says of the searched keys, moved into the space, where the peer needs it."""
    from jaxtune.config import dotted
    from jaxtune.search.space import Space

    values, reference = dotted(config), {}
    for dimension in Space(config.search.space).dimensions:
        low, high = dimension.decode(dimension.low), dimension.decode(dimension.high)
        reference[dimension.key] = min(max(values[dimension.key], low), high)
    return reference


# The pretrained model


def _pretrained(setting: Setting, validation: int, folder: Path) -> Any:
    from jaxtune.config import load_config, with_overrides

    config = next(config for config in map(load_config, CONFIGS) if _present(config))
    source = config.data.validation
    part = {"split": f"validation[:{validation}]"} if source.split else {"limit": validation}
    overrides = {
        "evaluation.task": "none",
        "data.validation": {**source.model_dump(), **part},
        **({} if setting.length is None else {"train.sequence_length": setting.length}),
        **({} if setting.model is None else {"model.path": str(Path(setting.model).resolve())}),
    }
    if setting.rows == "full":
        overrides |= _full_rows(with_overrides(config, overrides), folder)
    return with_overrides(config, overrides)


def _present(config: Any) -> bool:
    path = config.data.train.path
    return path.startswith("tfds:") or Path(path).exists()


def _full_rows(config: Any, folder: Path) -> dict[str, Any]:
    """The examples' texts on end, in pieces that fill a row and are cut to it; the loss is on all of their tokens."""
    from jaxtune.training.opened_config import OpenedConfig

    opened = OpenedConfig(config)
    length = config.train.sequence_length
    overrides: dict[str, Any] = {}
    for part, examples in opened.examples.items():
        if part == "test":
            continue
        tokens = np.concatenate([example.tokens for example in examples])
        text = opened.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        # Longer than a row: what is too much is cut off.
        size = int(1.5 * length * len(text) / len(tokens))
        pieces = [{"text": text[begin : begin + size]} for begin in range(0, len(text) - size, size)]
        path = folder / f"full-{part}.jsonl"
        path.write_text("".join(json.dumps(piece) + "\n" for piece in pieces[:2000]), encoding="utf-8")
        overrides[f"data.{part}"] = {"path": str(path)}
    return overrides | {
        "data.prompt": None,
        "data.explode": None,
        "data.completion": "{text}",
        "data.loss_on": "all",
        "data.too_long": "truncate",
    }


# Random models


def _random(setting: Setting, validation: int, folder: Path) -> Any:
    """A model of random weights over words that are drawn at random."""
    from jaxtune.config import load_config

    assert setting.shape is not None
    assert setting.length is not None
    shape, rng = SHAPES[setting.shape], np.random.default_rng(0)
    make_model(folder / "model", shape, setting.length)
    _word_tokenizer(shape["vocab_size"]).save_pretrained(folder / "model")
    for part, count in (("train", 512), ("validation", validation)):
        rows = [_words(setting, shape["vocab_size"], rng) for _ in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")
    answers = setting.rows == "answers"
    file = folder / "base.yaml"
    content = {
        "model": {"path": str(folder / "model")},
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "prompt": "{question}" if answers else None,
            "completion": " {text}",
            "loss_on": "completion" if answers else "all",
        },
        "train": {"steps": 1, "batch_size": setting.examples, "sequence_length": setting.length},
        "update": [RULE],
        "evaluation": {"task": "extraction", "max_new_tokens": ANSWER, "stop": None} if answers else {},
        "search": {"space": SPACE, "objective": "exact_match" if answers else "loss"},
    }
    file.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return load_config(file)


def _words(setting: Setting, vocabulary: int, rng: np.random.Generator) -> dict[str, str]:
    assert setting.length is not None
    length = setting.length
    if setting.rows == "answers":
        counts = {"question": QUESTION, "text": ANSWER}
    elif setting.rows == "real":
        counts = {"text": int(np.clip(rng.lognormal(np.log(length / 3), LENGTH_SIGMA), 8, length + 1))}
    else:
        counts = {"text": length + 1}
    return {name: " ".join(f"w{word}" for word in rng.integers(0, vocabulary, count)) for name, count in counts.items()}


def _word_tokenizer(vocabulary: int) -> Any:
    """A tokenizer of the words w0, w1, …, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{word}": word for word in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=words)


# The peer's files


def _for_peer(opened: Any, setting: Setting, folder: Path) -> None:
    """The task without jaxtune: tokens and loss weights, and the examples of each step of every trial.

    They are the very examples of jaxtune's batches: rows are packed, but a step has them all.
    """
    from jaxtune.models import resolve_path
    from jaxtune.search.space import Space
    from jaxtune.training.optimizers.adamw import OptimizerConfig

    config = opened.config
    places = {example.index: place for place, example in enumerate(opened.examples["train"])}
    batches = opened.batches(config)
    groups = []
    for _ in range(config.train.steps):
        ids = next(batches)["example_ids"]
        groups.append([places[int(index)] for index in np.unique(ids[ids >= 0])])
    batches.close()
    arrays: dict[str, np.ndarray] = {}
    for part in ("train", "validation"):
        examples = opened.examples[part]
        arrays[f"{part}_tokens"] = np.concatenate([example.tokens for example in examples])
        arrays[f"{part}_weights"] = np.concatenate([example.weights for example in examples])
        arrays[f"{part}_ends"] = np.cumsum([len(example.tokens) for example in examples])
    np.savez(folder / "examples.npz", **arrays)
    search, optimizer, rule = config.search, config.optimizer, config.update[0]
    assert isinstance(optimizer, OptimizerConfig), "the peer has AdamW"
    task = {
        "model": str(resolve_path(config.model.path)),
        "dtype": setting.dtype,
        "modules": PEFT_MODULES[rule.match],
        "groups": groups,
        "validation_group": setting.examples,
        "steps": config.train.steps,
        "early": round(search.fraction * config.train.steps),
        "trials": search.trials,
        "promote": search.promote,
        "seed": search.seed,
        "space": [dataclasses.asdict(dimension) for dimension in Space(search.space).dimensions],
        "reference": search.reference,
        # What is not searched.
        "fixed": {
            "optimizer.learning_rate": optimizer.learning_rate,
            "optimizer.warmup": optimizer.warmup,
            "optimizer.weight_decay": optimizer.weight_decay,
            "update.0.rank": rule.rank,
            "update.0.alpha": rule.alpha,
            "update.0.dropout": rule.dropout,
        },
        "schedule": optimizer.schedule,
        "clip_norm": optimizer.clip_norm,
        "betas": [optimizer.beta1, optimizer.beta2],
        "epsilon": optimizer.epsilon,
    }
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
