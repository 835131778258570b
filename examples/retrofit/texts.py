# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""A domain's documents, split into training, validation and test, and cut into blocks of tokens."""

import glob
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from modeling_attnres.eval.tasks import offline
from modeling_attnres.eval.tasks.offline.build_texts import paragraphs


# Every fifth document is for validation, every fifth for the test: a document is never in two splits.
FOLDS, VALIDATION, TEST = 5, 2, 4


@dataclass(frozen=True)
class Blocks:
    """Blocks of one split.

    Attributes:
        ids: `[n, T]`, tokens of one document each.
        num_bytes: `[n]`, bytes of UTF-8 in each block's predicted tokens (all but the first).
        documents: the `n` names of the documents.
    """

    ids: torch.Tensor
    num_bytes: torch.Tensor
    documents: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: torch.Tensor) -> "Blocks":
        return Blocks(self.ids[rows], self.num_bytes[rows], [self.documents[row] for row in rows.tolist()])

    def spread(self, count: int) -> "Blocks":
        """At most `count` blocks, evenly spread."""
        count = min(count, len(self))
        return self.select(torch.arange(count) * len(self) // count)


def evaluated_paragraphs() -> set[str]:
    """Paragraphs of more than a line that the offline task group evaluates on: no split may hold them."""
    folder = Path(offline.__file__).parent
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    return {part for line in lines for part in paragraphs(json.loads(line)["text"]) if len(part) > 60}


def read_documents(pattern: str) -> dict[str, str]:
    """The text files that match, by path, without the paragraphs of the offline task group.

    Raises:
        ValueError: if there are not enough files for the three splits.
    """
    paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True))
    if len(paths) < FOLDS:
        raise ValueError(f"`--domain` must match at least {FOLDS} text files, got {len(paths)} for {pattern}.")
    evaluated = evaluated_paragraphs()
    return {
        path.name: "\n\n".join(part for part in paragraphs(path.read_text("utf-8")) if part not in evaluated)
        for path in paths
    }


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """`[vocabulary]`, the bytes of every token of a byte-level BPE, which writes a byte as one character."""
    return torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])


def cut(documents: dict[str, str], tokenizer: PreTrainedTokenizerBase, length: int) -> Blocks:
    """Blocks of `length` tokens, each of one document; a document's last, short block is dropped."""
    ids, names = [], []
    for name, text in documents.items():
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)
        blocks = tokens[: len(tokens) // length * length].view(-1, length)
        ids.append(blocks)
        names += [name] * len(blocks)
    ids = torch.cat(ids)
    return Blocks(ids, token_bytes(tokenizer)[ids[:, 1:]].sum(1), names)


def load_domain(pattern: str, tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, Blocks]:
    """Splits `train`, `validation` and `test` of the files that match `pattern`.

    Raises:
        ValueError: if a split does not fill a block.
    """
    folds = {"train": {}, "validation": {}, "test": {}}
    for index, (name, text) in enumerate(read_documents(pattern).items()):
        split = {VALIDATION: "validation", TEST: "test"}.get(index % FOLDS, "train")
        folds[split][name] = text
    splits = {split: cut(documents, tokenizer, length) for split, documents in folds.items()}
    sizes = {split: len(blocks) for split, blocks in splits.items()}
    if not all(sizes.values()):
        raise ValueError(f"`--domain` must fill blocks of {length} tokens in every split, got {sizes} for {pattern}.")
    return splits
