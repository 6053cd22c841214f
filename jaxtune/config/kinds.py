"""Sections of one key that are chosen by name, each in a file of its own that nothing else has to know of.

The file holds the section, and what it stands for beside it; it imports jax where that is built, so that reading a
configuration does not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxtune.config.finding import Finder
from jaxtune.config.section import Section, located
from jaxtune.errors import UserError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kinds(Finder[Section]):
    """The sections that one key can hold, told apart by their key ``kind``; ``what`` is the key.

    Attributes:
      default: the kind where none is named.
    """

    default: str

    @functools.cached_property
    def builtin(self) -> Mapping[str, type[Section]]:
        """The sections in the package's files by their kinds, the default one first."""
        found = super().builtin
        return {self.default: found[self.default], **found}

    def parse(self, value: Any) -> Any:
        """A mapping as the section of its kind; anything else as it is.

        Raises:
          ValidationError: there is no such kind, or a key is another kind's.
        """
        if not isinstance(value, Mapping):
            return value
        kind = value.get("kind", self.default)
        try:
            section = self._named(kind) if isinstance(kind, str) else self.base()
        except UserError as error:
            raise located(("kind",), kind, str(error)) from error
        for name in value:
            others = [other for other, each in self.builtin.items() if name in each.model_fields]
            if name not in section.model_fields and others:
                near = nearest(name, section.model_fields)
                raise located((str(name),), value[name], f"{kind} has no such key, {' and '.join(others)} has{near}")
        return section.model_validate(dict(value))

    def _named(self, kind: str) -> type[Section]:
        if (found := self.find(kind)) is None:
            raise UserError(f"there is no {self.what} {kind!r}{nearest(kind, self.names())}")
        return found
