"""Changing a study that has begun: more trials, other promotions, a configuration by hand, a value held fast.

The journal stays append-only: a ``changed`` record holds the new settings, a trial by hand is a ``proposed`` record
whose source is ``hand``. Then ``config.yaml`` is rewritten to say the same. Killed in between, the journal is the
truth: extending the study again, by nothing, writes the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtune.config import Config, dotted, dump_config, load_config, parse_value, with_overrides
from jaxtune.config.paths import recorded
from jaxtune.config.roles import marked, within
from jaxtune.config.search_section import SearchConfig
from jaxtune.config.section import Amendable
from jaxtune.errors import UserError, nearest
from jaxtune.files import write_atomically
from jaxtune.layout import RunFiles
from jaxtune.search.checks import check_space, check_trials
from jaxtune.search.directory import study_directory
from jaxtune.search.header import (
    CHANGEABLE,
    amended_header,
    check_header,
    check_records,
    check_room,
    recorded_data,
)
from jaxtune.search.journal import Journal
from jaxtune.search.settings import Settings, search_config
from jaxtune.search.space import canonical
from jaxtune.search.trainer_runner import TrainerRunner
from jaxtune.search.trial import History, replay
from jaxtune.training.opened_config import OpenedConfig, read_fingerprints
from jaxtune.training.template_date import with_date

_SETTINGS = [key for key, mark in marked(Amendable).items() if mark.option is None]
"""What ``key=value`` changes."""


@dataclass(frozen=True)
class Extension:
    """What a study was changed to.

    Attributes:
      config: the configuration that it goes on with.
      changed: the settings that differ from before, by their name below ``search``.
      added: configurations by hand, by trial number.
      left: trials that have no early score yet.
    """

    config: Config
    changed: dict[str, Any] = field(default_factory=dict)
    added: dict[int, dict[str, Any]] = field(default_factory=dict)
    left: int = 0


def extend(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    added: Sequence[Mapping[str, Any]] = (),
    fixed: Mapping[str, Any] | None = None,
    freed: Sequence[str] = (),
    write: bool = True,
    accept_changed_data: bool = False,
) -> Extension:
    """Changes a study that nobody runs. Without any change, ``config.yaml`` is made to agree with the journal.

    Args:
      run_dir: the study's run directory.
      overrides: ``search.trials=…`` and ``search.promote=…``.
      added: configurations to try next. A searched key that is not named has its fixed value, or the configuration's.
        Each is a trial more, unless ``search.trials`` is given.
      fixed: searched keys that proposals do not vary any more, and their values.
      freed: fixed keys that they vary again.
      write: False checks only.
      accept_changed_data: change it where the training or the validation split is not what it was; otherwise refused.

    Raises:
      UserError: there is no study, another process holds it, its data have changed, or the change does not fit it;
        nothing is changed then.
    """
    directory = study_directory(run_dir)
    with Journal(directory) as journal:
        header = amended_header(journal.records, journal.path)
        if header.get("experiment"):
            raise UserError(f"{directory}: the trials of the experiment {header['experiment']}, which end with it")
        config = _recorded_config(directory, header)
        settings = Settings.of(config).begun(header, lambda overrides: 0)  # a study that has begun asks for no length
        search = settings.search
        # "auto" is what the study began with.
        population = header["population"] if search.population == "auto" else search.population
        here = settings.header(population=population, start=header["start"])
        check_header(journal.records, here, journal.path)
        check_records(journal.records, settings.space, journal.path)
        history = replay(journal.records[1:], directory, journal.path)
        changes = _changes(search.fixed, overrides, fixed or {}, freed)
        if added:
            changes.setdefault("search.trials", search.trials + len(added))
        changed = with_overrides(config, changes, origin="study extend: ")
        check_space(changed)
        now_set = Settings.of(changed)
        numbered = _numbered(now_set, history, added)
        _check_trials(now_set, history, numbered)
        known = recorded_data(journal.records, journal.path)
        # The model and the data have the last word on a configuration: ask them before it is written for good.
        opened = OpenedConfig(changed) if numbered else None
        costs: dict[int, dict[str, float]] = {}
        if opened is not None:
            runner = TrainerRunner(opened)
            check_trials(changed, runner, [dict(one) for one in numbered.values()])
            if search.counted:
                costs = {number: runner.costs(one) for number, one in numbered.items()}
        now = opened.fingerprints if opened else read_fingerprints(changed) if known.entries else {}
        data = known.follow(now, f"the study in {directory}", accept=accept_changed_data, begun=bool(history.trials))
        new = {name: value for name, value in now_set.search.model_dump().items() if header.get(name) != value}
        new = {name: value for name, value in new.items() if any(within(key, [f"search.{name}"]) for key in changes)}
        if write:
            if data != known:
                journal.append("data", fingerprints=now)
            _write(journal, now_set, new, numbered, costs)
    scored = sum(state.early is not None for state in history.trials.values())
    return Extension(changed, new, numbered, now_set.search.trials - scored)


def _recorded_config(directory: Path, header: Mapping[str, Any]) -> Config:
    """``config.yaml`` with the settings that the journal tells.

    Raises:
      UserError: it is missing or damaged, or has no search.
    """
    file = RunFiles(directory).config_path
    config = with_date(load_config(file))
    search_config(config)
    return with_overrides(config, {f"search.{name}": header[name] for name in CHANGEABLE}, origin=f"{file}: ")


def _changes(
    now: Mapping[str, Any], overrides: Sequence[str], fixed: Mapping[str, Any], freed: Sequence[str]
) -> dict[str, Any]:
    """What is asked for, as overrides of the configuration."""
    changes: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"{override!r}: expected {' or '.join(f'{name}=…' for name in _SETTINGS)}")
        if not within(key, _SETTINGS):
            begun = f"{key}: cannot change in a study that has begun"
            if key.removeprefix("search.") in SearchConfig.model_fields:
                raise UserError(f"{begun}, as its trials would not compare; {' and '.join(_SETTINGS)} can")
            raise UserError(f"{begun}{nearest(key, _SETTINGS)}")
        changes[key] = parse_value(text)
    for key in freed:
        if key not in now:
            raise UserError(f"--free {key}: it is not fixed{nearest(key, now)}")
    if fixed or freed:
        kept = {key: value for key, value in now.items() if key not in freed}
        changes["search.fixed"] = {**kept, **fixed}
    return changes


def _numbered(settings: Settings, history: History, added: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """The configurations by hand under the numbers of the next trials, with all searched keys.

    Raises:
      UserError: a key is not searched, a value is outside the space, or a trial has the configuration already.
    """
    known = {number: canonical(state.trial.configuration) for number, state in history.trials.items()}
    following = max(history.trials, default=0) + 1  # trial 0 is the reference's
    assert settings.config is not None
    space = settings.space
    values = dotted(settings.config) | space.fixed
    numbered: dict[int, dict[str, Any]] = {}
    for number, given in enumerate(added, start=following):
        for key in given:
            if key not in space.keys:
                raise UserError(f"--add {key}: not searched{nearest(key, space.keys)}")
        configuration: dict[str, Any] = {}
        told = values | dict(given)
        for dimension in space.dimensions:
            if not space.applies(dimension.key, told):
                if dimension.key in given:
                    raise UserError(f"--add {dimension.key}: does not apply to this configuration; leave it out")
                continue
            value = given.get(dimension.key, values.get(dimension.key))
            coordinate = dimension.encode(value)
            if coordinate is None:
                own = "" if dimension.key in given else " (it is not named, so it is the configuration's own)"
                raise UserError(
                    f"--add {dimension.key}={value}: outside search.space.{dimension.key}, "
                    f"{dimension.describe()}{own}; jaxtune train runs any configuration by itself"
                )
            configuration[dimension.key] = dimension.decode(coordinate)
        same = next((trial for trial, text in known.items() if text == canonical(configuration)), None)
        if same is not None:
            raise UserError(f"--add: trial {same} has this configuration already; jaxtune study show … {same} shows it")
        known[number] = canonical(configuration)
        numbered[number] = configuration
    return numbered


def _check_trials(settings: Settings, history: History, added: Mapping[int, Mapping[str, Any]]) -> None:
    """Raises :class:`UserError` where the trials that there are to be cannot be."""
    space, trials = settings.space, settings.search.trials
    there = max([*history.trials, *added], default=0) + 1
    if trials < there:
        raise UserError(
            f"search.trials: {trials} is less than the {there} trials that were proposed"
            f"{' or are added' if added else ''}; give at least {there}"
        )
    points = {number: space.point(state.trial.configuration) for number, state in history.trials.items()}
    points |= {number: space.point(configuration) for number, configuration in added.items()}
    check_room(space, trials, points | {0: settings.reference_point})


def _write(
    journal: Journal,
    settings: Settings,
    changed: Mapping[str, Any],
    added: Mapping[int, Mapping[str, Any]],
    costs: Mapping[int, Mapping[str, float]],
) -> None:
    """Journal first, then ``config.yaml``; a summary that is not true any more goes before both."""
    directory = journal.path.parent
    if changed or added:
        RunFiles(directory).summary_path.unlink(missing_ok=True)
    if changed:
        journal.append("changed", **changed)
    if added and 0 not in {record.get("trial") for record in journal.records}:
        reference = {"configuration": dict(settings.reference), "source": "reference"}
        journal.append("proposed", trial=0, **reference, told=[], pending=[])
    for number, configuration in added.items():
        counted = {name: costs[number][name] for name in settings.search.counted}
        journal.append(
            "proposed", trial=number, configuration=configuration, source="hand", told=[], pending=[],
            **({"costs": counted} if counted else {}),
        )  # fmt: skip
    assert settings.config is not None
    file, text = RunFiles(directory).config_path, dump_config(recorded(settings.config, directory))
    if file.read_text(encoding="utf-8") != text:
        write_atomically(file, text)


def parse_assignments(text: str, option: str) -> dict[str, Any]:
    """``"key=value,key=value"`` as a mapping; a comma inside a value is one that no ``key=`` follows.

    Args:
      text: as given.
      option: that it was given to, for the message.

    Raises:
      UserError: a part has no ``=``, or a key is given twice.
    """
    assigned: dict[str, Any] = {}
    for part in re.split(r",\s*(?=[A-Za-z_][\w.]*=)", text):
        key, separator, value = part.partition("=")
        if not separator or not key.strip():
            raise UserError(f"{option} {part!r}: expected key=value, or several with commas between them")
        if key.strip() in assigned:
            raise UserError(f"{option} {text!r}: {key.strip()} is given twice")
        assigned[key.strip()] = parse_value(value)
    return assigned
