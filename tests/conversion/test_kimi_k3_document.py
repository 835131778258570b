# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The commands and the program of docs/kimi-k3.md, run on tiny folders under the names that they have there."""

import re
import shlex
from pathlib import Path

import pytest
from k3_folders import EXPERTS, KINDS, TINY, copy_fixture, layers, pack_experts, random_folder
from kimi_linear_folder import save_published

from modeling_attnres.conversion import cli, fetch, mxfp4


DOCUMENT = Path(__file__).parents[2] / "docs" / "kimi-k3.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
COMMANDS = re.findall(r"^attnres-convert [^\n]+", TEXT, re.MULTILINE)
(PROGRAM,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def save_packed(folder: Path):
    """Experts are as wide as a group at least."""
    wide = {"moe_intermediate_size": 32, "routed_expert_hidden_size": 32}
    random_folder(folder, 4, **{**TINY, **EXPERTS, **wide, **layers(4, [4])})
    pack_experts(folder, folder.with_name("plain"))


STAND_INS = {
    "inference-optimization/Kimi-K3-0.40B": lambda folder: random_folder(folder, 4, **KINDS["no lower bound"][1]),
    "inference-optimization/Kimi-K3-0.40B-MXFP4": save_packed,
    "khtsly/Luau-Coder-1.0-0.5B-Base": lambda folder: random_folder(folder, 4, **KINDS["dense and tied"][1]),
    "nikita-savelyev-cerebras/tiny-random-kimi-k3": lambda folder: random_folder(
        folder, 12, **KINDS["more layers and experts"][1]
    ),
    "moonshotai/Kimi-Linear-48B-A3B-Instruct": save_published,
}


def run(command: str) -> int:
    return cli.main(shlex.split(command, comments=True)[1:])


def test_a_folder_is_converted_loaded_and_written_back(tmp_path, monkeypatch):
    (tmp_path / "path" / "to").mkdir(parents=True)
    copy_fixture(tmp_path / "path" / "to" / "kimi-k3")
    monkeypatch.chdir(tmp_path)
    there, back = COMMANDS[:2]
    assert run(there) == 0
    namespace = {}
    exec(compile(PROGRAM, DOCUMENT.name, "exec"), namespace)
    config = namespace["model"].config
    assert (config.backbone_type, config.sublayers_per_block) == ("kimi_k3_text", 2 * 3)
    assert run(back) == 0
    assert (tmp_path / "path" / "to" / "written" / "config.json").exists()


@pytest.mark.parametrize("command", COMMANDS[2:])
def test_public_checkpoints_convert_by_their_names(tmp_path, monkeypatch, command):
    repo_id = shlex.split(command)[1]
    save = STAND_INS[repo_id]

    def download(source, revision):
        assert (source, revision) == (repo_id, None)
        save(tmp_path / "snapshot")
        return tmp_path / "snapshot"

    monkeypatch.setattr(fetch, "_download", download)
    monkeypatch.chdir(tmp_path)
    assert run(command) == 0


def test_every_public_checkpoint_has_a_command():
    assert {shlex.split(command)[1] for command in COMMANDS[2:]} == STAND_INS.keys()


def test_figures_are_the_tests():
    assert f"under all {mxfp4.MAX_SCALE + 1} scale bytes" in TEXT
    for path in re.findall(r"\]\(([^)h][^)]*)\)", TEXT):
        assert (DOCUMENT.parent / path).exists(), path
