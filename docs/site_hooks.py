"""What the site (``make docs``) has beside the pages of docs/.

Pages from elsewhere in the repository, the notebook as a page, the public API by its names, and links that lead where
the site keeps what they name. The build fails where a page would load anything from another place.
"""

from __future__ import annotations

import importlib
import inspect
import json
import posixpath
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Where files of the repository are in the site; all else that is linked keeps its path.
PAGES = {
    "README.md": "index.md",
    "kernels/README.md": "kernels.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "docs/first_search.ipynb": "first_search.md",
}
MODULES = ("config", "data", "models", "parallel", "updates", "training", "evaluation", "search")

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")
# Attributes and style rules that a browser loads by itself; links are followed by readers alone.
_LOADS = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\ssrc=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*?\shref=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|@import\s+(?:url\()?["']?((?:https?:)?//[^"')\s]+)"""
    r"""|url\(["']?((?:https?:)?//[^"')\s]+)"""
)
# Scripts that the theme's own would fetch where a page has diagrams or the browser is old: no page has, and none shall.
_FETCHED = re.compile(r"https://unpkg\.com/[^\"'`)\s]*")


def in_site(path: str) -> str:
    """Where the site keeps a file of the repository."""
    return PAGES.get(path, path.removeprefix("docs/"))


def relinked(text: str, path: str) -> tuple[str, set[str]]:
    """A page of the repository with the site's links.

    Args:
      text: Markdown.
      path: of the page, from the repository's root.

    Returns:
      The text, and the files outside docs/ that it links and the site must therefore hold. Links to folders and to
      source code become their text: the site has pages, not the repository.
    """
    needed: set[str] = set()
    here = posixpath.dirname(in_site(path))

    def moved(link: re.Match[str]) -> str:
        image, label, target, anchor = link.groups()
        file = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if (ROOT / file).is_dir() or file.endswith(".py"):
            return label
        if not file.startswith("docs/") and file not in PAGES:
            needed.add(file)
        return f"{image}[{label}]({posixpath.relpath(in_site(file), here or '.')}{anchor or ''})"

    return _LINK.sub(moved, text), needed


def notebook_page(notebook: Mapping[str, Any]) -> str:
    """A notebook, with its outputs as text, as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            text = "".join(output.get("text") or output.get("data", {}).get("text/plain", []))
            if text.strip():
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _entry(package: str, name: str) -> str:
    """What the API's page says of a public name."""
    from pydantic import BaseModel

    from jaxtune.config.reference import table

    value = getattr(importlib.import_module(package), name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        home = _assigned_in(package.partition(".")[0], name, value)
        return f"### `{name}`\n\n`{package}.{name}`" if home is None else f"::: {home}.{name}"
    lines = [f"::: {value.__module__}.{value.__qualname__}"]
    if inspect.isclass(value) and issubclass(value, BaseModel):
        # The keys of a section have their meaning in the schema, not in docstrings.
        lines += ["    options: {members: false, merge_init_into_class: false}", "", *table(value)]
    return "\n".join(lines)


def _assigned_in(package: str, name: str, value: Any) -> str | None:
    """The module of a package that gives a value, which tells no origin of its own, its name: that of a type."""
    for module in [module for known, module in sorted(sys.modules.items()) if known.startswith(f"{package}.")]:
        if getattr(module, name, None) is value and re.search(rf"^{name}\b[^\n]* = ", inspect.getsource(module), re.M):
            return module.__name__
    return None


def api_pages() -> dict[str, str]:
    """The pages of the public names: those of ``jaxtune``, of its public modules, and of the kernels."""
    import jaxtune

    top = [name for name in jaxtune.__all__ if not name.startswith("__")]
    parts = ["# jaxtune", "What `import jaxtune` gives.", *(_entry("jaxtune", name) for name in top)]
    pages = {"api/index.md": parts, "api/modules.md": ["# Modules", "What the packages below `jaxtune` add."]}
    for module in MODULES:
        package = importlib.import_module(f"jaxtune.{module}")
        pages["api/modules.md"] += [f"## jaxtune.{module}", inspect.getdoc(package) or ""]
        names = [name for name in package.__all__ if name not in top]
        pages["api/modules.md"] += [_entry(package.__name__, name) for name in names]
    kernels = importlib.import_module("jaxtune_kernels")
    pages["api/kernels.md"] = ["# jaxtune_kernels", inspect.getdoc(kernels) or ""]
    pages["api/kernels.md"] += [_entry("jaxtune_kernels", name) for name in kernels.__all__]
    return {path: "\n\n".join(parts) + "\n" for path, parts in pages.items()}


def loads(files: Iterable[Path]) -> list[str]:
    """What pages and style sheets would load from elsewhere: ``file: address``."""
    return [
        f"{file.name}: {next(filter(None, match.groups()))}"
        for file in files
        for match in _LOADS.finditer(file.read_text(encoding="utf-8"))
    ]


# MkDocs' events.


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages from elsewhere and whatever the pages link."""
    from mkdocs.structure.files import File

    needed: set[str] = set()
    for path in [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]:
        text = (ROOT / path).read_text(encoding="utf-8")
        text, linked = relinked(notebook_page(json.loads(text)) if path.endswith(".ipynb") else text, path)
        needed |= linked
        if path in PAGES:
            files.append(File.generated(config, in_site(path), content=text))
    for path, text in api_pages().items():
        files.append(File.generated(config, path, content=text))
    for path in sorted(needed):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Gives the pages of docs/ the site's links."""
    if page.file.generated_by:
        return markdown
    return relinked(markdown, f"docs/{page.file.src_uri}")[0]


def on_post_build(config: Any) -> None:
    """Takes the theme's addresses of other hosts away, and fails where anything else would be loaded from one."""
    from mkdocs.exceptions import PluginError

    site = Path(config.site_dir)
    for script in site.rglob("*.js"):
        text = script.read_text(encoding="utf-8")
        if cleaned := _FETCHED.sub("", text) if _FETCHED.search(text) else None:
            script.write_text(cleaned, encoding="utf-8")
    if found := loads(file for file in site.rglob("*") if file.suffix in (".html", ".css", ".svg")):
        raise PluginError("the site would load from elsewhere: " + "; ".join(found[:10]))
