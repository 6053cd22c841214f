"""Trains a model on the first documents of a seed's order: the runner of the data-size study."""

from __future__ import annotations

import math
import time

import numpy as np
from jaxtyping import Int

from jaxtune.config import program_name
from jaxtune.data import train_batches
from jaxtune.data.pipeline import Plan
from jaxtune.errors import UserError
from jaxtune.evaluation.evaluator import documents
from jaxtune.search.measuring import measure
from jaxtune.search.outcome import Outcome, TestOutcome
from jaxtune.search.runner import Interrupted
from jaxtune.search.trial import Trial
from jaxtune.studies.sampling import Sampling, read_documents, sampling_order
from jaxtune.telemetry.writers import JsonlWriter
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.experiment import Experiment
from jaxtune.training.hooks import NOBODY, Hooks
from jaxtune.training.state import TrainState

SIZE, SEED = "documents", "train.seed"
"""What makes a trial of this study: how many documents it is trained on, and the seed of the draw and the training."""


class SizeRunner:
    """Trains and measures a study's trials on nested subsets of ``data.train``; one compiled program serves all.

    A trial's score is its lowest validation loss, and the model that reached it is the one that is tested.

    Args:
      experiment: the opened configuration, with its validation and test split.
      hooks: who is told of the trials, and who may stop them.
    """

    def __init__(self, experiment: Experiment, hooks: Hooks = NOBODY):
        self.experiment, self._hooks = experiment, hooks
        settings = experiment.config.study.data_size
        self._sampling: Sampling = settings.sampling
        self._score = settings.score
        self.documents = read_documents(experiment.examples["train"], experiment.config.data.explode, settings.group_by)
        self._orders: dict[int, Int[np.ndarray, " documents"]] = {}
        self._trainer = experiment.trainer()
        self._test_batches = experiment.loss_batches("test")
        self._evaluator = experiment.evaluator("test")
        self._test_documents = documents(experiment.examples["test"], experiment.config.data.explode)
        self._started: tuple[Trial, int] | None = None

    @property
    def capacity(self) -> int:
        """Trials differ in their data, which a population shares: one at a time."""
        return 1

    def total_steps(self, trial: Trial) -> int:
        """The most steps that a trial trains."""
        steps = self.experiment.config.train.steps
        assert steps is not None
        return steps

    def program(self, trial: Trial) -> str:
        """One for all sizes."""
        return program_name(self.experiment.config)

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
        size, seed = trial.configuration[SIZE], trial.configuration[SEED]
        config, examples = self.experiment.config, self.experiment.examples["train"]
        layout = {"sequence_length": config.train.sequence_length, "seed": seed, "packing": config.data.packing}
        chosen = [examples[place] for place in self.places(size, seed)]
        rows = len(Plan(chosen, **layout).rows(0))
        batches = train_batches(
            chosen,
            batch_size=config.train.batch_size,
            examples_may_change=self.experiment.data_changed,
            **layout,
        )
        checkpoints = Checkpoints(trial.files.checkpoints_path, keep=config.train.keep)
        writer = JsonlWriter(trial.files.metrics_path, checkpoints.latest_step or 0)
        try:
            result = self._trainer.fit(
                batches,
                state=self._trainer.init(seed=seed),
                until=until,
                validation=self.experiment.validation_batches,
                checkpoints=checkpoints,
                writer=writer,
                listener=self._hooks.listen(f"{size} documents, seed {seed}"),
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
        """Measures a trial's best checkpoint, or the untuned model, on the test split."""
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
        loaded = Checkpoints.load(trial.files.checkpoints_path, self._trainer.init(), "best", fall_back=False)
        if loaded is None:
            raise UserError(f"{trial.files.checkpoints_path}: the trained model's checkpoint is missing")
        return loaded[1]
