# Copyright 2026 The modeling-attnres maintainers.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Where a source comes from: a folder, a GGUF file, or the Hub."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .checkpoint import ConversionError
from .gguf import unpack_gguf


def fetch_source(source: str | Path, work: Path, dtype: torch.dtype | None) -> tuple[Path, str | None]:
    """Makes the source a local checkpoint folder.

    Args:
        source: a checkpoint folder, a `.gguf` file, or a model id on the Hub.
        work: folder for what has to be unpacked.
        dtype: for dequantised weights.

    Returns:
        The folder, and the Hub id if it came from there.
    """
    path = Path(source)
    if path.is_dir():
        return path, None
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConversionError(f"`source` must be a folder, a .gguf file or a Hub id, got the file {path}.")
        unpacked = work / "unpacked"
        unpack_gguf(path, unpacked, dtype)
        return unpacked, None
    return _download(str(source)), str(source)


def _download(repo_id: str) -> Path:
    """The repository's own folder in the Hub's cache, which also serves offline."""
    described = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.md", "LICENSE*", "NOTICE*"]
    try:
        # Repositories often hold the same weights in several formats.
        for weights in ("*.safetensors", "*.bin"):
            folder = Path(snapshot_download(repo_id, allow_patterns=[weights, *described], ignore_patterns=["*/*"]))
            if any(folder.glob(weights)):
                break
    except HFValidationError as error:
        raise ConversionError(f"`source` is neither an existing path nor a Hub id: {repo_id!r} ({error}).") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConversionError(
            f"`source` {repo_id!r} is no existing path, and could not be fetched from the Hub: {error}"
        ) from error
    return folder
