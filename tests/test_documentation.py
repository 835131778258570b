# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The pages of the site: their code runs, their links lead somewhere, and every page is in the navigation."""

import re
from functools import partialmethod
from glob import glob
from importlib import import_module
from pathlib import Path

import pytest
from documents import broken_links
from lm_eval.tasks import TaskManager
from pages import ROOT, WORDS, check_command, commands, read_blocks, run_page, save_source

from modeling_attnres.conversion import convert, fetch


DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "configuration/*.md", "conversion/*.md", "eval/**/*.md")
    for path in ROOT.glob(pattern)
)
RUN = [DOCS / name for name in ("index.md", "quickstart.md", "how-it-works.md")] + sorted(
    (DOCS / "tutorials").glob("*.md")
)
# test_readme.py has the README; tests/serving runs that page, in an environment with vLLM.
CHECKED = [page for page in PAGES if page not in (*RUN, ROOT / "README.md", DOCS / "serving.md")]
SHORTER = {
    "python examples/finetune.py": ["--steps", "2", "--tokens", "16", "--eval-blocks", "2"],
    "python examples/pretrain.py": ["--steps", "2", "--tokens", "16", "--vocab-size", "300", "--batch-size", "2"],
    "attnres-eval run": ["--limit", "2", "--batch_size", "8"],
    "attnres-inspect": ["--sequences", "1", "--tokens", "32"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of a reader: a model, its converted form, and texts, under the names that pages use."""
    source = tmp_path / "path" / "to" / "model"
    save_source(source)
    (tmp_path / "path" / "to" / "texts").mkdir()
    text = " ".join(f"{word} {WORDS[index % 5]}" for index, word in enumerate(WORDS * 200))
    for path in ("text.txt", "texts/a.txt", "texts/b.txt"):
        (tmp_path / "path" / "to" / path).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetch, "_download", lambda repo_id, revision: source)
    # No page asks for a task of lm-eval's own, and their index takes most of a run's time.
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    return tmp_path


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_a_page_runs(page, folder):
    converts = any("attnres-convert path/to/model" in block.code for block in read_blocks(page))
    if "my-attnres-model" in page.read_text(encoding="utf-8") and not converts and page.stem != "quickstart":
        convert(folder / "path" / "to" / "model", folder / "my-attnres-model", num_blocks=8)
    assert run_page(page, SHORTER) > 0


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_what_cannot_run_is_known(page):
    for block in read_blocks(page):
        if block.not_run:
            for words in commands(block):
                check_command(words)


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_other_pages_are_understood(page):
    """Their programs run in tests of their own."""
    for block in read_blocks(page):
        if block.language == "bash":
            for words in commands(block):
                check_command(words)


@pytest.mark.parametrize(
    ("page", "result"),
    [
        ("configuration/README.md", "config.depth_weights == 'sum'"),
        ("conversion/README.md", "report.max_logit_difference == 0"),
    ],
)
def test_programs_of_readmes_run(page, result, folder):
    (block,) = [block for block in read_blocks(ROOT / page) if block.language == "python"]
    namespace: dict = {}
    exec(compile(block.code.replace("path/to/llama", "path/to/model"), block.where, "exec"), namespace)
    assert eval(result, namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_every_page_is_in_the_navigation():
    index = DOCS / "index.md"
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```$", index.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    entries = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    names = [re.sub(r".*<(.+)>", r"\1", entry) for entry in entries]
    listed = {Path(path).resolve() for name in names for path in glob(f"{DOCS / name}.md")}
    assert listed | {index} == set(PAGES)


@pytest.mark.parametrize("name", ["", ".configuration", ".conversion", ".parallel", ".training"])
def test_the_reference_has_every_public_name(name):
    """The page documents the module as a whole, and so what its `__all__` names; each of these says what it is."""
    module = import_module(f"modeling_attnres{name}")
    page = DOCS / "reference" / f"{name.removeprefix('.') or 'modeling_attnres'}.md"
    assert f".. automodule:: {module.__name__}\n```" in page.read_text(encoding="utf-8")
    undocumented = [public for public in module.__all__ if not getattr(module, public).__doc__]
    assert undocumented == []
