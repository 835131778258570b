# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Tables for terminals and for Markdown."""

import pytest

from modeling_attnres.tables import aligned_table, markdown_table


HEADER, ROWS = ("task", "n", "p"), [("a task", "1", ""), ("b", "23", "0.5")]


def test_columns_are_aligned():
    assert aligned_table(HEADER, ROWS).splitlines() == [
        "task     n    p",
        "---------------",
        "a task   1",
        "b       23  0.5",
    ]
    assert aligned_table(HEADER, []) == "task  n  p\n----------"


def test_markdown():
    assert markdown_table(HEADER, ROWS).splitlines() == [
        "| task | n | p |",
        "| --- | --- | --- |",
        "| a task | 1 |  |",
        "| b | 23 | 0.5 |",
    ]
    assert markdown_table(HEADER, [], numbers=True).splitlines()[1] == "| --- | ---: | ---: |"


def test_a_short_row_is_an_error():
    with pytest.raises(ValueError, match="shorter"):
        aligned_table(HEADER, [("a", "b")])
