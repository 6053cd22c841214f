"""What ends an answer: read off the tokenizer's end-of-text token and its chat template."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxtune.models.end_tokens import end_tokens, turn_end

SPECIAL = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>", "<|end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
PHI = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}{{ eos_token }}"
TAGGED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes a tokenizer with a chat template; ``SPECIAL`` are tokens of their own."""
    made = Tokenizer(models.WordLevel({token: number for number, token in enumerate(SPECIAL)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(SPECIAL)

    def make(template: str | None, eos: str | None = "<|endoftext|>") -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(made), eos_token=eos, chat_template=template)

    return make


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        (None, "</s>", ["</s>"]),
        (None, None, []),
        (CHATML, "<|endoftext|>", ["<|endoftext|>", "<|im_end|>"]),
        (CHATML, "<|im_end|>", ["<|im_end|>"]),
        (CHATML, None, ["<|im_end|>"]),
        (ZEPHYR, "</s>", ["</s>"]),
        (PHI, "<|endoftext|>", ["<|endoftext|>", "<|end|>"]),
        (TAGGED, "</s>", ["</s>", "<|im_end|>"]),
        # An end in plain text is no token, and the start of what comes next is no end.
        ("{% for m in messages %}{{ '<|im_start|>' + m['content'] + '\n' }}{% endfor %}", "</s>", ["</s>"]),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}<|im_end|>", "</s>", ["</s>"]),
        ("{{ raise_exception('a system message is needed') }}", "</s>", ["</s>"]),
        ("{{ messages[5]['content'] + 1 }}", "</s>", ["</s>"]),
    ],
)
def test_what_training_ends_an_answer_with(tokenizer, template: str | None, eos: str | None, expected: list[str]):
    made = tokenizer(template, eos)
    assert made.convert_ids_to_tokens(list(end_tokens(made))) == expected


def test_the_longer_of_two_that_begin_alike(tokenizer):
    made = tokenizer("{% for m in messages %}{{ m['content'] + '<|im_end|><|end|>' }}{% endfor %}")
    made.add_tokens(["<|im", "<|im_end|><|end|>"], special_tokens=True)
    assert made.convert_ids_to_tokens(turn_end(made)) == "<|im_end|><|end|>"
