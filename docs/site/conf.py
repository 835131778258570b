# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Configuration of the site that `make docs` builds, see docs/site/README.md.

The source folder is the root of the checkout, so that the READMEs of conversion and evaluation are pages where they
stand and every relative link is the same on the site as in a checkout.
"""

import sys
from pathlib import Path

import modeling_attnres


sys.path.insert(0, str(Path(__file__).parent))

project = "modeling-attnres"
author = "The modeling-attnres maintainers"
copyright = "2026, the modeling-attnres maintainers"
release = version = modeling_attnres.__version__

root_doc = "docs/index"
include_patterns = [
    "*.md",
    "configuration/README.md",
    "conversion/README.md",
    "docs/**.md",
    "eval/**.md",
]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_argparse_cli",
    "command_line_tools",
    "markdown_docstrings",
    "own_resources",
]

# GitHub's way: every heading has an anchor, and a fence named `math` holds a formula.
myst_heading_anchors = 4
myst_fence_as_directive = {"math"}
html_math_renderer = "svg"

autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "show-inheritance": True,
    # What huggingface_hub's `@strict` adds to every config.
    "exclude-members": "validate, validate_architecture",
}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"modeling-attnres {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["redirect"]
html_copy_source = False
html_show_sphinx = False
