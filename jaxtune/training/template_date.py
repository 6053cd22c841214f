"""The day that the chat template of a run shows: that of its directory, whenever it goes on."""

from __future__ import annotations

import datetime
from pathlib import Path

from jaxtune.config import Config, with_overrides
from jaxtune.config.paths import located
from jaxtune.data.template_date import asks_for_date
from jaxtune.models import resolve_path
from jaxtune.training.run_directory import RunDirectory


def with_date(config: Config, like: str | Path | None = None) -> Config:
    """The configuration with ``data.date`` set, where its chat template asks for a date.

    Args:
      config: the run or study.
      like: a run directory that shows the same day; the configuration's own if None.

    Returns:
      With the day that the run directory has in its ``config.yaml``, or that it was begun on, or today. Where the
      template asks for no date, or the configuration gives one, it stays as it is.

    Raises:
      UserError: there is no such model, or the directory's ``config.yaml`` is damaged.
    """
    if not config.data.templated or config.data.date is not None:
        return config
    if not asks_for_date(resolve_path(*located(config).model.tokenizer_source, weights=False)):
        return config
    begun = RunDirectory(config.directory if like is None else like).date()
    return with_overrides(config, {"data.date": begun or today().isoformat()})


def today() -> datetime.date:
    """The day that a run shows which begins now."""
    return datetime.date.today()
