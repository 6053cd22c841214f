"""Trains a model on the first documents of a seed's order: the runner of the data-size study."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxtune.config import program_name
from jaxtune.config.update_rules import virtual_tokens
from jaxtune.data import Example, steps_of_epochs, train_batches
from jaxtune.data.examples import fronted
from jaxtune.data.pipeline import Plan
from jaxtune.errors import UserError
from jaxtune.evaluation.evaluator import documents
from jaxtune.experiments.sampling import Sampling, Unit, read_documents, sampling_order
from jaxtune.search.measuring import measure
from jaxtune.search.outcome import Outcome, TestOutcome
from jaxtune.search.runner import Interrupted
from jaxtune.search.trial import Trial
from jaxtune.telemetry.writers import JsonlWriter
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.hooks import NOBODY, Hooks
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.state import TrainState

logger = logging.getLogger(__name__)

SEED = "train.seed"
"""Beside the unit of the sizes, what makes a trial of this study: the seed of the draw and of the training."""


class SizeRunner:
    """Trains and measures a study's trials on nested subsets of ``data.train``; one compiled program serves all.

    A trial's score is its lowest validation loss, and the model that reached it is the one that is tested.

    Args:
      opened: the opened configuration, with its validation and test split.
      hooks: who is told of the trials, and who may stop them.
    """

    def __init__(self, opened: OpenedConfig, hooks: Hooks = NOBODY):
        self.opened, self._hooks = opened, hooks
        settings = opened.config.study.data_size
        self._sampling: Sampling = settings.sampling
        self._score = settings.score
        self.unit: Unit = settings.unit
        self.documents = read_documents(
            opened.examples["train"], opened.config.data.explode, settings.group_by, settings.unit
        )
        self._orders: dict[int, Int[np.ndarray, " documents"]] = {}
        self._trainer = opened.trainer()
        self._test_batches = opened.loss_batches("test")
        self._evaluator = opened.evaluator("test")
        self._test_documents = documents(opened.examples["test"], opened.config.data.explode)
        self._started: tuple[Trial, int] | None = None

    @property
    def capacity(self) -> int:
        """Trials differ in their data, which a population shares: one at a time."""
        return 1

    def total_steps(self, trial: Trial) -> int:
        """The most steps that a trial trains; of epochs over examples, those that its own examples make."""
        epochs, steps = self.opened.given.train.epochs, self.opened.config.train.steps
        if self.unit == "examples" and epochs is not None and self.unit in trial.configuration:
            size, seed = trial.configuration[self.unit], trial.configuration[SEED]
            chosen, layout = self._chosen(size, seed)
            steps = steps_of_epochs(chosen, epochs, batch_size=self.opened.config.train.batch_size, **layout)
        assert steps is not None
        return steps

    def _chosen(self, size: int, seed: int) -> tuple[Sequence[Example], dict[str, Any]]:
        """The training examples of a size, and how they are laid out in rows."""
        config, examples = self.opened.config, self.opened.examples["train"]
        layout = {"sequence_length": config.train.sequence_length, "seed": seed, "packing": config.data.packing}
        chosen = [examples[place] for place in self.places(size, seed)]
        return fronted(chosen, virtual_tokens(config.update)), layout

    def program(self, trial: Trial) -> str:
        """One for all sizes."""
        return program_name(self.opened.config)

    def places(self, size: int, seed: int) -> list[int]:
        """The places of the training examples of a size."""
        if seed not in self._orders:
            self._orders[seed] = sampling_order(self.documents, self._sampling, seed)
        return self.documents.examples(self._orders[seed][:size])

    def start(self, trial: Trial, until: int) -> None:
        """Takes a trial, which :meth:`wait` trains."""
        self._started = trial, until

    def wait(self) -> list[tuple[Trial, Outcome]]:
        """Trains the trial that was started.

        Raises:
          Interrupted: it was told to stop; the state is saved.
        """
        assert self._started is not None, "nothing was started"
        (trial, until), self._started = self._started, None
        return [(trial, self._train(trial, until))]

    def close(self) -> None:
        """Gives up a trial that was started and not trained."""
        self._started = None

    def _train(self, trial: Trial, until: int) -> Outcome:
        """Trains a trial, from its checkpoint on if it has one, until its end or until its patience is over.

        Raises:
          Interrupted: it was told to stop; the state is saved.
        """
        begin = time.perf_counter()
        size, seed = trial.configuration[self.unit], trial.configuration[SEED]
        config = self.opened.config
        chosen, layout = self._chosen(size, seed)
        rows = len(Plan(chosen, **layout).rows(0))
        batches = train_batches(
            chosen,
            batch_size=config.train.batch_size,
            examples_may_change=self.opened.data_changed,
            **layout,
        )
        checkpoints = Checkpoints(trial.files.checkpoints_path, keep=config.train.keep)
        writer = JsonlWriter(trial.files.metrics_path, checkpoints.latest_step or 0)
        try:
            result = self._trainer.fit(
                batches,
                state=self._trainer.init(seed=seed),
                hyperparameters={"train.steps": float(self.total_steps(trial))},
                until=until,
                validation=self.opened.validation_batches,
                checkpoints=checkpoints,
                writer=writer,
                listener=self._hooks.listen(f"{size} {self.unit}, seed {seed}"),
                should_stop=self._hooks.should_stop,
            )
            best, score = checkpoints.best_step, checkpoints.best_score
        finally:
            writer.close()
            batches.close()
            checkpoints.close()
        if result.stopped == "signal":
            raise Interrupted
        metrics = {**result.metrics, "passes": result.step * config.train.batch_size / rows}
        seconds = time.perf_counter() - begin
        if best is None or score is None:
            return Outcome(math.nan, None, result.step, seconds, metrics, diverged=True)
        return Outcome(score, None, result.step, seconds, {**metrics, "best_step": float(best)})

    def test(self, trial: Trial | None) -> TestOutcome:
        """Measures a trial's best checkpoint, or the untuned model, on the test split.

        Raises:
          Interrupted: the trial has to be trained again, as its checkpoint is gone, and it was told to stop.
        """
        begin = time.perf_counter()
        state = self._trainer.init() if trial is None else self._best(trial)
        assert self._test_batches is not None
        return measure(
            self._trainer,
            state,
            self._test_batches,
            self._evaluator,
            self._score,
            begin=begin,
            clusters=self._test_documents,
        )

    def _best(self, trial: Trial) -> TrainState:
        folder = trial.files.checkpoints_path
        if (newest := Checkpoints.newest_on_disk(folder)) < self.total_steps(trial):
            if not newest:  # else it was being trained again, or had run out of patience, which is found at once
                logger.warning("trial %d: its checkpoint is gone; it is trained again", trial.id)
            trial.directory.mkdir(parents=True, exist_ok=True)
            self._train(trial, self.total_steps(trial))
        loaded = Checkpoints.load(folder, self._trainer.init(), "best", fall_back=False)
        if loaded is None:
            raise UserError(f"{folder}: the trained model's checkpoint is missing")
        return loaded[1]
