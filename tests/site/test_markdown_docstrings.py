# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "site"))
from markdown_docstrings import to_inline, to_rst


@pytest.mark.parametrize(
    ("markdown", "rst"),
    [
        ("`[B, T, D]`, in fp32", "``[B, T, D]``, in fp32"),
        ("as in [`AttnResConfig`].", "as in :py:obj:`~.AttnResConfig`."),
        ("several `Model`s", "several ``Model``\\ s"),
        ("the norm |v| of names_ and `a_ | b`", "the norm \\|v\\| of names\\_ and ``a_ | b``"),
        ("mean of B * T, *optional*", "mean of B * T, *optional*"),
        ("snake_case stays", "snake_case stays"),
    ],
)
def test_a_line(markdown, rst):
    assert to_inline(markdown) == rst


def test_fenced_code_becomes_a_directive():
    lines = ["Text:", "", "```python", "x = `1`", "", "y", "```", "after `it`"]
    expected = ["Text:", "", "", ".. code-block:: python", "", "    x = `1`", "", "    y", "", "after ``it``"]
    assert to_rst(lines) == expected


def test_a_session_is_told_from_a_program():
    assert ".. code-block:: pycon" in to_rst(["```python", ">>> 1", "1", "```"])


def test_indented_code_is_literal_and_sections_are_not():
    lines = ["The rule", "", "    h = `a` + b", "", "        deeper_", "", "Args:", "    x: a `b`."]
    expected = ["The rule", "", "::", "", "    h = `a` + b", "", "        deeper_", "", "Args:", "    x: a ``b``."]
    assert to_rst(lines) == expected


def test_prose_that_is_returned_has_no_type():
    assert to_rst(["Returns:", "    All of them: first `a`."]) == [
        "Returns:",
        "    \\ ",
        "    All of them: first ``a``.",
    ]
    assert to_rst(["Returns:", "    `[B]`: them."]) == ["Returns:", "    ``[B]``: them."]


def test_a_list_with_paragraphs_is_no_code():
    lines = ["- one", "", "    still `one`"]
    assert to_rst(lines) == ["- one", "", "    still ``one``"]


def test_a_paragraph_within_a_section_is_no_code():
    lines = ["Args:", "    x: first.", "", "    y: `second`."]
    assert to_rst(lines)[-1] == "    y: ``second``."
