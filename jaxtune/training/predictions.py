"""What a trained model comes to on a split, example by example; kept beside the run, so that runs are compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.config import dotted
from jaxtune.data import Example
from jaxtune.evaluation import answer_texts, documents, normalize
from jaxtune.files import write_atomically
from jaxtune.layout import TrialDirectory
from jaxtune.training.opened_config import OpenedConfig, Part
from jaxtune.training.trained import Trained

logger = logging.getLogger(__name__)

# What an answer depends on beside the trained state and the examples.
_DECIDING = (
    *("model.path", "model.revision", "model.dtype"),
    *("evaluation.task", "evaluation.stop", "evaluation.max_new_tokens", "evaluation.limit"),
)


@dataclasses.dataclass(frozen=True, repr=False)
class Predictions:
    """A model on the examples of one split.

    Attributes:
      metrics: name -> score over the split: ``loss`` and the task's.
      standard_errors: of those whose error can be estimated.
      losses: of each example, the sum of its weighted token losses; 0 where nothing of it counts.
      tokens: of each example, the sum of the weights.
      documents: the document that each example comes from.
      prompts: of each example, as text.
      completions: of each example.
      records: of a task, as :class:`~jaxtune.evaluation.EvaluatorResult` has them; [] without one.
    """

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    losses: list[float]
    tokens: list[float]
    documents: list[int]
    prompts: list[str]
    completions: list[str]
    records: list[dict[str, Any]]

    def __repr__(self) -> str:
        return f"Predictions({self.metrics}, examples={len(self.losses)})"


def row_identities(examples: Sequence[Example]) -> list[str]:
    """What tells the rows of a split apart, whatever is made of them: of each, its fields and what is to be answered.

    Equal under another prompt, chat template or tokenizer, so that runs which differ in these compare.
    """

    def identity(example: Example) -> str:
        row = json.dumps([example.fields, normalize(example.completion)], sort_keys=True, default=str)
        return hashlib.blake2b(row.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    return [identity(example) for example in examples]


def predictions(
    opened: OpenedConfig, subject: Trained, split: Part, directory: TrialDirectory, *, name: str | None = None
) -> Predictions:
    """A trained state on a split: as kept by an earlier call, or evaluated now and kept.

    What is kept names the trained arrays, the examples and all settings that answers depend on. Where one of them is
    another by now, it is evaluated anew.

    Args:
      opened: the opened configuration, with the split.
      subject: over it.
      split: that is evaluated.
      directory: of the run or the trial, in which they are kept.
      name: of the file, without its ending; the split's by default.
    """
    file = directory.predictions_path(name or split)
    of = _identity(opened, subject, split)
    if (kept := _read(file, of)) is not None:
        return kept
    found = _evaluate(opened, subject, split)
    try:
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps({"of": of, **dataclasses.asdict(found)}, ensure_ascii=False) + "\n")
    except OSError as error:
        logger.warning("%s: %s; what was evaluated is not kept", file, error.strerror or error)
    return found


def _identity(opened: OpenedConfig, subject: Trained, split: Part) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(jax.device_get(subject.state.trainable)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    keys = dotted(opened.config)
    values = {key: value for key, value in subject.trainer.hyperparameters.items() if key.startswith("update.")}
    return {
        "trained": digest.hexdigest(),
        "values": values,
        "data": opened.fingerprints[f"data.{split}"],
        "settings": {key: keys[key] for key in _DECIDING},
    }


def _read(file: Path, of: Mapping[str, Any]) -> Predictions | None:
    """What is kept, if it is of the same; a file that cannot be read is as none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        same = content.pop("of") == json.loads(json.dumps(of))
        return Predictions(**content) if same else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: cannot be read (%s); it is evaluated anew", file, error)
        return None


def _evaluate(opened: OpenedConfig, subject: Trained, split: Part) -> Predictions:
    examples, batches = opened.examples[split], opened.loss_batches(split)
    assert batches is not None
    result = subject.trainer.evaluate(subject.state, batches)
    losses, tokens = np.zeros(len(examples)), np.zeros(len(examples))
    places = {example.index: place for place, example in enumerate(examples)}
    chosen = [places[index] for index in result.example_ids.tolist()]
    losses[chosen], tokens[chosen] = result.example_sums, result.example_weights
    metrics: dict[str, float] = {"loss": result.loss}
    errors = {} if result.standard_error is None else {"loss": result.standard_error}
    records: list[dict[str, Any]] = []
    if (evaluator := opened.evaluator(split)) is not None:
        task = evaluator.evaluate(*subject.apply())
        metrics, errors, records = metrics | task.metrics, errors | task.standard_errors, task.records
    return Predictions(
        metrics=metrics,
        standard_errors=errors,
        losses=losses.tolist(),
        tokens=tokens.tolist(),
        documents=documents(examples, opened.config.data.explode),
        prompts=answer_texts(opened.tokenizer, [example.prompt.tolist() for example in examples]),
        completions=[example.completion for example in examples],
        records=records,
    )
