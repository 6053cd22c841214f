"""Rows from files and data sets, as prompts, as tokens with loss weights, as packed batches."""

from jaxtune.data.chat import chat_prompt
from jaxtune.data.encoding import encode_continuations, encode_prompts
from jaxtune.data.examples import Example, Examples, make_examples
from jaxtune.data.fingerprint import fingerprint
from jaxtune.data.messages import one_turn, read_conversations
from jaxtune.data.packing import Batch, batch_shapes
from jaxtune.data.pipeline import (
    BatchIterator,
    EvaluationBatches,
    evaluation_batches,
    steps_of_epochs,
    train_batches,
)
from jaxtune.data.prompts import Template
from jaxtune.data.sources import Source, open_source

__all__ = [
    "Batch",
    "BatchIterator",
    "EvaluationBatches",
    "Example",
    "Examples",
    "Source",
    "Template",
    "batch_shapes",
    "chat_prompt",
    "encode_continuations",
    "encode_prompts",
    "evaluation_batches",
    "fingerprint",
    "make_examples",
    "one_turn",
    "open_source",
    "read_conversations",
    "steps_of_epochs",
    "train_batches",
]
