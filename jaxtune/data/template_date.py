"""The date that a chat template sees.

Templates such as Llama 3's write today's date into every conversation (``strftime_now("%d %b %Y")``). Text that changes
overnight would make two data sets of one: what is trained on, scored and generated is rendered for one day instead.
"""

from __future__ import annotations

import copy
import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

_FUNCTION = "strftime_now"
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_DIRECTIVES = [f"%-{letter}" for letter in "dmHIMSyj"] + [f"%{letter}" for letter in "aAwdbBmyYHIMSfpjUWcxXzZGuV"]


def asks_for_date(directory: Path) -> bool:
    """Whether a chat template among a tokenizer's files asks for the date; reads no tokenizer."""
    files = [directory / name for name in _TEMPLATE_FILES] + sorted(directory.glob("additional_chat_templates/*.jinja"))
    return any(_FUNCTION in file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())


def dated(tokenizer: PreTrainedTokenizerBase, date: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer with templates that see a fixed date; itself where they ask for none.

    Args:
      tokenizer: left as it is.
      date: ISO 8601, a day or a day and a time; None is the time at which a template is rendered.
    """
    templates: Any = tokenizer.chat_template
    if date is None or _FUNCTION not in str(templates):
        return tokenizer
    prefix = _prefix(datetime.datetime.fromisoformat(date))
    changed = copy.copy(tokenizer)
    if isinstance(templates, dict):
        changed.chat_template = {name: _behind(prefix, text) for name, text in templates.items()}
    else:
        changed.chat_template = _behind(prefix, templates)
    return changed


def _behind(prefix: str, template: str) -> str:
    return template if template.startswith(prefix) else prefix + template


def _prefix(moment: datetime.datetime) -> str:
    """A definition of the function, in the templates' own language.

    (A function that is given to a template as a variable does not reach it: transformers hands on plain data alone.)
    The line break belongs to the block: behind it the template begins a line, as it does by itself.
    """
    steps = "".join(f".replace('{name}', '{moment.strftime(name)}')" for name in _DIRECTIVES)
    kept = f"format.replace('%%', '\\x00'){steps}.replace('\\x00', '%')"
    return f"{{% macro {_FUNCTION}(format) %}}{{{{ {kept} }}}}{{% endmacro %}}\n"
