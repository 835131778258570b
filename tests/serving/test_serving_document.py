# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The commands and programs of docs/serving.md, run as they stand beside a model of that name, and what they print."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from vllm_processes import environment, started, tail

from modeling_attnres.conversion import convert


pytestmark = pytest.mark.vllm

TEXT = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
PROGRAMS = [(code, printed) for (kind, code), (_, printed) in zip(BLOCKS, [*BLOCKS[1:], ("", "")]) if kind == "python"]


@pytest.fixture(scope="module")
def folder(gguf_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    convert(gguf_file, folder / "my-attnres-model", num_blocks=8, dtype=torch.float32, check=False)
    return folder


@pytest.mark.parametrize(("code", "printed"), PROGRAMS, ids=["vllm", "generate_batch"])
def test_programs_print_what_is_shown(code, printed, folder):
    (folder / "program.py").write_text(code)
    result = subprocess.run(
        [sys.executable, "program.py"],
        cwd=folder,
        env=environment(HF_HOME=str(folder / "hf"), VLLM_LOGGING_LEVEL="ERROR"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = printed.strip().splitlines()
    assert result.stdout.strip().splitlines()[-len(lines) :] == lines


def test_a_server_answers_what_is_shown(folder):
    start, ask = (code for kind, code in BLOCKS if kind == "bash")
    (answer,) = (
        code for (before, _), (kind, code) in itertools.pairwise(BLOCKS) if (before, kind) == ("bash", "text")
    )
    command = shlex.split(start.replace("\\\n", " "))
    assert command[0] == "python"
    with started([sys.executable, *command[1:]], folder, folder / "server.txt") as process:
        wait_for("http://127.0.0.1:8000/health", process, folder / "server.txt", seconds=240)
        asked = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=120, env=os.environ)
    assert json.loads(asked.stdout)["choices"][0]["message"]["content"].strip() == answer.strip()


def wait_for(url: str, process: subprocess.Popen, log: Path, seconds: float):
    give_up = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < give_up:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    pytest.fail(f"no server within {seconds} s:\n{tail(log)}")
