"""What training sees of conversations is what transformers gives for them, and what generation starts from."""

from __future__ import annotations

import copy

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config.schema import DataConfig
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
