# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Pages that need no network: formulas as SVG, and no font, script or picture from elsewhere."""

import html
import re
from pathlib import Path

from docutils.nodes import SkipNode
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from sphinx.util.logging import getLogger


LOGGER = getLogger(__name__)
# Matplotlib's codes of a path, and SVG's letters for them.
COMMANDS = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C", Outline.CLOSEPOLY: "Z"}

# What a browser fetches by itself when it opens a page. A link that is followed by hand may lead anywhere.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=["'](?:https?:)?//[^"']*"""
    r"""|<link\b(?![^>]*rel=["']canonical)[^>]*\bhref=["'](?:https?:)?//[^"']*"""
    r"""|@import\s[^;]*//[^;]*|url\(["']?(?:https?:)?//[^)]*"""
)


def setup(app) -> dict[str, bool]:
    app.add_html_math_renderer("svg", inline_renderers=(_visit, None), block_renderers=(_visit, None))
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True}


def _visit(translator, node):
    formula = node.astext()
    label = html.escape(formula, quote=True)
    tag = "span" if node.tagname == "math" else "div"
    translator.body.append(f'<{tag} class="formula" role="img" aria-label="{label}">{to_svg(formula)}</{tag}>')
    raise SkipNode


def to_svg(formula: str) -> str:
    """A formula in the subset of TeX that Matplotlib reads, as outlines in the colour of the text around it.

    MathML would be shorter, but browsers set it badly where no font with mathematical metrics is installed.
    """
    outline = TextPath((0, 0), f"${formula}$", prop=FontProperties(math_fontfamily="stix", size=20))
    drawn = " ".join(
        COMMANDS[code] + " ".join(f"{number:.1f}" for number in points)
        for points, code in outline.iter_segments(simplify=False)
    )
    drawn = re.sub(r"Z[^A-Z]*", "Z", drawn)  # Matplotlib gives the point that a path returns to
    left, bottom, width, height = outline.get_extents().bounds
    box = f"{left - 1:.1f} {-bottom - height - 1:.1f} {width + 2:.1f} {height + 2:.1f}"
    size = f'width="{width + 2:.0f}" height="{height + 2:.0f}"'
    return f'<svg {size} viewBox="{box}"><path transform="scale(1 -1)" fill="currentColor" d="{drawn}"/></svg>'


def _check(app, exception: Exception | None):
    """Warns, which fails a strict build, where a page or a style sheet would fetch anything from another host."""
    if exception is None and app.builder.format == "html":
        for found in foreign_resources(Path(app.outdir)):
            LOGGER.warning(found)


def foreign_resources(site: Path) -> list[str]:
    """What files of a built site fetch from other hosts: the file, and the start of the tag or rule."""
    files = sorted(path for path in site.rglob("*") if path.suffix in (".html", ".css"))
    return [
        f"{file.relative_to(site)} fetches from another host: {found}"
        for file in files
        for found in FETCHED.findall(file.read_text(encoding="utf-8"))
    ]
