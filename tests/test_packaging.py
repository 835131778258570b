# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import configparser
import json
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from fresh_process import run_python

import modeling_attnres


ROOT = Path(__file__).parents[1]
FOLDERS = ("configuration", "conversion", "eval", "parallel", "training")
SCRIPTS = {"attnres-convert": "modeling_attnres.conversion.cli:main"}  # those a user is told of must be among them
INSTALLED = """
import importlib, json, sys
from pathlib import Path

import modeling_attnres
from modeling_attnres.configuration import list_presets, list_recipes, load_preset, load_recipe

found = {"file": modeling_attnres.__file__, "presets": list_presets()}
found["learning_rates"] = [load_recipe(name).get("learning_rate") for name in list_recipes()]
modeling_attnres.AttnResForCausalLM(load_preset("tiny-block")).save_pretrained("saved")
found["saved"] = sorted(path.name for path in Path("saved").glob("*.py"))
found["callable"] = []
for target in sys.argv[1:]:
    module, _, attribute = target.partition(":")
    found["callable"].append(callable(getattr(importlib.import_module(module), attribute)))
for name in ("conversion", "eval", "parallel", "training"):
    found[name] = importlib.import_module(f"modeling_attnres.{name}").__file__
print(json.dumps(found))
"""


def quiet(*command: str | Path):
    process = subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the sources, built: what an earlier build left in the checkout must not slip into the wheel."""
    folder = tmp_path_factory.mktemp("packaging")
    for name in ("modeling_attnres", *FOLDERS):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    quiet("build", "--wheel", "--no-isolation", "--outdir", folder / "wheel", folder / "source")
    return folder


@pytest.fixture(scope="module")
def wheel(folder):
    (wheel,) = (folder / "wheel").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def metadata(wheel):
    """The files of the wheel's `.dist-info`, by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name.split("/", 1)[1]: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name
        }


def test_the_wheel_holds_one_package_and_all_of_it(folder, wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = folder / "source"
    expected = {
        path.relative_to(source).as_posix() for path in (source / "modeling_attnres").rglob("*") if path.is_file()
    }
    for name in FOLDERS:
        files = [path.relative_to(source).as_posix() for path in (source / name).rglob("*") if path.is_file()]
        expected |= {f"modeling_attnres/{path}" for path in files}
    assert held == expected
    assert {"modeling_attnres/configuration/models/tiny.json", "modeling_attnres/conversion/cli.py"} <= held
    assert "modeling_attnres/configuration/training/scaling-law-194m.yaml" in held
    assert "modeling_attnres/configuration/training/accelerate/fsdp2.yaml" in held


def test_the_metadata_says_what_to_install(metadata):
    fields = Parser().parsestr(metadata["METADATA"])
    assert (fields["Name"], fields["Version"]) == ("modeling-attnres", modeling_attnres.__version__)
    assert (fields["License-Expression"] or fields["License"], fields["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    required = [line for line in fields.get_all("Requires-Dist") if "extra ==" not in line]
    assert {"torch", "transformers", "safetensors"} <= {re.match(r"[\w-]+", line).group() for line in required}
    assert set(fields.get_all("Provides-Extra")) >= {"dev", "eval", "explore", "gguf", "train", "triton"}
    dev = [line for line in fields.get_all("Requires-Dist") if 'extra == "dev"' in line]
    assert dev
    assert not any(line.startswith("triton") for line in dev)
    assert fields.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert "Apache License" in metadata["licenses/LICENSE"]


def test_the_installed_wheel_works_without_the_checkout(folder, wheel, metadata):
    quiet("pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder / "installed", wheel)
    entry_points = configparser.ConfigParser(delimiters="=")
    entry_points.read_string(metadata["entry_points.txt"])
    assert entry_points.sections() == ["console_scripts"]  # lm-eval, for one, reads no others
    scripts = dict(entry_points["console_scripts"])
    assert scripts.items() >= SCRIPTS.items()
    assert {path.name for path in (folder / "installed" / "bin").iterdir()} == set(scripts)

    targets = scripts.values()
    process = run_python("-c", INSTALLED, *targets, folder=folder, PYTHONPATH=str(folder / "installed"))
    found = json.loads(process.stdout.splitlines()[-1])
    package = folder / "installed" / "modeling_attnres"
    assert Path(found["file"]) == package / "__init__.py"
    assert {Path(found[name]) for name in FOLDERS[1:]} == {package / f"{n}/__init__.py" for n in FOLDERS[1:]}
    assert "tiny-block" in found["presets"]
    assert found["learning_rates"].count(None) == 1  # the 48B recipe publishes none
    code = {path.name for path in (ROOT / "modeling_attnres").glob("*_attnres.py")}
    assert set(found["saved"]) == code - {"kimi_k3_attnres.py"}  # another backbone's
    assert found["callable"] == [True] * len(scripts)
