"""A task's metrics: generate the answers to a set of examples and score them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from jaxtune.config.data_section import ExplodeConfig
from jaxtune.config.metrics import METRICS
from jaxtune.config.schema import EvaluationConfig
from jaxtune.data.examples import Example
from jaxtune.errors import UserError
from jaxtune.evaluation.extraction import extraction_metrics, normalize
from jaxtune.evaluation.generation import Generator
from jaxtune.evaluation.statistics import indices
from jaxtune.evaluation.text import answer_texts, stop_token_ids
from jaxtune.models.declarations import Params
from jaxtune.models.decoder import Decoder, split
from jaxtune.models.end_tokens import end_tokens
from jaxtune.models.linear import Adapter

ATTRIBUTE = ExplodeConfig.model_fields["key"].default
ABSENT = ExplodeConfig.model_fields["absent"].default


@dataclasses.dataclass(frozen=True, repr=False)
class EvaluatorResult:
    """One evaluation, as values that go into JSON.

    Attributes:
      metrics: name -> score; see :func:`jaxtune.evaluation.extraction.extraction_metrics`.
      standard_errors: name -> standard error, documents being independent; absent where it cannot be estimated.
      attributes: attribute -> counts (found, answered, present, total).
      records: one mapping per example: ``index``, ``document`` (number), ``attribute``, ``prompt``, ``prediction``,
        ``reference`` (texts), ``correct``, ``found``, ``present``.
    """

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    attributes: dict[str, dict[str, int]]
    records: list[dict[str, Any]]

    def __repr__(self) -> str:
        metrics = "".join(f"{name}={value:.4g}, " for name, value in self.metrics.items())
        return f"EvaluatorResult({metrics}examples={len(self.records)})"

    def per_example(self, metric: str) -> dict[str, list[Any]]:
        """What a paired bootstrap of ``metric`` needs (:func:`jaxtune.evaluation.statistics.paired_bootstrap`).

        Returns:
          ``per_example`` (1 or 0), ``weights`` (1 where there is a value to find), ``strata`` (attributes) and
          ``clusters`` (documents), one entry per example, for ``exact_match``. Empty for metrics whose denominator
          depends on the answers (F1, precision): two systems have no weights in common there.
        """
        if not METRICS[metric].by_example:
            return {}
        return {
            "per_example": [float(record["found"]) for record in self.records],
            "weights": [float(record["present"]) for record in self.records],
            "strata": [record["attribute"] for record in self.records],
            "clusters": [record["document"] for record in self.records],
        }


def answer_generator(model: Decoder, tokenizer: PreTrainedTokenizerBase, config: EvaluationConfig) -> Generator:
    """A greedy generator of short answers, to be shared by all evaluations of one model.

    An answer ends at the end tokens of the model, at those that training teaches with the tokenizer
    (:func:`jaxtune.models.end_tokens.end_tokens`), at ``config.stop``, or after ``config.max_new_tokens``.
    """
    return Generator(
        split(model)[0],
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        eos_ids={*model.config.eos_token_ids, *end_tokens(tokenizer)},
        pad_id=0,
        context=model.config.max_position_embeddings,
        stop_ids=stop_token_ids(tokenizer, config.stop),
        mesh=model.mesh,
    )


class Evaluator:
    """Scores a model's answers on one set of examples, for any parameters and adapters of that model."""

    def __init__(
        self,
        examples: Sequence[Example],
        generator: Generator,
        tokenizer: PreTrainedTokenizerBase,
        config: EvaluationConfig,
        *,
        explode: ExplodeConfig | None = None,
        key: str = "data.validation",
    ):
        """Prepares an evaluation by attribute extraction.

        A prompt is ``example.prompt``, its ground truth ``example.completion``. The attribute
        asked for is the field ``explode.key`` (the field ``attribute`` where nothing is exploded; all examples are one
        attribute where there is none). Examples that were exploded from the same row are one document.

        Args:
          examples: from :func:`jaxtune.data.examples.make_examples`.
          generator: from :func:`answer_generator`, shared by the evaluations of validation and test and by all trials.
          tokenizer: the one that made the examples.
          config: ``evaluation`` of the configuration.
          explode: ``data.explode`` of the configuration.
          key: configuration key of the source, for messages.

        Raises:
          UserError: no task is configured, or the examples cannot be evaluated by generation: a prompt is empty, an
            answer holds the stop string, or an absent value does not show as such in the completion.
        """
        if config.task == "none":
            raise UserError("evaluation.task is 'none'; set it to 'extraction' to score generated answers")
        self.examples = list(examples)[: config.limit]
        self._generator, self._tokenizer, self._stop = generator, tokenizer, config.stop
        self._absent = explode.absent if explode else ABSENT
        field = explode.key if explode else ATTRIBUTE
        self._attributes = [str(example.fields.get(field, "all")) for example in self.examples]
        # A stop string that ends every answer in training is no part of the answer, here as in generation.
        self._references = [example.completion.rstrip().removesuffix(config.stop or "") for example in self.examples]
        self._check(explode, key)
        self._documents = documents(self.examples, explode)
        self._prompts = [example.prompt.tolist() for example in self.examples]
        self._prompt_texts = answer_texts(tokenizer, self._prompts)

    def _check(self, explode: ExplodeConfig | None, key: str) -> None:
        if not self.examples:
            raise UserError(f"{key}: no examples to evaluate")
        for example, reference in zip(self.examples, self._references, strict=True):
            where = f"{key}: example {example.index}"
            if not len(example.prompt):
                raise UserError(f"{where} has no prompt to generate from; give data.prompt or data.messages")
            if self._stop and self._stop in reference:
                raise UserError(
                    f"{where}: the answer {example.completion!r} holds evaluation.stop ({self._stop!r}), so it could "
                    "never be generated as a whole; set evaluation.stop to null or to another string"
                )
            if explode is None:
                continue
            absent = normalize(str(example.fields[explode.value])) == normalize(explode.absent)
            if absent != (normalize(reference) == normalize(explode.absent)):
                raise UserError(
                    f"{where}: the answer {example.completion!r} does not tell whether the value is absent "
                    f"({explode.absent!r}); extraction needs completions that are the value alone, such as "
                    f"data.completion: ' {{{explode.value}}}'"
                )

    def evaluate(self, params: Params, adapters: dict[str, Adapter] | None = None) -> EvaluatorResult:
        """Generates all answers greedily and scores them.

        Args:
          params: parameters of the generator's model.
          adapters: low-rank adapters by module path, without dropout.
        """
        return self._scored(self._generator(params, adapters, self._prompts))

    @property
    def filled(self) -> float:
        """The share of the rows of :meth:`evaluate`'s batches that hold a question."""
        size = self._generator.batch_size
        return len(self.examples) / (-(-len(self.examples) // size) * size)

    def evaluate_side_by_side(self, params: Params, adapters: dict[str, Adapter], states: int) -> list[EvaluatorResult]:
        """What :meth:`evaluate` gives for each of several states, all of whose answers are generated in one loop.

        Args:
          params: parameters of the generator's model, in common.
          adapters: low-rank adapters by module path, without dropout; every array has a leading axis of states.
          states: how many of these are evaluated, the first ones.
        """
        answers = self._generator.side_by_side(params, adapters, [self._prompts] * states)
        return [self._scored(each) for each in answers]

    def _scored(self, answers: Sequence[Sequence[int]]) -> EvaluatorResult:
        predictions = answer_texts(self._tokenizer, answers, self._stop)
        result = extraction_metrics(
            predictions, self._references, self._attributes, self._absent, clusters=self._documents
        )
        records = [
            {
                "index": example.index,
                "document": self._documents[place],
                "attribute": self._attributes[place],
                "prompt": self._prompt_texts[place],
                "prediction": predictions[place],
                "reference": self._references[place],
                "correct": bool(result.correct[place]),
                "found": bool(result.found[place]),
                "present": bool(result.present[place]),
            }
            for place, example in enumerate(self.examples)
        ]
        return EvaluatorResult(
            metrics=result.metrics,
            standard_errors=result.standard_errors,
            attributes={name: dataclasses.asdict(counts) for name, counts in result.attributes.items()},
            records=records,
        )


def documents(examples: Sequence[Example], explode: ExplodeConfig | None) -> list[int]:
    """Numbers the documents that examples come from: those exploded from one row share a number.

    They are recognised by equal fields, the exploded entry aside, so a row that occurs twice is one document.
    """
    if explode is None:
        return list(range(len(examples)))
    entry = (explode.key, explode.value)
    rows = [{name: value for name, value in example.fields.items() if name not in entry} for example in examples]
    return indices([json.dumps(row, sort_keys=True, default=str) for row in rows]).tolist()
