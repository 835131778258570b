# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The files around the code agree with it and with each other."""

import re
from pathlib import Path

import yaml

import modeling_attnres


ROOT = Path(__file__).parents[1]


def read_yaml(path: str):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def targets_of_ci() -> list[str]:
    """The make targets of `.ci/run`, in order."""
    return re.findall(r"^make (\S+)$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)


def test_hosted_checks_are_those_of_ci():
    (job,) = read_yaml(".github/workflows/ci.yml")["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["make install", "make ${{ matrix.target }}"]
    assert ["install", *job["strategy"]["matrix"]["target"]] == targets_of_ci()
    variables = re.search(r"^export (.+)$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    assert {f"{name}={value}" for name, value in job["env"].items()} >= set(variables)


def test_hooks_before_a_commit_are_those_of_ci():
    hooks = [hook for repository in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repository["hooks"]]
    assert {hook["entry"] for hook in hooks} <= {f"make {target}" for target in targets_of_ci()}


def test_every_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split()
    rules = re.findall(r"^([\w-]+):(?!=)", makefile, re.MULTILINE)
    assert sorted(listed) == sorted(rules)
    assert set(targets_of_ci()) <= set(rules)


def test_the_citation_names_the_paper_and_this_version():
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # those that the format demands
    assert (citation["version"], citation["license"]) == (modeling_attnres.__version__, "Apache-2.0")
    paper = citation["preferred-citation"]
    assert paper["authors"][0] == {"name": "Kimi Team"}
    assert all({"given-names", "family-names"} == author.keys() for author in paper["authors"][1:])
    assert "arXiv:2603.15031" in [identifier["value"] for identifier in paper["identifiers"]]


def test_the_changelog_knows_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[Unreleased\]$", changelog, re.MULTILINE)
    assert modeling_attnres.__version__ in changelog
    kinds = set(re.findall(r"^### (.+)$", changelog, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_issue_forms_are_whole():
    """What GitHub demands of a form: a name, a description, and a body whose fields have names of their own."""
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = read_yaml(path.relative_to(ROOT).as_posix())
        if path.name == "config.yml":
            continue
        assert {"name", "description", "body"} <= form.keys()
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids))
        assert all(field["attributes"]["label"] for field in form["body"])
    assert (ROOT / ".github/pull_request_template.md").is_file()
