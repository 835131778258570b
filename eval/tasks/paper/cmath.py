# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""CMath (Chinese elementary-school word problems): worked examples and the comparison of numbers."""

import json
import re
from fractions import Fraction
from pathlib import Path


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")


def worked_examples() -> list[dict[str, str]]:
    """Three problems of our own in the style of the benchmark: `question` and `solution`."""
    path = Path(__file__).parent / "cmath_examples.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def to_number(text: str) -> Fraction | None:
    """The last number of a text, exactly; `None` if it has none. Understands `1,200`, `0.5`, `3/4` and `25%`."""
    found = NUMBER.findall(text)
    if not found:
        return None
    number, percent = found[-1].replace(",", "").rstrip("%"), found[-1].endswith("%")
    numerator, _, denominator = number.partition("/")
    if denominator and int(denominator) == 0:
        return None
    value = Fraction(numerator) / Fraction(denominator or 1)
    return value / 100 if percent else value


def same_number(doc: dict, results: list[str]) -> dict[str, float]:
    """1.0 if the answer's last number after `答案是` (or, without it, its last number) equals `golden`."""
    answer = results[0].rsplit("答案是", maxsplit=1)[-1]
    value = to_number(answer)
    return {"exact_match": float(value is not None and value == to_number(str(doc["golden"])))}
