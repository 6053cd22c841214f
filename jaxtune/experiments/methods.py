"""Which update method is best, each at a rate of its own?

The best rates of methods differ by orders of magnitude, and scores differ more between rates than between methods: at
one rate for all, one would rank the rate. So for each method a rate is searched first, on runs of ``rate_steps`` that
are compared on ``data.validation``; with the best one it trains over several seeds, and these runs are measured on
``data.test``, which nothing was chosen by. Data, batches and steps are the same for all methods.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtune.config import Config, dotted, with_overrides
from jaxtune.config.metrics import METRICS, check_measured
from jaxtune.config.search_section import DimensionConfig, SearchConfig
from jaxtune.errors import UserError, nearest
from jaxtune.experiments import methods_page
from jaxtune.experiments.method_scores import compared_scores
from jaxtune.experiments.output import publish
from jaxtune.experiments.rates import best_rate, first_rates, next_rate, on_end
from jaxtune.experiments.run import checked, claim, open_runner
from jaxtune.experiments.trials import ExperimentTrials
from jaxtune.models import read_config
from jaxtune.models.loading import quantized_config
from jaxtune.search.directory import train_command
from jaxtune.search.runner import Interrupted
from jaxtune.search.settings import Settings, search_config
from jaxtune.search.trainer_runner import TrainerRunner
from jaxtune.search.trial import Trial
from jaxtune.training.hooks import NOBODY, Hooks
from jaxtune.training.loadable import loadable_bytes
from jaxtune.training.model_directory import model_directory
from jaxtune.training.template_date import with_date
from jaxtune.updates import UpdatePlan, treatments

STUDY = "methods"

METHOD, RATE, SEED, STEPS = "update.0.method", "optimizer.learning_rate", "train.seed", "train.steps"
_MAY_DIFFER = ("update", "optimizer")
# Of a search section the experiment keeps these; the space is its own.
_KEPT = ("objective", "population", "seed")
# The space is for reports, and draws nothing: about as far as rates go.
_REACH = 1e3


@dataclasses.dataclass(frozen=True)
class Compared:
    """One of the methods.

    Attributes:
      name: as the configuration calls it.
      overrides: dotted, of that configuration; the rate is not among them.
      middle: of its rates.
    """

    name: str
    overrides: dict[str, Any]
    middle: float

    @property
    def by_name(self) -> bool:
        """Whether it differs in the method of the first rule alone."""
        return self.overrides.keys() == {METHOD}


def check(config: Config) -> dict[str, Any]:
    """Everything that can be checked before training; trains and writes nothing.

    Returns:
      ``trials`` and ``steps``, without the further rates of methods whose best one is an end; of ``memory`` and
      ``warnings`` see :func:`~jaxtune.experiments.run.checked`.

    Raises:
      UserError: the input is wrong.
    """
    config, methods = _prepared(with_date(config))
    runner, section = open_runner(config, STUDY), config.study.methods
    for method in methods:
        runner.trainer(runner.configuration(method.overrides))
    short, whole = (
        runner.total_steps(Trial(0, overrides, Path())) for overrides in (_shortened(config), dict[str, Any]())
    )
    rates, finals = len(methods) * section.rates, len(methods) * len(section.seeds)
    return {"trials": rates + finals, "steps": rates * short + finals * whole, **checked(runner)}


def run(config: Config, *, command: str, hooks: Hooks = NOBODY) -> dict[str, Any] | None:
    """Searches the rate of each method, trains each with its best over the seeds, and writes how they compare.

    Args:
      config: its ``study.methods`` section names the methods. Of a ``search`` section objective and population count.
      command: the command line, for the page.
      hooks: who is told of it, and who may stop it.

    Returns:
      The summary; None if it was stopped before its end.

    Raises:
      UserError: the input is wrong, or fewer than two methods stayed finite.
    """
    config, methods = _prepared(with_date(config))
    section = config.study.methods
    runner = open_runner(config, STUDY, hooks)
    runner.tested = section.score
    costs = {method.name: method_costs(runner, method.overrides) for method in methods}
    claim(config)
    settings = section.model_dump()
    data = runner.opened.fingerprints
    with ExperimentTrials(config, STUDY, runner, settings=settings, hooks=hooks, data=data) as trials:
        try:
            tried = _search_rates(config, trials, methods)
            best = {name: best_rate(scores) for name, (_, scores) in tried.items()}
            finals = {
                method.name: [
                    trials.add({**method.overrides, RATE: rate, SEED: seed}, method=method.name, part="seeds")
                    for seed in section.seeds
                ]
                for method in methods
                if (rate := best[method.name]) is not None
            }
            every = [trial for each in finals.values() for trial in each]
            trials.score([(trial, runner.total_steps(trial)) for trial in every])
            for trial in (None, *(trial for trial in every if trials.history.trials[trial.id].finished)):
                trials.test(trial)
        except Interrupted:
            return None
        summary = _summarize(config, command, trials, methods, tried, finals, costs)
    return publish(config, STUDY, summary, methods_page)


Tried = tuple[dict[float, Trial], dict[float, float]]
"""The trials of a method by rate, and their scores, lower is better; infinite where one has diverged."""


def _search_rates(config: Config, trials: ExperimentTrials, methods: Sequence[Compared]) -> dict[str, Tried]:
    """Trains each method with its first rates, then with further ones, all methods' next ones together.

    Raises:
      Interrupted: it was told to stop.
    """
    section, goal = config.study.methods, Settings.of(config).goal
    tried: dict[str, Tried] = {method.name: ({}, {}) for method in methods}
    due = [(method, rate) for method in methods for rate in first_rates(method.middle, section.rates)]
    while due:
        begun = []
        for method, rate in due:
            configuration = {**method.overrides, RATE: rate, **_shortened(config)}
            begun.append((method, rate, trials.add(configuration, method=method.name, part="rates")))
        trials.score([(trial, trials.runner.total_steps(trial)) for _, _, trial in begun])
        for method, rate, trial in begun:
            outcome = trials.outcome(trial, trials.runner.total_steps(trial))
            each, scores = tried[method.name]
            each[rate] = trial
            scores[rate] = math.inf if outcome is None or outcome.failed else goal.signed(outcome.score)
        most = section.rates + section.further
        due = [
            (method, rate)
            for method in methods
            if len(scores := tried[method.name][1]) < most and (rate := next_rate(scores)) is not None
        ]
    return tried


def _shortened(config: Config) -> dict[str, Any]:
    """What a run that compares rates overrides."""
    steps = config.study.methods.rate_steps
    if steps is None:
        return {}
    return {STEPS: steps} if config.train.epochs is None else {"train.epochs": None, STEPS: steps}


def _prepared(config: Config) -> tuple[Config, list[Compared]]:
    """The configuration with the search that the experiment is, and its methods.

    Raises:
      UserError: there are too few methods, one is unknown or does not fit the model, or there is no test split.
    """
    section = config.study.methods
    given = config.search or SearchConfig()
    search_config(config.model_copy(update={"search": given}))
    if config.data.test is None:
        raise UserError(f"data.test: {STUDY} measures its runs on this split; it is required")
    if config.model.adapter is not None:
        raise UserError(f"model.adapter: {STUDY} compares how methods train the base; leave the key out")
    check_measured(section.score, config.evaluation.task, "study.methods.score")
    if len(section.compare) < 2:
        names = [name for name, treatment in treatments.own().items() if treatment.trains]
        raise UserError(f"study.methods.compare: name at least two methods, of {', '.join(names)}")
    methods = [_method(config, name, overrides) for name, overrides in section.compare.items()]
    _check_distinct(methods)
    low, high = (select(method.middle for method in methods) for select in (min, max))
    space: dict[str, DimensionConfig] = {RATE: DimensionConfig(log_uniform=(low / _REACH, high * _REACH))}
    if len(named := [method.name for method in methods if method.by_name]) > 1:
        # What a search over them would be: methods of one program then train in it together.
        space[METHOD] = DimensionConfig(choice=named)
    kept = {name: getattr(given, name) for name in _KEPT}
    return config.model_copy(update={"search": SearchConfig(space=space, **kept)}), methods


def _method(config: Config, name: str, overrides: Mapping[str, Any]) -> Compared:
    """One of the methods.

    Raises:
      UserError: there is no such method, it overrides what must be the same for all, or does not fit the model.
    """
    where = f"study.methods.compare.{name}"
    for key in overrides:
        if key.partition(".")[0] not in _MAY_DIFFER:
            raise UserError(
                f"{where}: {key!r} is the same for all methods; only {' and '.join(_MAY_DIFFER)} may differ"
            )
    own = {key: value for key, value in overrides.items() if key != RATE}
    if not own:
        if treatments.find(name) is None:
            raise UserError(
                f"{where}: no method is called {name!r}{nearest(name, treatments.names())}; or say under another name "
                f"what it overrides, such as {{{METHOD}: full}}"
            )
        own = {METHOD: name}
    changed = with_overrides(config, {**own, **overrides}, origin=f"{where}: ")
    model = quantized_config(read_config(model_directory(config)), config.model.quantize)
    try:
        plan = UpdatePlan(changed.update).resolve(model)
        plan.check({key: value for key, value in dotted(changed).items() if key.startswith("update.")})
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Compared(name, own, float(dotted(changed)[RATE]))


def _check_distinct(methods: Sequence[Compared]) -> None:
    for place, method in enumerate(methods):
        for other in methods[:place]:
            if method.overrides == other.overrides:
                raise UserError(f"study.methods.compare.{method.name}: it is the same as {other.name}; leave one out")


def method_costs(runner: TrainerRunner, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What a method trains and keeps, by itself: in a program that methods share there is room for all of them."""
    trainer = runner.opened.trainer(runner.configuration(overrides))
    trained, everything = (row["parameters"] for row in trainer.plan.table(trainer.hyperparameters)[-2:])
    moments = jax.tree.leaves(trainer.abstract_state().moments)
    return {
        "trained_parameters": trained,
        "share": trained / everything,
        "optimizer_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in moments),
        "file": "adapter" if trainer.plan.exports else "model",
        "file_bytes": loadable_bytes(trainer),
    }


def _summarize(
    config: Config,
    command: str,
    trials: ExperimentTrials,
    methods: Sequence[Compared],
    tried: Mapping[str, Tried],
    finals: Mapping[str, Sequence[Trial]],
    costs: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The summary of methods that are all searched, trained and tested."""
    section, settings = config.study.methods, Settings.of(config)
    goal, metric = settings.goal, METRICS[section.score]
    states = trials.history.trials
    tests = {name: [states[trial.id].test for trial in each] for name, each in finals.items()}
    whole = {name: [test for test in each if test is not None] for name, each in tests.items()}
    whole = {name: each for name, each in whole.items() if len(each) == len(section.seeds)}
    if len(whole) < 2:
        raise UserError(
            f"{len(methods) - len(whole)} of {len(methods)} methods diverged, so there is nothing to compare; lower "
            "optimizer.learning_rate, which is the middle of the rates"
        )
    first = methods[0].name if methods[0].name in whole else next(iter(whole))
    scores = compared_scores(whole, first, metric, samples=config.study.bootstrap, confidence=config.study.confidence)
    entries = []
    for method in methods:
        each, signed = tried[method.name]
        rate = best_rate(signed)
        entries.append(
            {
                "name": method.name,
                "overrides": method.overrides,
                "rate": rate,
                "on_end": on_end(signed),
                "rates": [
                    {
                        "rate": tested,
                        "score": goal.signed(signed[tested]) if math.isfinite(signed[tested]) else None,
                        "trial": each[tested].id,
                    }
                    for tested in sorted(each)
                ],
                "trials": [trial.id for trial in finals.get(method.name, ())],
                "test": [None if test is None else test.score for test in tests.get(method.name, ())],
                "diverged": sum(test is None for test in tests.get(method.name, ())),
                "score": None,
                "against": None,
                **scores.get(method.name, {}),
                **costs[method.name],
            }
        )
    best = min(
        (entry for entry in entries if entry["score"] is not None),
        key=lambda entry: metric.goal.signed(entry["score"]["value"]),
    )
    untuned = trials.history.untuned
    winner = next(method for method in methods if method.name == best["name"])
    return {
        "study": STUDY,
        "task": config.name,
        "command": command,
        "objective": {"name": settings.search.objective, "direction": goal.direction},
        "score": {"name": section.score, "direction": metric.direction},
        "seeds": section.seeds,
        "rate_steps": trials.runner.total_steps(next(iter(tried[methods[0].name][0].values()))),
        "steps": trials.runner.total_steps(Trial(0, {}, Path())),
        "interval": {
            "confidence": config.study.confidence,
            "bootstrap": config.study.bootstrap,
            "over": "seeds and test documents",
        },
        "reference": first,
        "best": best["name"],
        "untuned": None if untuned is None else untuned.score,
        "methods": entries,
        "next": train_command(
            config.directory, {**winner.overrides, RATE: best["rate"]}, f"{config.directory}-{best['name']}"
        ),
        "machine": trials.machine,
        "budget": trials.budget,
    }
