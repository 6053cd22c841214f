"""The page of a study, as a file and served: one mechanism makes both.

``report.html`` is one file that holds everything, so that it can be mailed, printed and opened without a network.
Figures are inline SVG drawn here; a small script adds pointing, walking by keyboard, filters, sorting and copying, and
the page says all it has to say without it. Served, the same page asks for the parts that change with the study and
patches them in.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from jaxtune.files import write_atomically
from jaxtune.layout import RunFiles
from jaxtune.reports import figures, formatting, headline, space_figures, trade_offs
from jaxtune.reports.progress import progress
from jaxtune.reports.records import StudyRecord, TrialRecord, read_study


@dataclasses.dataclass(frozen=True)
class View:
    """What of the page changes with the study.

    Attributes:
      directory: the study's.
      title: the window's title.
      head, main: markup of the page's head and of its sections.
      cards: trial → what is shown when it is pointed at.
      ended: whether the study has its summary.
    """

    directory: str
    title: str
    head: Markup
    main: Markup
    cards: dict[int, Any]
    ended: bool


def write_report(run_dir: str | Path) -> Path:
    """Renders ``report.html`` of a study, finished or not, from the files in its directory alone.

    Args:
      run_dir: a directory with ``trials.jsonl``; ``summary.json`` and ``trials/<id>/metrics.jsonl`` are used where they
        are there. The page is replaced in one piece.

    Returns:
      The page's path.

    Raises:
      UserError: there is no study in ``run_dir``; the message names the nearest directory that has one.
    """
    directory = Path(run_dir)
    page = render(view(read_study(directory)))
    target = RunFiles(directory).report_path
    write_atomically(target, page)
    return target


def render(shown: View, *, refresh: str = "") -> str:
    """The page as HTML.

    Args:
      shown: the study's parts of it.
      refresh: where the page asks for a newer view, relative to its own address; "" for a page that stands by itself.
    """
    script = asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return render_template(
        "report.html.j2",
        view=shown,
        style=Markup(asset("report.css")),
        script=Markup(script),
        # Only this very script may run: text that slipped through the escaping still could not.
        script_source=f"'sha256-{digest}'",
        refresh=refresh,
        version=version(),
    )


@functools.cache
def version() -> str:
    """Names the style and the script, which a served page loads once."""
    return hashlib.sha256((asset("report.css") + asset("report.js")).encode()).hexdigest()[:16]


def notice(directory: Path, title: str, text: str) -> View:
    """A page in place of a study that is not there yet, or cannot be read."""
    name = directory.resolve().name
    head = render_template("head.html.j2", name=name, running=True, facts=[("Directory", str(directory))])
    main = render_template("notice.html.j2", title=title, text=text)
    return View(str(directory), f"{name} · search report", head, main, {}, ended=False)


def view(study: StudyRecord, *, live: bool = False) -> View:
    """What the page shows of a study; ``live`` where it will refresh itself."""
    winner = headline.find_winner(study)
    leader = winner.trial.id if winner else None
    running = headline.is_running(study)
    main = render_template(
        "study.html.j2",
        study=study,
        live=live,
        running=running,
        winner=winner,
        verdict=headline.verdict(study, winner),
        comparison=headline.comparison(study, winner),
        ended_sentence=headline.ended_sentence(study),
        prior_sentence=headline.prior_sentence(study),
        seeds_sentence=headline.seeds_sentence(study),
        finalists=headline.finalists(study, winner),
        test_sentence=headline.test_sentence(study, winner),
        measures=headline.test_measures(study, winner),
        settings=headline.settings(study, winner) if winner else [],
        commands=headline.commands(study, winner) if winner else [],
        progress=progress(study) if running else None,
        budget=headline.budget(study),
        agreement=headline.agreement(study),
        status_words=figures.STATUS_WORDS,
        convergence=figures.convergence(study, leader),
        early_final=figures.early_against_final(study, leader),
        trade_offs=trade_offs.front(study, leader),
        bounds=trade_offs.bounds(study),
        parallel=space_figures.parallel_coordinates(study, leader),
        ramp=range(space_figures.RAMP),
        dependence=space_figures.partial_dependence(study),
        importance=sorted(space_figures.importances(study).items(), key=lambda item: -item[1]),
        curves=figures.learning_curves(study, leader),
        short_key=space_figures.short_key,
        trials=[trial_row(study, trial, leader) for trial in study.trials],
        score_names=[name for name, _ in score_columns(study)],
        stopped=any(trial.status == "stopped" for trial in study.trials),
        failures=[trial for trial in study.trials if trial.status == "failed"],
        percent=formatting.percentage,
        metric=formatting.metric_name(study.objective),
        clock=formatting.clock,
    )
    return View(
        directory=str(study.directory),
        title=f"{study.name} · search report",
        head=render_template("head.html.j2", name=study.name, running=running, facts=facts(study)),
        main=main,
        cards={trial.id: card(study, trial, leader) for trial in study.trials},
        ended=not running,
    )


def render_template(template: str, **given: Any) -> Markup:
    """A template of this package, filled in; what is no markup is escaped."""
    return Markup(_environment().get_template(template).render(given))


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("jaxtune.reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def asset(name: str) -> str:
    """The text of a style or a script of this package."""
    return resources.files("jaxtune.reports").joinpath("templates", name).read_text(encoding="utf-8")


def facts(study: StudyRecord) -> list[tuple[str, str]]:
    """The line under the title: model, data, objective, how many trials."""
    model = (study.config.get("model") or {}).get("path")
    data = (study.config.get("data") or {}).get("train")
    source = data.get("path") if isinstance(data, dict) else data
    states = [trial.status for trial in study.trials]
    told = f"{len(states)} of {study.planned}" if study.planned > len(states) else str(len(states))
    told += f", {states.count('finished')} finished" + (
        f", {states.count('failed')} failed" if "failed" in states else ""
    )
    given = [
        ("Model", model),
        ("Data", source),
        ("Objective", f"{formatting.metric_name(study.objective)}, {study.goal.words}"),
        ("Trials", told),
        ("Ladder", ", ".join(map(formatting.percentage, study.recorded.shares.ladder))),
        ("Scored after", f"{formatting.percentage(study.fraction)} of the steps"),
        ("Going on", going_on(study)),
    ]
    return [(name, str(value)) for name, value in given if value]


def going_on(study: StudyRecord) -> str:
    """How many of the best go on to each rung after the fraction; "" where they go straight to the end."""
    shares = study.recorded.shares
    if len(shares.finish) == 1 or not study.promote:
        return ""
    numbers = zip(shares.promotions(study.promote), shares.finish, strict=True)
    return ", ".join(f"{number} to {formatting.percentage(share)}" for number, share in numbers)


def score_columns(study: StudyRecord) -> list[tuple[str, Callable[[TrialRecord], float | None]]]:
    """The scores in the table of all trials, each by its name, in the order in which a trial comes to them."""

    def at(step: int) -> tuple[str, Callable[[TrialRecord], float | None]]:
        return f"At step {step:,}", lambda trial: trial.rungs.get(step, trial.finishing.get(step))

    rungs, finishing = (
        [at(step) for step in sorted({step for trial in study.trials for step in getattr(trial, name)})]
        for name in ("rungs", "finishing")
    )
    early, final = ("Early score", lambda trial: trial.early_score), ("Final score", lambda trial: trial.final_score)
    return [*rungs, early, *finishing, final]


def trial_row(study: StudyRecord, trial: TrialRecord, winner: int | None) -> dict[str, Any]:
    """A row of the table of all trials: cells as text, with the numbers to sort by."""
    score, number = study.objective, formatting.number
    scores = [of(trial) for _, of in score_columns(study)]
    cells: list[tuple[str, Any]] = [
        (formatting.setting_of(trial.configuration, key), trial.configuration.get(key)) for key in study.keys
    ]
    return {
        "id": trial.id,
        "status": trial.status,
        "training": trial.training,
        "name": figures.winner_name(study, winner) if trial.id == winner else ("reference" if trial.reference else ""),
        "reason": trial.reason,
        "settings": [(text, sort_key(value)) for text, value in cells],
        "scores": [
            *((formatting.score(value, score), sort_key(value)) for value in scores),
            (number(trial.steps, 9) if trial.steps else formatting.ABSENT, trial.steps),
            (formatting.seconds(trial.seconds), sort_key(trial.seconds)),
        ],
    }


def sort_key(value: Any) -> str:
    """What a cell is sorted by: a number's exact text, "" for nothing, else the text."""
    if value is None:
        return ""
    return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else formatting.setting(value)


def card(study: StudyRecord, trial: TrialRecord, winner: int | None) -> dict[str, Any]:
    """What is shown when a trial is pointed at."""
    word = figures.STATUS_WORDS[trial.status]
    named = (figures.winner_name(study, winner), trial.id == winner), ("reference", trial.reference)
    roles = [name for name, holds in named if holds]
    early = formatting.score(trial.early_score, study.objective)
    if trial.early_score is not None and trial.early_error:
        early += f" ± {formatting.difference(trial.early_error, study.objective).lstrip('+')}"
    if trial.training:
        word += f", step {trial.steps:,}"
    lines = [("early score", early), ("final score", formatting.score(trial.final_score, study.objective))]
    if trial.reason and trial.early_score is None:
        lines = [("reason", trial.reason)]
    lines += [
        (space_figures.short_key(key, study.keys), formatting.setting_of(trial.configuration, key))
        for key in study.keys
    ]
    return {"title": f"Trial {trial.id}: {', '.join([*roles, word])}", "lines": lines}
