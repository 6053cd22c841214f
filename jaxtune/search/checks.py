"""What is checked of a study before anything is trained: its space, its reference, trials at the ends of the space."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.config import Config, with_overrides
from jaxtune.config.aliases import sections_of
from jaxtune.config.loading import TAGS
from jaxtune.config.roles import marked, within
from jaxtune.config.section import BesideAdapter, PerTrial
from jaxtune.config.update_rules import Rule
from jaxtune.errors import UserError
from jaxtune.search.header import first_record, read_data
from jaxtune.search.milestones import Milestones
from jaxtune.search.population_size import population_size
from jaxtune.search.settings import Settings
from jaxtune.search.space import Space
from jaxtune.search.trainer_runner import TrainerRunner
from jaxtune.training.hooks import NOBODY, Hooks
from jaxtune.training.opened_config import OpenedConfig


def check_space(config: Config) -> None:
    """Tries values of every searched key, and the reference; opens nothing.

    Raises:
      UserError: a key does not exist, is none that can differ between trials, or a value does not fit it.
    """
    settings = Settings.of(config)
    alone = settings.space.alone
    for dimension in settings.space.dimensions:
        _check_varied(dimension.key, "search.space", config)
        for value in dimension.samples():
            with_overrides(config, alone(dimension.key, value), origin=f"search.space.{dimension.key}: ")
    for key in settings.reference:
        _check_varied(key, "search.reference", config)
    with_overrides(config, settings.reference, origin="search.reference: ")


def _check_varied(key: str, where: str, config: Config) -> None:
    """Refuses keys that a study reads once for all of its trials: differing there, they would do nothing.

    And those that the adapter has settled which trials start from: with another rank or alpha they would start from
    something else.
    """
    if config.model.adapter is not None and within(key, ["update"]):
        free = sorted({name for rule in sections_of(Rule) for name in marked(BesideAdapter, rule)})
        if key.rpartition(".")[2] not in free:
            raise UserError(
                f"{where}: {key!r} is settled by model.adapter, {config.model.adapter}, as its modules, ranks and "
                f"alphas are what training starts from; of update only {', '.join(free)} can differ"
            )
    if not within(key, marked(PerTrial)):
        raise UserError(
            f"{where}: {key!r} is the same for all trials of a study, which share one model and one reading of the "
            f"data; search over keys of {', '.join(marked(PerTrial))}"
        )


def check_trials(config: Config, runner: TrainerRunner, added: Sequence[Mapping[str, Any]] = ()) -> None:
    """Tries trials with values of every searched key, and the reference, against the opened model and data.

    Args:
      config: with a ``search`` section.
      runner: over the opened configuration.
      added: configurations by hand to try as well.

    Raises:
      UserError: a value does not fit the model, its context, the devices or the data, a rung or the fraction of its
        steps is less than a step, or two of them are the same step.
    """
    settings = Settings.of(config).begun(first_record(config.directory), runner.steps)
    trials: list[tuple[str, str, dict[str, Any]]] = [("", "", {}), ("search.reference", "", dict(settings.reference))]
    trials += [("--add", "", dict(configuration)) for configuration in added]
    trials += [(f"search.space.{key}", key, overrides) for key, overrides in _tried(settings.space)]
    for origin, key, overrides in trials:
        try:
            variant = runner.configuration(overrides)
            check_milestones(settings, variant)
            runner.opened.check_lengths(variant)
            trainer, values = runner.prepared(variant)
            trainer.plan.check(values)
        except UserError as error:
            # The value is worth saying where one was tried.
            tried = [overrides[key]] if key in overrides else [*overrides.values()]
            value = f"{tried[0]!r}: " if len(tried) == 1 else ""
            raise UserError(f"{origin}{': ' if origin else ''}{value}{error}") from error


def _tried(space: Space) -> Iterator[tuple[str, dict[str, Any]]]:
    """Values of every searched key, each alone, and of a section's with each kind that the section may be of."""
    for dimension in space.dimensions:
        yield from ((dimension.key, space.alone(dimension.key, value)) for value in dimension.samples())
    for tag in (one for one in space.dimensions if one.key.rpartition(".")[2] in TAGS and one.choices):
        section = f"{tag.key.rpartition('.')[0]}."
        beside = [one for one in space.dimensions if one is not tag and one.key.startswith(section)]
        for choice, other in itertools.product(tag.choices, beside):
            for value in other.samples():
                overrides = {tag.key: choice, other.key: value}
                if space.applies(other.key, overrides):
                    yield tag.key, overrides


def checked_runner(
    config: Config,
    *,
    run_dir: Path | None = None,
    hooks: Hooks = NOBODY,
) -> TrainerRunner:
    """Opens model and data, tries trials against them, and settles how many train at a time.

    Args:
      config: with a ``search`` section.
      run_dir: of the study, where that is not the configuration's: a study that goes on keeps its population.
      hooks: who is told of the trials, and who may stop them.

    Raises:
      UserError: as :func:`check_trials`, or the population does not fit the devices.
    """
    runner = TrainerRunner(OpenedConfig(config), hooks=hooks)
    check_trials(config, runner)
    directory = Path(config.directory) if run_dir is None else run_dir
    runner.capacity = population_size(runner, directory)
    # Whether the study may go on with other examples is asked where its journal is held.
    opened = runner.opened
    opened.data_changed = read_data(directory).training_changed(opened.fingerprints)
    return runner


def check_milestones(settings: Settings, config: Config) -> Milestones:
    """The steps at which a trial of this configuration is looked at.

    Raises:
      UserError: a rung or the fraction is less than a step, or two of them are the same step.
    """
    return settings.milestones(config.train.steps or 0)
