"""`tfds:product_listings`: generated product pages for attribute extraction, without a download.

Each row is one page: an HTML fragment, its category and what it says about eight attributes. Markup, labels, wording
and order vary; some attributes stand in running text only; other brands, colours and numbers stand beside the right
ones. A page need not give every attribute of its category, and only a quarter of the pages give a rating, so an
extractor also has to notice what is absent. Brands are invented words and no brand is in two splits: values have to be
read, not remembered.

TFDS stores a mapping with fixed keys, so an attribute that the page does not give is the empty string.
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections.abc import Callable, Iterator, Mapping

import tensorflow_datasets as tfds

ATTRIBUTES = ("brand", "model", "color", "size", "weight", "material", "flavor", "rating")

SPLITS = {"train": 2000, "validation": 200, "test": 200}

# A brand's checksum says which split may use it; what is left over is for generated pretraining text.
_BRAND_BUCKETS = {"train": range(6), "validation": range(6, 7), "test": range(7, 8), "pretraining": range(8, 10)}

_RATING_SHARE = 0.25
_PRESENT_SHARE = 0.85
_PROSE_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Category:
    """A kind of product: what it is called, which attributes it can have and how its size is written."""

    nouns: tuple[str, ...]
    attributes: tuple[str, ...]
    size: str
    materials: tuple[str, ...] = ()


_FABRICS = ("cotton", "wool", "linen", "silk", "denim", "fleece", "nylon", "felt")
_HARD = ("steel", "oak", "glass", "bamboo", "brass", "plastic", "walnut", "ceramic", "aluminium", "copper")
_LEATHERS = ("leather", "suede", "canvas", "mesh", "rubber", "nylon")

CATEGORIES: Mapping[str, Category] = {
    "shoes": Category(
        ("shoe", "boot", "sandal", "sneaker"),
        ("brand", "model", "color", "size", "weight", "material", "rating"),
        "shoe",
        _LEATHERS,
    ),
    "clothing": Category(
        ("shirt", "jacket", "scarf", "sweater"), ("brand", "color", "size", "material", "rating"), "letter", _FABRICS
    ),
    "bags": Category(
        ("backpack", "bag", "suitcase", "wallet"),
        ("brand", "model", "color", "size", "weight", "material", "rating"),
        "litre",
        _LEATHERS,
    ),
    "home": Category(
        ("lamp", "shelf", "chair", "mirror"),
        ("brand", "model", "color", "size", "weight", "material", "rating"),
        "box",
        _HARD,
    ),
    "kitchen": Category(
        ("kettle", "pan", "mug", "bowl"), ("brand", "model", "color", "size", "material", "rating"), "litre", _HARD
    ),
    "audio": Category(
        ("speaker", "headset", "radio", "earphone"), ("brand", "model", "color", "weight", "rating"), "box"
    ),
    "drinks": Category(("tea", "juice", "coffee", "soda"), ("brand", "flavor", "size", "rating"), "millilitre"),
    "snacks": Category(("bar", "cookie", "candy", "yoghurt"), ("brand", "flavor", "size", "weight", "rating"), "pack"),
}

COLORS = [
    "black",
    "white",
    "red",
    "navy",
    "olive",
    "teal",
    "grey",
    "ivory",
    "amber",
    "rose",
    "plum",
    "sand",
    "mint",
    "coral",
    "indigo",
    "lilac",
    "brown",
    "green",
    "blue",
    "orange",
    "purple",
    "silver",
    "gold",
    "pink",
]
_SHADES = ("dark", "light", "matte", "pale", "deep")
_FINISHES = ("recycled", "brushed", "organic", "solid", "soft")
FLAVORS = [
    "lemon",
    "mint",
    "vanilla",
    "cherry",
    "cocoa",
    "ginger",
    "honey",
    "peach",
    "almond",
    "caramel",
    "lime",
    "mango",
    "apple",
    "cinnamon",
    "hazelnut",
    "banana",
]

LABELS: Mapping[str, tuple[str, ...]] = {
    "brand": ("Brand", "Maker", "Manufacturer"),
    "model": ("Model", "Series", "Model name"),
    "color": ("Color", "Colour", "Shade"),
    "size": ("Size", "Format", "Size info"),
    "weight": ("Weight", "Net weight", "Mass"),
    "material": ("Material", "Made of", "Main material"),
    "flavor": ("Flavor", "Taste", "Flavour"),
    "rating": ("Rating", "Stars", "Score"),
}

# A value follows a tag everywhere on a page, so that its first token is the same as at the start of an answer.
_SENTENCES: Mapping[str, tuple[str, ...]] = {
    "brand": ("By <b>{value}</b>.", "A {noun} from <b>{value}</b>.", "This {noun} is made by <b>{value}</b>, as ever."),
    "model": ("This is the <b>{value}</b>.", "Sold as <b>{value}</b>.", "Ask for the <b>{value}</b>, our newest."),
    "color": ("It comes in <b>{value}</b>.", "Finished in <b>{value}</b>.", "The {noun} you see is <b>{value}</b>."),
    "size": ("It measures <b>{value}</b>.", "The size is <b>{value}</b>.", "You get <b>{value}</b>, no less."),
    "weight": ("It weighs <b>{value}</b>.", "In the hand it is <b>{value}</b>.", "The scale says <b>{value}</b>."),
    "material": ("Made of <b>{value}</b>.", "We use <b>{value}</b>.", "It is all <b>{value}</b>, by hand."),
    "flavor": ("It tastes of <b>{value}</b>.", "With a hint of <b>{value}</b>.", "Enjoy the <b>{value}</b>."),
    "rating": ("Buyers rate it <b>{value}</b>.", "Rated <b>{value}</b> by buyers.", "It earns <b>{value}</b> stars."),
}

_ONSETS = [
    "b",
    "br",
    "c",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "z",
]
_VOWELS = ["a", "e", "i", "o", "u", "ae", "ei", "o", "a", "e"]
_CODAS = ["", "", "", "n", "r", "l", "s", "x", "nd", "rk", "th", "m"]


def invented_word(rng: random.Random, syllables: int = 2) -> str:
    """A pronounceable lower-case word that is (almost surely) no English word."""
    word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
    return word + rng.choice(_CODAS)


def brand_of_split(rng: random.Random, split: str) -> str:
    """An invented brand that only ``split`` uses (``pretraining`` names the share no split uses)."""
    while True:
        brand = invented_word(rng, rng.choice((2, 2, 3))).capitalize()
        if zlib.crc32(brand.encode()) % 10 in _BRAND_BUCKETS[split]:
            return brand


def _model_name(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTVXZ") for _ in range(rng.choice((1, 2))))
    number = rng.randint(2, 99) * rng.choice((1, 10, 100))
    return rng.choice((f"{letters}{number}", f"{letters}-{number}", f"{letters} {number}"))


def _size(rng: random.Random, kind: str) -> str:
    if kind == "shoe":
        return f"{rng.randint(35, 48)}{rng.choice(('', '', '.5'))}"
    if kind == "letter":
        return rng.choice(("XS", "S", "M", "L", "XL", "XXL"))
    if kind == "litre":
        return f"{rng.randint(1, 45)}{rng.choice(('', '.5'))} l"
    if kind == "millilitre":
        return f"{rng.randint(5, 99) * 10} ml"
    if kind == "pack":
        return f"{rng.randint(2, 48)} pieces"
    return f"{rng.randint(5, 99)} x {rng.randint(5, 99)} cm"


def _weight(rng: random.Random) -> str:
    return rng.choice((f"{rng.randint(11, 99) * 10} g", f"{rng.randint(1, 9)}.{rng.randint(1, 9)} kg"))


def _value(rng: random.Random, attribute: str, category: Category, split: str) -> str:
    if attribute == "brand":
        return brand_of_split(rng, split)
    if attribute == "model":
        return _model_name(rng)
    if attribute == "color":
        return rng.choice(("", "", f"{rng.choice(_SHADES)} ")) + rng.choice(COLORS)
    if attribute == "size":
        return _size(rng, category.size)
    if attribute == "weight":
        return _weight(rng)
    if attribute == "material":
        return rng.choice(("", "", f"{rng.choice(_FINISHES)} ")) + rng.choice(category.materials)
    if attribute == "flavor":
        return " ".join(rng.sample(FLAVORS, rng.choice((1, 2))))
    return f"{rng.randint(1, 4)}.{rng.randint(0, 9)}"


def _distractors(rng: random.Random, attributes: Mapping[str, str], category: Category, split: str) -> list[str]:
    """Sentences with values of the right kind that are not this product's."""
    other_brand = brand_of_split(rng, split)
    other_color = rng.choice([color for color in COLORS if color not in attributes.get("color", "")])
    sentences = [
        f"Compare with <b>{other_brand}</b> <b>{_model_name(rng)}</b>.",
        f"Also seen in <b>{other_color}</b>.",
        f"Ships in {rng.randint(2, 9)} days.",
        f"{rng.randint(11, 990)} reviews.",
        f"Save {rng.randint(5, 60)} %.",
        f"Buy it with a <b>{other_brand}</b> {rng.choice(category.nouns)}.",
        f"Only {rng.randint(2, 40)} left.",
    ]
    return rng.sample(sentences, rng.choice((0, 1, 1, 2, 3)))


def _definition_list(rng: random.Random, items: list[tuple[str, str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{label}</dt><dd>{value}</dd>" for _, label, value in items) + "</dl>"


def _table(rng: random.Random, items: list[tuple[str, str, str]]) -> str:
    head = rng.choice(("th", "td"))
    rows = (f"<tr><{head}>{label}</{head}><td>{value}</td></tr>" for _, label, value in items)
    return "<table>" + "".join(rows) + "</table>"


def _list(rng: random.Random, items: list[tuple[str, str, str]]) -> str:
    template = rng.choice(("<li>{}: <b>{}</b></li>", "<li><b>{}</b><i>{}</i></li>", "<li>{} - <i>{}</i></li>"))
    return "<ul>" + "".join(template.format(label, value) for _, label, value in items) + "</ul>"


def _spans(rng: random.Random, items: list[tuple[str, str, str]]) -> str:
    # Class names give the attribute, the label is not shown.
    prefix = rng.choice(("", "", "p-"))
    return "".join(f'<span class="{prefix}{attribute}">{value}</span>' for attribute, _, value in items)


def _line(rng: random.Random, items: list[tuple[str, str, str]]) -> str:
    separator = rng.choice((" | ", "<br>", ", "))
    return "<p>" + separator.join(f"{label}: <b>{value}</b>" for _, label, value in items) + "</p>"


LAYOUTS: tuple[Callable[[random.Random, list[tuple[str, str, str]]], str], ...] = (
    _definition_list,
    _table,
    _list,
    _spans,
    _line,
)


def random_attributes(rng: random.Random, category: Category, split: str) -> dict[str, str]:
    """What one product's page says: attribute -> value, without the absent ones."""
    attributes = {}
    for attribute in category.attributes:
        share = {"brand": 1.0, "rating": _RATING_SHARE}.get(attribute, _PRESENT_SHARE)
        if rng.random() < share:
            attributes[attribute] = _value(rng, attribute, category, split)
    return attributes


def render_page(rng: random.Random, attributes: Mapping[str, str], category: Category, split: str) -> str:
    """An HTML fragment of one line that contains each value verbatim, among other things."""
    noun = rng.choice(category.nouns)
    order = rng.sample(list(attributes), len(attributes))
    prose = [attribute for attribute in order if rng.random() < _PROSE_SHARE]
    title = noun.capitalize()
    if rng.random() < 0.5 and "brand" not in prose:
        # The title names the brand; half of the time nothing else on the page does.
        title = f"{title} {rng.choice(('by', 'from'))} <b>{attributes['brand']}</b>"
        if rng.random() < 0.5:
            order.remove("brand")
    listed = [
        (attribute, rng.choice(LABELS[attribute]), attributes[attribute])
        for attribute in order
        if attribute not in prose
    ]
    sentences = [rng.choice(_SENTENCES[name]).format(value=attributes[name], noun=noun) for name in prose]
    sentences += _distractors(rng, attributes, category, split)
    rng.shuffle(sentences)
    heading = rng.choice(("h1", "h2", "h3"))
    parts = [f"<{heading}>{title}</{heading}>"]
    body = [rng.choice(LAYOUTS)(rng, listed)] if listed else []
    if sentences:
        body.append(f"<p>{' '.join(sentences)}</p>")
    rng.shuffle(body)
    wrapper = rng.choice(("div", "section", ""))
    page = "".join(parts + body)
    return f"<{wrapper}>{page}</{wrapper}>" if wrapper else page


def generate_rows(split: str, count: int, seed: int = 0) -> Iterator[dict]:
    """Rows of a split: ``id``, ``category``, ``html`` and ``attributes`` (every name, ``""`` where absent).

    A row depends on (seed, split, its index) only, so a longer split begins with a shorter one.
    """
    names = list(CATEGORIES)
    for index in range(count):
        rng = random.Random(f"product_listings/{seed}/{split}/{index}")
        name = rng.choice(names)
        category = CATEGORIES[name]
        attributes = random_attributes(rng, category, split)
        html = render_page(rng, attributes, category, split)
        yield {
            "id": f"{split}-{index:05d}",
            "category": name,
            "html": html,
            "attributes": {attribute: attributes.get(attribute, "") for attribute in ATTRIBUTES},
        }


class ProductListings(tfds.core.GeneratorBasedBuilder):
    """Product pages (HTML fragments) and their attributes, generated; see the module's docstring."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "id": text(),
                    "category": text(),
                    "html": text(),
                    "attributes": {attribute: text() for attribute in ATTRIBUTES},
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {split: self._generate_examples(split, count) for split, count in SPLITS.items()}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict]]:
        yield from enumerate(generate_rows(split, count))
