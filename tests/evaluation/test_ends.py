"""Where an answer ends: a merged model stops in transformers where generation stops here."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from jaxtune.config.schema import EvaluationConfig
from jaxtune.data.examples import make_examples
from jaxtune.evaluation import answer_generator
from jaxtune.models import load_model, load_tokenizer, save_model
from jaxtune.models.decoder import split

LENGTH = 12
PROMPT = [1, 5, 11, 17, 3]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model)


def written(model, tokenizer) -> list[int]:
    config = EvaluationConfig(task="extraction", max_new_tokens=LENGTH, batch_size=1, stop=None)
    (answer,) = answer_generator(model, tokenizer, config)(split(model)[1], None, [PROMPT])
    return answer


@pytest.fixture(scope="module")
def endless(model, tiny_model) -> list[int]:
    """What the model writes with no end but the length, and that holds tokens to end at."""
    answer = written(model, load_tokenizer(tiny_model))
    assert len(answer) == LENGTH
    return answer


@pytest.mark.parametrize("by", ["end-of-text", "template", "configuration"])
def test_transformers_stops_where_we_stop(model, tiny_model, endless, tmp_path, by):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    words = range(4, len(load_tokenizer(tiny_model)))  # The model has more rows than the tokenizer has tokens.
    place = next(
        place for place in range(2, LENGTH) if endless[place] in words and endless[place] not in endless[:place]
    )
    source = tmp_path / "source"
    shutil.copytree(tiny_model, source, ignore=shutil.ignore_patterns("model.safetensors", "generation_config.json"))
    tokenizer = load_tokenizer(source)
    end = tokenizer.convert_ids_to_tokens(endless[place])
    if by == "end-of-text":
        tokenizer.eos_token = end
    elif by == "template":
        tokenizer.add_tokens([end], special_tokens=True)
        tokenizer.chat_template = "{% for m in messages %}: {{ m['content'] }} " + end + " {% endfor %}"
    tokenizer.save_pretrained(source)
    if by == "configuration":
        (source / "tokenizer_config.json").unlink()
        text = (source / "config.json").read_text().replace('"eos_token_id": 2', f'"eos_token_id": {endless[place]}')
        (source / "config.json").write_text(text)
    tokenizer = load_tokenizer(source)
    assert written(model, tokenizer) == endless[:place]
    save_model(model, tmp_path / "merged", tokenizer_from=source)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    generated = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
    assert generated[0, len(PROMPT) :].tolist() == endless[: place + 1]
    # Without the last file, the tokens of config.json alone do the same.
    (tmp_path / "merged" / "generation_config.json").unlink()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert theirs.generation_config.eos_token_id == [2, endless[place]]


def test_the_turn_end_ends_the_answer_that_training_taught(model, tiny_model):
    """A template ends turns with another token than the end-of-text token: what is learnt holds an end all the same."""
    from jaxtune.config.data_section import DataConfig

    tokenizer = load_tokenizer(tiny_model)
    tokenizer.add_tokens(["w39"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}: {{ m['content'] }} w39 w38 {% endfor %}"
    talk = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    (example,) = make_examples([{"talk": talk}], DataConfig(train="x.jsonl", messages="talk"), tokenizer)
    learnt = example.tokens[np.flatnonzero(example.weights)].tolist()
    ends = answer_generator(model, tokenizer, EvaluationConfig(stop=None)).eos_ids
    assert tokenizer.convert_ids_to_tokens(sorted(ends)) == ["</s>", "w39"]
    assert tokenizer.convert_ids_to_tokens(learnt[: next(i for i, t in enumerate(learnt) if t in ends) + 1])[-2:] == [
        "w3",
        "w39",
    ]
