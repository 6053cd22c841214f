"""Tables as a terminal shows them."""

import re
import sys

from jaxtune.cli.common import table

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
