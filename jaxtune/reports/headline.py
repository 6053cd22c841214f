"""What the page says first: which configuration won, by how much, how to run it again, and what was saved."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtune.reports import formatting
from jaxtune.reports.records import StudyRecord, TrialRecord
from jaxtune.search.conditions import says_kind
from jaxtune.search.directory import export_command, train_command
from jaxtune.search.enough import why_enough
from jaxtune.search.header import lookup


@dataclasses.dataclass(frozen=True)
class Winner:
    """The best trial so far.

    Attributes:
      trial: the trial.
      final: it was trained to the end; otherwise it leads by its early score.
      decided: the study has ended and says so; until then it only leads.
    """

    trial: TrialRecord
    final: bool
    decided: bool

    @property
    def word(self) -> str:
        """What it is called: the winner, or the leader."""
        return "winner" if self.decided else "leader"


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A row of the comparison.

    Attributes:
      name: "winner", "reference", "untuned model".
      validation, test: scores as text.
      validation_gain, test_gain: differences to the reference as text, "" for the reference itself.
    """

    name: str
    validation: str
    validation_gain: str
    test: str
    test_gain: str


def find_winner(study: StudyRecord) -> Winner | None:
    """The trial that is ahead, if any; at the end of the study it is the winner."""
    ahead = study.recorded.leader
    trial = next((trial for trial in study.trials if ahead is not None and trial.id == ahead.trial.id), None)
    if trial is None:
        return None
    final = trial.final_score is not None
    return Winner(trial, final, decided=final and not is_running(study))


def is_running(study: StudyRecord) -> bool:
    """Whether the study has no final result yet."""
    return not study.summary.get("best")


def verdict(study: StudyRecord, winner: Winner | None) -> str:
    """The page's first sentence."""
    tried = formatting.count(len(study.trials), "trial")
    scored = formatting.count(sum(trial.early_score is not None for trial in study.trials), "scored trial")
    metric = formatting.metric_name(study.objective)
    if winner is None:
        failed = sum(trial.status == "failed" for trial in study.trials)
        return f"No trial has a score yet: {tried} started, {failed} failed."
    trial = winner.trial
    if not winner.decided:
        score = formatting.score(trial.final_score if winner.final else trial.early_score, study.objective)
        subject = "The reference configuration" if trial.reference else f"Trial {trial.id}"
        where = "the end" if winner.final else f"{formatting.percentage(study.fraction)} of its steps"
        return f"{subject} leads after {scored}: {metric} {score} at {where}."
    score = formatting.score(trial.final_score, study.objective)
    if trial.reference:
        others = formatting.count(len(study.trials) - 1, "other trial")
        return f"The reference configuration was not beaten: {metric} {score}, ahead of {others}."
    reference = reference_final(study)
    against = (
        f", against {formatting.score(reference, study.objective)} for the reference" if reference is not None else ""
    )
    return f"Trial {trial.id} is the best of {tried}: {metric} {score}{against}."


def reference_final(study: StudyRecord) -> float | None:
    """The reference configuration's validation score at the end."""
    given = formatting.finite((study.summary.get("baseline") or {}).get("final_score"))
    if given is not None:
        return given
    return next((trial.final_score for trial in study.trials if trial.reference), None)


def comparison(study: StudyRecord, winner: Winner | None) -> list[Contestant]:
    """Winner, reference and untuned model side by side; [] until the leading trial is finished."""
    best, baseline, untuned = (study.summary.get(name) or {} for name in ("best", "baseline", "untuned"))
    if winner is None or not winner.final:
        return []
    rows: list[tuple[str, float | None, float | None]] = [
        (
            f"Trial {winner.trial.id} ({winner.word})",
            winner.trial.final_score,
            formatting.finite(best.get("test_score")),
        )
    ]
    reference = reference_final(study), formatting.finite(baseline.get("test_score"))
    if winner.trial.reference:
        rows = [(f"Reference ({winner.word})", *rows[0][1:])]
        reference = rows[0][1], rows[0][2]
    else:
        rows.append(("Reference (trial 0)", *reference))
    if (before := formatting.finite(untuned.get("test_score"))) is not None:
        rows.append(("Untuned model", None, before))

    def gain(name: str, value: float | None, base: float | None) -> str:
        if value is None or base is None or name.startswith("Reference"):
            return ""
        return formatting.difference(value - base, study.objective)

    return [
        Contestant(
            name,
            formatting.score(validation, study.objective),
            gain(name, validation, reference[0]),
            formatting.score(test, study.objective),
            gain(name, test, reference[1]),
        )
        for name, validation, test in rows
    ]


def ended_sentence(study: StudyRecord) -> str:
    """Why no further trial was proposed; "" while there may be another one."""
    history, planned = study.recorded.history, study.planned
    tried = len(study.trials)
    if history.enough is not None:
        ended = {"budget": "the budget is spent", "terminator": "another one promised less than noise would show"}
        why = ended.get(history.enough["reason"], history.enough["reason"])
        return f"Proposals ended after {tried} of {planned} trials, as {why}: {why_enough(history.enough)}."
    if is_running(study) or tried < planned or not study.recorded.header.get("trials"):
        return ""
    return f"No further trial was proposed, as the study has all of its {tried} (search.trials)."


def prior_sentence(study: StudyRecord) -> str:
    """Whether scores contradicted the priors of the space; "" where they did not, or there are none."""
    if (dropped := study.recorded.history.prior_dropped) is None:
        return ""
    trial, scores = dropped
    return (
        f"From trial {trial} on the priors do not count any more: of the first {scores} scored trials, the better ones "
        f"are the less likely under them."
    )


def seeds_sentence(study: StudyRecord) -> str:
    """What the table of the finalists shows; "" where none was repeated."""
    repeats = study.summary.get("seeds") or {}
    if not repeats.get("trials"):
        return ""
    confidence = formatting.percentage(repeats["confidence"])
    return f"Means of {repeats['count']} seeds each, with {confidence} intervals. The best mean wins."


def finalists(study: StudyRecord, winner: Winner | None) -> tuple[list[str], list[list[str]]]:
    """The best with other seeds: column names, and a row for each, the best mean first; no rows where there is none."""
    repeats = study.summary.get("seeds") or {}
    rows = []
    for one in repeats.get("trials") or []:
        name = "Reference (trial 0)" if one["trial"] == 0 else f"Trial {one['trial']}"
        if winner is not None and winner.decided and winner.trial.id == one["trial"]:
            name = f"{name.split(' (')[0]} ({winner.word})"
        mean, low, high = (formatting.finite(one.get(key)) for key in ("mean", "low", "high"))
        scores = [formatting.finite(score) for score in one["scores"]]
        shown = ["diverged" if score is None else formatting.score(score, study.objective) for score in scores]
        told = [formatting.ABSENT] * 2
        if mean is not None:
            ends = [formatting.score(end, study.objective) for end in (low, high)]
            told = [formatting.score(mean, study.objective), " to ".join(ends)]
        rows.append([name, *told, *shown])
    seeds = max((len(row) - 3 for row in rows), default=0)
    # A finalist that was found later may have been trained less often.
    padded = [row + [formatting.ABSENT] * (3 + seeds - len(row)) for row in rows]
    return ["Finalist", "Mean", "Interval", *(f"Seed {place}" for place in range(1, seeds + 1))], padded


def test_sentence(study: StudyRecord, winner: Winner | None) -> str:
    """What the test split says about winner and reference, with the paired bootstrap interval where there is one."""
    best = study.summary.get("best") or {}
    if winner is None or not winner.decided:
        return "The test split is measured once, at the end, on the best finished trial."
    if formatting.finite(best.get("test_score")) is None:
        return "There is no test score: the configuration names no test split (data.test), or the test has not run yet."
    if winner.trial.reference:
        return ""
    interval = study.summary.get("test_difference") or {}
    low, high = formatting.finite(interval.get("low")), formatting.finite(interval.get("high"))
    if low is None or high is None:
        return "No bootstrap interval is in the summary, so the test difference may be chance."
    confidence = formatting.percentage(formatting.finite(interval.get("confidence")) or 0.95)
    ends = " to ".join(formatting.difference(end, study.objective) for end in (low, high))
    if low <= 0 <= high:
        meaning = "it includes zero: on this test split winner and reference cannot be told apart"
    else:
        better = study.goal.better(low, 0.0)
        meaning = f"it excludes zero: the winner is {'better' if better else 'worse'} on the test split too"
    return f"Paired bootstrap of the test difference to the reference, {confidence} interval: {ends}; {meaning}."


def test_measures(study: StudyRecord, winner: Winner | None) -> tuple[list[str], list[list[str]]]:
    """Everything measured on the test split: column names, and a row per measure; no rows where there is nothing."""
    best, baseline, untuned = (study.summary.get(name) or {} for name in ("best", "baseline", "untuned"))
    columns = {"winner": best, "reference": baseline, "untuned": untuned}
    if winner is not None and winner.trial.reference:
        del columns["winner"]
    measured = {name: entry["test_metrics"] for name, entry in columns.items() if entry.get("test_metrics")}
    names = dict.fromkeys(key for metrics in measured.values() for key in metrics)
    rows = [
        [name, *(formatting.score(formatting.finite(m.get(name)), name) for m in measured.values())] for name in names
    ]
    return ["Measure", *measured], rows


def settings(study: StudyRecord, winner: Winner) -> list[dict[str, Any]]:
    """The winner's value beside the reference's: of every searched key, and of each other in which the two differ."""
    reference = next((trial.configuration for trial in study.trials if trial.reference), {})

    def value(configuration: Mapping[str, Any], key: str) -> Any:
        """What a trial does not override it has from the study's configuration."""
        with contextlib.suppress(KeyError):
            if key in configuration or says_kind(configuration, key):
                return configuration.get(key)
            return lookup(study.config, key)

    rows = []
    for key in dict.fromkeys([*study.keys, *winner.trial.configuration, *reference]):
        own = winner.trial.configuration
        mine, theirs = value(own, key), value(reference, key)
        if mine == theirs and key not in study.space:
            continue
        rows.append(
            {
                "key": key,
                "value": formatting.setting_of({**own, key: mine} if mine is not None else own, key),
                "reference": formatting.setting_of(
                    {**reference, key: theirs} if theirs is not None else reference, key
                ),
                "changed": mine != theirs,
                "searched": searched(study.space.get(key) or {}),
            }
        )
    return rows


def searched(dimension: Mapping[str, Any]) -> str:
    """A dimension in words: ``1e-5 to 1e-2, log-uniform, prior 3e-4``."""
    prior = f", prior {formatting.setting(dimension['prior'])}" if "prior" in dimension else ""
    for kind, value in dimension.items():
        if kind == "choice":
            return "one of " + ", ".join(formatting.setting(choice) for choice in value) + prior
        words = {"log_uniform": "log-uniform", "power_of_two": "powers of two"}.get(kind, kind)
        return f"{formatting.setting(value[0])} to {formatting.setting(value[1])}, {words}{prior}"
    return "not searched"


def commands(study: StudyRecord, winner: Winner) -> list[dict[str, str]]:
    """The command lines that use the winner, from the directory as it is named now, each with its title.

    A study that goes on has nothing to export: what leads there may not be finished.
    """
    directory = str(study.directory).rstrip("/")
    again = train_command(directory, winner.trial.configuration, f"{directory}-winner")
    use = [{"id": "export", "title": "Use it", "line": export_command(directory)}] if study.summary else []
    return [*use, {"id": "command", "title": "Train it again", "line": again}]


def budget(study: StudyRecord) -> dict[str, Any] | None:
    """Steps run against steps if every trial had been finished; None until the summary has them."""
    given = study.summary.get("budget") or {}
    run, whole = formatting.finite(given.get("steps_run")), formatting.finite(given.get("steps_if_all_finished"))
    if run is None or not whole:
        return None
    saved = 1 - run / whole
    compilations = given.get("compilations")
    return {
        "run": formatting.number(run, 9),
        "whole": formatting.number(whole, 9),
        "share": round(100 * min(1.0, run / whole), 1),
        "saved": formatting.percentage(max(0.0, saved)),
        "times": f"{whole / run:.1f}" if run else formatting.ABSENT,
        "seconds": formatting.seconds(study.durations.work),
        "compilations": formatting.ABSENT if compilations is None else str(compilations),
    }


def agreement(study: StudyRecord) -> dict[str, str] | None:
    """The rank agreement of early and final scores as text; None until there is one."""
    given = study.summary.get("rank_agreement") or {}
    spearman, kendall = formatting.finite(given.get("spearman")), formatting.finite(given.get("kendall"))
    if spearman is None and kendall is None:
        return None
    finished = given.get("finished") or len(study.finished)
    overlap, top_k = given.get("top_k_overlap"), given.get("top_k")
    return {
        "spearman": formatting.number(spearman, 3),
        "kendall": formatting.number(kendall, 3),
        "overlap": f"{formatting.number(overlap)} of {top_k}" if overlap is not None and top_k else "",
        "over": (
            f"over all {finished} trials that did not diverge"
            if given.get("basis") == "all"
            else f"over the {finished} finished trials; the others were stopped early, so this says nothing about them"
        ),
    }
