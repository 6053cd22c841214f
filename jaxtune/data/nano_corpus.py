"""`tfds:nano_corpus`: generated text that the small model inside the package is pretrained on, and its tokenizer.

A model of a million parameters learns from a few million tokens only what those tokens insist on. What adapting it to
extraction needs is copying: find the place where something was said and repeat it. So every document says things twice,
in two of many formats (HTML pages, tables, lists, notes, sentences, plain repetition), in another order the second
time.

No line of any document begins with a name and a colon. That is the form in which the extraction task asks its
questions, and answering them is left to fine-tuning.

``python -m jaxtune.data.nano_corpus DIRECTORY`` trains the tokenizer and writes it there.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from jaxtune.data import product_listings

SPLITS = {"train": 60_000, "validation": 500}

VOCABULARY_SIZE = 1536
END_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"

# A space belongs to the word before it, so that a value has the same tokens after a tag and after a word, and a word is
# one token for the next one to follow. Digits are single. A run of tags is one piece, which halves the length of a
# page.
_PIECES = r"(?:</?[a-z][a-z0-9]*>)+|<[a-z]+ class=\"|\">|[A-Za-z]+ ?|[0-9] ?|[^A-Za-z0-9\s] ?|\s"

_NAMES = [
    "name",
    "owner",
    "color",
    "city",
    "price",
    "shape",
    "taste",
    "year",
    "sound",
    "language",
    "leader",
    "river",
    "food",
    "metal",
    "flower",
    "animal",
    "game",
    "song",
    "tool",
    "number",
    "code",
    "street",
    "title",
    "author",
    "age",
    "height",
    "width",
    "speed",
    "power",
    "origin",
    "season",
    "county",
    "harbour",
    "captain",
    "crop",
    "symbol",
    "code",
    "key",
    "label",
    "grade",
    "class",
    "team",
    "role",
    "floor",
    "room",
    "gate",
    "track",
    "line",
    "unit",
    "stock",
    "port",
    "family",
    "genus",
    "habitat",
]
_KINDS = [
    "village",
    "ship",
    "bird",
    "island",
    "planet",
    "robot",
    "singer",
    "school",
    "bridge",
    "museum",
    "engine",
    "garden",
    "castle",
    "forest",
    "mine",
    "ferry",
]

_COMMON_WORDS = (*_NAMES, *_KINDS, *product_listings.COLORS, *product_listings.FLAVORS, *product_listings.ATTRIBUTES)


def _invented(rng: random.Random) -> str:
    return product_listings.invented_word(rng, rng.choice((1, 2, 2)))


def _random_value(rng: random.Random) -> str:
    return rng.choice(
        (
            lambda: product_listings.brand_of_split(rng, "pretraining"),
            lambda: _invented(rng),
            lambda: f"{_invented(rng)} {_invented(rng)}",
            lambda: rng.choice(product_listings.COLORS),
            lambda: str(rng.randint(1, 10 ** rng.randint(1, 4))),
            lambda: f"{rng.randint(1, 99)}.{rng.randint(0, 9)}",
            lambda: f"{''.join(rng.choice('ABCDEFGHKLMNPRSTVXZ') for _ in range(2))}{rng.randint(1, 999)}",
        )
    )()


def _restate(rng: random.Random, facts: Sequence[tuple[str, str]], subject: str) -> str:
    """The facts in one of the formats of notes; none puts a colon after a name."""
    form = rng.randrange(9)
    if form == 0:
        return "\n".join(f"{name} = {value}" for name, value in facts)
    if form == 1:
        return "\n".join(f"| {name} | {value} |" for name, value in facts)
    if form == 2:
        return " ".join(f"The {name} is {value}." for name, value in facts)
    if form == 3:
        return f"The {subject} has " + ", ".join(f"{name} {value}" for name, value in facts) + "."
    if form == 4:
        return "\n".join(f"{name} - {value}" for name, value in facts)
    if form == 5:
        return "\n".join(f"[{name}] {value}" for name, value in facts)
    if form == 6:
        return "\n".join(f"{name}\n {value}" for name, value in facts)
    if form == 7:
        return " ".join(f"{value} is the {name} of the {subject}." for name, value in facts)
    return "; ".join(f"{name} -> {value}" for name, value in facts)


def _page_document(rng: random.Random) -> str:
    """A product page and notes on it; the notes say so where the page does not give an attribute."""
    category = rng.choice(list(product_listings.CATEGORIES.values()))
    attributes = product_listings.random_attributes(rng, category, "pretraining")
    page = product_listings.render_page(rng, attributes, category, "pretraining")
    facts = [
        (name, attributes.get(name, "not given")) for name in rng.sample(category.attributes, len(category.attributes))
    ]
    return f"{page}\n{_restate(rng, facts, rng.choice(category.nouns))}"


def _record_document(rng: random.Random) -> str:
    """A record with random names and values, written twice."""
    names = rng.sample(_NAMES, rng.randint(3, 6))
    names = [_invented(rng) if rng.random() < 0.3 else name for name in names]
    facts = [(name, _random_value(rng)) for name in dict.fromkeys(names)]
    kind = rng.choice(_KINDS)
    first = _restate(rng, facts, kind) if rng.random() < 0.5 else _record_page(rng, facts, kind)
    return f"{first}\n{_restate(rng, rng.sample(facts, len(facts)), kind)}"


def _record_page(rng: random.Random, facts: Sequence[tuple[str, str]], kind: str) -> str:
    items = [(name, name.capitalize(), value) for name, value in facts]
    return f"<h2>{kind.capitalize()}</h2>{rng.choice(product_listings.LAYOUTS)(rng, items)}"


def _table_document(rng: random.Random) -> str:
    """Several subjects with the same names: which value is whose. A table first, sentences after it."""
    names = rng.sample(_NAMES, 2)
    subjects = [product_listings.brand_of_split(rng, "pretraining") for _ in range(rng.randint(3, 5))]
    rows = [(subject, [_random_value(rng) for _ in names]) for subject in subjects]
    head = f"| {rng.choice(_KINDS)} | {' | '.join(names)} |"
    table = "\n".join([head, *(f"| {subject} | {' | '.join(values)} |" for subject, values in rows)])
    facts = [(subject, name, value) for subject, values in rows for name, value in zip(names, values, strict=True)]
    form = rng.choice(
        ("The {1} of {0} is {2}.", "{0}, whose {1} is {2}.", "{2} is the {1} of {0}.", "{0} has {1} {2}.")
    )
    sentences = [form.format(*fact) for fact in rng.sample(facts, len(facts))]
    return f"{table}\n{' '.join(sentences)}"


def _repeated_document(rng: random.Random) -> str:
    """Random words, then the same words again and again: what induction is learnt from fastest."""
    if rng.random() < 0.6:
        words = [rng.choice(_COMMON_WORDS) for _ in range(rng.randint(4, 30))]
        repeats, separator = max(2, rng.randint(50, 100) // len(words)), " "
    else:
        words = [_random_value(rng) for _ in range(rng.randint(3, 12))]
        repeats, separator = rng.choice((2, 3)), rng.choice((" ", ", ", " | ", "<br>"))
    return separator.join(words * repeats)


_KINDS_OF_DOCUMENT: Mapping[Callable[[random.Random], str], float] = {
    _page_document: 0.3,
    _record_document: 0.2,
    _table_document: 0.1,
    _repeated_document: 0.4,
}


def generate_documents(split: str, count: int, seed: int = 0) -> Iterator[str]:
    """Documents of a split. Each depends on (seed, split, its index) only."""
    kinds, shares = list(_KINDS_OF_DOCUMENT), list(_KINDS_OF_DOCUMENT.values())
    for index in range(count):
        rng = random.Random(f"nano_corpus/{seed}/{split}/{index}")
        yield rng.choices(kinds, shares)[0](rng)


class NanoCorpus(tfds.core.GeneratorBasedBuilder):
    """Generated documents that say everything twice; see the module's docstring."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {split: self._generate_examples(split, count) for split, count in SPLITS.items()}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict]]:
        for index, text in enumerate(generate_documents(split, count)):
            yield index, {"text": text}


def train_tokenizer(directory: Path, documents: int = 20_000) -> None:
    """Trains a byte-level BPE tokenizer on the corpus and writes it in the form ``AutoTokenizer`` reads.

    Args:
      directory: where ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json`` go.
      documents: how many training documents to count merges on.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD_TOKEN, END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(generate_documents("train", documents), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_TOKEN, pad_token=PAD_TOKEN, clean_up_tokenization_spaces=False
    ).save_pretrained(directory)


def main() -> None:
    """Writes the tokenizer to the directory given on the command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directory", type=Path)
    train_tokenizer(parser.parse_args().directory)


if __name__ == "__main__":
    main()
