"""Which hyperparameters made the winner? Each is set back to the reference by itself, the others stay.

The winner of a search differs from the reference in every searched key. Trained over several seeds, paired by seed,
with one key set back at a time, it shows which of the differences it owes its score to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.config import Config, dotted, load_config
from jaxtune.config.metrics import Goal
from jaxtune.config.paths import located
from jaxtune.config.roles import marked, within
from jaxtune.config.section import HostOnly
from jaxtune.errors import UserError
from jaxtune.evaluation.statistics import paired_bootstrap
from jaxtune.experiments import ablation_page
from jaxtune.experiments.output import publish
from jaxtune.experiments.paired import paired_interval
from jaxtune.experiments.run import checked, claim, open_runner
from jaxtune.experiments.trials import ExperimentTrials
from jaxtune.layout import RunFiles
from jaxtune.search.checks import check_space
from jaxtune.search.lora_space import with_space
from jaxtune.search.outcome import TestOutcome
from jaxtune.search.run import preflight_search, run_search
from jaxtune.search.runner import Interrupted
from jaxtune.search.settings import Settings, search_config
from jaxtune.search.space import canonical
from jaxtune.search.trial import Trial
from jaxtune.training.adapter_start import with_adapter
from jaxtune.training.hooks import NOBODY, Hooks
from jaxtune.training.run_directory import RunDirectory, different_keys
from jaxtune.training.template_date import with_date

STUDY = "ablation"

SEED = "train.seed"

MATERIAL = 0.01
"""A change of less than this share of what winner and reference differ by is none to choose a value for."""

# What must be the same in the search that found the winner, beside all that decides training.
_SEARCH = ("search.space", "search.reference", "search.objective")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One configuration, to be trained with every seed.

    Attributes:
      name: ``reference``, ``winner``, or the key that is set back.
      configuration: dotted overrides.
    """

    name: str
    configuration: dict[str, Any]


def check(config: Config) -> dict[str, Any]:
    """Everything that can be checked before training; trains and writes nothing.

    Returns:
      ``trials`` and ``steps``: at most so many, the search included where it is yet to be run. A key in which the
      winner equals the reference needs no trials. Of ``memory`` and ``warnings`` see
      :func:`~jaxtune.experiments.run.checked`.

    Raises:
      UserError: the input is wrong.
    """
    config = with_date(_with_space(config), _given_search(config))
    _check_keys(config)
    seeds, keys = config.study.ablation.seeds, search_config(config).space
    runner = open_runner(config, STUDY)
    steps = runner.total_steps(Trial(0, {}, Path()))
    trials = (2 + len(keys)) * len(seeds)
    planned = {"trials": trials, "steps": trials * steps}
    if (given := _given_search(config)) is not None:
        _read_search(config, given)
        return {**planned, **checked(runner)}
    searched = preflight_search(_search_of(config))
    told = {name: searched[name] for name in ("memory", "warnings")}
    return {**{name: planned[name] + searched[name] for name in planned}, **told}


def run(config: Config, *, command: str, hooks: Hooks = NOBODY) -> dict[str, Any] | None:
    """Runs the search if need be, trains the winner and its ablations, and writes which keys mattered.

    Args:
      config: its ``search`` section gives space, objective and reference.
      command: the command line, for the page.
      hooks: who is told of it, and who may stop it.

    Returns:
      The summary; None if it was stopped before its end.

    Raises:
      UserError: the input is wrong, or the winner diverged with every seed.
    """
    # What is compared with a search is rendered for the search's day.
    config = with_date(_with_space(config), _given_search(config))
    _check_keys(config)
    RunDirectory(config.directory, study=True).check(config)
    if (given := _given_search(config)) is not None:
        found = _read_search(config, given)
    else:
        claim(config)
        found = run_search(_search_of(config), hooks)
        if found is None:
            return None
    variants = make_variants(config, found["best"]["configuration"])
    seeds = config.study.ablation.seeds
    runner = open_runner(config, STUDY, hooks)
    claim(config)
    settings = {"seeds": seeds, "winner": found["best"]["configuration"]}
    planned = len(variants) * len(seeds)
    data = runner.opened.fingerprints
    with ExperimentTrials(config, STUDY, runner, settings=settings, planned=planned, hooks=hooks, data=data) as trials:
        by_variant = {
            variant.name: [trials.add({**variant.configuration, SEED: seed}, variant=variant.name) for seed in seeds]
            for variant in variants
        }
        every = [trial for each in by_variant.values() for trial in each]
        try:
            trials.score([(trial, runner.total_steps(trial)) for trial in every])
            for trial in every:
                if trials.history.trials[trial.id].finished:
                    trials.test(trial)
        except Interrupted:
            return None
        summary = _summarize(config, command, found, variants, trials, by_variant)
    return publish(config, STUDY, summary, ablation_page)


def make_variants(config: Config, winner: Mapping[str, Any]) -> list[Variant]:
    """The reference, the winner, and the winner with each searched key set back in which the two differ.

    Args:
      config: resolved, with a ``search`` section.
      winner: the configuration that a search found best; that of its reference leaves nothing to set back.
    """
    settings, base = Settings.of(config), dotted(config)
    applies = settings.space.applies
    overrides = dict(settings.reference)
    variants = [Variant("reference", overrides), Variant("winner", dict(winner))]
    for key in settings.space.keys:
        if key not in overrides and key not in base:
            continue
        back = overrides.get(key, base.get(key))
        if canonical(winner.get(key, back)) != canonical(back):
            changed = {**winner, key: back}
            searched = settings.space.keys
            kept = {one: value for one, value in changed.items() if one not in searched or applies(one, changed)}
            variants.append(Variant(key, kept))
    return variants if len(variants) > 2 else variants[:1]


def _check_keys(config: Config) -> None:
    """Raises UserError where the space is wrong, or searches the seed that the repetitions vary."""
    space = search_config(config).space
    if SEED in space:
        raise UserError(f"search.space.{SEED}: {STUDY} repeats every trial over study.ablation.seeds; leave it out")
    check_space(config)


def _with_space(config: Config) -> Config:
    """With the rules of its adapter, and the space that its search has or is to have."""
    return with_space(with_adapter(config), _given_search(config) or _search_of(config).directory)


def _given_search(config: Config) -> Path | None:
    """The directory of the search that the experiment is to take; None where it runs one itself."""
    directory = located(config).study.ablation.search
    return None if directory is None else Path(directory)


def _search_of(config: Config) -> Config:
    """The configuration of the search that is run first."""
    return config.model_copy(update={"run_dir": str(RunFiles(config.directory).search_path)})


def _read_search(config: Config, directory: Path) -> dict[str, Any]:
    """The summary of a finished search of the same configuration.

    Raises:
      UserError: there is none, or it was another one; names a key that differs.
    """
    key = "study.ablation.search"
    there = RunDirectory(directory, study=True)
    summary = there.read_summary() if directory.is_dir() else None
    if summary is None or not {"best", "rank_agreement"} <= summary.keys():
        raise UserError(
            f"{key}: {directory} does not hold a finished search (no summary.json of one); run jaxtune search first, "
            "or leave the key out"
        )

    first, second = dotted(load_config(there.config_path)), dotted(config)
    different = [
        name for name in different_keys(first, second) if name in _SEARCH or not within(name, marked(HostOnly))
    ]
    if different:
        name = different[0]
        raise UserError(
            f"{key}: {directory} is a search of another configuration: {name} is {first.get(name)!r} there and "
            f"{second.get(name)!r} here"
        )
    return summary


def _summarize(
    config: Config,
    command: str,
    found: Mapping[str, Any],
    variants: Sequence[Variant],
    trials: ExperimentTrials,
    by_variant: Mapping[str, Sequence[Trial]],
) -> dict[str, Any]:
    """The summary of trials that are all trained and tested."""
    ablation, settings = config.study.ablation, Settings.of(config)
    objective, goal = settings.search.objective, settings.goal
    validation = {name: [_final(trials, trial) for trial in each] for name, each in by_variant.items()}
    tests = {name: [trials.history.trials[trial.id].test for trial in each] for name, each in by_variant.items()}
    test = {name: [math.nan if outcome is None else outcome.score for outcome in each] for name, each in tests.items()}
    tested = any(outcome is not None for each in tests.values() for outcome in each)
    winner = "winner" if len(variants) > 1 else "reference"
    if not np.isfinite(validation[winner]).any():
        raise UserError(f"the winner diverged with every seed of study.ablation.seeds ({ablation.seeds})")

    whole = _difference(config, validation["reference"], validation[winner])["difference"]

    def effect(name: str) -> dict[str, Any]:
        measured = {"validation": _difference(config, validation[name], validation["winner"])}
        if tested:
            measured["test"] = _difference(config, test[name], test["winner"])
            measured["test"]["over_examples"] = _over_examples(config, tests[name], tests["winner"])
        return {**measured, "verdict": _verdict(measured["validation"], whole, goal)}

    reference, best = variants[0].configuration, variants[1].configuration if len(variants) > 1 else {}
    effects = [
        {"key": variant.name, "winner": best[variant.name], "reference": variant.configuration[variant.name],
         **effect(variant.name)}
        for variant in variants[2:]
    ]  # fmt: skip
    effects.sort(key=lambda entry: -goal.signed(_or(entry["validation"]["difference"], goal.signed(math.inf))))
    return {
        "study": STUDY,
        "task": config.name,
        "command": command,
        "objective": {"name": objective, "direction": goal.direction},
        "seeds": ablation.seeds,
        "material": MATERIAL,
        "interval": {"confidence": config.study.confidence, "bootstrap": config.study.bootstrap, "over": "seeds"},
        "search": {
            "trial": found["best"]["trial"],
            "final_score": found["best"]["final_score"],
            "test_score": found["best"]["test_score"],
            "reference": found["baseline"]["final_score"],
            "trials": len(found["trials"]),
            "seed": config.train.seed,
        },
        "effects": effects,
        "whole": {"reference": reference, **effect("reference")} if len(variants) > 1 else None,
        "unchanged": [key for key in settings.space.keys if key not in by_variant],
        "variants": [
            {
                "name": variant.name,
                "configuration": variant.configuration,
                "trials": [trial.id for trial in by_variant[variant.name]],
                "validation": validation[variant.name],
                "test": test[variant.name] if tested else None,
            }
            for variant in variants
        ],
        "machine": trials.machine,
        "budget": {
            **trials.budget,
            "search": found["budget"],
        },
    }


def _final(trials: ExperimentTrials, trial: Trial) -> float:
    """A trial's final score; NaN where it diverged."""
    state = trials.history.trials[trial.id]
    return state.final.score if state.final is not None and state.finished else math.nan


def _difference(config: Config, first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """What setting back does to the score, over seeds."""
    interval, pairs = paired_interval(first, second, config.study.confidence)
    bounds = interval.as_dict()
    lost = int(np.sum(~np.isfinite(first)))
    return {
        "difference": bounds["value"],
        "low": bounds["low"],
        "high": bounds["high"],
        "pairs": pairs,
        "diverged": lost,
    }


def _over_examples(
    config: Config, first: Sequence[TestOutcome | None], second: Sequence[TestOutcome | None]
) -> dict[str, float] | None:
    """The interval over examples of the mean test difference over seeds; None where examples are unknown."""
    pairs = [
        (one, other)
        for one, other in zip(first, second, strict=True)
        if one is not None and other is not None and one.per_example is not None and other.per_example is not None
    ]
    if not pairs:
        return None
    example = pairs[0][0]
    weights = np.ones(len(example.per_example or [])) if example.weights is None else np.asarray(example.weights)
    one, other = (
        np.mean([np.where(weights > 0, np.asarray(outcome.per_example) * weights, 0.0) for outcome in side], axis=0)
        for side in zip(*pairs, strict=True)
    )
    found = paired_bootstrap(
        one, other, weights, strata=example.strata, clusters=example.clusters, samples=config.study.bootstrap,
        confidence=config.study.confidence,
    )  # fmt: skip
    return {"low": found.low, "high": found.high}


def _verdict(measured: Mapping[str, Any], whole: float | None, goal: Goal) -> str:
    """What setting a key back comes to.

    ``mattered`` (worse), ``harmful`` (better), ``unclear`` (the interval holds zero), or ``negligible``: told from
    zero, but less than :data:`MATERIAL` of the difference between reference and winner.
    """
    if measured["diverged"] and not measured["pairs"]:
        return "mattered"
    difference, low, high = (measured[name] for name in ("difference", "low", "high"))
    if low is None or low <= 0 <= high:
        return "unclear"
    if whole is not None and abs(difference) < MATERIAL * abs(whole):
        return "negligible"
    return "mattered" if goal.better(0.0, low) else "harmful"


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
