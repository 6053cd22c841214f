"""The ``update`` section: rules that say what is trained, each of the section that its method has."""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, WrapValidator
from pydantic.functional_serializers import SerializeAsAny

from jaxtune.config.rule import RuleConfig
from jaxtune.config.section import Sections
from jaxtune.errors import UserError


def _treatments() -> Any:
    # By name and at the first use: methods are code, above the configuration, and their sections are made of its parts.
    return importlib.import_module("jaxtune.updates.treatments")


def rule_sections() -> list[type[RuleConfig]]:
    """The sections of the package's methods."""
    return [treatment.Section for treatment in _treatments().own().values()]


def method_names() -> list[str]:
    """What a rule can give as its method, apart from ``module:Name``."""
    return _treatments().names()


def section_of(method: str) -> type[RuleConfig] | None:
    """The section of a method's rules, whoever brings it; None where there is no such method.

    Raises:
      UserError: what was named cannot be imported, or is no treatment.
    """
    found = _treatments().find(method)
    return None if found is None else found.Section


@functools.cache
def _validator(method: str | None) -> Any:
    """Makes rules: of the package's methods, and of another one that is named."""
    other = None if method is None else section_of(method)
    sections = [*rule_sections(), *([] if other is None else [other])]
    union: Any = functools.reduce(operator.or_, sections)
    # To a type checker a union that is made at run time is no type.
    told_apart: Any = Annotated[union, Field(discriminator="method")]
    return TypeAdapter(told_apart)


def _validated(value: Any, _: Any) -> RuleConfig:
    if isinstance(value, RuleConfig):
        return value
    method = value.get("method") if isinstance(value, Mapping) else None
    if isinstance(method, str) and (instead := _treatments().INSTEAD.get(method)) is not None:
        raise ValueError(f"method {method!r} is not offered: {instead}")
    other = method if isinstance(method, str) and method not in _treatments().own() else None
    try:
        validator = _validator(other)
    except UserError as error:
        raise ValueError(str(error)) from error
    return validator.validate_python(value)


Rule = Annotated[SerializeAsAny[RuleConfig], WrapValidator(_validated), Sections(rule_sections)]


@functools.cache
def reference_update() -> tuple[RuleConfig, ...]:
    """What is trained where a configuration does not say (arXiv:2407.13906)."""
    rule = {"match": "layers.*.attention.{q,v}", "method": "low_rank", "rank": 16, "alpha": 32.0, "dropout": 0.1}
    return (_validated(rule, None),)
