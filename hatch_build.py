"""The README as package indexes show it.

Its links are relative to the repository, which an index does not have: where ``JAXTUNE_BASE_URL`` is set while building
they point below it, else their text stands alone.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_RELATIVE_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\((?!https?://|#)([^)\s]+)\)")


def published_readme(text: str, base_url: str | None) -> str:
    """Markdown whose relative links point below ``base_url``, or are their text alone where there is none."""
    if base_url is None:
        return _RELATIVE_LINK.sub(r"\1", text)
    return _RELATIVE_LINK.sub(lambda link: f"[{link[1]}]({base_url.rstrip('/')}/{link[2]})", text)


class ReadmeHook(MetadataHookInterface):
    """Sets ``project.readme``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds the README to the project's metadata."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        base_url = os.environ.get("JAXTUNE_BASE_URL") or None
        metadata["readme"] = {"content-type": "text/markdown", "text": published_readme(text, base_url)}
