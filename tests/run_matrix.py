# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Runs the fast suite on every version of Transformers that a release promises, and writes the table of results.

Each version gets an overlay in `build/matrix`: a virtual environment with that Transformers and this checkout, which takes
every other package (torch above all) from the environment that runs this script.

    python tests/run_matrix.py                                        # every version; writes docs/versions.md
    python tests/run_matrix.py --versions oldest --tests tests/test_hub.py   # one version, some tests, no table
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from packaging.version import Version
from tqdm import tqdm

from modeling_attnres.twin_attnres import TESTED_TRANSFORMERS


HERE = Path(__file__).parent
ROOT = HERE.parent
OVERLAYS = ROOT / "build" / "matrix"
TABLE = ROOT / "docs" / "versions.md"
TOLERANCE = 1e-5  # fp32 logits: versions of Transformers sum in different orders


def overlay(version: str) -> Path:
    """The Python of an environment with Transformers `version` above the running one's packages, made where missing."""
    folder = OVERLAYS / version
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists():
        return python
    venv.create(folder, clear=True, symlinks=True)
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # `addsitedir` would bring the base's links to checkouts too; a plain path brings its packages alone.
    (site_packages / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--ignore-installed", f"transformers=={version}"], check=True)
    subprocess.run([*pip, "--no-build-isolation", "--editable", str(ROOT)], check=True, stderr=subprocess.DEVNULL)
    ready.touch()
    return python


def run_suite(version: str, tests: list[str], workers: int) -> dict:
    """Counts of `passed`, `failed` and `skipped` tests, and the reasons of those skipped."""
    python = overlay(version)
    report = OVERLAYS / f"{version}.xml"
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "-n", str(workers), "--dist", "loadfile", f"--junitxml={report}"]
    log = OVERLAYS / f"{version}.log"
    with log.open("w") as output:
        process = subprocess.run(
            [*command, "-p", "no:cacheprovider", *tests],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    if process.returncode not in (0, 1):  # 1: some tests failed
        raise SystemExit(f"pytest ended with status {process.returncode} on Transformers {version}: see {log}")
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case.find("skipped").get("message") for case in cases if case.find("skipped") is not None]
    for case in failed:
        print(f"{version}: FAILED {case.get('classname')}::{case.get('name')}", flush=True)
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "reasons": Counter(skipped),
    }


def exchange(writer: str, reader: str):
    """Checkpoints and adapters written under one version answer the same under another, by their own code.

    Raises:
        SystemExit: if they differ by more than rounding.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = [
            json.loads(run_python(HERE / "exchange_checkpoints.py", action, folder, version=version).splitlines()[-1])
            for action, version in (("write", writer), ("read", reader))
        ]
    versions = [record.pop("transformers") for record in found]
    if versions != [writer, reader]:
        raise SystemExit(f"The checkpoints were to be written and read under {writer} and {reader}, got {versions}.")
    different = {name: gap for name, gap in found[1].items() if gap > (0 if "generated" in name else TOLERANCE)}
    print(
        f"written under {writer}, read under {reader}: {len(found[1])} answers, {len(different)} different", flush=True
    )
    if different or not found[1]:
        raise SystemExit(f"Different: {different}")


def run_python(*arguments: str | Path, version: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory() as cache:
        environment["HF_HOME"] = cache  # where code of checkpoints is imported from
        command = [str(overlay(version)), *map(str, arguments)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stdout}\n{process.stderr}")
    return process.stdout


def table(results: dict[str, dict]) -> str:
    """The page of results, as Markdown."""
    lines = [
        "# Versions of Transformers",
        "",
        "The fast suite on each minor version that `setup.py` allows, as counted by `make test-matrix` with the other packages of",
        "`constraints.txt`. Tests that call what a version does not have yet are not applicable there. Checkpoints and adapters",
        "written under the newest version answer the same under the oldest, by their own code, and the reverse.",
        "",
        "The lowest versions of the other packages were run together, beside Transformers 5.19.0: torch 2.9.1, huggingface_hub",
        "1.31.0, accelerate 1.15.0, peft 0.20.0. Models, generation, training, adapters and conversion pass their tests there.",
        "`torch.compile(fullgraph=True)` and pipeline stages need torch 2.13: on 2.9 both end in an error of torch's.",
        "",
        "| Transformers | passed | failed | not applicable |",
        "|---|---|---|---|",
    ]
    for version, result in results.items():
        lines.append(f"| {version} | {result['passed']} | {result['failed']} | {result['skipped']} |")
    reasons = Counter()
    for version, result in results.items():
        for reason, count in result["reasons"].items():
            reasons[reason] = {**(reasons[reason] or {}), version: count}
    if reasons:
        lines += ["", "Not applicable, and why:", "", "| reason | tests, by version |", "|---|---|"]
        for reason, counts in sorted(reasons.items()):
            lines.append(f"| {reason} | {', '.join(f'{version}: {count}' for version, count in counts.items())} |")
    return "\n".join(lines) + "\n"


def chosen_versions(names: list[str]) -> list[str]:
    """Versions by number or as `oldest` and `newest`; all that were tested where none is named."""
    ordered = sorted(TESTED_TRANSFORMERS, key=Version)
    aliases = {"oldest": ordered[0], "newest": ordered[-1]}
    return [aliases.get(name, name) for name in names] or ordered


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--versions", nargs="*", default=[], help="numbers, `oldest` or `newest`; default: all")
    parser.add_argument("--tests", nargs="*", default=[], help="files to run; default: the whole fast suite")
    parser.add_argument("--workers", type=int, default=2, help="test processes at a time")
    parser.add_argument("--exchange", action="store_true", help="also exchange checkpoints of oldest and newest")
    arguments = parser.parse_args()
    results = {}
    for version in tqdm(chosen_versions(arguments.versions), desc="versions"):
        results[version] = run_suite(version, arguments.tests, arguments.workers)
        counts = ", ".join(f"{results[version][name]} {name}" for name in ("passed", "failed", "skipped"))
        print(f"Transformers {version}: {counts}", flush=True)
    whole = not arguments.versions and not arguments.tests
    if whole:
        TABLE.write_text(table(results))
    if whole or arguments.exchange:
        oldest, newest = chosen_versions(["oldest", "newest"])
        exchange(newest, oldest)
        exchange(oldest, newest)
    if any(result["failed"] for result in results.values()):
        raise SystemExit("Some tests failed.")


if __name__ == "__main__":
    main()
