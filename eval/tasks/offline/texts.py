# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Held-out real text: passages to compress, and cloze questions made from other passages of the same source."""

import json
import random
import re
from pathlib import Path

from datasets import Dataset


PASSAGES_TO_COMPRESS = 20  # the first of each file; cloze questions come from the rest, one a passage
CONTEXT_CHARACTERS = 200
CHOICES = 4
# A word inside a line of prose, after a space, so that the choice is one more word of the sentence.
WORD = re.compile(r"(?<=[a-z,;] )[a-z]{4,}(?=[ ,.;:!?\n])")


def read(name: str) -> list[dict]:
    """The passages of `name`.jsonl in this folder: `source` and `text`."""
    path = Path(__file__).parent / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def passages(texts: str, **_) -> dict[str, Dataset]:
    """Documents of `source` and `text`.

    Args:
        texts: `"shakespeare"` or `"python_reference"`.
    """
    return {"test": Dataset.from_list(read(texts)[:PASSAGES_TO_COMPRESS])}


def distractors(word: str, vocabulary: list[str], rng: random.Random) -> list[str]:
    """Words of the same text with the same ending and about the same length: mostly the same part of speech.

    A word with an ending too rare for that gets words of its length.
    """
    others = [other for other in vocabulary if other != word]
    fitting = [other for other in others if other[-2:] == word[-2:] and abs(len(other) - len(word)) <= 2]
    if len(fitting) < CHOICES - 1:
        fitting = [other for other in others if len(other) == len(word)]
    if len(fitting) < CHOICES - 1:
        fitting = sorted(others, key=lambda other: abs(len(other) - len(word)))[:10]
    return rng.sample(fitting, CHOICES - 1)


def cloze(texts: str, item_seed: int = 0, **_) -> dict[str, Dataset]:
    """The last word of a context, among three other words of the same text.

    Args:
        texts: `"shakespeare"` or `"python_reference"`.
        item_seed: which words are asked for.

    Returns:
        Documents of `context`, `choices` (4 words), `gold` (index) and `source`.
    """
    records = read(texts)
    rng = random.Random(f"{texts} {item_seed}")
    vocabulary = sorted({word for record in records for word in WORD.findall(record["text"])})
    documents = []
    for record in records[PASSAGES_TO_COMPRESS:]:
        text = record["text"]
        match = rng.choice([found for found in WORD.finditer(text) if found.start() > CONTEXT_CHARACTERS])
        context = text[match.start() - CONTEXT_CHARACTERS : match.start()].split(maxsplit=1)[1].rstrip()
        choices = distractors(match[0], vocabulary, rng) + [match[0]]
        rng.shuffle(choices)
        documents.append(
            {
                "context": context,
                "choices": choices,
                "gold": choices.index(match[0]),
                "source": record["source"],
            }
        )
    return {"test": Dataset.from_list(documents)}
