"""Tables as a terminal shows them."""

import json
import logging
import math
import re
import sys

import absl.logging
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.cli.common import emit, start_devices, table

ROW = {
    "trial": 1,
    "early": 4.7012,
    "final": None,
    "status": "finished",
    "learning_rate": 0.0005154,
    "warmup": 0.1235,
    "weight_decay": 0.00123,
    "rank": 16,
    "alpha": 31.12,
    "dropout": 0.1235,
}


def test_a_table_of_a_search_fits_eighty_columns_without_breaking_a_number(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", table([ROW, ROW], title="trials"))
    assert max(map(len, drawn.splitlines())) <= 80
    last = drawn.splitlines()[-1]
    assert last.split() == ["1", "4.701", "–", "finished", "0.0005154", "0.1235", "0.00123", "16", "31.12", "0.1235"]
    monkeypatch.setenv("COLUMNS", "110")
    assert "learning_rate" in table([ROW]), "names are whole where there is room"


@pytest.mark.parametrize("columns", [30, 40])
def test_a_terminal_that_no_table_fits_in_is_shown_lines(monkeypatch, columns):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = table([ROW, ROW], title="trials").splitlines()
    assert lines[0] == "trials"
    cells = ["1", "4.701", "–", "finished", "0.0005154", "0.1235", "0.00123", "16", "31.12", "0.1235"]
    assert [line.split() for line in lines[1:11]] == [list(pair) for pair in zip(ROW, cells, strict=True)]
    assert max(map(len, lines)) <= columns
    drawn = re.sub(
        r"\x1b\[[0-9;]*m", "", table([{"study": "a" * 60, "trials": 3, "status": "best", "share": "0.542 %"}])
    )
    assert {"best", "0.542 %"} <= {part.strip() for line in drawn.splitlines() for part in line.split("  ")}


def test_numbers_that_are_not_finite_are_null_in_json(capsys):
    result = {"metrics": {"loss": math.nan, "f1": 1.0}, "trials": [np.float32(0.5), math.inf, (1, -math.inf)]}
    emit(result, True, "")
    output = capsys.readouterr().out
    assert json.loads(output, parse_constant=pytest.fail) == {
        "metrics": {"loss": None, "f1": 1.0},
        "trials": [0.5, None, [1, None]],
    }


MARKUP = st.text(alphabet=r"[]/\\:abred!=@ ", min_size=1, max_size=12).map(str.strip).filter(bool)


@given(title=MARKUP, name=MARKUP, cell=MARKUP)
def test_a_table_tells_names_as_they_are(title, name, cell):
    """Brackets are no markup and ``:red_heart:`` is no picture, in cells, heads and titles."""
    lines = table([{name: cell, "key": "[red]:heart:[/]"}], title=title).splitlines()
    assert lines[0].strip() == title
    assert lines[1].split("key")[0].strip() == name
    assert lines[2].strip() == f"{cell}".ljust(len(lines[2].split("[red]:heart:[/]")[0])) + "[red]:heart:[/]"


def test_a_title_is_one_line_whatever_the_width_of_the_table():
    title = "the winner of runs/quickstart, trial 2, at step 40 on test"
    assert table([{"metric": "loss", "value": 1.739}], title=title).splitlines()[0] == title


def test_a_warning_is_told_without_its_level_and_module(monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])
    start_devices()
    absl.logging.vlog(2, "what gives the root a handler where it has none")
    logging.getLogger("jaxtune.training.idle_keys").warning("never acts: train.patience")
    assert capsys.readouterr().err == "never acts: train.patience\n"
