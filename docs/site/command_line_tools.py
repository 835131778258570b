# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The directive `attnres_tools`: a section for every command-line tool that the installed package has.

The tools are found by their entry points, and sphinx-argparse-cli reads their parsers. A new tool or option is on the
page without an edit.
"""

from importlib.metadata import entry_points

from docutils.nodes import Element, Node, Text, literal
from sphinx.util.docutils import SphinxDirective


SECTION = """
.. sphinx_argparse_cli::
   :module: {module}
   :func: build_parser
   :prog: {name}
   :title: {name}
   :group_title_prefix: {{prog}}
   :no_default_values: yes
   :usage_width: 76
"""


def setup(app) -> dict[str, bool]:
    app.add_directive("attnres_tools", AttnresTools)
    return {"parallel_read_safe": True}


def tool_modules() -> dict[str, str]:
    """The module of every tool, by the tool's name."""
    points = entry_points(group="console_scripts")
    return {point.name: point.module for point in sorted(points) if point.name.startswith("attnres-")}


class AttnresTools(SphinxDirective):
    def run(self) -> list[Node]:
        sections = [SECTION.format(module=module, name=name) for name, module in tool_modules().items()]
        nodes = self.parse_text_to_nodes("\n".join(sections), allow_section_headings=True)
        for node in nodes:
            mark_code(node)
        return nodes


def mark_code(node: Element):
    """Makes code of what stands between backticks in help texts, which are plain text to sphinx-argparse-cli."""
    for text in list(node.findall(Text)):
        parts = text.split("`")
        if len(parts) > 1 and len(parts) % 2 and not isinstance(text.parent, literal):
            marked = [literal("", part) if place % 2 else Text(part) for place, part in enumerate(parts)]
            text.parent.replace(text, marked)
