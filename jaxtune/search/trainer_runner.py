"""Trials trained by the trainer: one opened configuration, one compiled program for each shape."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.config import (
    Config,
    capacities,
    dump_config,
    hyperparameters,
    load_config,
    program_key,
    program_name,
    with_overrides,
)
from jaxtune.config.paths import recorded
from jaxtune.errors import UserError
from jaxtune.evaluation import EvaluatorResult
from jaxtune.files import write_atomically
from jaxtune.layout import TrialDirectory
from jaxtune.parallel.platform import platform
from jaxtune.parallel.sharding import TRIAL_AXIS
from jaxtune.search.costs import counted_costs
from jaxtune.search.header import deciding
from jaxtune.search.measuring import measure
from jaxtune.search.outcome import Outcome, TestOutcome
from jaxtune.search.runner import Interrupted
from jaxtune.search.scoring import Scoring
from jaxtune.search.settings import Settings
from jaxtune.search.slots import RunningTrial, Slots
from jaxtune.search.space import canonical
from jaxtune.search.trial import Trial
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.hooks import NOBODY, Hooks
from jaxtune.training.loadable import save_loadable
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.run_directory import RunDirectory
from jaxtune.training.run_options import RunOptions
from jaxtune.training.state import TrainState
from jaxtune.training.trainer import Trainer

logger = logging.getLogger(__name__)


class TrainerRunner:
    """Trains and scores trials of one study in this process.

    Args:
      opened: the opened configuration with its ``search`` section.
      population: trials that train at the same time, in one compiled step.
      hooks: who is told of the trials, and who may stop them.
    """

    lockstep = True

    def __init__(
        self,
        opened: OpenedConfig,
        *,
        population: int = 1,
        hooks: Hooks = NOBODY,
    ):
        self.opened = opened
        self.settings = Settings.of(opened.given)
        self.search = self.settings.search
        self._hooks = hooks
        self.capacity = population
        # A study asks for a trial's length at every turn, and epochs take a packing of all examples to count.
        self._configurations: dict[str, Config] = {}
        self._trainers: dict[str, Trainer] = {}
        self._slots: dict[Trainer, Slots] = {}
        self._running: list[RunningTrial] = []
        self._stopping = False
        self._space = self.settings.space
        self._variants = [opened.config, self.configuration(self.settings.reference)]
        self._evaluators = {"validation": opened.evaluator("validation"), "test": opened.evaluator("test")}
        self._scoring = Scoring(self._evaluators["validation"], self.slots_of)

    @property
    def compilations(self) -> int:
        """How often a training step was compiled in this process."""
        return sum(slots.traces for slots in self._slots.values())

    @property
    def trainers(self) -> tuple[Trainer, ...]:
        """Those made so far, one for each program."""
        return tuple(self._trainers.values())

    def configuration(self, overrides: Mapping[str, Any]) -> Config:
        """The configuration of a trial, resolved.

        Raises:
          UserError: a value does not fit its key.
        """
        key = canonical(overrides)
        if key not in self._configurations:
            changed = with_overrides(self.opened.given, overrides, origin="search: ")
            self._configurations[key] = self.opened.resolve(changed)
        return self._configurations[key]

    def total_steps(self, trial: Trial) -> int:
        """The trial's full length in optimizer steps."""
        return self.steps(trial.configuration)

    def steps(self, overrides: Mapping[str, Any]) -> int:
        """The full length of a trial with these overrides, in optimizer steps."""
        steps = self.configuration(overrides).train.steps
        assert steps is not None
        return steps

    def step_flops(self, trial: Trial) -> float:
        """Model FLOPs of one step of the trial, over full rows."""
        config = self.configuration(trial.configuration)
        trainer, values = self.prepared(config)
        return trainer.step_flops(values).total

    def program(self, trial: Trial) -> str:
        """Names the compiled step that trains the trial."""
        return program_name(self.configuration(trial.configuration))

    def costs(self, overrides: Mapping[str, Any]) -> dict[str, float]:
        """The counted costs of a configuration, by name."""
        return counted_costs(self.configuration(overrides), self.opened.model.config)

    def start(self, trial: Trial, until: int) -> None:
        """Opens a trial at its checkpoint, or its start; see :class:`~jaxtune.search.runner.TrialRunner`."""
        if self._asked_to_stop():
            raise Interrupted
        assert len(self._running) < self.capacity, "start() needs a free place"
        begin = time.perf_counter()
        config = self.configuration(trial.configuration)
        trainer, values = self.prepared(config)
        _set_aside(trial.directory, config, until)
        write_atomically(trial.files.config_path, dump_config(recorded(config, trial.directory)))
        running = RunningTrial(
            trial,
            trainer,
            values,
            until=until,
            seed=config.train.seed,
            batches=self.opened.batches(config),
            objective=self.search.objective,
            metrics=self.search.measured,
            answer=None if self._side_by_side(trainer) else functools.partial(self._answer, trainer, values),
            options=RunOptions(
                validation=self.opened.validation_batches,
                listener=self._hooks.listen(f"trial {trial.id}"),
                should_stop=lambda: self._stopping,
                config=config.train,
            ),
        )
        running.seconds = time.perf_counter() - begin
        self._running.append(running)

    def wait(self) -> list[tuple[Trial, Outcome]]:
        """Trains all trials side by side until one is scored; see :class:`~jaxtune.search.runner.TrialRunner`."""
        assert self._running or self._stopping, "nothing was started"
        if not self._running:
            raise Interrupted
        try:
            while not (ended := [running for running in self._running if running.result is not None]):
                begin = time.perf_counter()
                # Asked once a step, so that all trials stop at the same one.
                if not self._scoring.score(self._running):
                    self._asked_to_stop()
                    self._step()
                    self._scoring.score(self._running)
                share = (time.perf_counter() - begin) / len(self._running)
                for running in self._running:
                    running.seconds += share
        except BaseException:
            self.close()
            raise
        self._running = [running for running in self._running if running.result is None]
        for running in ended:
            running.close()
        scored = [(running.trial, running.outcome()) for running in ended if not running.interrupted]
        if not scored:
            self.close()
            raise Interrupted
        return scored

    def _step(self) -> None:
        """One step of every trial, program by program."""
        programs: dict[Trainer, list[RunningTrial]] = {}
        for running in self._running:
            programs.setdefault(running.trainer, []).append(running)
        for trainer, trials in programs.items():
            if trainer not in self._slots:
                self._slots[trainer] = Slots(trainer, self.slots_of(trainer))
            self._slots[trainer].advance(trials)

    def _side_by_side(self, trainer: Trainer) -> bool:
        """Whether answers of a program's trials are generated in one loop; it follows from the configuration alone.

        Where whole parameters are trained there is no base in common: these are scored one after another, so that a
        state is there for no longer than its own score takes. So they are on a CPU where one trial's questions fill
        its batches: it computes as many rows of one state in less time.
        """
        evaluator = self._evaluators["validation"]
        if evaluator is None or not trainer.plan.adapters_only or self.slots_of(trainer) == 1:
            return False
        spread = platform(trainer.mesh) != "cpu" or trainer.mesh.shape[TRIAL_AXIS] > 1
        return spread or evaluator.filled <= 0.5

    def _asked_to_stop(self) -> bool:
        self._stopping = self._stopping or self._hooks.should_stop()
        return self._stopping

    def close(self) -> None:
        """Closes what trials under way hold open."""
        for running in self._running:
            running.close()
        self._running = []

    def test(self, trial: Trial | None) -> TestOutcome | None:
        """Measures a finished trial, or the untuned model, on the test split; None without one.

        Raises:
          Interrupted: the trial has to be trained again, as its checkpoint is gone, and it was told to stop.
        """
        loss_batches = self.opened.loss_batches("test")
        if loss_batches is None:
            return None
        begin = time.perf_counter()
        self._make_good(trial)
        trainer, values, state = self.load(trial)
        return measure(
            trainer, state, loss_batches, self._evaluators["test"], self.search.objective, values=values, begin=begin
        )

    def _make_good(self, trial: Trial | None) -> None:
        """Trains a finished trial again whose checkpoint is gone, as where the journal alone was kept of a study.

        Raises:
          Interrupted: it was told to stop.
        """
        if trial is None:
            return
        newest = Checkpoints.newest_on_disk(trial.files.checkpoints_path)
        if newest == self.total_steps(trial):
            return
        assert not self._running, "nothing else trains when a study has come to its tests"
        if not newest:  # else it was being trained again, or had run out of patience, which is found at once
            logger.warning("trial %d: its checkpoint is gone; it is trained again", trial.id)
        self.start(trial, self.total_steps(trial))
        self.wait()

    def load(
        self, trial: Trial | None, overrides: Mapping[str, Any] | None = None
    ) -> tuple[Trainer, dict[str, float], TrainState]:
        """A trial's program, its values and its newest state; without a trial, those of the untuned model.

        Args:
          trial: the trial.
          overrides: further ones, which change no shape.

        Raises:
          UserError: the trial has no checkpoint, or one of another configuration.
        """
        config = self.configuration({} if trial is None else {**trial.configuration, **(overrides or {})})
        trainer, values = self.prepared(config)
        # At step 0 no rule has changed anything yet: a fresh state is the untuned model.
        state = trainer.init(values)
        if trial is not None:
            folder = trial.files.checkpoints_path
            loaded = Checkpoints.load(folder, state, "latest", fall_back=False)
            if loaded is None:
                raise UserError(f"{folder}: the checkpoint of trial {trial.id} is missing; it must be trained again")
            state = loaded[1]
        return trainer, values, state

    def save_winner(self, trial: Trial) -> dict[str, Any]:
        """Writes a trial's newest state as the PEFT adapter, or the model, of the study, in place of another one.

        Returns:
          ``adapter`` or ``model``: where it is, and what it is of; see :func:`jaxtune.training.loadable.save_loadable`.

        Raises:
          Interrupted: the trial has to be trained again, and it was told to stop.
        """
        self._make_good(trial)
        trainer, values, state = self.load(trial)
        directory = RunDirectory(self.opened.config.directory)
        kept = save_loadable(directory, self.opened, trainer, state, values)
        return {name: {"path": path, "trial": trial.id, "step": int(state.step)} for name, path in kept.items()}

    def prepared(self, config: Config) -> tuple[Trainer, dict[str, float]]:
        """The trainer of a configuration, and what its program takes as arguments.

        Raises:
          UserError: as :meth:`trainer`.
        """
        return self.trainer(config), hyperparameters(config)

    def trainer(self, config: Config) -> Trainer:
        """The trainer whose compiled step serves this configuration.

        Raises:
          UserError: its batch or its rules do not fit.
        """
        key = program_key(config)
        if key not in self._trainers:
            ceiling = capacities(config)
            for variant in self._variants:
                for name, value in capacities(variant).items():
                    if name in ceiling:
                        ceiling[name] = max(ceiling[name], value)
            for dimension in self._space.dimensions:
                if dimension.key in ceiling:
                    values = dimension.choices or (dimension.decode(dimension.high),)
                    ceiling[dimension.key] = max(ceiling[dimension.key], *map(int, values))
            self._trainers[key] = self.opened.trainer(config, capacity=ceiling, dropout=self._drops())
        return self._trainers[key]

    def slots_of(self, trainer: Trainer) -> int:
        """How many trials of a program train in one compiled step: as many as train at a time, if all are of it.

        The programs of a space get a share each, as most slots of larger ones would stand idle; a program that only the
        reference has gets a slot. It follows from the configuration and :attr:`capacity` alone, never from the trials
        so far: what is computed in populations of two sizes agrees within rounding only.
        """
        programs, references_own = self._programs
        alone = references_own is not None and trainer is self._trainers.get(references_own)
        share = 1 if alone else -(-self.capacity // programs)
        parts = trainer.mesh.shape["trial"]
        return -(-share // parts) * parts

    @functools.cached_property
    def _programs(self) -> tuple[int, str | None]:
        """How many programs the space has, and the key of the one that only the reference has, if it does."""
        dimensions = self._space.dimensions
        alone = self._space.alone
        keys = [
            {program_key(self.configuration(alone(one.key, value))) for value in one.samples()} for one in dimensions
        ]
        reference = self.settings.reference
        inside = {
            one.key: reference[one.key]
            for one in dimensions
            if one.key in reference and one.encode(reference[one.key]) is not None
        }
        own, searched = (program_key(self.configuration(overrides)) for overrides in (reference, inside))
        return math.prod(map(len, keys)), own if own != searched else None

    def _drops(self) -> bool:
        """Whether any trial may use dropout."""
        searched = any(key.endswith(".dropout") for key in self._space.keys)
        return searched or any(
            getattr(rule, "dropout", 0.0) > 0 for variant in self._variants for rule in variant.update
        )

    def _answer(self, trainer: Trainer, values: Mapping[str, float], state: TrainState) -> EvaluatorResult:
        evaluator = self._evaluators["validation"]
        assert evaluator is not None
        return evaluator.evaluate(*trainer.apply(state, values))


def _set_aside(directory: Path, config: Config, until: int) -> None:
    """Moves files of another trial out of the way, so that they are not taken for the beginning of this one.

    They are there where a journal was cut back by hand: then its trials are proposed anew, with other values, or are
    to be scored before the step that their checkpoint has reached.
    """
    files = TrialDirectory(directory)
    file = files.config_path
    if not file.is_file():  # a trial writes it first
        return
    try:
        # What a later version has added stands at its default there; how far a study goes decides no trial.
        same = _trained_by(load_config(file)) == _trained_by(config)
    except UserError:
        same = False
    if same and Checkpoints.newest_on_disk(files.checkpoints_path) <= until:
        return
    number = next(
        number for number in itertools.count(1) if not directory.with_name(f"{directory.name}.{number}").exists()
    )
    aside = directory.rename(directory.with_name(f"{directory.name}.{number}"))
    logger.warning("%s: holds a trial that the journal does not know; moved to %s", directory, aside)


def _trained_by(config: Config) -> dict[str, Any]:
    """What decides the training of a trial; space and reference bound the shapes of what is trained."""
    bounds = {} if config.search is None else config.search.model_dump(mode="json", include={"space", "reference"})
    return {**deciding(config), **bounds}
