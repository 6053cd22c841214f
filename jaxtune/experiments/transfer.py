"""Does the best configuration of a cheaper setting stay the best in the full one?

One design of configurations is trained to its end in the full setting and in cheaper ones: on a part of the data, with
fewer steps, with a smaller model. Losses of two settings cannot be compared (another model may even count other
tokens), but their *order* can: it is all that a search needs of a cheap setting.

A setting may also differ in nothing but ``train.seed``. It shows how far the full setting agrees with itself, which no
cheaper one can be expected to exceed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxtune.config import Config, with_overrides
from jaxtune.config.metrics import Goal
from jaxtune.config.roles import marked
from jaxtune.config.section import HostOnly
from jaxtune.errors import UserError
from jaxtune.experiments import transfer_page
from jaxtune.experiments.agreement import TOP, agreement
from jaxtune.experiments.early_score import design
from jaxtune.experiments.output import publish
from jaxtune.experiments.run import check_places, checked, claim
from jaxtune.experiments.trials import ExperimentTrials
from jaxtune.search.checks import check_space, checked_runner
from jaxtune.search.lora_space import with_space
from jaxtune.search.outcome import Outcome
from jaxtune.search.runner import Interrupted
from jaxtune.search.settings import Settings, search_config
from jaxtune.search.trainer_runner import TrainerRunner
from jaxtune.search.trial import Trial
from jaxtune.training.adapter_start import with_adapter
from jaxtune.training.hooks import NOBODY, Hooks
from jaxtune.training.template_date import with_date

STUDY = "transfer"

FULL = "full"
"""The setting that the others are to foretell: the configuration as it is."""


def check(config: Config) -> dict[str, Any]:
    """Everything that can be checked before training; trains and writes nothing.

    Returns:
      ``trials`` and ``steps``, what the experiment would train; of ``memory`` and ``warnings``, in the full setting,
      see :func:`~jaxtune.experiments.run.checked`.

    Raises:
      UserError: the input is wrong.
    """
    configurations = design(config, STUDY)
    settings = _settings(config)
    check_places(config, STUDY)
    steps, told = 0, {}
    for name, changed in settings.items():
        runner = _open(changed, name)
        told = told or checked(runner)  # the first is the full setting
        steps += sum(runner.total_steps(Trial(0, values, Path())) for values in configurations)
    return {"trials": len(configurations) * len(settings), "steps": steps, **told}


def run(config: Config, *, command: str, hooks: Hooks = NOBODY) -> dict[str, Any] | None:
    """Trains the design in every setting, and writes how far their orders agree.

    Args:
      config: its ``search`` section gives space, number of trials, objective and reference; ``study.transfer.settings``
        the cheaper settings.
      command: the command line, for the page.
      hooks: who is told of it, and who may stop it.

    Returns:
      The summary; None if it was stopped before its end.

    Raises:
      UserError: the input is wrong, or fewer than two trials of the full setting stayed finite.
    """
    config = with_date(with_space(with_adapter(config)))
    configurations = design(config, STUDY)
    settings = _settings(config)
    check_places(config, STUDY)
    # Every setting is opened before the first trial: what is wrong with the last one is known at once.
    runners = {name: _open(changed, name, hooks) for name, changed in settings.items()}
    claim(config)
    with ExperimentTrials(
        config, STUDY, runners[FULL], settings={"settings": config.study.transfer.settings},
        planned=len(configurations) * len(settings), hooks=hooks, data=_fingerprints(runners),
    ) as trials:  # fmt: skip
        each = {name: [trials.add(values, setting=name) for values in configurations] for name in settings}
        try:
            for name, runner in runners.items():
                trials.score([(trial, runner.total_steps(trial)) for trial in each[name]], runner)
        except Interrupted:
            return None
        summary = _summarize(config, command, trials, runners, each)
    return publish(config, STUDY, summary, transfer_page)


def _settings(config: Config) -> dict[str, Config]:
    """The configuration of every setting, the full one first.

    Raises:
      UserError: there is no cheaper setting, a key does not exist, or overriding it would do nothing.
    """
    cheaper, space = config.study.transfer.settings, search_config(config).space
    if not cheaper:
        raise UserError("study.transfer.settings: name at least one cheaper setting, such as short: {train.steps: 40}")
    settings = {FULL: config}
    for name, overrides in cheaper.items():
        where = f"study.transfer.settings.{name}"
        if name == FULL:
            raise UserError(f"{where}: this is the name of the configuration as it is; choose another")
        if not overrides:
            raise UserError(f"{where}: overrides nothing; give at least one key, such as train.steps")
        for key in overrides:
            # What is the study's own makes no setting cheaper.
            if key.split(".")[0] in marked(HostOnly):
                raise UserError(f"{where}: {key!r} is the same for all settings of a study")
            if searched := next((other for other in space if _overlap(key, other)), None):
                raise UserError(f"{where}: {key!r} would be overridden by the searched key {searched!r}")
        settings[name] = with_overrides(config, overrides, origin=f"{where}: ")
        check_space(settings[name])
    return settings


def _overlap(one: str, other: str) -> bool:
    """Whether two dotted keys are one, or one lies inside the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _open(config: Config, name: str, hooks: Hooks = NOBODY) -> TrainerRunner:
    """Opens model and data of a setting and tries the space against them."""
    try:
        return checked_runner(config, hooks=hooks.titled(name))
    except UserError as error:
        raise UserError(str(error) if name == FULL else f"study.transfer.settings.{name}: {error}") from error


def _fingerprints(runners: Mapping[str, TrainerRunner]) -> dict[str, dict[str, Any]]:
    """The fingerprints of the splits of every setting, which may override what makes them."""
    return {
        key if name == FULL else f"study.transfer.settings.{name}: {key}": value
        for name, runner in runners.items()
        for key, value in runner.opened.fingerprints.items()
    }


def _summarize(
    config: Config,
    command: str,
    trials: ExperimentTrials,
    runners: Mapping[str, TrainerRunner],
    each: Mapping[str, Sequence[Trial]],
) -> dict[str, Any]:
    """The summary of trials that are all scored in every setting."""
    settings, study = Settings.of(config), config.study
    search, goal = settings.search, settings.goal
    outcomes = {name: [_outcome(trials, runners[name], trial) for trial in each[name]] for name in runners}
    scores = {
        name: np.array([math.inf if o.failed else goal.signed(o.score) for o in row], np.float64)
        for name, row in outcomes.items()
    }
    full = scores[FULL]
    if np.isfinite(full).sum() < 2:
        raise UserError(
            f"{np.isinf(full).sum()} of {len(full)} trials diverged in the full setting, so there is no order to "
            "compare; lower the upper bound of the learning rate in search.space"
        )
    cost = {name: _cost(runner, each[name], outcomes[name]) for name, runner in runners.items()}
    return {
        "study": STUDY,
        "task": config.name,
        "command": command,
        "objective": {"name": search.objective, "direction": goal.direction},
        "top_k": TOP,
        "promote": search.promote,
        "interval": {"confidence": study.confidence, "bootstrap": study.bootstrap, "over": "trials"},
        "full": {
            "cost": cost[FULL],
            "best": int(np.argmin(full)),
            "best_score": goal.signed(float(full.min())),
            "standard_deviation": float(full[np.isfinite(full)].std(ddof=1)),
            "diverged": int(np.isinf(full).sum()),
        },
        "settings": {
            name: {
                "overrides": overrides,
                **agreement(
                    scores[name], full, promote=search.promote, samples=study.bootstrap, confidence=study.confidence
                ),
                **_choice(scores[name], full, goal),
                "diverged": int(np.isinf(scores[name]).sum()),
                "cost": cost[name],
                "cost_saved": _saved(cost, name, len(full)),
            }
            for name, overrides in study.transfer.settings.items()
        },
        "trials": [
            {
                "id": number,
                "configuration": each[FULL][number].configuration,
                "scores": {name: None if row[number].failed else row[number].score for name, row in outcomes.items()},
                "standard_error": outcomes[FULL][number].standard_error,
            }
            for number in range(len(full))
        ],
        "machine": trials.machine,
        "budget": trials.budget,
    }


def _outcome(trials: ExperimentTrials, runner: TrainerRunner, trial: Trial) -> Outcome:
    outcome = trials.outcome(trial, runner.total_steps(trial))
    assert outcome is not None
    return outcome


def _choice(cheap: Float[np.ndarray, " n"], full: Float[np.ndarray, " n"], goal: Goal) -> dict[str, Any]:
    """What choosing in a cheaper setting comes to: the trial, and where it stands in the full one.

    Of equal scores the earlier trial is chosen. Ranks count from 1; a rank is one more than the trials that are better.
    """
    chosen, best = int(np.argmin(cheap)), int(np.argmin(full))
    return {
        "chosen": chosen,
        "rank_in_full": int((full < full[chosen]).sum()) + 1,
        "score_in_full": goal.signed(float(full[chosen])) if np.isfinite(full[chosen]) else None,
        "rank_of_full_best": int((cheap < cheap[best]).sum()) + 1,
    }


def _cost(runner: TrainerRunner, trials: Sequence[Trial], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What training a setting's trials takes: steps, model FLOPs, and the seconds that were measured."""
    flops = 0.0
    for trial in trials:
        flops += runner.costs(trial.configuration)["flops"]
    return {
        "steps": sum(runner.total_steps(trial) for trial in trials),
        "flops": flops,
        "seconds": sum(outcome.seconds for outcome in outcomes),
    }


def _saved(cost: Mapping[str, Mapping[str, Any]], name: str, trials: int) -> float:
    """Share of the model FLOPs that is saved where all trials are trained in a setting and one of them in full."""
    whole = cost[FULL]["flops"]
    return 1 - (cost[name]["flops"] + whole / trials) / whole
