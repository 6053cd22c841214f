from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path

import pytest

from jaxtune.config import (
    data_section,
    experiments,
    optimizer_section,
    reference,
    schema,
    search_section,
    training_sections,
)
from jaxtune.config.reference import markdown
from jaxtune.config.section import Section, default_text
from jaxtune.config.update_rules import rule_sections


def test_the_page_of_all_keys_is_up_to_date():
    page = Path(__file__).parent.parent.parent / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == markdown(), (
        "run: python -m jaxtune.config.reference > docs/configuration.md"
    )


SECTIONS = {
    name: kind
    for module in (schema, data_section, training_sections, search_section, experiments)
    for name, kind in vars(module).items()
    if inspect.isclass(kind) and issubclass(kind, Section) and kind is not Section
} | {kind.__name__: kind for kind in (*rule_sections(), *optimizer_section.OPTIMIZERS.builtin.values())}
FIELDS = [(name, key) for name, kind in SECTIONS.items() for key in kind.model_fields]
# What a number counts or is a part of.
UNITS = re.compile(
    r"\b(steps?|rows?|tokens?|minutes?|seconds?|bytes|documents|examples|evaluations|prompts|passes|epochs|devices|trials|"
    r"microbatches|checkpoints|processes|draws|sizes?|columns|layers|configurations|seed|share|part|factor|scaled|norm|numbers|"
    r"rate at its peak|root of the mean|standard error|coverage|GPU)\b",
    re.IGNORECASE,
)
# What holds where a key is not given, where that is no value.
UNSET = re.compile(r"\b(unset|default|or give|instead|empty|null|if not)\b", re.IGNORECASE)


def numeric(annotation: typing.Any) -> bool:
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return False
    return annotation in (int, float) or any(map(numeric, parts))


def test_the_sections_are_those_of_the_page():
    shown = {section for _, section in reference.sections()}
    bases = {optimizer_section.OptimizerSection}
    assert set(SECTIONS.values()) - shown == bases, "base classes, whose keys each of their sections shows"
    assert len(FIELDS) > 100


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_says_what_it_is_with_unit_and_default(name):
    kind = SECTIONS[name]
    lacking = []
    for key, field in kind.model_fields.items():
        said = field.description or ""
        if len(said.split()) < 2 or not said.endswith((".", "'")):
            lacking.append(f"{name}.{key}: no sentence: {said!r}")
        if numeric(field.annotation) and not UNITS.search(said):
            lacking.append(f"{name}.{key}: of what? {said!r}")
        if default_text(field) == "" and not UNSET.search(said):
            lacking.append(f"{name}.{key}: what if it is unset? {said!r}")
    assert not lacking, "\n".join(lacking)


@pytest.mark.parametrize("name", SECTIONS)
def test_help_tells_what_the_page_tells(name):
    kind = SECTIONS[name]
    told = inspect.getdoc(kind) or ""
    for key, field in kind.model_fields.items():
        assert f"\n  {key}: {field.description}" in told
        if (default := default_text(field)) not in ("", "see below", "required"):
            assert re.search(rf"^  {key}: .*Default: {re.escape(default)}\.$", told, re.MULTILINE), told
