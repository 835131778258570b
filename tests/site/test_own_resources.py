# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest


pytest.importorskip("sphinx", reason="the site's generator is an extra: make docs")
sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "site"))
import own_resources


def test_a_formula_is_one_outline():
    svg = ElementTree.fromstring(own_resources.to_svg(r"\dfrac{a_i}{b} + \sum_{i=0}^{n} x_i"))
    (path,) = svg
    assert path.attrib["fill"] == "currentColor"
    _, top, width, height = map(float, svg.attrib["viewBox"].split())
    assert 60 < width < 200
    assert 20 < height < 80
    assert float(svg.attrib["width"]) == pytest.approx(width, abs=1)
    assert path.attrib["d"].startswith("M")
    assert top < 0  # text stands on the baseline, which is at 0


@pytest.mark.parametrize(
    ("name", "content", "fetches"),
    [
        ("a.html", '<a href="https://arxiv.org">paper</a><script src="_static/own.js"></script>', False),
        ("a.html", '<script src="https://cdn.example/x.js"></script>', True),
        ("a.html", '<script async="async" src="//cdn.example/x.js"></script>', True),
        ("a.html", '<link rel="stylesheet" href="https://fonts.example/css">', True),
        ("a.html", '<img alt="x" src="https://example/badge.svg">', True),
        ("a.css", '@font-face { src: url("https://fonts.example/a.woff2") }', True),
        ("a.css", "a { background: url(data:image/svg+xml;base64,AA) }", False),
    ],
)
def test_a_page_fetches_from_its_own_host_alone(tmp_path, name, content, fetches):
    (tmp_path / name).write_text(content, encoding="utf-8")
    found = own_resources.foreign_resources(tmp_path)
    assert len(found) == fetches
    assert all(line.startswith(f"{name} fetches from another host: ") and "example" in line for line in found)
