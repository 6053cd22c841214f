"""Every number in the documentation is the one in the file that holds it (tests/documented_numbers.yaml says which)."""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxtune.experiments import ablation_page, data_size_page, early_score_page, transfer_page
from jaxtune.experiments.output import write_output

ROOT = Path(__file__).resolve().parent.parent
PAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "tests/documented_numbers.yaml").read_text(encoding="utf-8"))
EXPERIMENTS = {
    "early-score": early_score_page,
    "ablation": ablation_page,
    "data-size": data_size_page,
    "transfer": transfer_page,
}

_FIELD = re.compile(r"\{([^{}|]+?)(?:\|(\w+))?:([^{}:]+)\}")
_UNITS = {"": 1.0, "minutes": 1 / 60, "MiB": 2.0**-20, "percent": 100.0, "MB": 1e-6, "GB": 1e-9}
# Numbers that say how much or how long: with a fraction or a unit. Counts in words and settings are not looked for.
_UNIT = r"\s?(?:%|×|GB|MB|MiB|GiB|GFLOP|ms\b|s\b|min\b|minutes?\b|seconds?\b|hours?\b)"
_NUMBER = re.compile(rf"(?<![\w.,/\-])(?:\d[\d,]*(?:\.\d+)?(?:{_UNIT})|\d[\d,]*\.\d+(?![\w.])|\d{{1,3}},\d{{3}}\b)")


def words(text: str) -> str:
    """The text with its lines joined."""
    return " ".join(text.split())


@cache
def held(file: str) -> Any:
    return json.loads((ROOT / file).read_text(encoding="utf-8"))


def filled(template: str, file: str) -> str:
    """The template with the numbers of a file."""

    def number(field: re.Match[str]) -> str:
        value = held(file)
        for key in field[1].split("/"):
            value = value[int(key) if isinstance(value, list) else key]
        value *= _UNITS[field[2] or ""]
        return format(round(value) if field[3].endswith("d") else value, field[3])

    return _FIELD.sub(number, template)


def prose(text: str) -> str:
    """A page without code and addresses."""
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?:^|\n)\n(?:    .*(?:\n|$)|\n(?=    ))+", "\n\n", text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def sourced(page: str) -> list[str]:
    """The texts of a page whose numbers are accounted for."""
    entry = PAGES[page]
    measured = [filled(text, file) for file, texts in entry.get("measured", {}).items() for text in texts]
    return [words(text) for text in [*measured, *(text for texts in entry.get("given", {}).values() for text in texts)]]


def tables(page: str) -> list[str]:
    """The tables of a page that a benchmark writes."""
    if page != "docs/surrogates.md":
        return []
    sys.path.insert(0, str(ROOT / "benchmarks"))
    surrogates = pytest.importorskip("surrogates", exc_type=ImportError)
    import landscape_study
    import priors

    result = held("benchmarks/results/surrogates.json")
    names = list(surrogates.STRATEGIES)
    extras = [name for name in surrogates.EXTRAS if name in result["tasks"]["attr_oamine"]["strategies"]]
    wide = [held(f"benchmarks/results/surrogates-{which}.json") for which in ("development", "confirmation")
            if (ROOT / f"benchmarks/results/surrogates-{which}.json").exists()]  # fmt: skip
    return [
        priors.text(held("benchmarks/results/priors.json")["summary"]),
        *(landscape_study.as_markdown(one["summary"], split) for one in wide for split in one["summary"]),
        landscape_study.promotions_as_markdown(wide[0]["summary"]),
        *(landscape_study.judged_as_markdown(one["judged"]) for one in wide if "judged" in one),
        *(surrogates.as_markdown(result, names, tasks=[task]) for task in result["tasks"]),
        surrogates.as_markdown(result, names, prefix="test_", bands=False),
        surrogates.as_markdown(result, [surrogates.OURS, *extras], bands=False),
    ]


@pytest.mark.parametrize("page", PAGES)
def test_numbers_are_those_of_the_results(page):
    text = words((ROOT / page).read_text(encoding="utf-8"))
    for expected in [*sourced(page), *map(words, tables(page))]:
        assert expected in text, f"{page} does not say: {expected}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md")])
def test_no_number_is_without_a_source(page):
    text = words(prose((ROOT / page).read_text(encoding="utf-8")))
    for known in [*sourced(page), *map(words, tables(page))]:
        text = text.replace(words(prose(known)), " ")
    text = re.sub(r"`[^`]*`", " ", text)
    left = [text[max(0, found.start() - 60) : found.end() + 20] for found in _NUMBER.finditer(text)]
    assert not left, f"{page}: tests/documented_numbers.yaml does not say where these come from: {left}"


def test_every_page_is_looked_at():
    written = {str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")} - {"docs/configuration.md"}
    assert written | {"README.md", "CONTRIBUTING.md", "kernels/README.md", "docs/experiments/README.md"} <= set(PAGES)


FOLDERS = [file.parent for file in (ROOT / "docs/experiments").rglob("summary.json") if "journals" not in file.parts]


@pytest.mark.parametrize("folder", sorted(FOLDERS), ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_pages_of_experiments_are_written_from_their_summaries(folder, tmp_path):
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    page = EXPERIMENTS[folder.name.rpartition("-")[0]]
    write_output(tmp_path, summary, title=page.title(summary), text=page.text(summary))
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (folder / "README.md").read_text(encoding="utf-8")


def test_a_number_that_is_not_the_results_is_found(monkeypatch):
    """The comparison can fail: with another number in the file, and with one that no file has."""
    template = "| peak memory, MiB | {runs/0/jaxtune/peak_bytes|MiB:,.0f} |"
    assert filled(template, "benchmarks/results/train_step-cpu.json") == "| peak memory, MiB | 1,580 |"
    for text in ("it took 2 min", "0.96 against", "40 % saved", "3.45 × as long", "1,580 tokens", "12 s"):
        assert _NUMBER.search(prose(text)), text
    for text in (
        "a name of 3 words",
        "jax-0.10",
        "[x](a/0.5)",
        "version v2.0.1",
        "```\n3.5\n```\n",
        "x\n\n    0.5 s\n",
    ):
        assert not _NUMBER.search(prose(text)), text
