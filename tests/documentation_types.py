"""Whether the Python that README and docs show is typed: by mypy --strict and by pyright strict, as a user checks it.

No test of pytest's: two type checkers read jax, flax and transformers, which takes minutes. ``make lint`` runs it:
``python tests/documentation_types.py``. (kernels/README.md is left out: pyright strict knows no types of ``jax.jit``,
``jax.grad`` and lambdas in them, which that page is made of.)
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
# Packages that say nothing of their types: what comes from them is Any.
_UNTYPED = ("optax", "pandas")

# What must not pass, lest an API that says nothing of its types passes as well; each line ends in what is wrong.
_MISTAKES = """\
import jaxtune
from jaxtune.search import search

jaxtune.TrainConfig(stepz=3)
jaxtune.DataConfig(train=3, completion="{answer}")
jaxtune.LowRankRule(match="**", rank="8")


def mistakes(trainer: jaxtune.Trainer, config: jaxtune.Config) -> None:
    trainer.fit([], untill=3)
    config.data.validation.path
    jaxtune.train(config).stepz
    jaxtune.train(config).steps.upper()
    search(config).best
"""
_MISTAKEN_LINES = {4, 5, 6, 10, 11, 12, 13, 14}


def page_code(text: str) -> str:
    """The Python of a page as one module, each line where it stands in the page: a block goes on from those before.

    What is imported once is not imported again.
    """
    lines = [""] * (text.count("\n") + 1)
    imported: set[str] = set()
    for block in _BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        for number, line in enumerate(block[1].splitlines(), first):
            if line.startswith(("import ", "from ")):
                if line in imported:
                    continue
                imported.add(line)
            lines[number] = line
    return "\n".join(lines) + "\n"


def write_modules(folder: Path) -> dict[str, Path]:
    """Writes a module for each page that shows Python; the page of each file's name."""
    pages = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if _BLOCK.search(text):
            name = f"page_{re.sub(r'[^a-z0-9]', '_', page.stem.lower())}.py"
            (folder / name).write_text(page_code(text), encoding="utf-8")
            pages[name] = page.relative_to(ROOT)
    for package in _UNTYPED:
        (folder / package).mkdir()
        stub = "from typing import Any\n\ndef __getattr__(name: str) -> Any: ...\n"
        (folder / package / "__init__.pyi").write_text(stub, encoding="utf-8")
    return pages


def _mypy(folder: Path) -> list[str]:
    lines = ["[mypy]", "strict = True", f"mypy_path = {ROOT}:{ROOT / 'kernels'}:{folder}"]
    # As with an installed package: its own files are followed, and not reported.
    lines += ["[mypy-jaxtune.*,jaxtune_kernels.*]", "follow_imports = silent"]
    (folder / "mypy.ini").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [
        "mypy",
        "--no-error-summary",
        f"--cache-dir={ROOT / '.mypy_cache'}",
        f"--python-executable={sys.executable}",
    ]


def _pyright(folder: Path) -> list[str]:
    settings = {
        "typeCheckingMode": "strict",
        "include": ["page_*.py"],
        "extraPaths": [str(ROOT), str(ROOT / "kernels")],
        "stubPath": ".",
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    return ["pyright", f"--project={folder}", f"--pythonpath={sys.executable}"]


def check(folder: Path, pages: dict[str, Path]) -> str:
    """What the two checkers say of the modules in a folder, with the names of their pages; empty where all is well."""
    (folder / "page_mistakes.py").write_text(_MISTAKES, encoding="utf-8")
    problems = []
    for options in (_mypy(folder), _pyright(folder)):
        # pyright checks the files of its project, and takes no others beside one.
        files = [*pages, "page_mistakes.py"] if options[0] == "mypy" else []
        ended = subprocess.run([sys.executable, "-m", *options, *files], cwd=folder, capture_output=True, text=True)
        lines = ended.stdout.replace(f"{folder}/", "").splitlines()
        found = {int(number) for line in lines for number in re.findall(r"page_mistakes\.py:(\d+)", line)}
        if ended.returncode != 1 or found != _MISTAKEN_LINES:
            problems.append(f"{options[0]} found mistakes in lines {sorted(found)}, not in {sorted(_MISTAKEN_LINES)}")
            problems += [ended.stdout, ended.stderr]
        for name, page in pages.items():
            problems += [
                f"{options[0]}: {line.strip().replace(name, str(page))}" for line in lines if f"{name}:" in line
            ]
    return "\n".join(problems)


def main() -> int:
    """Checks every page; 1 where a checker finds fault."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        pages = write_modules(folder)
        said = check(folder, pages)
    print(said or f"mypy --strict and pyright strict pass: {', '.join(map(str, pages.values()))}")
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
