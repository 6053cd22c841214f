"""What a notebook shows: bars that move while something trains, and results as tables in which nothing is markup."""

from __future__ import annotations

import html.parser
import json
import os
import subprocess
import sys
import types

import pytest

from jaxtune.search.results import StudySummary
from jaxtune.search.study import Study
from jaxtune.telemetry.notebook import in_notebook
from jaxtune.telemetry.progress import ProgressBoard, ProgressDisplay, watched
from jaxtune.telemetry.tables import cell, html_table
from jaxtune.training.fit import FitResult
from jaxtune.training.state import TrainState
from jaxtune.training.summary import RunSummary


class Table(html.parser.HTMLParser):
    """The cells of a page as a browser reads them, and every tag in it."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def published(monkeypatch):
    """A notebook's shell, and what its cells show: the messages that a kernel sends to the page."""
    IPython = pytest.importorskip("IPython")
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    sent: list[tuple[str, bool]] = []

    def publish(data: dict, metadata: object = None, *, update: bool = False, **_: object) -> None:
        sent.append((data["text/html"], update))

    shell.kernel = object()
    monkeypatch.setattr(shell.display_pub, "publish", publish)
    monkeypatch.setattr(InteractiveShell, "_instance", shell)
    monkeypatch.setattr(InteractiveShell, "initialized", classmethod(lambda cls: True))
    monkeypatch.setattr(InteractiveShell, "instance", classmethod(lambda cls, *_, **__: shell))
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    return sent


def test_a_notebook_shows_a_bar_that_moves_and_goes(published, capsys):
    display = watched("exp <b>1</b>")
    assert isinstance(display, ProgressDisplay)
    display.on_start(4, 20)
    display.on_metrics(10, {"loss": 1.23456})
    display.on_metrics(20, {"loss": 0.5})
    display.on_end()
    pages = [page for page, _ in published]
    assert [update for _, update in published] == [False] + [True] * (len(pages) - 1), (
        "one place, drawn again and again"
    )
    assert Table(pages[-1]).texts == [], "gone when it is over"
    last = Table(pages[-2])
    assert "".join(last.texts).split() == ["exp", "<b>1</b>", "20/20", "loss", "0.5000"]
    assert last.tags == {"div", "progress"}
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_several_bars_share_a_place(published):
    board = ProgressBoard()
    first, second = watched("trial 1", board), watched("trial 2", board)
    assert first is not None
    assert second is not None
    first.on_start(0, 8)
    second.on_start(0, 8)
    board.refresh()
    assert Table(published[-1][0]).texts == ["trial 1  ", "  0/8  ", "trial 2  ", "  0/8  "]
    first.on_end()
    assert Table(published[-1][0]).texts == ["trial 2  ", "  0/8  "]
    second.on_end()
    third = watched("trial 3", board)
    assert third is not None
    third.on_start(0, 8)
    third.on_end()
    assert [update for _, update in published].count(False) == 1, "the next trials stand where the first ones stood"


def test_nothing_is_shown_where_nobody_looks(monkeypatch, capsys):
    assert watched("train") is None, "standard error is a file here"
    # IPython on a terminal is no notebook, and its standard error is asked.
    module = types.ModuleType("IPython")
    monkeypatch.setattr(module, "get_ipython", lambda: types.SimpleNamespace(), raising=False)
    monkeypatch.setitem(sys.modules, "IPython", module)
    assert not in_notebook()
    assert watched("train") is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert watched("train") is not None


def test_the_second_process_shows_nothing(published, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert watched("train") is None


NASTY = "<script>alert('x')</script> & \"q\""


def test_values_and_names_are_told_as_they_are():
    read = Table(html_table([{NASTY: NASTY, "loss": 0.123456, "n": 12345, "none": None}], title=NASTY))
    assert read.texts == [NASTY, NASTY, "loss", "n", "none", NASTY, "0.1235", "12,345", "–"]
    assert read.tags == {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert Table(html_table([])).tags == {"table"}
    assert cell(True) == "True"


RUN = {"name": "a<b", "run_dir": "runs/a", "stopped": "finished", "steps": 3, "metrics": {"loss": 0.5, "x": None}}


def test_a_summary_is_what_it_was_and_has_typed_attributes():
    summary = RunSummary(RUN, seconds=1.5, compilations=1)
    assert json.loads(json.dumps(summary)) == {**RUN, "seconds": 1.5, "compilations": 1} == summary
    assert (summary.steps, summary.metrics["loss"], summary.adapter) == (3, 0.5, None)
    assert RunSummary(RUN, adapter={"path": "p", "step": 3}).adapter == {"path": "p", "step": 3}
    with pytest.raises(AttributeError, match="RunSummary has no 'step', but name, run_dir"):
        summary.step  # noqa: B018
    with pytest.raises(AttributeError):
        summary.steps = 4  # a file is not changed by it
    assert "a<b: runs/a" in Table(summary._repr_html_()).texts
    assert Table(summary._repr_html_()).texts[-4:] == ["finished", "0.5", "–", "1.5"]


def test_a_fit_is_one_row():
    state = TrainState(step=3, trainable={}, moments={}, seed=0)  # type: ignore[arg-type]
    result = FitResult(
        state=state,
        step=3,
        steps_run=3,
        stopped="paused",
        metrics={"loss": 2.0},
        evaluation={"validation_loss": 3.0},
        examples=12,
        examples_per_step=4.0,
        seconds=0.25,
        planned=((0, 6),),
    )
    cells = ["fit", "step", "stopped", "loss", "validation_loss", "seconds", "3", "paused", "2", "3", "0.25"]
    assert Table(result._repr_html_()).texts == cells


def test_a_study_shows_its_trials(tmp_path):
    trial = {"id": 0, "configuration": {"optimizer.learning_rate": 1e-3}, "early_score": 2.0, "standard_error": 0.1}
    entry = {"trial": 0, "test_score": 1.5}
    summary = StudySummary(
        objective={"name": "loss", "direction": "min"},
        trials=[{**trial, "final_score": None, "status": "scored"}],
        best=entry,
    )
    assert summary.trials[0]["early_score"] == 2.0
    title, *cells = Table(summary._repr_html_()).texts
    assert title == "loss (min is better): trial 0 won, 1.5 on the test split"
    assert cells[:5] == ["trial", "status", "early_score", "final_score", "optimizer.learning_rate"]
    assert cells[5:] == ["0", "scored", "2", "–", "0.001"]
    study = Study.__new__(Study)
    study.run_dir = tmp_path / "none"
    assert Table(study._repr_html_()).texts == [f"{study.run_dir}: no trial yet"]


def test_transformers_does_not_miss_torch_aloud():
    """Nor tqdm ipywidgets: both say so when they are imported, and ``import jaxtune`` needs neither."""
    script = (
        "import importlib.util as util, sys\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'torch' else found(name, *more)\n"
        "if sys.argv[1:]: import jaxtune; assert 'transformers' not in sys.modules\n"
        "import transformers, warnings, tqdm, tqdm.notebook\n"
        # As tqdm.autonotebook does, which transformers imports in a notebook.
        "warnings.warn(tqdm.notebook.WARN_NOIPYW, tqdm.TqdmWarning)\n"
    )
    # Where torch is missing, this process has silenced transformers already.
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    said = [
        subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True, env=environment
        )
        for arguments in ([], ["jaxtune"])
    ]
    assert "PyTorch was not found" in said[0].stderr
    assert "IProgress not found" in said[0].stderr
    assert (said[1].stdout, said[1].stderr) == ("", "")
