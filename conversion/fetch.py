# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Where a source comes from: a folder, a GGUF file, or the Hub."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from .checkpoint import (
    PICKLED,
    PICKLED_INDEX,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    ConversionError,
    first_line,
    read_index,
    shorten,
)
from .companions import WEIGHT_ENDINGS
from .gguf import unpack_gguf


@dataclass(frozen=True)
class FetchedSource:
    """A source as a local checkpoint folder, and as what it was given as.

    Attributes:
        folder: with config and weights in the library's layout.
        repo_id, revision: of the Hub, and the commit; `None` for a local source.
        gguf_file: that was unpacked into `folder`, or `None`.
    """

    folder: Path
    repo_id: str | None = None
    revision: str | None = None
    gguf_file: Path | None = None

    @property
    def location(self) -> tuple[Path, dict[str, Any]]:
        """What the library's `from_pretrained` takes to read the source itself: a place and keywords."""
        if self.gguf_file is not None:
            return self.gguf_file.parent, {"gguf_file": self.gguf_file.name}
        return self.folder, {}

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as a user of the source gets it; code that came with the source is not run."""
        place, keywords = self.location
        if self.repo_id is not None:  # the library's choice of a class may depend on the name
            with suppress(ValueError):  # a model type without a class: the library takes the tokenizer's files alone
                config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
                config.name_or_path = self.repo_id
                keywords = {"config": config}
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **keywords)


def fetch_source(source: str | Path, work: Path, dtype: torch.dtype | None, revision: str | None) -> FetchedSource:
    """Makes the source a local checkpoint folder.

    Args:
        source: a checkpoint folder, a `.gguf` file, or a model id on the Hub.
        work: folder for what has to be unpacked.
        dtype: for dequantised weights.
        revision: branch, tag or commit on the Hub.
    """
    path = Path(source)
    if revision is not None and path.exists():
        raise ConversionError(f"`revision` goes with a Hub id, got {revision!r} with the local source {path}.")
    if path.is_dir():
        ggufs = sorted(file.name for file in path.iterdir() if file.suffix.lower() == ".gguf")
        if ggufs and not (path / "config.json").is_file():
            raise ConversionError(f"{path}: holds GGUF files; give one of them as `source`: {shorten(ggufs)}.")
        return FetchedSource(path)
    if path.exists():
        if not path.is_file() or path.suffix.lower() != ".gguf":
            raise ConversionError(f"`source` must be a folder, a .gguf file or a Hub id, got the file {path}.")
        unpacked = work / "unpacked"
        unpack_gguf(path, unpacked, dtype)
        return FetchedSource(unpacked, gguf_file=path)
    folder = _download(str(source), revision)
    return FetchedSource(folder, str(source), folder.name)


def _download(repo_id: str, revision: str | None) -> Path:
    """The repository's own folder in the Hub's cache, which also serves offline.

    All that is no weight file comes first. What it says then names the weight files: repositories often hold the same
    weights in several formats.
    """
    endings = [f"*.{ending}" for ending in WEIGHT_ENDINGS]
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, ignore_patterns=endings))
        for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (PICKLED, PICKLED_INDEX)):
            names = sorted(set(read_index(folder / index).values())) if (folder / index).is_file() else [single]
            # By commit: a branch may have moved on in the meantime.
            snapshot_download(repo_id, revision=folder.name, allow_patterns=names)
            if any((folder / name).is_file() for name in names):
                break
    except HFValidationError as error:
        raise ConversionError(
            f"`source` is neither an existing path nor a Hub id: {repo_id!r} ({first_line(error)})."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise ConversionError(
            f"`source` {repo_id!r}{at} is no existing path, and could not be fetched from the Hub: {first_line(error)}"
        ) from error
    return folder
