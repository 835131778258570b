# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The table of look-ups (`look_ups.csv`) and the page that shows it: `python tests/library/look_ups.py` writes the page."""

import csv
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from scan import LookUp


TABLE = Path(__file__).parent / "look_ups.csv"
PAGE = Path(__file__).parents[2] / "docs" / "look-ups.md"

ANSWERS = {
    "differs": "Where the answer is another one",
    "refused": "Refused in plain words",
    "own": "Answered by an entry of our own",
    "same": "Answered as for the plain model",
    "none": "Not about such a model",
}
PREAMBLE = """\
# Look-ups

What Transformers, PEFT, accelerate, TRL and lm-eval do with a model, they often decide by its type, its class' name or
its source. An AttnRes model is to get the plain model's answer ([architecture.md](architecture.md)). This page lists
every such look-up in the pinned versions (`constraints.txt`), what it decides, and what becomes of an AttnRes model.

It is made of `tests/library/look_ups.csv` by `python tests/library/look_ups.py`. `tests/library/test_look_ups.py` finds
the look-ups anew in the installed code, fails by the name of one that is new or gone, and asks both models where the
answer can be had. Fields of configs and attributes of models need no table: the test reads all that these libraries read
off both models, and compares them.

Left out are single models' own code, TRL's experimental trainers and commands, tests, and of lm-eval all but the model
class for Transformers.
"""


class Row(NamedTuple):
    """A look-up: where it is, what it goes by (a `LookUp`'s fields), what it decides, and our answer with its reason."""

    module: str
    symbol: str
    by: str
    decides: str
    answer: str

    @property
    def look_up(self) -> LookUp:
        return LookUp(self.module, self.symbol, self.by)

    @property
    def kind(self) -> str:
        """One of `ANSWERS`."""
        return self.answer.partition(":")[0]


def read_rows() -> list[Row]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return [Row(**row) for row in csv.DictReader(file)]


def render(rows: list[Row]) -> str:
    """The page: per answer a table with a line for look-ups of one module that decide the same."""
    lines = [PREAMBLE]
    for kind, title in ANSWERS.items():
        chosen = [row for row in rows if row.kind == kind]
        lines += [f"## {title} ({len(chosen)})", "", "| where | by | decides | answer |", "|---|---|---|---|"]
        by_line = sorted(chosen, key=lambda row: (row.module, row.decides, row.answer, row.symbol))
        for (module, decides, answer), group in groupby(by_line, lambda row: (row.module, row.decides, row.answer)):
            group = list(group)
            symbols = ", ".join(dict.fromkeys(f"`{row.symbol}`" for row in group))
            by = ", ".join(sorted({row.by for row in group}))
            lines.append(f"| `{module}`: {symbols} | {by} | {decides} | {answer.partition(': ')[2]} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render(read_rows()), encoding="utf-8")
