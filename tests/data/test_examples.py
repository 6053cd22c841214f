from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxtune.config.data_section import DataConfig, ExplodeConfig
from jaxtune.data.examples import Example, make_examples, split
from jaxtune.data.pipeline import evaluation_batches
from jaxtune.data.sources import open_source
from jaxtune.errors import UserError

ROWS = [
    {"text": "the shoe is blue", "colour": "blue"},
    {"text": "the shirt is red and the shoe is blue and that is fine", "colour": "red"},
    {"text": "hello", "colour": "n/a"},
]


def config(**options) -> DataConfig:
    defaults = {"train": "rows.jsonl", "prompt": "{text}\ncolour:", "completion": " {colour}"}
    return DataConfig(**{**defaults, **options})


def test_tokens_weights_and_prompt(byte_tokenizer: PreTrainedTokenizerFast):
    examples = make_examples(ROWS, config(), byte_tokenizer)
    assert [example.index for example in examples] == [0, 1, 2]
    for row, example in zip(ROWS, examples, strict=True):
        text = f"{row['text']}\ncolour: {row['colour']}"
        assert byte_tokenizer.decode(example.tokens) == f"<s>{text}</s>"
        prompt, answer = example.tokens[: example.prompt_length], example.tokens[example.prompt_length :]
        assert prompt.tolist() == byte_tokenizer(f"{row['text']}\ncolour:")["input_ids"]
        assert byte_tokenizer.decode(answer) == f" {row['colour']}</s>"
        assert example.weights.tolist() == [0.0] * len(prompt) + [1.0] * len(answer)
        assert example.tokens.dtype == np.int32
        assert example.weights.dtype == np.float32
        assert (example.fields, example.completion) == (row, f" {row['colour']}")


def test_loss_on_all(byte_tokenizer: PreTrainedTokenizerFast):
    example = make_examples(ROWS, config(loss_on="all"), byte_tokenizer)[0]
    assert example.weights.tolist() == [0.0] + [1.0] * (len(example.tokens) - 1)
    assert example.prompt_length == make_examples(ROWS, config(), byte_tokenizer)[0].prompt_length


def test_plain_text(byte_tokenizer: PreTrainedTokenizerFast):
    example = make_examples(ROWS, config(prompt=None, completion="{text}"), byte_tokenizer)[0]
    assert example.tokens.tolist() == [*byte_tokenizer("the shoe is blue")["input_ids"], byte_tokenizer.eos_token_id]
    assert example.weights.tolist() == [0.0] + [1.0] * (len(example.tokens) - 1)
    assert example.prompt_length == 0


def test_without_special_tokens(word_tokenizer: PreTrainedTokenizerFast):
    options = {"prompt": "{text}", "completion": "{colour}"}
    example = make_examples(ROWS[:1], config(**options), word_tokenizer)[0]
    assert word_tokenizer.convert_ids_to_tokens(example.tokens) == ["the", "shoe", "is", "blue", "blue"]
    assert example.weights.tolist() == [0, 0, 0, 0, 1]
    with pytest.raises(UserError, match="row 1: the completion 'blue' leaves no token to predict"):
        make_examples(ROWS[:1], config(prompt=None, completion="{colour}"), word_tokenizer)


def test_an_end_token_in_the_template_is_not_doubled(byte_tokenizer: PreTrainedTokenizerFast):
    plain = make_examples(ROWS, config(), byte_tokenizer)[0]
    written = make_examples(ROWS, config(completion=" {colour}</s>"), byte_tokenizer)[0]
    assert plain.tokens.tolist() == written.tokens.tolist()


def test_exploded(byte_tokenizer: PreTrainedTokenizerFast):
    rows = [
        {"text": "the shoe", "attributes": {"colour": "blue", "size": ""}},
        {"text": "x", "attributes": {"colour": "red"}},
    ]
    options = {"prompt": "{text} {attribute}:", "completion": " {value}", "explode": ExplodeConfig(field="attributes")}
    examples = make_examples(rows, config(**options), byte_tokenizer)
    assert [byte_tokenizer.decode(example.tokens) for example in examples] == [
        "<s>the shoe colour: blue</s>",
        "<s>the shoe size: n/a</s>",
        "<s>x colour: red</s>",
    ]
    assert [example.index for example in examples] == [0, 1, 2]
    assert examples[1].fields["value"] == "n/a"


def test_bad_rows_are_named(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*ROWS, {"text": "x", "color": "y"}]) + "\n")
    rows = open_source(config(train=str(path)).train)
    with pytest.raises(UserError, match=r"data\.completion: .*rows\.jsonl, line 4 has no field 'colour'.*'color'"):
        make_examples(rows, config(), byte_tokenizer)
    blank = [ROWS[0], {"text": "x", "colour": " "}]
    with pytest.raises(UserError, match=r"data\.test: row 2: empty completion: ' \{colour\}' gives '  '"):
        make_examples(blank, config(), byte_tokenizer, key="data.test")
    with pytest.raises(UserError, match="no rows"):
        make_examples([], config(), byte_tokenizer)


def lengths(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return [len(example.tokens) for example in make_examples(ROWS, config(), tokenizer)]


def test_too_long_is_an_error(byte_tokenizer: PreTrainedTokenizerFast):
    longest = max(lengths(byte_tokenizer))
    # An example of n tokens takes n - 1 positions.
    make_examples(ROWS, config(), byte_tokenizer, sequence_length=longest - 1)
    message = f"1 of 3 examples are longer than .* {longest - 2}; the longest, from row 2, takes {longest - 1}"
    with pytest.raises(UserError, match=message):
        make_examples(ROWS, config(), byte_tokenizer, sequence_length=longest - 2)


def test_too_long_is_dropped(byte_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture):
    limit = max(lengths(byte_tokenizer)) - 2
    with caplog.at_level(logging.WARNING):
        examples = make_examples(ROWS, config(too_long="drop"), byte_tokenizer, sequence_length=limit)
    assert (len(examples), examples.total, examples.dropped, examples.truncated) == (2, 3, 1, 0)
    assert [example.index for example in examples] == [0, 2]
    assert "1 left out" in caplog.text


def test_all_too_long_leave_nothing(byte_tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(UserError, match=r"every example is too long: 3 of 3 examples.* to truncate or split"):
        make_examples(ROWS, config(too_long="drop"), byte_tokenizer, sequence_length=3)
    chat_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    asked = [{"role": "user", "content": "hello " * 30}, {"role": "assistant", "content": "hello"}]
    chat = config(prompt=None, completion=None, messages="talk", too_long="truncate")
    with pytest.raises(UserError, match=r"every example is too long: 1 of 1 examples.* to split"):
        make_examples([{"talk": asked}], chat, chat_tokenizer, sequence_length=3)


@pytest.mark.parametrize("prompt", [None, "{text}:"])
def test_all_too_long_are_truncated(byte_tokenizer: PreTrainedTokenizerFast, prompt: str | None):
    options = {"prompt": prompt, "completion": "{text}"}
    examples = make_examples(ROWS[:2], config(too_long="truncate", **options), byte_tokenizer, sequence_length=3)
    assert [len(example.tokens) for example in examples] == [4, 4]
    assert (examples.total, examples.truncated, examples.dropped) == (2, 2, 0)
    assert all(example.weights.any() for example in examples)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=6),
    st.integers(1, 12),
    st.integers(0, 40),
    st.booleans(),
)
def test_splitting_learns_every_token_once(
    lengths: list[int], sequence_length: int, given_tokens: int, everything: bool
):
    rng = np.random.default_rng(0)
    for place, length in enumerate(lengths):
        tokens = rng.permutation(length).astype(np.int32)
        prompt = min(given_tokens, length - 1)
        weights = (np.arange(length) >= max(1, 0 if everything else prompt)).astype(np.float32)
        example = Example(tokens, weights, place, prompt, {}, "")
        pieces = split(example, sequence_length + 1)
        assert max(len(piece.tokens) for piece in pieces) <= sequence_length + 1
        assert all(len(piece.tokens) > sequence_length for piece in pieces[:-1])
        # What a piece predicts, from what, is what the whole example predicts there, in order.
        pairs = [pair for piece in pieces for pair in zip(piece.tokens[:-1], piece.tokens[1:], strict=True)]
        assert pairs == list(itertools.pairwise(tokens))
        assert [weight for piece in pieces for weight in piece.weights[1:]] == weights[1:].tolist()
        assert not any(piece.weights[0] for piece in pieces)
        assert pieces[0].prompt_length == min(prompt, len(pieces[0].tokens))
        # The prompt's tokens after the first are predicted once each as well.
        assert sum(max(piece.prompt_length - 1, 0) for piece in pieces) == max(prompt - 1, 0)


def test_split_examples_are_rows_of_a_batch(byte_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture):
    text = {"prompt": None, "completion": "{text}"}
    whole = make_examples(ROWS, config(**text), byte_tokenizer)
    with caplog.at_level(logging.WARNING):
        examples = make_examples(ROWS, config(too_long="split", **text), byte_tokenizer, sequence_length=6)
    assert [example.index for example in examples] == list(range(len(examples)))
    assert (examples.total, examples.split, examples.dropped, examples.truncated) == (3, 1, 0, 0)
    assert "1 of 3 examples are longer" in caplog.text
    batches = evaluation_batches(examples, batch_size=2, sequence_length=6, packing=True)
    learnt = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
    assert sorted(learnt) == sorted(np.concatenate([example.tokens[1:] for example in whole]))
    # The question alone teaches nothing, so its rows are left out; the answer's tokens are all there.
    asked = config(too_long="split", completion="{colour}", prompt="{text}:")
    answers = make_examples(ROWS, asked, byte_tokenizer, sequence_length=6)
    assert all(example.weights.any() for example in answers)
    answer = [token for example in answers for token in example.tokens[example.weights > 0]]
    expected = make_examples(ROWS, config(completion="{colour}", prompt="{text}:"), byte_tokenizer)
    assert answer == [token for example in expected for token in example.tokens[example.weights > 0]]
    assert len({example.index for example in answers}) == len(answers) < max(e.index for e in answers) + 1


@pytest.mark.parametrize("limit", [4, 5, 8, 12, 20])
def test_truncation_keeps_the_question_and_the_answer(byte_tokenizer: PreTrainedTokenizerFast, limit: int):
    options = {"prompt": "{text}:", "completion": "{colour}"}
    rows = [*ROWS, {"text": "", "colour": "a"}]
    whole = make_examples(rows, config(**options), byte_tokenizer)
    examples = make_examples(rows, config(too_long="truncate", **options), byte_tokenizer, sequence_length=limit)
    assert len(examples) == 4
    assert examples.truncated == sum(len(example.tokens) > limit + 1 for example in whole)
    for full, example in zip(whole, examples, strict=True):
        assert len(example.tokens) == min(len(full.tokens), limit + 1)
        assert example.tokens[0] == byte_tokenizer.bos_token_id
        assert example.tokens[example.prompt_length - 1] == full.tokens[full.prompt_length - 1]
        answer = example.tokens[example.prompt_length :]
        assert answer.tolist() == full.tokens[full.prompt_length :][: len(answer)].tolist()
        assert example.weights.tolist() == [0.0] * example.prompt_length + [1.0] * len(answer)
        assert len(answer) > 0


def test_truncation_without_a_first_token(word_tokenizer: PreTrainedTokenizerFast):
    options = {"prompt": "{text}", "completion": "{colour}", "loss_on": "all", "too_long": "truncate"}
    rows = [ROWS[1], {"text": "red", "colour": "red"}]
    example = make_examples(rows, config(**options), word_tokenizer, sequence_length=3)[0]
    assert example.tokens.tolist() == word_tokenizer("that is fine red")["input_ids"]
    assert example.weights.tolist() == [0, 1, 1, 1]


def test_truncation_of_text_and_of_chats_at_the_end(chat_tokenizer: PreTrainedTokenizerFast):
    text = {"prompt": None, "completion": "{text}", "too_long": "truncate"}
    whole = make_examples(ROWS, config(**text), chat_tokenizer)[1]
    cut = make_examples(ROWS, config(**text), chat_tokenizer, sequence_length=4)[1]
    assert cut.tokens.tolist() == whole.tokens[:5].tolist()
    chat_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    talk = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hello " * 30}]
    asked = [{"role": "user", "content": "hello " * 30}, {"role": "assistant", "content": "hello"}]
    options = {"prompt": None, "completion": None, "messages": "talk", "too_long": "truncate"}
    short = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    rows = [{"talk": talk}, {"talk": asked}, {"talk": short}]
    examples = make_examples(rows, config(**options), chat_tokenizer, sequence_length=20)
    # The second has lost its answer, so there is nothing in it to learn.
    assert [example.index for example in examples] == [0, 2]
    assert (examples.truncated, examples.dropped) == (1, 1)
    assert len(examples[0].tokens) == 21


def test_real_data_through_a_real_tokenizer(shared_data: Path, babyllama: Path):
    folder = shared_data / "attr_oamine"
    explode = ExplodeConfig(field="attributes", schema_path=str(folder / "schema.json"), schema_by="category")
    options = config(
        train=str(folder / "validation.jsonl"),
        prompt="{text}\n{attribute}:",
        completion=" {value}",
        explode=explode,
        too_long="drop",
    )
    tokenizer = AutoTokenizer.from_pretrained(str(babyllama))
    rows = open_source(options.train)
    examples = make_examples(rows, options, tokenizer, sequence_length=256)
    schema = json.loads((folder / "schema.json").read_text())
    assert len(rows) == 163
    assert examples.total == sum(len(schema[row["category"]]) for row in rows)
    assert examples.total == len(examples) + examples.dropped
    for example in examples[::10]:
        name = example.fields["attribute"]
        value = example.fields["attributes"].get(name, "n/a")
        prompt = f"{example.fields['text']}\n{name}:"
        assert example.completion == f" {value}"
        assert example.tokens[: example.prompt_length].tolist() == tokenizer(prompt)["input_ids"]
        # This tokenizer works by character, so both ways of encoding agree.
        assert example.tokens.tolist() == [*tokenizer(f"{prompt} {value}")["input_ids"], tokenizer.eos_token_id]
