"""Whether the data are those that a run or a study began with.

Every split is fingerprinted when it is opened; a run keeps the fingerprints in its directory, a study in its journal.
A file that was edited, another chat template, another tokenizer or version of one: whatever changes the text that the
model sees, or the answers that it is scored against, would otherwise go into scores that seem to compare.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError

logger = logging.getLogger(__name__)

Fingerprints = Mapping[str, Mapping[str, Any]]
"""Configuration key of a split (``data.train``) → its :func:`~jaxtune.data.fingerprint.fingerprint`."""


@dataclasses.dataclass(frozen=True)
class DataHistory:
    """The fingerprints of a run's or a study's splits.

    Attributes:
      entries: oldest first: those it began with, and those of every change that was accepted. None where it began
        before fingerprints were kept.
    """

    entries: tuple[Fingerprints, ...] = ()

    @classmethod
    def read(cls, entries: Sequence[Any], file: Path) -> DataHistory:
        """Entries from a file.

        Raises:
          UserError: they are no fingerprints.
        """
        for entry in entries:
            if not isinstance(entry, dict) or not all(isinstance(each, dict) for each in entry.values()):
                raise UserError(f"{file}: {str(entry)[:60]!r} are no fingerprints of data; restore the file")
        return cls(tuple(entries))

    @property
    def latest(self) -> dict[str, Mapping[str, Any]]:
        """The newest fingerprint of every split."""
        return {key: value for entry in self.entries for key, value in entry.items()}

    def training_changed(self, now: Fingerprints) -> bool:
        """Whether the training examples are, or were, others than now."""
        key = "data.train"
        return any(key in entry and key in now and entry[key] != now[key] for entry in self.entries)

    def follow(self, now: Fingerprints, what: str, *, accept: bool = False, begun: bool = False) -> DataHistory:
        """The history with the data as they are now.

        Args:
          now: of the splits as they were opened.
          what: what goes on: ``the run in runs/mine``.
          accept: go on where they have changed.
          begun: something was trained or scored already.

        Raises:
          UserError: a split that is trained on, or that scores are measured on, has changed. The test split decides
            nothing: a change of it is told.
        """
        latest = self.latest
        changed = [key for key in now if key in latest and latest[key] != now[key]]
        refused = [key for key in changed if not key.endswith("data.test")]
        counts = {
            key: f"{key} ({latest[key].get('examples')} examples then, {now[key]['examples']} now)" for key in changed
        }
        if refused and not accept:
            raise UserError(
                f"{' and '.join(counts[key] for key in refused)}: other data than {what} began with: a file, the chat "
                f"template or the tokenizer has changed, or a package that reads them. Set it back, or choose another "
                f"run_dir; to go on with the data as they are now: --accept-changed-data"
            )
        if changed:
            logger.warning(
                "%s: other data than %s began with; scores from before do not compare with later ones",
                " and ".join(counts.values()),
                what,
            )
        if now and begun and not self.entries:
            logger.warning(
                "%s began before fingerprints of its data were kept: whether they have changed since cannot be told; "
                "those of now are kept from here on",
                what,
            )
        if all(latest.get(key) == value for key, value in now.items()):
            return self
        return DataHistory((*self.entries, now))
