"""Do early scores foretell final ones? Every trial of a space-filling design is trained to its end to find out.

The paper reports that of the five best configurations after 20 % of the steps four are among the five best at the end
(arXiv:2407.13906). A search cannot check that: it finishes the best ones alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxtune.config import Config
from jaxtune.config.metrics import METRICS
from jaxtune.errors import UserError
from jaxtune.experiments import early_score_page
from jaxtune.experiments.agreement import TOP, agreement
from jaxtune.experiments.design_size import known_alone, overlap_by_size
from jaxtune.experiments.output import publish
from jaxtune.experiments.run import checked, claim, open_runner
from jaxtune.experiments.trials import ExperimentTrials
from jaxtune.search.lora_space import with_space
from jaxtune.search.milestones import distinct_steps
from jaxtune.search.outcome import Outcome
from jaxtune.search.runner import Interrupted, TrialRunner
from jaxtune.search.settings import Settings
from jaxtune.search.space import Point
from jaxtune.search.surrogate import Surrogate
from jaxtune.search.trial import Trial
from jaxtune.training.adapter_start import with_adapter
from jaxtune.training.hooks import NOBODY, Hooks
from jaxtune.training.template_date import with_date

STUDY = "early-score"

PAPER = {"fraction": "0.2", "top_5_overlap": 4, "of": TOP, "source": "arXiv:2407.13906"}


def check(config: Config) -> dict[str, Any]:
    """Everything that can be checked before training; trains and writes nothing.

    Returns:
      ``trials`` and ``steps``, what the experiment would train; of a step's ``memory`` and of ``warnings`` see
      :func:`~jaxtune.experiments.run.checked`.

    Raises:
      UserError: the input is wrong.
    """
    config = with_date(with_space(with_adapter(config)))
    configurations = _checked_design(config)
    runner = open_runner(config, STUDY)
    ladders = _ladders(config, runner, configurations)
    return {"trials": len(ladders), "steps": sum(ladder[-1] for ladder in ladders), **checked(runner)}


def run(config: Config, *, command: str, hooks: Hooks = NOBODY) -> dict[str, Any] | None:
    """Trains all trials of the design to their end, and writes what their early scores were worth.

    Args:
      config: its ``search`` section gives space, number of trials, objective and reference.
      command: the command line, for the page.
      hooks: who is told of it, and who may stop it.

    Returns:
      The summary; None if it was stopped before its end.

    Raises:
      UserError: the input is wrong, or fewer than two trials stayed finite.
    """
    config = with_date(with_space(with_adapter(config)))
    configurations = _checked_design(config)
    runner = open_runner(config, STUDY, hooks)
    settings: dict[str, Any] = {"fractions": config.study.early_score.fractions}
    if config.search is not None and config.search.metrics:  # what journals of earlier versions lack
        settings["metrics"] = config.search.metrics
    planned = len(configurations)
    ladders = _ladders(config, runner, configurations)
    claim(config)
    data = runner.opened.fingerprints
    with ExperimentTrials(config, STUDY, runner, settings=settings, planned=planned, hooks=hooks, data=data) as trials:
        each = [trials.add(values) for values in configurations]
        try:
            # Step by step and not trial by trial: a population trains many at a time.
            for place in range(len(settings["fractions"])):
                trials.score(zip(each, (ladder[place] for ladder in ladders), strict=True))
            if config.study.early_score.test:
                for trial in (None, *each):
                    if trial is None or trials.history.trials[trial.id].finished:
                        trials.test(trial)
        except Interrupted:
            return None
        summary = _summarize(config, command, trials, each, ladders)
    return publish(config, STUDY, summary, early_score_page)


def design(config: Config, study: str = STUDY) -> list[dict[str, Any]]:
    """The configurations of all trials: the reference, then points that fill the space evenly.

    Args:
      config: its ``search`` section gives space, number of trials and reference.
      study: the experiment, for messages.

    Raises:
      UserError: there is no ``search`` section, its space is empty or too small, or there are too few trials to
        compare the leading ones.
    """
    settings = Settings.of(config)
    search, space = settings.search, settings.space
    if search.trials <= TOP:
        raise UserError(
            f"search.trials: {search.trials} is too few, as {study} compares the {TOP} best of them; choose "
            f"{TOP + 1} or more"
        )
    if space.size is not None and search.trials - 1 > space.size:
        raise UserError(
            f"search.trials: {search.trials}, but search.space holds only {space.size} configurations beside the "
            "reference; lower it, or widen the space"
        )
    # What early scores foretell is asked of all of the space, not of where the best ones are believed to be.
    surrogate = Surrogate(space.without_priors(), seed=search.seed, initial=search.trials)
    points: list[Point] = []
    for number, point in enumerate(surrogate.design(), start=1):
        if point in points:
            # Of a space with few values the design may repeat a point; the surrogate then takes a free one.
            point = space.point(surrogate.propose(number, [], points).configuration)
            assert point is not None
        points.append(point)
    return [dict(settings.reference), *map(space.configuration, points)]


def _checked_design(config: Config) -> list[dict[str, Any]]:
    """The design, where the splits that it is measured on are there.

    Raises:
      UserError: as :func:`design`, or trials are to be tested without a test split.
    """
    configurations = design(config)
    if config.study.early_score.test and config.data.test is None:
        raise UserError("study.early_score.test: there is no data.test; name one, or leave the key out")
    return configurations


def _ladders(config: Config, runner: TrialRunner, configurations: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The steps at which each trial is scored, one for each fraction.

    Raises:
      UserError: two fractions fall on one step, or the first before any.
    """
    totals = [runner.total_steps(Trial(number, values, Path())) for number, values in enumerate(configurations)]
    named = [("study.early_score.fractions", fraction) for fraction in config.study.early_score.fractions]
    steps = {total: distinct_steps(named, total) for total in dict.fromkeys(totals)}
    return [steps[total] for total in totals]


def fraction_name(fraction: float) -> str:
    """How a fraction stands in the summary: ``"0.2"``, ``"1"``."""
    return f"{fraction:g}"


def _summarize(
    config: Config, command: str, trials: ExperimentTrials, each: Sequence[Trial], ladders: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The summary of trials that are all scored at every step."""
    settings, fractions = Settings.of(config), config.study.early_score.fractions
    search, goal = settings.search, settings.goal
    names = [fraction_name(fraction) for fraction in fractions]
    outcomes = [[trials.outcome(trial, step) for step in ladder] for trial, ladder in zip(each, ladders, strict=True)]
    scores = np.array(
        [[math.inf if o is None or o.failed else goal.signed(o.score) for o in row] for row in outcomes], np.float64
    )
    final = scores[:, -1]
    if np.isfinite(final).sum() < 2:
        raise UserError(
            f"{np.isinf(final).sum()} of {len(each)} trials diverged, so there is no order to compare; lower the upper "
            "bound of the learning rate in search.space"
        )
    total = sum(ladder[-1] for ladder in ladders)
    by_fraction = {
        name: {
            **figures,
            "chosen": each[int(np.argmin(scores[:, place]))].id,
            "steps_saved": _saved(scores[:, place], ladders, place, 1),
            "steps_saved_promoted": _saved(scores[:, place], ladders, place, search.promote),
            "diverged": int(np.isinf(scores[:, place]).sum()),
        }
        for place, (name, figures) in enumerate(_agreements(config, search.promote, names, scores).items())
    }
    by_metric = {}
    for metric in search.metrics:
        measured = _measured(metric, outcomes)
        finite = np.isfinite(measured)
        zeros = ((measured == 0) & finite).sum(axis=0) / np.maximum(finite.sum(axis=0), 1)
        figures = _agreements(config, search.promote, names, measured)
        by_metric[metric] = {
            "direction": METRICS[metric].direction,
            "by_fraction": {
                name: {**figures[name], "zeros": float(share)} for name, share in zip(names, zeros, strict=True)
            },
            "by_design_size": _by_design_size(names, measured),
        }
    return {
        "study": STUDY,
        "task": config.name,
        "command": command,
        "objective": {"name": search.objective, "direction": goal.direction},
        "fractions": fractions,
        "top_k": TOP,
        "promote": search.promote,
        "interval": {
            "confidence": config.study.confidence,
            "bootstrap": config.study.bootstrap,
            "over": "trials",
            "regret": "calibrated",
        },
        "by_fraction": by_fraction,
        "by_design_size": _by_design_size(names, scores),
        "rate_alone": _rate_alone(each, final),
        **({"by_metric": by_metric} if by_metric else {}),
        "final": _spread(goal.sign * final),
        "trials": [
            {
                "id": trial.id,
                "configuration": trial.configuration,
                "steps": list(ladder),
                "scores": {
                    name: None if o is None or o.failed else o.score for name, o in zip(names, row, strict=True)
                },
                "final_score": None if row[-1] is None or row[-1].failed else row[-1].score,
                **_further(search.metrics, names, row),
                **_tested(trials, trial),
                "standard_error": None if row[-1] is None else row[-1].standard_error,
                "status": trials.history.trials[trial.id].status,
            }
            for trial, ladder, row in zip(each, ladders, outcomes, strict=True)
        ],
        "paper": PAPER,
        "machine": trials.machine,
        "budget": {
            **trials.budget,
            "steps": total,
        },
    }


def _agreements(
    config: Config, promote: int, names: Sequence[str], scores: Float[np.ndarray, "trials fractions"]
) -> dict[str, Mapping[str, Any]]:
    """The figures of each fraction, given signed scores whose last column is that of the end."""
    return {
        name: agreement(
            scores[:, place],
            scores[:, -1],
            promote=promote,
            samples=config.study.bootstrap,
            confidence=config.study.confidence,
        )
        for place, name in enumerate(names)
    }


def _by_design_size(
    names: Sequence[str], scores: Float[np.ndarray, "trials fractions"]
) -> Sequence[Mapping[str, Any]] | None:
    """The overlap at the paper's fraction in smaller designs; None where trials were not scored there."""
    if PAPER["fraction"] not in names:
        return None
    early = scores[:, names.index(PAPER["fraction"])]
    return overlap_by_size(early, scores[:, -1], claimed=PAPER["top_5_overlap"])


def _rate_alone(each: Sequence[Trial], final: Float[np.ndarray, " trials"]) -> Mapping[str, float | int | None] | None:
    """What the learning rate alone foretells; None where it is not searched."""
    rates = [trial.configuration.get("optimizer.learning_rate") for trial in each]
    return None if None in rates else known_alone([float(rate) for rate in rates if rate is not None], final)


def _measured(metric: str, outcomes: Sequence[Sequence[Outcome | None]]) -> Float[np.ndarray, "trials fractions"]:
    """A metric of all trials and fractions, lower is better, infinite where a trial had diverged."""
    goal, logged = METRICS[metric].goal, METRICS[metric].logged or metric
    return np.array(
        [[math.inf if o is None or o.failed else goal.signed(o.metrics[logged]) for o in row] for row in outcomes],
        np.float64,
    )


def _further(metrics: Sequence[str], names: Sequence[str], row: Sequence[Outcome | None]) -> dict[str, Any]:
    """What was measured of a trial beside its scores, by metric and fraction; nothing where nothing was asked for."""
    if not metrics:
        return {}
    measured = {
        metric: {
            name: None if outcome is None or outcome.failed else outcome.metrics[METRICS[metric].logged or metric]
            for name, outcome in zip(names, row, strict=True)
        }
        for metric in metrics
    }
    return {"metrics": measured}


def _tested(trials: ExperimentTrials, trial: Trial) -> dict[str, Any]:
    """What a trial came to on the test split, if it was measured there."""
    outcome = trials.history.trials[trial.id].test
    return {} if outcome is None else {"test_score": outcome.score, "test_metrics": outcome.metrics}


def _saved(early: Float[np.ndarray, " n"], ladders: Sequence[Sequence[int]], place: int, finished: int) -> float:
    """Share of all steps that is saved where all trials stop at a fraction and the best ones alone go on."""
    best = np.argsort(early, kind="stable")[:finished]
    spent = sum(ladder[place] for ladder in ladders) + sum(ladders[i][-1] - ladders[i][place] for i in best)
    return 1 - spent / sum(ladder[-1] for ladder in ladders)


def _spread(final: Float[np.ndarray, " n"]) -> Mapping[str, float | int]:
    """The final scores that a regret is to be seen against."""
    finite = final[np.isfinite(final)]
    return {
        "lowest": float(finite.min()),
        "median": float(np.median(finite)),
        "highest": float(finite.max()),
        "standard_deviation": float(finite.std(ddof=1)),
        "diverged": int(len(final) - len(finite)),
    }
