"""Evaluation: loss with its standard error, batched generation, and task metrics of the generated answers."""

from jaxtune.evaluation.continuation import generate
from jaxtune.evaluation.evaluator import Evaluator, EvaluatorResult, answer_generator, documents
from jaxtune.evaluation.extraction import ExtractionResult, extraction_metrics, normalize
from jaxtune.evaluation.generation import Generator
from jaxtune.evaluation.loss import LossResult, LossTotals, evaluate_loss
from jaxtune.evaluation.statistics import PairedDifference, paired_bootstrap, ratio
from jaxtune.evaluation.terms import Terms
from jaxtune.evaluation.text import answer_texts, stop_token_ids

__all__ = [
    "Evaluator",
    "EvaluatorResult",
    "ExtractionResult",
    "Generator",
    "LossResult",
    "LossTotals",
    "PairedDifference",
    "Terms",
    "answer_generator",
    "answer_texts",
    "documents",
    "evaluate_loss",
    "extraction_metrics",
    "generate",
    "normalize",
    "paired_bootstrap",
    "ratio",
    "stop_token_ids",
]
