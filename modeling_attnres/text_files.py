# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Text files: those that `--text` names, for every tool and example that reads one, and those that are written."""

from pathlib import Path


def load_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: if there is no such file, or it is no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"`--text` must be a file that can be read, got {path} ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"`--text` must be text in UTF-8, got {path} ({error}).") from error
    if "\0" in text:
        raise ValueError(f"`--text` must be text in UTF-8, got {path}, which has zero bytes.")
    return text


def load_texts(path: Path) -> list[str]:
    """The text of a file, or of every `*.txt` file below a folder, in the order of their names.

    Raises:
        ValueError: if there is none, or one of them is no text.
    """
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    texts = [load_text(file) for file in files]
    if not any(texts):
        raise ValueError(f"`--text` must be a text file or a folder with *.txt files, got {path}.")
    return texts


def split_at_marks(document: Path, begin: str, end: str) -> tuple[str, str, str]:
    """What stands before, between and after two marks of a page; the marks belong to the outer parts.

    Raises:
        ValueError: if the page is not there or has no marks.
    """
    if not document.is_file():
        raise ValueError(f"`--document` must be a file, got {document}.")
    before, found_begin, rest = document.read_text(encoding="utf-8").partition(begin)
    between, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"`--document` must hold {begin} and {end}, got {document}.")
    return before + begin, between, end + after


def write_text(path: Path, text: str):
    """Writes a file in UTF-8, and its folder if need be. The file is complete, or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
