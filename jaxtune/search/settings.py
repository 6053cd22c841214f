"""What a search's configuration says, worked out once: its section, space, reference and direction."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtune.config import Config, dotted, with_overrides
from jaxtune.config.metrics import METRICS, Direction, Goal, check_measured
from jaxtune.config.optimizer_section import default_optimizer
from jaxtune.config.search_section import SearchConfig
from jaxtune.config.update_rules import reference_update
from jaxtune.errors import UserError
from jaxtune.search.beginning import Total, why_straight
from jaxtune.search.conditions import Conditions, conditions_of
from jaxtune.search.header import lookup, recorded_reference, rules_of, settled, study_header
from jaxtune.search.milestones import Milestones, Shares
from jaxtune.search.objectives import Objectives
from jaxtune.search.rules import RULES
from jaxtune.search.space import Point, Space
from jaxtune.updates.treatments.low_rank import RankRule

PAPER_BATCH_SIZE = 16

# Sections of the configuration that decide how many steps a trial takes.
_LENGTHS = ("train", "data")


@dataclass(frozen=True)
class Settings:
    """Everything that a study derives from its configuration.

    Attributes:
      search: the section.
      space: the searched space, its fixed keys included.
      reference: dotted overrides that make trial 0.
      goal: whether the objective is minimised or maximised.
      base: the resolved configuration, nested, that trials override.
      reference_config: ``base`` with ``reference`` applied, nested, where the reference's searched keys are looked up;
        a missing one puts it outside the space. None: it follows from ``config``, or else they are looked up in
        ``reference`` and then in ``base``.
      config: that all of this is of, where there is one.
      straight: why a new study finishes trials straight to the end, which it is not told to; else None.
      rules: by which it proposes (:mod:`jaxtune.search.rules`).
    """

    search: SearchConfig
    space: Space
    reference: Mapping[str, Any]
    goal: Goal
    base: Mapping[str, Any]
    reference_config: Mapping[str, Any] | None = None
    config: Config | None = None
    straight: str | None = None
    rules: int = RULES

    @classmethod
    def of(cls, config: Config) -> Settings:
        """The settings of a configuration with a ``search`` section.

        Raises:
          UserError: there is no such section, its objective needs a task that is not configured, there is no validation
            split, or the space is empty or names unknown keys.
        """
        search = search_config(config)
        known, conditions = conditions_of(config, search.space)
        return cls(
            search=search,
            space=Space(search.space, known, search.fixed, conditions),
            reference=reference_overrides(config),
            goal=METRICS[search.objective].goal,
            base=config.model_dump(mode="json"),
            config=config,
        )

    @classmethod
    def by_hand(
        cls,
        search: SearchConfig,
        *,
        direction: Direction = "min",
        reference: Mapping[str, Any] | None = None,
        base: Mapping[str, Any] | None = None,
        reference_config: Mapping[str, Any] | None = None,
        known_keys: Iterable[str] | None = None,
        conditions: Conditions | None = None,
    ) -> Settings:
        """The settings of a study over a runner that takes no configuration; see :class:`Settings`.

        Args:
          search: the section.
          direction: of the objective.
          reference: overrides that make trial 0.
          base: what trials override.
          reference_config: ``base`` with ``reference`` applied.
          known_keys: every dotted key of the configuration; None skips the check of the space's keys.
          conditions: of searched keys that do not always apply.

        Raises:
          UserError: the space is empty or names unknown keys.
        """
        space = Space(search.space, known_keys, search.fixed, conditions)
        return cls(search, space, dict(reference or {}), Goal(direction), dict(base or {}), reference_config)

    def begun(self, record: Mapping[str, Any] | None, total: Total) -> Settings:
        """These settings with what is unset as a study began with it, or as a new one begins.

        Args:
          record: the first one of the study's journal; None where it has not begun.
          total: the steps of a trial with some overrides; asked only of a new study, and only if it matters.
        """
        shortest = functools.cache(functools.partial(self._shortest, total))
        unsaid = record is None and self.search.finish is None
        return dataclasses.replace(
            self,
            search=settled(self.search, record, shortest),
            straight=why_straight(self.search, shortest) if unsaid else None,
            rules=rules_of(record),
        )

    def _shortest(self, total: Total) -> int:
        """The steps of the shortest trial that the space holds, or of the reference."""
        values = {
            one.key: min(one.samples(), key=lambda value, key=one.key: total(self.space.alone(key, value)))
            for one in self.space.dimensions
            if one.key.partition(".")[0] in _LENGTHS
        }
        return min(total(self.reference), total(values))

    @functools.cached_property
    def reference_point(self) -> Point | None:
        """Where trial 0 lies in the space; None outside it.

        Raises:
          UserError: the reference does not fit the configuration.
        """
        config = self._reference_config()

        def value(key: str) -> Any:
            if config is not None:
                return lookup(config, key)
            return self.reference[key] if key in self.reference else lookup(self.base, key)

        found: dict[str, Any] = {}
        for key in self.space.keys:
            with contextlib.suppress(KeyError):
                found[key] = value(key)
        return self.space.point({key: one for key, one in found.items() if self.space.applies(key, found)})

    def _reference_config(self) -> Mapping[str, Any] | None:
        if self.config is None or self.reference_config is not None:
            return self.reference_config
        own, changed = dotted(self.config), dotted(with_overrides(self.config, self.reference))
        # The surrogate knows the searched keys alone: a reference that differs in others is none of its points.
        others = own.keys() - self.space.keys
        same = changed.keys() == own.keys() and all(changed[key] == own[key] for key in others)
        return with_overrides(self.config, self.reference).model_dump(mode="json") if same else {}

    @functools.cached_property
    def objectives(self) -> Objectives:
        """All objectives, with the bounds on them."""
        return Objectives.of(self.search, self.goal)

    @functools.cached_property
    def shares(self) -> Shares:
        """The shares of a trial's steps at which it is looked at."""
        return Shares.of(self.search.model_dump())

    @property
    def promotions(self) -> tuple[int, ...]:
        """How many trials are to go on to each share of ``search.finish``, besides the reference."""
        return self.shares.promotions(self.search.promote)

    def milestones(self, total: int) -> Milestones:
        """The steps at which a trial of ``total`` steps is looked at.

        Raises:
          UserError: one of them is less than a step, or two are the same.
        """
        return self.shares.checked(total)

    def header(self, *, population: int, start: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The fields of the journal's first record.

        Args:
          population: trials that train at a time.
          start: configurations of the trials after the reference that an earlier study gave.
        """
        return study_header(
            self.search,
            population=population,
            direction=self.goal.direction,
            reference=self.reference,
            start=start,
            base=self.base,
            rules=self.rules,
        )


def search_config(config: Config) -> SearchConfig:
    """The ``search`` section.

    Raises:
      UserError: there is none, its objective is not measured, or there is no validation split.
    """
    search = config.search
    if search is None:
        raise UserError("search: this section is required; jaxtune init quickstart writes an example")
    for name in search.measured:
        check_measured(name, config.evaluation.task, f"search.{search.key_of(name)}")
    if config.data.validation is None:
        raise UserError("data.validation: a search scores its trials on this split; it is required")
    return search


def reference_overrides(config: Config) -> dict[str, Any]:
    """What makes trial 0, as ``search.reference`` says.

    ``own`` changes nothing: it names what the configuration has for the searched keys. A study that began when another
    reference was the default keeps the one in its journal. ``paper`` (arXiv:2407.13906) is LoRA on q and v with rank
    16, alpha 32, dropout 0.1, learning rate 1e-4, batch 16, cosine, warm-up 0.1; where the configuration trains
    low-rank terms on other modules, those modules are kept and take the paper's rank, alpha and dropout.
    """
    assert config.search is not None
    chosen = config.search.reference
    if isinstance(chosen, dict):
        return dict(chosen)
    if chosen == "own":
        if (recorded := recorded_reference(config.directory)) is not None:
            return recorded
        values = dotted(config)
        return {key: values[key] for key in config.search.space if key in values}
    paper, optimizer = reference_update()[0], default_optimizer()
    assert isinstance(paper, RankRule)
    overrides: dict[str, Any] = {
        "optimizer.learning_rate": optimizer.learning_rate,
        "optimizer.warmup": optimizer.warmup,
        "optimizer.schedule": optimizer.schedule,
        "optimizer.weight_decay": optimizer.weight_decay,
        "train.batch_size": PAPER_BATCH_SIZE,
    }
    for index, rule in enumerate(config.update):
        if isinstance(rule, RankRule):
            overrides |= {
                f"update.{index}.rank": paper.rank,
                f"update.{index}.alpha": paper.alpha,
                f"update.{index}.dropout": paper.dropout,
            }
    return overrides
