"""A bar with tokens/s and the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re

from rich.console import Console

from jaxtune.telemetry.progress import ProgressBoard, ProgressDisplay, short

METRICS = {"loss": 1.23456, "learning_rate": 3e-4, "grad_norm": 0.5, "tokens_per_second": 12345.6, "weight": 9.0}


def test_plain_lines_where_there_is_no_terminal():
    output, now = io.StringIO(), 100.0
    display = ProgressDisplay(ProgressBoard(Console(file=output, width=80)), title="trial 3", clock=lambda: now)
    display.on_start(4, 20)
    now = 130.0
    display.on_metrics(10, METRICS)
    display.on_metrics(20, {"validation_loss": 2.5})
    display.on_end()
    # Six steps took half a minute; ten are left.
    assert output.getvalue().splitlines() == [
        "trial 3  step 10/20  loss 1.2346  lr 3.00e-04  norm 0.50  12,346 tokens/s  0:00:50 left",
        "trial 3  step 20/20  validation loss 2.5000",
    ]


def test_a_bar_with_tokens_per_second_and_the_time_left_on_a_terminal():
    output = io.StringIO()
    board = ProgressBoard(Console(file=output, width=160, force_terminal=True, color_system=None))
    display = ProgressDisplay(board)
    display.on_start(4, 20)
    display.on_metrics(10, METRICS)
    board.refresh()
    display.on_end()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    assert "10/20" in shown
    assert "12,346 tokens/s" in shown
    # Hours, minutes and seconds; dashes until a rate is known.
    assert re.search(r"(\d|-):(\d\d|--):(\d\d|--)", shown)


def test_a_title_is_told_as_it_is():
    for terminal in (False, True):
        output = io.StringIO()
        board = ProgressBoard(Console(file=output, width=160, force_terminal=terminal, color_system=None))
        display = ProgressDisplay(board, title="exp[v2] [/red] :heart:")
        display.on_start(0, 2)
        display.on_metrics(1, METRICS)
        board.refresh()
        display.on_end()
        assert "exp[v2] [/red] :heart:" in output.getvalue()


def test_quiet_shows_nothing():
    output = io.StringIO()
    display = ProgressDisplay(ProgressBoard(Console(file=output, force_terminal=True)), quiet=True)
    display.on_start(0, 2)
    display.on_metrics(1, METRICS)
    display.on_end()
    assert output.getvalue() == ""


def test_only_what_is_there_is_shown():
    assert short({"exact_match": 0.25, "examples": 3.0}) == "exact match 0.250"


def test_trials_side_by_side_have_a_bar_each():
    output = io.StringIO()
    board = ProgressBoard(Console(file=output, width=120, force_terminal=True, color_system=None))
    displays = [ProgressDisplay(board, title=f"trial {number}") for number in range(3)]
    for display in displays:
        display.on_start(0, 10)
    for step, display in enumerate(displays, 1):
        display.on_metrics(step, {"loss": 1.0 / step})
    displays[1].on_end()
    displays[1].on_end()
    displays[0].on_metrics(7, {"loss": 0.25})
    board.refresh()
    for display in displays:
        display.on_end()
    drawn = output.getvalue()
    assert all(f"trial {number}" in drawn for number in range(3))
    assert "7/10" in drawn
    # The next run's bar starts afresh.
    displays[0].on_start(0, 4)
    board.refresh()
    displays[0].on_end()
    assert "0/4" in output.getvalue()
