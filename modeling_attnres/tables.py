# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Tables of ready-made cells, for terminals and for Markdown.

Tools that print tables run with nothing but this package's core dependencies, and none of these draws tables.
"""

from collections.abc import Iterable, Sequence


def aligned_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned by spaces, the first to the left and the others, which hold numbers, to the right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    drawn = [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]).rstrip()
        for first, *others in lines
    ]
    return "\n".join([drawn[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *drawn[1:]])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """A Markdown table; `numbers` puts all columns but the first to the right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))
