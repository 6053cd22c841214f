"""What training sees of conversations is what transformers gives for them, and what generation starts from."""

from __future__ import annotations

import copy
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jaxtune.config.data_section import DataConfig
from jaxtune.data.examples import Examples, make_examples

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
# The generation prompt ends in a space, and nothing special stands between the turns.
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "zephyr": ZEPHYR, "llama": LLAMA, "plain": PLAIN, "tagged": TAGGED}

KINDS = (
    *("byte", "chat", "dummy_prefix", "word", "pair"),
    *("metaspace_first", "metaspace_always", "metaspace_never", "right_strip", "left_strip"),
)
WORDS = [
    "the",
    "shoe",
    "blue",
    "a",
    "b",
    " ",
    "  ",
    "\n",
    "\n\n",
    ".",
    ":",
    "12",
    "345",
    "é",
    "☃",
    "▁",
    "</s>",
    "<|user|>",
]
CONTENT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map("".join).filter(str.strip)
TALKS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3).map(
    lambda turns: [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
)


def with_template(tokenizer, template: str):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def encoded(tokenizer, talks: list, **options) -> Examples:
    config = DataConfig(train="rows.jsonl", messages="talk", **options)
    return make_examples([{"talk": talk} for talk in talks], config, tokenizer)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(KINDS), template=st.sampled_from(sorted(TEMPLATES)), talk=TALKS)
def test_ids_are_those_of_apply_chat_template(any_tokenizer, kind: str, template: str, talk: list):
    tokenizer = with_template(any_tokenizer(kind), TEMPLATES[template])
    whole = tokenizer.apply_chat_template(talk, return_dict=False)
    givens = [
        tokenizer.apply_chat_template(talk[:number], add_generation_prompt=True, return_dict=False)
        for number in range(1, len(talk), 2)
    ]
    crossed = any(whole[: len(given)] != given for given in givens)
    (example,) = encoded(tokenizer, [talk], loss_on="all")
    # An unknown token stands for any text; that it crosses does not show in ids.
    unknown = any(given[-1] == tokenizer.unk_token_id for given in givens)
    assert example.crossed >= crossed
    assert example.crossed == crossed or unknown
    if not example.crossed:
        assert example.tokens.tolist() == whole
        assert example.prompt_length == len(givens[-1])
    # Whatever crosses: the first given part keeps its ids, and generation starts from the messages before the answer.
    assert example.tokens[: len(givens[0])].tolist() == givens[0]
    assert example.prompt.tolist() == givens[-1]


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(("byte", "dummy_prefix", "metaspace_first", "metaspace_always")), talk=TALKS)
def test_what_is_learnt_is_what_transformers_masks(any_tokenizer, kind: str, talk: list):
    tokenizer = with_template(any_tokenizer(kind), TAGGED)
    (example,) = encoded(tokenizer, [talk])
    mask = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    if not example.crossed:
        assert example.weights.tolist() == mask


TALK = [
    {"role": "user", "content": "the shoe?"},
    {"role": "assistant", "content": "blue"},
    {"role": "user", "content": "the shirt?"},
    {"role": "assistant", "content": "red"},
]


def test_a_space_after_a_special_token(dummy_prefix_tokenizer):
    tokenizer = with_template(dummy_prefix_tokenizer, ZEPHYR)
    (example,) = encoded(tokenizer, [TALK])
    tokens = tokenizer.convert_ids_to_tokens(example.tokens)
    assert [tokens[place + 1] for place, token in enumerate(tokens) if token == "</s>"] == ["▁"] * 4
    assert tokens == tokenizer.convert_ids_to_tokens(tokenizer.apply_chat_template(TALK, return_dict=False))
    # What follows a special token of a template of ours does so too.
    config = DataConfig(train="rows.jsonl", prompt="{question}</s>", completion="blue")
    (plain,) = make_examples([{"question": "the shoe?"}], config, dummy_prefix_tokenizer)
    assert plain.tokens.tolist() == [*dummy_prefix_tokenizer("the shoe?</s>blue")["input_ids"], 2]
    assert plain.prompt.tolist() == dummy_prefix_tokenizer("the shoe?</s>")["input_ids"]


def test_given_ids_win_and_rows_are_counted_and_told(chat_tokenizer, caplog: pytest.LogCaptureFixture):
    tokenizer = with_template(chat_tokenizer, PLAIN)
    apart = [{"role": "user", "content": "the shoe?"}, {"role": "assistant", "content": "12"}]
    with caplog.at_level(logging.WARNING):
        found = encoded(tokenizer, [TALK, apart, TALK[:2]])
    assert [example.crossed for example in found] == [True, False, True]
    assert found.crossed == 2
    assert "in 2 of 3 conversations a token of the whole text would cross" in caplog.text
    example = found[0]
    # Both answers begin anew behind a space that stays a token of its own.
    learnt = [tokenizer.decode([token]) for token in example.tokens[example.weights > 0]]
    assert "".join(learnt) == "blue\nred\n"
    assert not any(token.startswith(" ") for token in learnt)
    assert tokenizer.decode(example.tokens) == tokenizer.apply_chat_template(TALK, tokenize=False)
    # Generation of the second starts from the whole of what precedes it, in which the first answer is no cut.
    whole = tokenizer.apply_chat_template(TALK[:3], add_generation_prompt=True, return_dict=False)
    assert example.prompt.tolist() == whole != example.tokens[: example.prompt_length].tolist()


def test_a_token_that_crosses_the_end_of_an_answer_belongs_to_it(chat_tokenizer):
    # The turn ends with a line break, and what the next begins with makes one token of both.
    template = PLAIN.replace("m['role'] + ': '", "'\n' + m['role'] + ':'").replace("'assistant: '", "'\nassistant:'")
    tokenizer = with_template(copy.deepcopy(chat_tokenizer), template)
    tokenizer.add_tokens(["\n\n"])
    (example,) = encoded(tokenizer, [TALK])
    assert not example.crossed
    assert example.tokens.tolist() == tokenizer.apply_chat_template(TALK, return_dict=False)
    runs = "".join("+" if weight else "-" for weight in example.weights)
    ends = [example.tokens[place].item() for place in range(len(runs) - 1) if runs[place : place + 2] == "+-"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["\n\n"]


def test_a_block_that_takes_in_the_generation_prompt(chat_tokenizer, caplog: pytest.LogCaptureFixture):
    wide = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = with_template(chat_tokenizer, wide)
    with caplog.at_level(logging.WARNING):
        (example,) = encoded(tokenizer, [TALK])
    prompt = tokenizer.apply_chat_template(TALK[:-1], add_generation_prompt=True, return_dict=False)
    assert example.tokens[: example.prompt_length].tolist() == example.prompt.tolist() == prompt
    assert tokenizer.decode(example.tokens[example.weights > 0]) == (
        "<|im_start|>assistant\nblue<|im_end|><|im_start|>assistant\nred<|im_end|>"
    )
    assert not caplog.text


def test_a_generation_prompt_that_training_does_not_show(chat_tokenizer, caplog: pytest.LogCaptureFixture):
    tokenizer = with_template(
        chat_tokenizer, TAGGED.replace("{{ '<|assistant|>' }}{% endif %}", "{{ 'hello' }}{% endif %}")
    )
    with caplog.at_level(logging.WARNING):
        (example,) = encoded(tokenizer, [TALK])
    assert "in 1 of 1 conversations the last answer that is learnt does not begin where" in caplog.text
    prompt = tokenizer.apply_chat_template(TALK[:-1], add_generation_prompt=True, return_dict=False)
    assert example.prompt.tolist() == prompt


def test_a_chat_that_is_cut_is_asked_in_full(chat_tokenizer):
    tokenizer = with_template(chat_tokenizer, CHATML)
    (whole,) = encoded(tokenizer, [TALK])
    config = DataConfig(train="rows.jsonl", messages="talk", too_long="truncate")
    short = {"talk": TALK[:2]}
    cut = make_examples([{"talk": TALK}, short], config, tokenizer, sequence_length=len(whole.tokens) - 12)[0]
    assert len(cut.tokens) == len(whole.tokens) - 11 < whole.prompt_length
    assert cut.prompt.tolist() == whole.prompt.tolist()


def test_a_real_template_and_tokenizer(babyllama):
    path = babyllama.parent / "smollm2-135m-instruct"
    if not path.is_dir():
        pytest.skip(f"no pretrained checkpoint at {path}")
    tokenizer = AutoTokenizer.from_pretrained(path)
    talk = [*TALK, {"role": "user", "content": " 2 + 40? \n"}, {"role": "assistant", "content": "42 "}]
    # A line break at the beginning of an answer makes one token with the one of the generation prompt.
    broken = [*talk[:-1], {"role": "assistant", "content": "\n 42 "}]
    kept, cut = encoded(tokenizer, [talk, broken])
    prompt = tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=False)
    assert kept.tokens.tolist() == tokenizer.apply_chat_template(talk, return_dict=False)
    assert tokenizer.decode(kept.tokens[kept.weights > 0]) == "blue<|im_end|>red<|im_end|>42 <|im_end|>"
    assert (kept.crossed, cut.crossed) == (False, True)
    for example in (kept, cut):
        assert example.prompt.tolist() == example.tokens[: example.prompt_length].tolist() == prompt
    assert tokenizer.decode(cut.tokens) == tokenizer.apply_chat_template(broken, tokenize=False)
