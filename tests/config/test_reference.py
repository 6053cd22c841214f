from pathlib import Path

from jaxtune.config.reference import markdown


def test_the_page_of_all_keys_is_up_to_date():
    page = Path(__file__).parent.parent.parent / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == markdown(), (
        "run: python -m jaxtune.config.reference > docs/configuration.md"
    )
