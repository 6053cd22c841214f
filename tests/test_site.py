"""What the site adds to the pages of docs/. ``make docs`` builds it, and fails where it would load from elsewhere."""

from __future__ import annotations

import importlib.util
import posixpath
import re
from pathlib import Path

import jaxtune_kernels
import pytest

import jaxtune
from jaxtune.config.training_sections import TrainConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_has_its_place(hooks):
    pages = hooks.api_pages()
    for name in jaxtune.__all__:
        if name != "__version__":
            assert re.search(rf"^::: jaxtune\.[\w.]+\.{name}$", pages["api/index.md"], flags=re.M), name
    for name in jaxtune_kernels.__all__:
        assert re.search(rf"(^::: jaxtune_kernels[\w.]*\.|### `){name}\b", pages["api/kernels.md"], flags=re.M), name
    for key, field in TrainConfig.model_fields.items():
        assert re.search(rf"^\| `{key}` \|.*{re.escape((field.description or '')[:20])}", pages["api/index.md"], re.M)
    assert "::: jaxtune.training.trainer.Trainer" not in pages["api/modules.md"], "told once"


def test_links_lead_where_the_site_keeps_their_files(hooks):
    """Also from pages that lie outside docs/, and to files that do; what the site has not becomes its text."""
    repository = [*hooks.PAGES, *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
    held = {hooks.in_site(path) for path in repository}
    checked = 0
    for path in (path for path in repository if path.endswith(".md")):
        text, needed = hooks.relinked((ROOT / path).read_text(encoding="utf-8"), path)
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
            place = posixpath.normpath(posixpath.join(posixpath.dirname(hooks.in_site(path)), target))
            assert place in held | needed or (ROOT / "docs" / place).is_file(), f"{path}: {target}"
            checked += 1
        assert all((ROOT / file).is_file() for file in needed)
    assert checked > 40
    linked = "[a](docs/studies.md#more-of-it) [`b`](configs/chat.yaml) [c](jaxtune/cli) ![d](docs/figures/x.svg)"
    expected = "[a](studies.md#more-of-it) [`b`](configs/chat.yaml) c ![d](figures/x.svg)"
    assert hooks.relinked(linked, "README.md") == (expected, {"configs/chat.yaml"})
    assert hooks.relinked("[k](../../kernels/README.md)", "docs/experiments/README.md") == ("[k](../kernels.md)", set())


@pytest.mark.parametrize(
    ("markup", "found"),
    [
        ('<script async src="https://cdn.example/x.js"></script>', True),
        ("<link rel=stylesheet href=//fonts.example/css>", True),
        ('<style>@import url("https://fonts.example/css")</style>', True),
        ("a { background: url(https://example.org/x.png) }", True),
        ('<img alt="" src="https://example.org/badge.svg">', True),
        (
            '<a href="https://example.org">there</a><img src="figures/x.svg"><svg xmlns="http://www.w3.org/2000/svg">',
            False,
        ),
        ("<link rel=canonical href=https://example.org/><script src=assets/x.js></script>", False),
        ("a { background: url('data:image/svg+xml;charset=utf-8,<svg xmlns=\"http://www.w3.org/2000/svg\">') }", False),
    ],
)
def test_what_a_browser_would_fetch_from_elsewhere_is_found(hooks, tmp_path, markup, found):
    page = tmp_path / "page.html"
    page.write_text(markup, encoding="utf-8")
    assert bool(hooks.loads([page])) is found


def test_a_notebook_becomes_a_page(hooks):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "words"]},
        {
            "cell_type": "code",
            "source": ["1 + 1"],
            "outputs": [{"data": {"text/plain": ["2"], "text/html": ["<b>2</b>"]}}],
        },
        {"cell_type": "code", "source": ["print()"], "outputs": [{"output_type": "stream", "text": ["\n"]}]},
    ]
    expected = "# Title\nwords\n\n```python\n1 + 1\n```\n\n```text\n2\n```\n\n```python\nprint()\n```\n"
    assert hooks.notebook_page({"cells": cells}) == expected
