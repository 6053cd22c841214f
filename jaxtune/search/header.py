"""What makes a study this study: the first record of its journal, with the changes that later records made to it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jaxtune.config.metrics import Direction
from jaxtune.config.roles import marked, without
from jaxtune.config.schema import Config
from jaxtune.config.search_section import SearchConfig
from jaxtune.config.section import Amendable, HostOnly, Recorded
from jaxtune.errors import UserError, nearest
from jaxtune.layout import RunFiles
from jaxtune.search.beginning import UNSET, beginning
from jaxtune.search.journal import difference, read_journal
from jaxtune.search.objectives import recorded_where
from jaxtune.search.rules import RULES
from jaxtune.search.space import Point, Space
from jaxtune.training.data_history import DataHistory

CHANGEABLE = tuple(marked(Amendable, SearchConfig))
"""Settings of a study that may change after its start, as what is scored already stays comparable."""

# Of the settings, those that make a study this study.
_SETTINGS = set(marked(Recorded, SearchConfig))

# What a study had where its journal does not name it: it began before there was a choice.
_BEFORE: dict[str, Any] = {
    "method": "gp",
    "acquisition": "ei",
    "ladder": [],
    "finish": [1.0],
    "promote_by": "mean",
    "seeds": 1,
    "budget": None,
    "terminate": "never",
    "metrics": [],
    "start": [],
    "fixed": {},
    "objectives": [],
    "where": {},
    "rules": 1,
}


def deciding(config: Config) -> dict[str, Any]:
    """The keys of a configuration that decide what its training comes to, nested."""
    return _deciding(config.model_dump(mode="json"))


def _deciding(nested: Mapping[str, Any]) -> dict[str, Any]:
    return without(nested, marked(HostOnly))


def study_header(
    search: SearchConfig,
    *,
    population: int,
    direction: Direction,
    reference: Mapping[str, Any],
    start: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any],
    rules: int,
) -> dict[str, Any]:
    """The fields of a journal's first record.

    Args:
      search: the study's settings, :func:`settled`.
      population: trials that train at a time.
      direction: ``min`` or ``max``.
      reference: dotted overrides that make trial 0.
      start: configurations of the trials after it that an earlier study gave.
      base: the resolved configuration, nested.
      rules: by which it proposes (:mod:`jaxtune.search.rules`).
    """
    return {
        "space": {key: value.model_dump(exclude_none=True) for key, value in search.space.items()},
        "objective": {"name": search.objective, "direction": direction},
        "experiment": None,
        **search.model_dump(include=_SETTINGS),
        "where": recorded_where(search.where),
        "rules": rules,
        "population": population,
        "reference": dict(reference),
        "start": [dict(one) for one in start],
        "config": _deciding(base),
    }


def amended_header(records: Sequence[Mapping[str, Any]], path: Path) -> dict[str, Any]:
    """The first record of a journal with the changes of its ``changed`` records, which hold the new values alone.

    Raises:
      UserError: there is no record, or the first one is not a study's.
    """
    if not records:
        raise UserError(f"{path}: the journal is empty; run the search again to start it anew")
    if records[0]["event"] != "study":
        raise UserError(f"{path}, line 1: the first record is {records[0]['event']!r}, not 'study'; restore it")
    header: dict[str, Any] = {**_BEFORE, **records[0]}
    for record in records[1:]:
        if record["event"] == "changed":
            header |= {name: record[name] for name in CHANGEABLE if name in record}
    return header


def recorded_data(records: Sequence[Mapping[str, Any]], path: Path) -> DataHistory:
    """The fingerprints of the data that a journal's trials have seen.

    Raises:
      UserError: they are none.
    """
    told = [*records[:1], *(record for record in records[1:] if record["event"] == "data")]
    return DataHistory.read([record["fingerprints"] for record in told if "fingerprints" in record], path)


def read_data(run_dir: Path) -> DataHistory:
    """The fingerprints of the data that the trials in a study's directory have seen; takes no lock.

    Raises:
      UserError: the journal is damaged.
    """
    path = RunFiles(run_dir).journal_path
    return recorded_data(read_journal(run_dir), path) if path.exists() else DataHistory()


def recorded_reference(run_dir: str | Path) -> dict[str, Any] | None:
    """The overrides that made trial 0 of the study in a directory; None where none has begun."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return dict((first_record(run_dir) or {})["reference"])
    return None


def first_record(run_dir: str | Path) -> dict[str, Any] | None:
    """How the journal in a directory begins, as it was written; None where no study has begun.

    A journal that cannot be read is told of by whoever reads all of it.
    """
    with contextlib.suppress(OSError, ValueError, TypeError), RunFiles(run_dir).journal_path.open("rb") as file:
        return dict(json.loads(file.readline()))
    return None


def settled(search: SearchConfig, begun: Mapping[str, Any] | None, shortest: Callable[[], int]) -> SearchConfig:
    """The settings with what is unset filled in: as a study began, or as a new one begins.

    A later version may begin studies with another choice; one that has begun goes on with its own.

    Args:
      search: as configured.
      begun: the first record of the study's journal; None where it has not begun.
      shortest: tells the steps of the shortest trial; asked only of a new study, and only if it matters.
    """
    known = beginning(search, shortest) if begun is None else {**_BEFORE, **begun}
    return search.model_copy(update={name: known[name] for name in UNSET if getattr(search, name) is None})


def rules_of(begun: Mapping[str, Any] | None) -> int:
    """By which rules a study proposes: as it began, or as a new one begins.

    Args:
      begun: the first record of its journal; None where it has not begun.
    """
    return RULES if begun is None else {**_BEFORE, **begun}["rules"]


def searched_values(header: Mapping[str, Any]) -> dict[str, Any]:
    """What the study's own configuration has for its searched keys; the reference overrides only what it changes."""
    values = {}
    for key in header["space"]:
        with contextlib.suppress(KeyError):
            values[key] = lookup(header.get("config") or {}, key)
    return values


def check_header(
    records: Sequence[Mapping[str, Any]], header: Mapping[str, Any], path: Path, section: str = "search."
) -> None:
    """Refuses the journal of another study.

    Args:
      records: of the journal.
      header: what the study at hand would begin it with.
      path: of the journal, for the message.
      section: what the names of the header's settings start with in the message.

    Raises:
      UserError: they differ; the first difference is named.
    """
    recorded = amended_header(records, path)
    recorded["config"] = _dated(_with_defaults(recorded.get("config")), header.get("config"))
    for name, value in header.items():
        found = difference(recorded.get(name), value, "" if name == "config" else f"{section}{name}")
        if found is None:
            continue
        if name in CHANGEABLE and not recorded.get("experiment"):
            raise UserError(
                f"{path}: {found}; to change the study: jaxtune study extend {path.parent} …; to go on with it as it "
                f"is: jaxtune study extend {path.parent}"
            )
        raise UserError(f"{path} is the journal of another study: {found}; choose another run_dir, or set it back")


def _with_defaults(config: Any) -> Any:
    """A recorded configuration with the keys that a later version has added, at their defaults; or as it is."""
    try:
        return deciding(Config.model_validate(config))
    except ValidationError:
        return config


def _dated(recorded: Any, config: Any) -> Any:
    """A recorded configuration that leaves the date of its chat template open, with the date of another one."""
    if not (isinstance(recorded, dict) and isinstance(recorded.get("data"), dict) and isinstance(config, Mapping)):
        return recorded
    here = config.get("data")
    if recorded["data"].get("date") is not None or not isinstance(here, Mapping) or "date" not in here:
        return recorded
    return {**recorded, "data": {**recorded["data"], "date": here["date"]}}


def check_records(records: Sequence[Mapping[str, Any]], space: Space, path: Path) -> None:
    """Refuses trials that cannot come from this study: a journal that was edited by hand, or put together.

    Args:
      records: all of a journal's, the first included.
      space: of the study.
      path: of the journal, for the message.

    Raises:
      UserError: a trial was proposed twice, has other keys than the searched ones or a value outside the space, or was
        scored with another configuration than it was proposed with; names the line.
    """
    proposed: dict[Any, tuple[int, Any]] = {}
    for line, record in enumerate(records, start=1):
        number, configuration = record.get("trial"), record.get("configuration")
        if number is None or configuration is None:
            continue
        wrong: str | None = None
        if record["event"] != "proposed":
            first, expected = proposed.get(number, (line, configuration))
            found = difference(expected, configuration)
            if found is not None:
                wrong = f"differs from what line {first} proposed ({found})"
        elif number in proposed:
            wrong = f"was proposed before, in line {proposed[number][0]}"
        elif number != 0:
            wrong = _misfit(configuration, space)
        if wrong is not None:
            raise UserError(
                f"{path}, line {line}: trial {number} {wrong}; restore the line, or cut the file before it to run the "
                f"later trials again"
            )
        if record["event"] == "proposed":
            proposed[number] = line, configuration


def lookup(nested: Any, key: str) -> Any:
    """The value of a dotted key in a nested configuration.

    Raises:
      KeyError: there is no such key.
    """
    for part in key.split("."):
        if isinstance(nested, list | tuple) and part.isdigit() and int(part) < len(nested):
            nested = nested[int(part)]
        elif isinstance(nested, Mapping) and part in nested:
            nested = nested[part]
        else:
            raise KeyError(key)
    return nested


def check_room(space: Space, trials: int, points: Mapping[int, Point | None]) -> None:
    """Refuses more trials than a finite space has configurations.

    Args:
      space: of the study.
      trials: how many there are to be.
      points: of the trials that there are, trial 0 included; None for one outside the space.

    Raises:
      UserError: there are not enough configurations that no trial has.
    """
    size, wanted = space.size, trials - len(points)
    if size is None or wanted <= 0:
        return
    taken = {tuple(point) for point in points.values() if point is not None and space.snap(point) == point}
    free = size - len(taken)
    if wanted > free:
        fixed = ", ".join(f"{key} fixed at {value}" for key, value in space.fixed.items())
        held = f"search.space with {fixed}" if fixed else "search.space"
        raise UserError(
            f"search.trials is {trials}, but {held} holds only {size} configurations; lower "
            f"search.trials to {len(points) + free}, or widen the space"
        )


def _misfit(configuration: Any, space: Space) -> str | None:
    """Why a configuration is none of a space; None where it is one."""
    if not isinstance(configuration, Mapping):
        return f"has the configuration {configuration!r}, which is no mapping"
    for key in configuration:
        if key not in space.keys:
            return f"sets {key!r}, which is not searched{nearest(key, space.keys)}"
    for dimension in space.dimensions:
        if not space.applies(dimension.key, configuration):
            if dimension.key in configuration:
                return f"sets {dimension.key!r}, which does not apply to it"
            continue
        if dimension.key not in configuration:
            return f"does not set {dimension.key}"
        value = configuration[dimension.key]
        if dimension.encode(value) is None:
            return f"has {dimension.key} = {value!r}, which is outside {dimension.describe()}"
    return None
