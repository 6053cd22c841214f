"""Evaluation by generation, with a generator that answers from a table and with a trained checkpoint."""

from __future__ import annotations

import copy
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken

from jaxtune.config.data_section import DataConfig
from jaxtune.config.schema import EvaluationConfig
from jaxtune.data.examples import make_examples
from jaxtune.errors import UserError
from jaxtune.evaluation import Evaluator, answer_generator, documents, extraction_metrics, paired_bootstrap
from jaxtune.evaluation.generation import Generator
from jaxtune.models.decoder import split
from jaxtune.models.loading import load_model
from jaxtune.models.tokenizer import load_tokenizer

CONFIG = EvaluationConfig(task="extraction", max_new_tokens=12, batch_size=4)
ROWS = [
    {"text": "a red ball", "attributes": {"color": "red", "thing": "ball"}},
    {"text": "the big dog", "attributes": {"color": "n/a", "thing": "dog"}},
    {"text": "a blue bird", "attributes": {"color": "blue", "thing": "bird"}},
]


def data_config(**changes):
    settings = {
        "train": "rows.jsonl",
        "prompt": "{text} {attribute}:",
        "completion": " {value}",
        "explode": {"field": "attributes"},
    }
    return DataConfig(**(settings | changes))


@pytest.fixture(scope="module")
def tokenizer(babyllama):
    return load_tokenizer(babyllama)


@pytest.fixture(scope="module")
def model(babyllama):
    return load_model(babyllama, dtype=jnp.float32)


class Told(Generator):
    """Answers from a table: the text given for each prompt, encoded, and a stop token behind."""

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers = tokenizer, answers

    def __call__(self, params, adapters, prompts, **_):
        texts = [self.tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
        return [self.tokenizer.encode(self.answers.get(text, " no"), add_special_tokens=False) for text in texts]


def test_a_chat_is_asked_what_transformers_would_ask(tokenizer):
    # Each answer stands behind a space that the whole text would merge with it: only the messages' own ids will do.
    chat = copy.deepcopy(tokenizer)
    chat.add_tokens([AddedToken(" red", normalized=False), AddedToken(" big", normalized=False)])
    chat.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' says ' + m['content'] + ' . ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant says ' }}{% endif %}"
    )
    words = ["a red ball", "red", "the big dog", "big"]
    talk = [{"role": role, "content": word} for role, word in zip(["user", "assistant"] * 2, words, strict=True)]
    asked = []

    class Asked(Told):
        def __call__(self, params, adapters, prompts, **_):
            asked.extend(prompts)
            return [self.tokenizer.encode("big . ", add_special_tokens=False) for _ in prompts]

    examples = make_examples([{"talk": talk}], DataConfig(train="rows.jsonl", messages="talk"), chat)
    assert examples[0].crossed
    Evaluator(examples, Asked(chat, {}), chat, CONFIG).evaluate({})
    assert asked == [chat.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=False)]


def make_evaluator(tokenizer, answers, config=CONFIG, data=None, rows=ROWS):
    data = data or data_config()
    examples = make_examples(rows, data, tokenizer)
    return Evaluator(examples, Told(tokenizer, answers), tokenizer, config, explode=data.explode)


def test_metrics_and_records(tokenizer):
    answers = {
        "a red ball color:": " red",
        "a red ball thing:": " ball. It was",
        "the big dog color:": " n/a",
        "the big dog thing:": " Dog",
        "a blue bird color:": " red",
        "a blue bird thing:": " bird",
    }
    result = make_evaluator(tokenizer, answers, CONFIG.model_copy(update={"stop": "."})).evaluate({})
    assert result.metrics["exact_match"] == pytest.approx((1 / 2 + 3 / 3) / 2)
    assert result.metrics["precision"] == pytest.approx(4 / 5)
    assert result.attributes["color"] == {"found": 1, "answered": 2, "present": 2, "total": 3}
    assert [record["document"] for record in result.records] == [0, 0, 1, 1, 2, 2]
    assert result.records[1]["prompt"] == "a red ball thing:"
    assert result.records[1]["prediction"].strip() == "ball"
    assert [record["correct"] for record in result.records] == [True, True, True, True, False, True]
    assert [record["present"] for record in result.records] == [True, True, False, True, True, True]
    assert json.loads(json.dumps(result.records)) == result.records
    again = extraction_metrics(
        [record["prediction"] for record in result.records],
        [record["reference"] for record in result.records],
        [record["attribute"] for record in result.records],
        clusters=[record["document"] for record in result.records],
    )
    assert again.metrics == result.metrics
    assert again.standard_errors == result.standard_errors


def test_two_results_are_compared(tokenizer):
    right = {f"{row['text']} {name}:": f" {value}" for row in ROWS for name, value in row["attributes"].items()}
    best, worst = (make_evaluator(tokenizer, answers).evaluate({}) for answers in (right, {}))
    first, second = best.per_example("exact_match"), worst.per_example("exact_match")
    difference = paired_bootstrap(
        np.array(first["per_example"]),
        np.array(second["per_example"]),
        np.array(first["weights"]),
        strata=first["strata"],
        clusters=first["clusters"],
        samples=50,
    )
    assert (difference.difference, difference.low, difference.high) == (1.0, 1.0, 1.0)
    assert best.per_example("f1") == {}


def test_limit_and_attribute_field_without_explode(tokenizer):
    rows = [{"text": row["text"], "attribute": "color", "value": row["attributes"]["color"]} for row in ROWS]
    data = data_config(explode=None)
    evaluator = make_evaluator(tokenizer, {}, CONFIG.model_copy(update={"limit": 2}), data, rows)
    result = evaluator.evaluate({})
    assert len(result.records) == 2
    assert list(result.attributes) == ["color"]
    assert result.attributes["color"]["present"] == 1
    assert documents(evaluator.examples, None) == [0, 1]


@pytest.mark.parametrize(
    ("evaluation", "data", "message"),
    [
        ({"task": "none"}, {}, "evaluation.task is 'none'"),
        ({}, {"prompt": None}, "no prompt to generate from"),
        ({"stop": "e"}, {}, r"example 0: the answer ' red' holds evaluation.stop \('e'\)"),
        ({}, {"completion": " it is {value}"}, r"does not tell whether the value is absent \('n/a'\)"),
    ],
)
def test_what_cannot_be_evaluated_is_named(tokenizer, evaluation, data, message):
    config = CONFIG.model_copy(update=evaluation)
    with pytest.raises(UserError, match=message):
        make_evaluator(tokenizer, {}, config, data_config(**data))


def test_a_stop_string_behind_every_answer_is_no_part_of_it(tokenizer):
    config = CONFIG.model_copy(update={"stop": "."})
    result = make_evaluator(
        tokenizer, {"a red ball color:": " red."}, config, data_config(completion=" {value}.")
    ).evaluate({})
    assert result.records[0]["reference"] == " red"
    assert result.records[0]["correct"]


def test_no_examples(tokenizer):
    with pytest.raises(UserError, match=r"data.test: no examples"):
        Evaluator([], Told(tokenizer, {}), tokenizer, CONFIG, key="data.test")


def test_a_real_model_answers(model, tokenizer):
    """The checkpoint continues stories that it knows; every trial's parameters go through one program."""
    rows = [
        {"text": "Once upon a time, there was a little girl named L", "attribute": "name", "value": "ily"},
        {"text": "Once upon a time, there was a little g", "attribute": "who", "value": "irl named Lily"},
        {"text": "Once upon a time, there was a little girl n", "attribute": "who", "value": "obody"},
    ]
    data = data_config(prompt="{text}", completion="{value}", explode=None)
    config = EvaluationConfig(task="extraction", max_new_tokens=30, batch_size=4, stop=".")
    generator = answer_generator(model, tokenizer, config)
    evaluator = Evaluator(make_examples(rows, data, tokenizer), generator, tokenizer, config)
    _, params = split(model)
    result = evaluator.evaluate(params)
    assert [record["prediction"] for record in result.records] == ["ily", "irl named Lily", "amed Lily"]
    assert result.metrics["exact_match"] == pytest.approx((1 + 1 / 2) / 2)
    changed = evaluator.evaluate(params | {"final_norm.scale": -params["final_norm.scale"]})
    assert changed.metrics["exact_match"] == 0.0
    assert generator.compilations == 1
