# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What Markdown pages show: code blocks, commands and links, for the tests that run or check them."""

import re
from pathlib import Path


def code_blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in blocks if name == language]


def shell_commands(text: str) -> list[str]:
    """Every command of the `bash` blocks, comments left out, continued lines joined; those after `&&` apart."""
    lines = "\n".join(code_blocks(text, "bash")).replace("\\\n", " ").splitlines()
    commands = [command for line in lines for command in re.sub(r"(^|\s)#.*", "", line).split("&&")]
    return [command.strip() for command in commands if command.strip()]


def inline_code(text: str) -> list[str]:
    """What stands in single backticks outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(text: str) -> set[str]:
    """The names that links can give for the headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Links and pictures to files that are not there, or to headings that their page does not have."""
    text = page.read_text(encoding="utf-8")
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken
