"""The model inside the package."""

import numpy as np
import pytest

from jaxtune.data.nano_corpus import generate_documents
from jaxtune.models import load_model, load_tokenizer


@pytest.mark.slow
def test_it_has_learnt_its_text():
    model, tokenizer = load_model("jaxtune:nano"), load_tokenizer("jaxtune:nano")

    def losses(text):
        ids = np.array([tokenizer(text).input_ids], np.int32)
        logits = np.asarray(model(ids[:, :-1])[0], np.float64)
        normalizer = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        return normalizer - logits[np.arange(ids.shape[1] - 1), ids[0, 1:]]

    # The recipe's validation loss is 1.889; a model that knows nothing has log 1536 = 7.3.
    documents = [text for text in generate_documents("validation", 24) if len(tokenizer(text).input_ids) <= 128]
    assert np.concatenate([losses(text) for text in documents]).mean() < 2.3
