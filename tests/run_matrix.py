"""Runs the fast suite on every version of Transformers that a release promises, and writes the table of results.

Each version gets an overlay in `build/matrix`: a virtual environment with that Transformers and this checkout, which takes
every other package (torch above all) from the environment that runs this script.

    python tests/run_matrix.py                                        # every version; writes docs/versions.md
    python tests/run_matrix.py --versions oldest --tests tests/test_hub.py   # one version, some tests, no table
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import venv
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from packaging.version import Version
from tqdm import tqdm

from modeling_attnres.twin_attnres import TESTED_TRANSFORMERS


ROOT = Path(__file__).parent.parent
OVERLAYS = ROOT / "build" / "matrix"
TABLE = ROOT / "docs" / "versions.md"


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
    subprocess.run([*pip, "--no-build-isolation", "--editable", str(ROOT)], check=True)
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


def table(results: dict[str, dict]) -> str:
    """The page of results, as Markdown."""
    lines = [
        "# Versions of Transformers",
        "",
        "The fast suite on each minor version that `setup.py` allows, as counted by `make test-matrix`. Tests that call what a",
        "version does not have yet are not applicable there.",
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
    arguments = parser.parse_args()
    results = {}
    for version in tqdm(chosen_versions(arguments.versions), desc="versions"):
        results[version] = run_suite(version, arguments.tests, arguments.workers)
        counts = ", ".join(f"{results[version][name]} {name}" for name in ("passed", "failed", "skipped"))
        print(f"Transformers {version}: {counts}", flush=True)
    if not arguments.versions and not arguments.tests:
        TABLE.write_text(table(results))
    if any(result["failed"] for result in results.values()):
        raise SystemExit("Some tests failed.")


if __name__ == "__main__":
    main()
