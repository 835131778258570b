# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""How figures are written."""

import pytest

from modeling_attnres.eval.report import Table, number, p_text


@pytest.mark.parametrize(
    ("value", "in_percent", "sign", "expected"),
    [
        (0.12345, True, False, "12.35"),
        (-0.05714, True, True, "-5.71"),
        (0.05714, True, True, "+5.71"),
        (-1e-9, True, True, "+0.00"),
        (-1e-9, False, True, "+0.0000"),
        (0.97268, False, False, "0.9727"),
    ],
)
def test_number(value, in_percent, sign, expected):
    assert number(value, in_percent, sign) == expected


def test_p_values_below_a_thousandth_are_not_zero():
    assert [p_text(value) for value in (0.0, 0.0009, 0.001, 0.0456, 1.0)] == [
        *("< 0.001", "< 0.001", "0.001", "0.046", "1.000")
    ]


def test_table():
    table = Table("Title", ("task", "n"), [("a task", "1"), ("b", "23")])
    assert table.text() == "Title\ntask     n\n----------\na task   1\nb       23\n"
    assert table.markdown() == "**Title**\n\n| task | n |\n| --- | ---: |\n| a task | 1 |\n| b | 23 |\n"
