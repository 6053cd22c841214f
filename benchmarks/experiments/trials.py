"""Named configurations, each with some seeds, scored on the way and perhaps tested: an experiment in a journal.

    python benchmarks/experiments/trials.py configs/studies/smollm2/attr_oamine.yaml run_dir=runs/rates \\
        --trials rates.json --fractions 1 --output rates-summary.json

``rates.json`` holds ``[{"name": …, "configuration": {dotted key: value}}, …]``; ``train.seed`` is a key like any other.
Stopped or killed, the same command goes on; ``trials.jsonl`` and ``config.yaml`` of the run directory are all it needs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.config import Config, load_config
from jaxtune.errors import UserError
from jaxtune.experiments.run import claim, open_runner
from jaxtune.experiments.trials import ExperimentTrials
from jaxtune.files import write_atomically
from jaxtune.search.journal import plain
from jaxtune.search.milestones import distinct_steps
from jaxtune.search.runner import Interrupted
from jaxtune.training.hooks import NOBODY, Hooks
from jaxtune.training.signals import stop_signals
from jaxtune.training.template_date import with_date

STUDY = "trials"


def run(
    config: Config,
    named: Sequence[Mapping[str, Any]],
    *,
    fractions: Sequence[float],
    test: bool,
    hooks: Hooks = NOBODY,
) -> dict[str, Any] | None:
    """Trains and scores every configuration, and measures it on the test split.

    Args:
      config: its ``search`` section says what a score is, and what is measured beside it.
      named: ``name`` and ``configuration`` of each trial.
      fractions: shares of the steps at which all are scored, rising.
      test: whether those that stayed finite, and the untuned model, are tested.
      hooks: who is told of it, and who may stop it.

    Returns:
      ``trials``, each with its name, its scores and metrics by fraction, and its test; None if it was stopped.

    Raises:
      UserError: the input is wrong.
    """
    config = with_date(config)
    runner = open_runner(config, STUDY, hooks)
    claim(config)
    settings = {"trials": [dict(one) for one in named], "fractions": list(fractions)}
    data = runner.opened.fingerprints
    with ExperimentTrials(
        config, STUDY, runner, settings=settings, planned=len(named), hooks=hooks, data=data
    ) as trials:
        each = [trials.add(one["configuration"], name=one["name"]) for one in named]
        named_fractions = [("--fractions", fraction) for fraction in fractions]
        steps = [distinct_steps(named_fractions, runner.total_steps(trial)) for trial in each]
        try:
            for place in range(len(fractions)):
                trials.score([(trial, row[place]) for trial, row in zip(each, steps, strict=True)])
            finished = [trial for trial in each if trials.history.trials[trial.id].finished]
            untuned = trials.test(None) if test else None
            tested = {trial.id: trials.test(trial) for trial in finished} if test else {}
        except Interrupted:
            return None
        rows = []
        for one, trial, row in zip(named, each, steps, strict=True):
            outcomes = [trials.outcome(trial, step) for step in row]
            result = tested.get(trial.id)
            rows.append(
                {
                    **one,
                    "trial": trial.id,
                    "scores": [None if outcome is None or outcome.failed else outcome.score for outcome in outcomes],
                    "metrics": [{} if outcome is None else outcome.metrics for outcome in outcomes],
                    "test": None if result is None else {"score": result.score, "metrics": result.metrics},
                }
            )
        return {
            "fractions": list(fractions),
            "trials": rows,
            "untuned": None if untuned is None else {"score": untuned.score, "metrics": untuned.metrics},
            "machine": trials.machine,
            "budget": trials.budget,
        }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value")
    parser.add_argument("--trials", type=Path, required=True, help="JSON file of names and configurations")
    parser.add_argument("--fractions", type=float, nargs="+", default=[1.0], help="shares of the steps, rising")
    parser.add_argument("--test", action="store_true", help="measure those that are finished on data.test")
    parser.add_argument("--output", type=Path, required=True, help="where the summary is written at the end")
    arguments = parser.parse_intermixed_args(argv)

    def tell(event: str, trial: int | None, details: Mapping[str, Any]) -> None:
        print(event, trial, details.get("step"), details.get("score"), file=sys.stderr, flush=True)

    try:
        config = load_config(arguments.config, arguments.overrides)
        named = json.loads(arguments.trials.read_text(encoding="utf-8"))
        with stop_signals() as should_stop:
            hooks = Hooks(on_event=tell, should_stop=should_stop)
            summary = run(config, named, fractions=arguments.fractions, test=arguments.test, hooks=hooks)
    except UserError as error:
        print(f"trials: {error}", file=sys.stderr)
        return 2
    if summary is not None:
        write_atomically(arguments.output, json.dumps(plain(summary), indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
