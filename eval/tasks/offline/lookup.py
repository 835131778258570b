# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Chains of look-ups of growing length: the answer is so many hops away, and every hop needs the one before it."""

import itertools
import random
import string

from datasets import Dataset


ITEMS = 50
SHOTS = 2
CHAINS = 2
DIGITS = tuple(string.digits)


def chains(rng: random.Random, hops: int) -> dict:
    """`CHAINS` chains of assignments in random order of lines; the question is the end of one of them.

    With one hop, `k = 7`, `p = k`, then `p =`. The other chains are as long and end in other digits, so neither the
    lines' number nor a digit's mere presence gives the answer away.
    """
    names = rng.sample(string.ascii_lowercase, CHAINS * (hops + 1))
    values = rng.sample(DIGITS, CHAINS)
    lines, ends = [], []
    for chain in range(CHAINS):
        links = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        lines.append(f"{links[0]} = {values[chain]}")
        lines += [f"{name} = {previous}" for previous, name in itertools.pairwise(links)]
        ends.append(links[-1])
    rng.shuffle(lines)
    asked = rng.randrange(CHAINS)
    return {"question": "\n".join([*lines, f"{ends[asked]} ="]), "gold": int(values[asked]), "choices": list(DIGITS)}


def look_ups(hops: int, item_seed: int = 0, **_) -> dict[str, Dataset]:
    """Documents of `question`, `choices` (the ten digits) and `gold`, the digit.

    Args:
        hops: from the question to the digit, at least 1; `CHAINS * (hops + 1)` names must fit the alphabet.
    """
    if not 1 <= hops < len(string.ascii_lowercase) // CHAINS:
        raise ValueError(f"`hops` must be between 1 and {len(string.ascii_lowercase) // CHAINS - 1}, got {hops}")
    rng = random.Random(f"look-ups {hops} {item_seed}")
    documents = [chains(rng, hops) for _ in range(ITEMS + SHOTS)]
    return {"examples": Dataset.from_list(documents[:SHOTS]), "test": Dataset.from_list(documents[SHOTS:])}
