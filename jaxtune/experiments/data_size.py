"""How much data is enough? A model trained on more and more documents, and the curve through its scores.

The paper reports that 200 samples lift the accuracy from 70 % to 88 % and that gains end near 6,500 samples
(arXiv:2407.13906).

Every size trains for the same number of steps at most, ``train.steps`` on one schedule, so that sizes differ in their
documents alone: a small set is repeated, of a large one perhaps only a part is seen. A run keeps the model of its best
evaluation on ``data.validation`` (and ends early by ``train.patience``), so a size does not count as bad because it was
trained for too long. That model is measured on ``data.test``, which nothing was chosen by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.config import Config
from jaxtune.config.metrics import METRICS, VALIDATION_LOSS, check_measured
from jaxtune.errors import UserError
from jaxtune.evaluation.evaluator import documents
from jaxtune.experiments import data_size_page
from jaxtune.experiments.learning_curve import Curve, Measured, fit_curve, group_curves, saturation
from jaxtune.experiments.output import publish
from jaxtune.experiments.power_law import FEWEST_SIZES
from jaxtune.experiments.run import check_places, claim
from jaxtune.experiments.sampling import chosen_sizes, example_groups, group_field
from jaxtune.experiments.saturation import GAP_RULE, gaps_to_largest
from jaxtune.experiments.size_runner import SEED, SizeRunner
from jaxtune.experiments.trials import ExperimentTrials
from jaxtune.search.header import read_data
from jaxtune.search.outcome import TestOutcome
from jaxtune.search.runner import Interrupted
from jaxtune.search.trial import Trial
from jaxtune.training.adapter_start import with_adapter
from jaxtune.training.hooks import NOBODY, Hooks
from jaxtune.training.idle_keys import idle_keys
from jaxtune.training.memory import check_base, checked_memory
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.template_date import with_date

STUDY = "data-size"

PAPER = {
    "source": "arXiv:2407.13906",
    "metric": "accuracy",
    "untuned": 0.70,
    "samples": 200,
    "at_samples": 0.88,
    "saturation": 6500,
}


def check(config: Config) -> dict[str, Any]:
    """Everything that can be checked before training; trains and writes nothing.

    Returns:
      ``trials`` and ``steps``, the most that the experiment would train; of a step's ``memory`` and of ``warnings`` see
      :func:`~jaxtune.experiments.run.checked`.

    Raises:
      UserError: the input is wrong.
    """
    runner, sizes = _open(_without_search(config))
    seeds = config.study.data_size.seeds
    each = [Trial(0, {runner.unit: size, SEED: seed}, Path()) for size in sizes if size > 0 for seed in seeds]
    opened = runner.opened
    trainer = opened.trainer()
    told = {"memory": checked_memory(opened, trainer), "warnings": idle_keys(opened.config, trainer.plan)}
    return {"trials": len(each), "steps": sum(map(runner.total_steps, each)), **told}


def run(config: Config, *, command: str, hooks: Hooks = NOBODY) -> dict[str, Any] | None:
    """Trains and measures every size with every seed, and writes the learning curve.

    Args:
      config: its ``study.data_size`` section says which sizes, seeds and sampling. A ``search`` section is not used.
      command: the command line, for the page.
      hooks: who is told of it, and who may stop it.

    Returns:
      The summary; None if it was stopped before its end.

    Raises:
      UserError: the input is wrong, or a run diverged before its first evaluation.
    """
    config = with_date(with_adapter(_without_search(config)))
    settings = config.study.data_size
    runner, sizes = _open(config, hooks)
    decisive = {"sizes": sizes, **settings.model_dump(include={"seeds", "sampling", "group_by", "score"})}
    if settings.unit != "documents":  # what journals of earlier versions count
        decisive["unit"] = settings.unit
    trained = [(size, seed) for seed in settings.seeds for size in sizes if size > 0]
    claim(config)
    with ExperimentTrials(
        config,
        STUDY,
        runner,
        settings=decisive,
        planned=len(trained),
        objective=settings.score,
        hooks=hooks,
        data=runner.opened.fingerprints,
    ) as trials:
        try:
            tested = _measure(trials, runner, trained)
        except Interrupted:
            return None
        summary = _summarize(config, command, trials, runner, sizes, tested)
    return publish(config, STUDY, summary, data_size_page)


def _without_search(config: Config) -> Config:
    """The study does not search: another ``search`` section makes no other study."""
    return config.model_copy(update={"search": None})


def _open(config: Config, hooks: Hooks = NOBODY) -> tuple[SizeRunner, list[int]]:
    """Checks everything that can be checked before training, opens model and data: the runner, and the sizes."""
    settings, train = config.study.data_size, config.train
    for part, use in (("validation", "chooses each run's best model"), ("test", "measures it")):
        if getattr(config.data, part) is None:
            raise UserError(f"data.{part}: {STUDY} {use} on this split; it is required")
    by_epochs = settings.unit == "examples" and train.epochs is not None and train.evaluate_every is None
    if not by_epochs and (
        train.evaluate_every is None or (train.steps is not None and train.evaluate_every > train.steps)
    ):
        raise UserError(
            f"train.evaluate_every: {STUDY} keeps the model of each run's best evaluation, so it needs several; it is "
            f"{train.evaluate_every}, for train.steps {train.steps}"
        )
    check_measured(settings.score, config.evaluation.task, "study.data_size.score")
    if settings.sampling != "random" and group_field(config.data.explode, settings.group_by) is None:
        raise UserError(
            f"study.data_size.sampling: {settings.sampling} needs groups; set study.data_size.group_by to a field of "
            "the rows, or data.explode"
        )
    check_places(config, STUDY)
    check_base(config)
    opened = OpenedConfig(config)
    opened.data_changed = read_data(Path(config.directory)).training_changed(opened.fingerprints)
    runner = SizeRunner(opened, hooks)
    total = len(runner.documents)
    sizes = chosen_sizes(settings.sizes, total, settings.points, settings.smallest, settings.unit)
    if len(sizes) < FEWEST_SIZES:
        raise UserError(
            f"study.data_size: {len(sizes)} different sizes ({', '.join(map(str, sizes))}) are too few for a curve "
            f"with {FEWEST_SIZES} parameters; data.train has {total} {settings.unit}"
        )
    return runner, sizes


def _measure(
    trials: ExperimentTrials, runner: SizeRunner, trained: Sequence[tuple[int, int]]
) -> dict[tuple[int, int] | None, tuple[Trial | None, TestOutcome]]:
    """Trains and tests what the journal does not have yet: the untuned model (None), then each size and seed.

    Raises:
      Interrupted: it was told to stop.
      UserError: a run diverged before its first evaluation.
    """
    untuned = trials.test(None)
    assert untuned is not None
    tested: dict[tuple[int, int] | None, tuple[Trial | None, TestOutcome]] = {None: (None, untuned)}
    for size, seed in trained:
        trial = trials.add({runner.unit: size, SEED: seed})
        steps = runner.total_steps(trial)
        trials.score([(trial, steps)])
        outcome = trials.outcome(trial, steps)
        if outcome is None or outcome.failed:
            raise UserError(
                f"{size} {runner.unit} with seed {seed} diverged before the first evaluation (trial {trial.id}); lower "
                "optimizer.learning_rate or train.evaluate_every"
            )
        result = trials.test(trial)
        assert result is not None
        tested[size, seed] = trial, result
    return tested


def _measured(
    config: Config,
    runner: SizeRunner,
    sizes: Sequence[int],
    tested: Mapping[tuple[int, int] | None, tuple[Trial | None, TestOutcome]],
) -> Measured:
    """All test outcomes by size, seed and test example."""
    settings = config.study.data_size
    metric = METRICS[settings.score]
    first = tested[None][1]
    assert first.per_example is not None
    weights = np.ones(len(first.per_example)) if first.weights is None else np.asarray(first.weights, np.float64)

    def numerators(size: int, seed: int) -> np.ndarray:
        outcome = tested[(size, seed) if size else None][1]
        values = np.asarray(outcome.per_example, np.float64)
        # What weighs nothing has no score, and 0 × NaN is no number.
        return np.where(weights > 0, values, 0.0) * weights

    return Measured.of(
        sizes,
        np.stack([[numerators(size, seed) for seed in settings.seeds] for size in sizes]),
        weights,
        strata=first.strata,
        clusters=documents(runner.opened.examples["test"], config.data.explode),
        direction=metric.direction,
        limit=metric.best,
    )


def _summarize(
    config: Config,
    command: str,
    trials: ExperimentTrials,
    runner: SizeRunner,
    sizes: Sequence[int],
    tested: Mapping[tuple[int, int] | None, tuple[Trial | None, TestOutcome]],
) -> dict[str, Any]:
    """The summary of sizes that are all measured."""
    settings, study = config.study.data_size, config.study
    measured = _measured(config, runner, sizes, tested)
    curve = fit_curve(measured, samples=study.bootstrap, confidence=study.confidence)
    tolerances = curve.errors if settings.epsilon is None else np.full(len(sizes), settings.epsilon)
    gaps = gaps_to_largest(measured, samples=study.bootstrap)
    ends = saturation(sizes, curve.means, tolerances, curve.law.ceiling, measured.direction)
    if settings.saturation == "gap":
        ends = next((gap.size for gap in gaps if gap.is_small), None)
    largest = sizes[-1]
    field = group_field(config.data.explode, settings.group_by)
    groups = example_groups(runner.opened.examples["test"], field, key="data.test")
    by_group = {} if field is None else group_curves(measured, groups, samples=min(study.bootstrap, 500))
    held = dict(zip(runner.documents.names, runner.documents.present.sum(axis=0).tolist(), strict=True))
    return {
        "study": STUDY,
        "task": config.name,
        "command": command,
        "objective": {"name": settings.score, "direction": METRICS[settings.score].direction},
        "split": "test",
        "unit": settings.unit,
        "sampling": settings.sampling,
        "group_by": field,
        "training": {
            "steps": runner.total_steps(Trial(0, {}, Path())),
            **({"epochs": config.train.epochs} if settings.unit == "examples" else {}),
            **config.train.model_dump(include={"evaluate_every", "patience", "batch_size", "sequence_length"}),
        },
        "interval": {
            "confidence": study.confidence,
            "bootstrap": study.bootstrap,
            "over": "seeds and test documents",
        },
        "sizes": list(sizes),
        "scores": [
            _size_entry(trials, runner, tested, size, settings.seeds, mean, error)
            for size, mean, error in zip(sizes, curve.means.tolist(), curve.errors.tolist(), strict=True)
        ],
        "curve": {
            "formula": f"score = ceiling ± coefficient ({settings.unit} + offset)^-exponent, + for a loss, - for a "
            "score that is maximised",
            "coefficient": curve.law.coefficient,
            "exponent": curve.law.exponent,
            "offset": curve.law.offset,
            "gain": curve.law.gain,
            "residual": curve.law.residual,
            **_drawing(curve),
        },
        "ceiling": curve.ceiling,
        "saturation": ends,
        "gaps": [dataclasses.asdict(gap) for gap in gaps],
        "epsilon": settings.epsilon,
        "rule": GAP_RULE if settings.saturation == "gap" else _rule(settings.epsilon),
        "next_doubling": {"documents": 2 * largest, "improvement": curve.improvement(largest, 2 * largest)},
        "by_attribute": {name: {"train_documents": held.get(name, 0), **entry} for name, entry in by_group.items()},
        "paper": {**PAPER, "ours": _beside_the_paper(curve, sizes, PAPER["samples"])},
        "machine": trials.machine,
        "budget": trials.budget,
    }


def _rule(epsilon: float | None) -> str:
    near = "one standard error of that mean (over seeds and test documents)" if epsilon is None else f"{epsilon:g}"
    return f"the smallest size whose mean score is no further than {near} behind the fitted ceiling"


def _size_entry(
    trials: ExperimentTrials,
    runner: SizeRunner,
    tested: Mapping[tuple[int, int] | None, tuple[Trial | None, TestOutcome]],
    size: int,
    seeds: Sequence[int],
    mean: float,
    error: float,
) -> dict[str, Any]:
    """What was measured at one size: the mean, its standard error, and each seed."""
    if size == 0:
        outcome = tested[None][1]
        return {
            "size": 0,
            "examples": 0,
            "mean": mean,
            "standard_error": error,
            "seed_standard_deviation": None,
            "seeds": [{"seed": None, "score": outcome.score, "metrics": outcome.metrics}],
        }
    each = []
    for seed in seeds:
        trial, result = tested[size, seed]
        assert trial is not None
        outcome = trials.outcome(trial, runner.total_steps(trial))
        assert outcome is not None
        each.append(
            {
                "seed": seed,
                "score": result.score,
                "metrics": result.metrics,
                VALIDATION_LOSS: outcome.score,
                "best_step": int(outcome.metrics["best_step"]),
                "steps_run": outcome.steps_run,
                "passes": outcome.metrics["passes"],
            }
        )
    scores = np.array([entry["score"] for entry in each])
    return {
        "size": size,
        "examples": round(np.mean([len(runner.places(size, seed)) for seed in seeds])),
        "mean": mean,
        "standard_error": error,
        "seed_standard_deviation": float(scores.std(ddof=1)),
        "seeds": each,
    }


def _drawing(curve: Curve) -> dict[str, list[float]]:
    """The curve and its band at sizes close enough to draw it, up to the next doubling."""
    sizes = curve.sizes
    grid = [0.0, *np.geomspace(max(sizes[1] / 2, 1), 2 * sizes[-1], 60).tolist()]
    low, high = curve.band(grid)
    return {"documents": grid, "values": curve.law(grid).tolist(), "low": low.tolist(), "high": high.tolist()}


def _beside_the_paper(curve: Curve, sizes: Sequence[int], samples: int) -> dict[str, Any]:
    """Our score at the paper's number of samples: measured where that is a size, else read off the curve."""
    untuned = float(curve.means[0]) if sizes[0] == 0 else float(curve.law([0])[0])
    known = samples in sizes
    at = float(curve.means[sizes.index(samples)] if known else curve.law([samples])[0])
    last = float(curve.means[-1])
    share = (untuned - at) / (untuned - last) if untuned != last else None
    return {
        "untuned": untuned,
        "at_samples": at,
        "basis": "measured" if known else "curve" if samples <= sizes[-1] else "extrapolated",
        "share_of_gain": share,
    }
