"""The README of the wheel: what a package index shows has no dead links."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)]*)\)")


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_base_url_only_absolute_links_remain(hook: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert any(not link.startswith("http") for link in LINK.findall(text))
    published = hook.published_readme(text, None)
    assert all(link.startswith("https://") for link in LINK.findall(published))
    assert "docs/configuration.md" in published


def test_with_a_base_url_every_link_is_below_it_and_names_a_file(hook: ModuleType) -> None:
    base = "https://example.org/jaxtune/blob/main"
    published = hook.published_readme((ROOT / "README.md").read_text(encoding="utf-8"), f"{base}/")
    inside = [link.removeprefix(f"{base}/") for link in LINK.findall(published) if link.startswith(base)]
    assert inside
    assert all((ROOT / link.partition("#")[0]).exists() for link in inside)
    assert all(link.startswith("https://") for link in LINK.findall(published))
