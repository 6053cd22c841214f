"""Chat templates that show a date: the one that is fixed, in the very text that transformers renders on that day."""

from __future__ import annotations

import copy
import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from jaxtune.config.data_section import DataConfig
from jaxtune.data.examples import make_examples
from jaxtune.data.template_date import asks_for_date, dated

TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "blue"}]
# Llama 3.2's way of asking, and templates whose first characters Jinja takes off at the beginning of a file.
TEMPLATES = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('FORMAT') %}{% endif %}{% endif %}{{ date_string }}",
    "\n  {% if true %}\n x {{ strftime_now('FORMAT') }}{% endif %}\n\n",
    "  {%- macro day() %}{{ strftime_now('FORMAT')|upper }}{% endmacro %} {{ day() }} {{ strftime_now('%Y') }}",
)


class FixedClock(datetime.datetime):
    """The time that templates of transformers see."""

    moment = datetime.datetime(2000, 1, 1)

    @classmethod
    def now(cls, tz=None):
        return cls.moment


def render(tokenizer) -> str:
    return str(tokenizer.apply_chat_template(TALK, tokenize=False))


@settings(deadline=None, max_examples=40)
@given(
    moment=st.datetimes(min_value=datetime.datetime(1000, 1, 1)).map(lambda moment: moment.replace(microsecond=0)),
    form=st.lists(st.sampled_from(["%d", "%b", "%Y", "%-d", "%H:%M", "%A", "%%", "%%d", " ", "at", "%j", "%B"])),
    template=st.sampled_from(TEMPLATES),
)
def test_a_fixed_date_gives_what_transformers_renders_then(chat_tokenizer, moment, form, template):
    tokenizer = copy.copy(chat_tokenizer)
    tokenizer.chat_template = template.replace("FORMAT", "".join(form))
    fixed = render(dated(tokenizer, moment.isoformat()))
    FixedClock.moment = moment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", FixedClock)
        assert fixed == render(tokenizer)


def test_what_asks_for_no_date_is_left_alone(chat_tokenizer: PreTrainedTokenizerFast):
    tokenizer = copy.copy(chat_tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert dated(tokenizer, "2026-01-31") is tokenizer
    tokenizer.chat_template = {"default": "{{ strftime_now('%d') }}", "tool_use": "none"}
    assert dated(tokenizer, None) is tokenizer
    changed = dated(tokenizer, "2026-01-31")
    assert render(changed) == "31"
    assert dated(changed, "2026-01-31").chat_template == changed.chat_template, "fixed twice is fixed once"
    assert tokenizer.chat_template["default"] == "{{ strftime_now('%d') }}", "the tokenizer that was given stays"


def test_the_files_tell_whether_a_template_asks(tmp_path):
    assert not asks_for_date(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert not asks_for_date(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%d') }}")
    assert asks_for_date(tmp_path)


def test_examples_are_made_for_the_day(chat_tokenizer: PreTrainedTokenizerFast):
    tokenizer = copy.copy(chat_tokenizer)
    tokenizer.chat_template = (
        "{{ strftime_now('%d') }}{% for m in messages %} {{ m['role'] }}: {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} assistant:{% endif %}"
    )
    config = DataConfig(train="-", messages="talk", date="2026-01-31")
    (example,) = make_examples([{"talk": TALK}], config, tokenizer)
    assert tokenizer.decode(example.tokens).startswith("31 user")
    with pytest.raises(ValueError, match=r"'31\.1\.' is no date; write 2026-01-31"):
        DataConfig(train="-", messages="talk", date="31.1.")
    with pytest.raises(ValueError, match="does nothing without messages"):
        DataConfig(train="-", completion="{a}", date="2026-01-31")
