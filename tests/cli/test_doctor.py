"""``jaxtune doctor``."""

from __future__ import annotations

import json
import sys

import pytest

from jaxtune.cli import main


def test_a_package_that_cannot_be_imported_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["broken"] == {}
    # An entry of None makes the import system raise ModuleNotFoundError.
    monkeypatch.setitem(sys.modules, "skopt", None)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("scikit-optimize"))
    assert "CANNOT BE IMPORTED" in line
