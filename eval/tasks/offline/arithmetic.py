# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Generated arithmetic with exact answers, and word problems of several steps, both from a seed."""

import random

from datasets import Dataset


ARITHMETIC_ITEMS = 80
STORY_ITEMS = 30
SHOTS = 3
PEOPLE = ("Ada", "Ben", "Chen", "Dora", "Emil", "Fatma", "Goran", "Hana", "Ivo", "Jun")
THINGS = ("apples", "books", "coins", "marbles", "shells", "stamps", "tickets", "walnuts")


def expression(rng: random.Random) -> tuple[str, int]:
    """One of: a sum or difference of two-digit numbers, a product, a nested expression of one-digit numbers."""
    kind = rng.choice(("sum", "difference", "product", "nested"))
    if kind == "sum":
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        return f"{a} + {b}", a + b
    if kind == "difference":
        b, a = sorted((rng.randrange(10, 100), rng.randrange(10, 100)))
        return f"{a} - {b}", a - b
    if kind == "product":
        a, b = rng.randrange(2, 10), rng.randrange(10, 20)
        return f"{a} * {b}", a * b
    a, b, c, d = (rng.randrange(1, 10) for _ in range(4))
    return f"({a} + {b}) * {c} + {d}", (a + b) * c + d


def expressions(item_seed: int = 0, **_) -> dict[str, Dataset]:
    """Documents of `question` and `answer`; the full stop ends an answer, so that 12 is not a right 123."""
    rng = random.Random(f"expressions {item_seed}")
    seen: dict[str, int] = {}
    while len(seen) < ARITHMETIC_ITEMS + SHOTS:
        question, value = expression(rng)
        seen[question] = value
    documents = [{"question": f"Q: {text}\nA:", "answer": f" {value}."} for text, value in seen.items()]
    return {"examples": Dataset.from_list(documents[:SHOTS]), "test": Dataset.from_list(documents[SHOTS:])}


def story(rng: random.Random, steps: int) -> dict:
    """A story of `steps` changes to one count, its solution step by step, and the last count."""
    person, things = rng.choice(PEOPLE), rng.choice(THINGS)
    count = rng.randrange(3, 30)
    sentences, solution = [f"{person} has {count} {things}."], []
    for _ in range(steps):
        changes = ["find"]
        if count > 1:
            changes.append("give")
        if count < 40:  # larger doubles would test long multiplication instead
            changes.append("double")
        change = rng.choice(changes)
        if change == "give":
            amount = rng.randrange(1, count)
            sentences.append(f"{person} gives away {amount} {things}.")
            text, count = f"{count} - {amount}", count - amount
        elif change == "double":
            sentences.append(f"A friend brings as many {things} as {person} has by then.")
            text, count = f"{count} * 2", count * 2
        else:
            amount = rng.randrange(2, 20)
            sentences.append(f"{person} finds {amount} more {things}.")
            text, count = f"{count} + {amount}", count + amount
        solution.append(f"{text} = {count}.")
    question = f"Question: {' '.join(sentences)} How many {things} does {person} have now?\nAnswer:"
    return {"question": question, "solution": f"{' '.join(solution)} The answer is {count}.", "answer": str(count)}


def stories(item_seed: int = 0, **_) -> dict[str, Dataset]:
    """Documents of `question`, `solution`, `answer` and `steps` (2, 3 or 4, in turn)."""
    rng = random.Random(f"stories {item_seed}")
    documents = [{**story(rng, steps=2 + index % 3), "steps": 2 + index % 3} for index in range(STORY_ITEMS + SHOTS)]
    return {"examples": Dataset.from_list(documents[:SHOTS]), "test": Dataset.from_list(documents[SHOTS:])}
