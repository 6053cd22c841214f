"""Generated data: product pages are what they claim to be, pretraining text never asks the task's questions."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from jaxtune.config.data_section import SourceConfig
from jaxtune.data import nano_corpus, product_listings
from jaxtune.data.product_listings import ATTRIBUTES, CATEGORIES, generate_rows
from jaxtune.data.sources import open_source

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "jaxtune" / "models" / "nano"


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {split: list(generate_rows(split, count)) for split, count in product_listings.SPLITS.items()}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(nano_corpus.generate_documents("train", 4000))


def test_same_seed_gives_the_same_pages_and_another_seed_others(rows):
    again = list(generate_rows("test", product_listings.SPLITS["test"]))
    assert rows["test"] == again
    assert [row["html"] for row in generate_rows("test", 20, seed=1)] != [row["html"] for row in again[:20]]
    # Changing this text changes everybody's prepared data: raise ProductListings.VERSION with it.
    assert rows["train"][0]["html"] == (
        "<h3>Radio</h3><dl><dt>Score</dt><dd>3.8</dd><dt>Series</dt><dd>RV6000</dd><dt>Maker</dt><dd>Boze</dd>"
        "<dt>Shade</dt><dd>light red</dd></dl><p>Compare with <b>Relum</b> <b>D9500</b>.</p>"
    )
    assert product_listings.ProductListings.VERSION == "1.0.0"


def test_every_value_is_on_its_page(rows):
    for row in (row for split in rows.values() for row in split):
        assert tuple(row["attributes"]) == ATTRIBUTES
        assert row["attributes"]["brand"]
        for attribute, value in row["attributes"].items():
            assert value in row["html"], (attribute, row)
            assert not value or attribute in CATEGORIES[row["category"]].attributes


def test_a_quarter_of_the_pages_give_a_rating(rows):
    rated = [bool(row["attributes"]["rating"]) for row in rows["train"]]
    assert 0.22 < sum(rated) / len(rated) < 0.28
    sized = [
        bool(row["attributes"]["size"]) for row in rows["train"] if "size" in CATEGORIES[row["category"]].attributes
    ]
    assert 0.8 < sum(sized) / len(sized) < 0.9


def test_no_product_and_no_brand_is_in_two_splits(rows, documents):
    brands = {split: {row["attributes"]["brand"] for row in part} for split, part in rows.items()}
    assert not brands["train"] & brands["validation"]
    assert not brands["train"] & brands["test"]
    assert not brands["validation"] & brands["test"]
    assert len({row["id"] for part in rows.values() for row in part}) == sum(map(len, rows.values()))
    words = {word for document in documents for word in re.findall(r"[A-Za-z]+", document)}
    # The pretraining text keeps to its own brands; an invented word may coincide with one by chance.
    assert len(words & brands["test"]) <= 2


def test_position_and_kind_do_not_give_the_answer_away(rows):
    """The first text that looks like an answer is often another product's or another attribute's."""
    model = re.compile(r"\b[A-Z]{1,2}[- ]?[0-9]{1,5}\b")
    first = [
        (found.group(), row["attributes"]["model"])
        for row in rows["train"]
        if row["attributes"]["model"] and (found := model.search(row["html"]))
    ]
    right = sum(guess == value for guess, value in first) / len(first)
    assert right < 0.95
    markers = ("<dl>", "<table>", "<ul>", '<span class="', "<br>")
    shares = [sum(marker in row["html"] for row in rows["train"]) / len(rows["train"]) for marker in markers]
    assert min(shares) > 0.05


def test_pretraining_text_never_has_the_form_of_a_question(documents):
    for document in documents:
        assert not re.search(r"^[A-Za-z ]+:", document, flags=re.MULTILINE), document
        assert "n/a" not in document


def test_pretraining_text_says_things_twice(documents):
    """Most words in the second half of a document stand in its first half already."""
    ratios = []
    for document in documents[:500]:
        words = re.findall(r"[A-Za-z0-9]+", document)
        first, second = set(words[: len(words) // 2]), words[len(words) // 2 :]
        ratios.append(sum(word in first for word in second) / len(second))
    assert sum(ratios) / len(ratios) > 0.6


def test_builder_prepares_without_tensorflow(rows, tmp_path):
    source = open_source(SourceConfig(path="tfds:product_listings", split="validation", data_dir=str(tmp_path)))
    assert list(source) == rows["validation"]
    assert "tensorflow" not in sys.modules


def test_schema_file_lists_what_each_category_can_have():
    schema = json.loads((ROOT / "configs" / "product_listings_attributes.json").read_text())
    assert schema == {name: list(category.attributes) for name, category in CATEGORIES.items()}


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(NANO)


def test_tokenizer_gives_text_back(tokenizer, rows, documents):
    for text in [row["html"] for row in rows["test"]] + documents[:200] + ["Größe: 5 µm\n\t“ok” 漢字 "]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_value_has_the_same_tokens_on_the_page_and_in_the_answer(tokenizer):
    answer = tokenizer(" Zeikrand").input_ids[1:]
    for page in ("<dd>Zeikrand</dd>", "By Zeikrand.", '<span class="brand">Zeikrand</span>', "Brand: Zeikrand<br>"):
        tokens = tokenizer(page).input_ids
        assert any(tokens[start : start + len(answer)] == answer for start in range(len(tokens))), page


def test_question_and_answer_fit_the_quickstart_row(tokenizer, rows):
    longest = max(len(tokenizer(f"{row['html']}\nmaterial: brushed aluminium").input_ids) for row in rows["train"])
    assert longest <= 128


def test_package_data_is_small():
    assert sum(path.stat().st_size for path in NANO.iterdir()) <= 8 * 2**20
