"""Studies recorded once are repeated, journal for journal: what was proposed, scored, promoted and told then, is now.

``python tests/search/test_recorded.py`` records them anew, after a change that is meant to change proposals.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from synthetic import REFERENCE, SPACE, SyntheticRunner, interrupt_at, records, search_config

from jaxtune.search import Outcome, Study, Trial
from jaxtune.search.journal import Journal

RECORDED = Path(__file__).with_name("recorded")


class Noisy(SyntheticRunner):
    """Its noise follows from trial and step, not from the last bit of the configuration."""

    def run(self, trial: Trial, until: int) -> Outcome:
        outcome = super().run(trial, until)
        if outcome.diverged:
            return outcome
        score = self.floor(trial.configuration) + 0.3 * math.exp(-4 * until / self.steps)
        score += 0.004 * math.sin(7 * trial.id + until)
        return Outcome(self.sign * score, self.noise, until, 0.5, {"validation_loss": score})


@dataclass(frozen=True)
class Case:
    """A study.

    Attributes:
      settings: of the search, where they are not those of ``search_config``.
      capacity: trials at a time.
      divergence: rates above it diverge.
      stops: where a process ends, each in the middle of a trial on its way to a step.
      extended: settings that the study goes on with after its end.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    capacity: int = 1
    divergence: float = 5e-3
    stops: tuple[tuple[int, int], ...] = ()
    extended: Mapping[str, Any] = field(default_factory=dict)
    optuna: bool = False


LADDER = {"ladder": [0.1, 0.2], "fraction": 0.4, "trials": 9, "promote": 2}
CASES = {
    "gp": Case(stops=((6, 10),)),
    "gp_population": Case(capacity=3, stops=((0, 50),), extended={"trials": 10, "promote": 4}),
    "gp_divergence": Case({"initial": 6}, divergence=1e-3),
    "ladder": Case(LADDER, stops=((5, 5), (0, 10))),
    "ladder_population": Case({**LADDER, "method": "random"}, capacity=3, extended={"trials": 11, "promote": 3}),
    "maximised": Case({"objective": "f1", "method": "random"}, capacity=3),
    "tpe": Case({"method": "tpe"}, capacity=3, optuna=True),
    "hyperband": Case({"method": "hyperband", "fraction": 0.4, "trials": 10}, stops=((7, 3),), optuna=True),
}


def run(case: Case, directory: Path) -> list[list[Any]]:
    """Runs a study, and tells it in brief."""
    settings = dict(case.settings)
    maximised = settings.get("objective", "loss") != "loss"
    summary = None

    def go_on(stop: tuple[int, int] | None) -> Any:
        runner = Noisy(capacity=case.capacity, divergence=case.divergence, sign=-1.0 if maximised else 1.0)
        if stop is not None:
            runner.before = interrupt_at(*stop)
        search = search_config(**settings)
        direction = "max" if maximised else "min"
        return Study(directory, search, runner, direction=direction, reference=REFERENCE, base={"name": "test"}).run()

    for stop in case.stops:
        assert go_on(stop) is None, f"it never came to {stop}"
    summary = go_on(None)
    if case.extended:
        (directory / "summary.json").unlink()
        with Journal(directory) as journal:
            journal.append("changed", **case.extended)
        settings |= case.extended
        summary = go_on(None)
    assert summary is not None
    end = {
        "statuses": [trial["status"] for trial in summary["trials"]],
        "best": summary["best"]["trial"],
        "rank_agreement": summary["rank_agreement"],
        "budget": summary["budget"],
        "importance": summary["importance"],
    }
    return [*map(brief, records(directory)[1:]), ["summary", end]]


def brief(record: Mapping[str, Any]) -> list[Any]:
    """A record without what others tell as well."""
    event = record["event"]
    told = [event, record.get("trial")]
    if event == "proposed":
        configuration = record["configuration"]
        told += [configuration[key] for key in SPACE]
        return [*told, *(record[key] for key in ("source", "told", "pending"))]
    return [*told, *(record[key] for key in _TOLD if key in record)]


_TOLD = ("trials", "promote", "phase", "step", "waits", "program", "compilations", "rank", "score", "estimate")


def rounded(value: Any) -> Any:
    """With seven digits."""
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def near(found: Any, expected: Any, where: str) -> None:
    """Equal, but for the last digits of numbers, which other versions of NumPy and SciPy round otherwise."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6), where
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for one, other in zip(found, expected, strict=True):
            near(one, other, f"{where}: {found} is not {expected}")
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            near(found[key], expected[key], f"{where}.{key}")
    else:
        assert found == expected, where


@pytest.mark.parametrize("name", CASES)
def test_a_recorded_study_repeats_itself(name, tmp_path):
    if CASES[name].optuna:
        pytest.importorskip("optuna")
    lines = (RECORDED / f"{name}.jsonl").read_text().splitlines()
    found = run(CASES[name], tmp_path)
    for number, (one, line) in enumerate(zip(found, lines, strict=True), start=1):
        near(one, json.loads(line), f"record {number} of {name}")


if __name__ == "__main__":
    RECORDED.mkdir(exist_ok=True)
    for case_name, one_case in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            lines = [json.dumps(rounded(record)) for record in run(one_case, Path(scratch))]
        (RECORDED / f"{case_name}.jsonl").write_text("\n".join(lines) + "\n")
