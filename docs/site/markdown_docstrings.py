# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Docstrings in Markdown for Sphinx, which reads reStructuredText.

Only what the docstrings here use is translated: code spans, references such as [`AttnResConfig`], fenced and indented
code. Lists, emphasis and the Google sections are the same in both, or are read by napoleon afterwards.
"""

import re
from collections.abc import Iterator


# A reference in square brackets, or a code span.
CODE = re.compile(r"\[`(?P<name>[\w.]+)`\]|`(?P<code>[^`]+)`")
# Characters that mean something to reStructuredText and nothing to Markdown: bars, and underscores at the end of a word.
SPECIAL = re.compile(r"\||(?<=\w)_(?!\w)")


def setup(app) -> dict[str, bool]:
    # Before napoleon, which listens to the same event with the default priority of 500.
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True}


def _process(app, what, name, obj, options, lines: list[str]):
    lines[:] = to_rst(lines)
    if what in ("property", "attribute"):
        lines.insert(0, "")  # otherwise napoleon takes "L: sublayers" for a type and a description


def to_rst(lines: list[str]) -> list[str]:
    """The lines of a Markdown docstring as those of a reStructuredText one."""
    return list(_blocks(lines))


def _blocks(lines: list[str]) -> Iterator[str]:
    fence = None  # the indentation of the fence that is open
    previous = before = ""  # the line above, and the last one above that is not blank
    literal = False
    for position, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith("```"):
            if fence is None:
                fence = indent
                session = position + 1 < len(lines) and lines[position + 1].lstrip().startswith(">>>")
                language = "pycon" if session else line.strip().removeprefix("```") or "text"
                yield from ("", f"{' ' * indent}.. code-block:: {language}", "")
            else:
                fence = None
                yield ""
        elif fence is not None:
            yield f"    {line}" if line else line
        else:
            if line and indent < 4:
                literal = False
            elif line and not literal and not previous and before and not before.startswith((" ", "- ")):
                literal = True
                yield from ("::", "")
            yield line if literal else to_inline(line)
            if line.strip() == "Returns:" and not lines[position + 1].lstrip().startswith("`"):
                # Nothing, so that napoleon does not take the words before a colon for a type.
                yield f"{' ' * (indent + 4)}\\ "
        previous, before = line, line if line and not literal else before


def to_inline(line: str) -> str:
    """A line of text: code spans and references translated, special characters of the rest escaped."""
    parts, end = [], 0
    for match in CODE.finditer(line):
        parts.append(SPECIAL.sub(lambda found: f"\\{found.group()}", line[end : match.start()]))
        parts.append(f":py:obj:`~.{match['name']}`" if match["name"] else f"``{match['code']}``")
        end = match.end()
        if line[end : end + 1].isalnum():
            parts.append("\\ ")  # inline markup ends at a word's end
    parts.append(SPECIAL.sub(lambda found: f"\\{found.group()}", line[end:]))
    return "".join(parts)
