# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What a release uploads: the source distribution, the wheel made of it, and that wheel without a single extra.

`make package` runs it, and so does `.ci/run`.
"""

import json
import re
import subprocess
import sys
import tarfile
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tiny_backbones import tiny_backbone
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import modeling_attnres


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
NAME = f"modeling_attnres-{modeling_attnres.__version__}"
# Of every extra, something that the core does not need itself.
ABSENT = ("datasets", "gguf", "gradio", "lm_eval", "matplotlib", "peft", "scipy", "torchao", "trl")
USE = """
import importlib.util, json, sys

import torch
import modeling_attnres
from modeling_attnres.conversion import convert
from transformers import AutoModelForCausalLM

report = convert("prenorm", "attnres", num_blocks=2)
model = AutoModelForCausalLM.from_pretrained("attnres")
tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
found = [name for name in sys.argv[1:] if importlib.util.find_spec(name)]
print(json.dumps([report.max_logit_difference, tokens.shape, found, modeling_attnres.__file__]))
"""

# What a user writes, and what a type checker must make of it: the line that it complains of is wrong on purpose.
PROGRAM = """
from modeling_attnres import AttnResForCausalLM, supported_backbones
from modeling_attnres.conversion import convert
from modeling_attnres.training import attnres_parameter_groups, read_metrics

report = convert("prenorm", "attnres", num_blocks=2)
reveal_type(report.max_logit_difference)  # float | None
reveal_type(report.num_blocks)  # int
convert("prenorm", "attnres", num_blocks="two")  # error: incompatible type "str"; expected "int | None"
"""


def run(*command: str | Path, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1800, **settings)


def checked(*command: str | Path, **settings) -> str:
    process = run(*command, **settings)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    checked(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def core_distributions() -> dict[str, object]:
    """What an installation without extras installs, by normalised name: the requirements, and theirs."""
    found, wanted = {}, [Requirement(line) for line in distribution("modeling-attnres").requires]
    wanted = [requirement for requirement in wanted if "extra" not in str(requirement.marker)]
    while wanted:
        requirement = wanted.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found:
            continue
        found[name] = distribution(requirement.name)
        for line in found[name].requires or ():
            further = Requirement(line)
            if further.marker is None or any(
                further.marker.evaluate({"extra": extra}) for extra in (requirement.extras or {""})
            ):
                wanted.append(further)
    return found


@pytest.fixture(scope="module")
def bare(built, tmp_path_factory) -> Path:
    """The `bin` of an environment with the wheel and its core requirements alone, which are linked, not downloaded."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for core in core_distributions().values():
        tops = {file.parts[0] for file in core.files} - {"..", "__pycache__"}
        for top in tops:
            if not (site_packages / top).exists():
                (site_packages / top).symlink_to(core.locate_file(top))
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    checked(*pip, "install", "--quiet", "--no-index", "--no-deps", built[1])
    checked(*pip, "check")  # the requirements are all there
    return folder / "bin"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a tiny PreNorm model and its tokenizer."""
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("models")
    AutoModelForCausalLM.from_config(tiny_backbone("llama")).save_pretrained(folder / "prenorm")
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(96)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "prenorm")
    (folder / "text.txt").write_text("w5 " * 600)
    return folder


def test_the_index_would_take_them(built):
    printed = checked(sys.executable, "-m", "twine", "check", "--strict", *built)
    assert printed.count("PASSED") == 2


def test_the_source_distribution_is_the_whole_repository(built):
    """Also what the tests need: pictures, tables, fixtures, the documents whose commands they run."""
    listed = run("git", "-C", ROOT, "ls-files")
    if listed.returncode:
        pytest.skip("not a git checkout")
    with tarfile.open(built[0]) as archive:
        held = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    assert set(listed.stdout.split("\n")) - {""} <= held
    assert not [name for name in held if "__pycache__" in name or name.startswith((".venv", "build"))]


def test_the_core_imports_converts_and_generates(bare, models):
    process = checked(bare / "python", "-c", USE, *ABSENT, cwd=models)
    difference, shape, found, file = json.loads(process.splitlines()[-1])
    assert (difference, shape, found) == (0.0, [1, 7], [])
    assert Path(file).is_relative_to(bare.parent)


def test_a_type_checker_knows_the_installed_package(bare, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    options = ("--config-file=", "--follow-imports=silent", "--python-executable", bare / "python", "program.py")
    printed = run(sys.executable, "-m", "mypy", *options, cwd=tmp_path).stdout
    for number, line in enumerate(PROGRAM.splitlines(), 1):
        said = [text for text in printed.splitlines() if text.startswith(f"program.py:{number}: ")]
        expected = line.partition("  # ")[2]
        assert len(said) == bool(expected), said
        for part in expected.split("; ") if expected else ():
            assert part.removeprefix("error: ") in said[0].replace("builtins.", ""), said


# script -> what it is asked to do, and the extra that this needs; nothing where it does without.
SCRIPTS = {
    "attnres-bench": ("--published mixer --output figures", "eval"),
    "attnres-convert": ("model.gguf out", "gguf"),
    "attnres-eval": ("run prenorm --output results --tasks attnres_offline", "eval"),
    "attnres-eval compare": ("compare results results --names a b", "eval"),
    "attnres-inspect": ("prenorm --text text.txt --output figures", "eval"),
    "attnres-plan": ("--preset kimi-linear-48b-a3b-block", None),
}


def test_every_script_is_known(bare):
    scripts = {path.name for path in bare.glob("attnres-*")}
    assert scripts == {name.split()[0] for name in SCRIPTS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_names_the_extra_that_it_lacks(name, bare, models):
    (models / "model.gguf").write_bytes(b"GGUF")
    script, (arguments, extra) = name.split()[0], SCRIPTS[name]
    assert "usage:" in checked(bare / script, "--help", cwd=models)
    process = run(bare / script, *arguments.split(), cwd=models)
    if extra is None:
        assert process.returncode == 0, process.stderr
        return
    assert process.returncode == 2, process.stdout + process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"{script}: error: ")
    assert f'pip install "modeling-attnres[{extra}]"' in line
    assert not (models / "figures").exists()
