# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear complete or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class OutputError(ValueError):
    """An output cannot be written where it was asked for; nothing was."""


class Outputs:
    """Outputs in the making, each in a hidden folder beside its place; see [`outputs`]."""

    def __init__(self):
        self._places: list[tuple[Path, Path]] = []  # the output and where it is made
        self._hidden: list[Path] = []
        self._parents: list[Path] = []  # that were missing, the outer ones first

    def folder(self, path: Path, argument: str) -> Path:
        """A folder to write into instead of `path`, which may exist.

        Raises:
            OutputError: if no folder can be made there; it names `argument`.
        """
        made = self._beside(path, argument, "folder")
        if path.exists() and not path.is_dir():
            raise OutputError(f"{argument} must be a folder, got the file {path}")
        made.mkdir()
        return made

    def file(self, path: Path, argument: str) -> Path:
        """A file to write instead of `path`, which may exist; it has the same name.

        Raises:
            OutputError: as [`folder`].
        """
        made = self._beside(path, argument, path.name)
        if path.is_dir():
            raise OutputError(f"{argument} must be a file, got the folder {path}")
        return made

    def _beside(self, path: Path, argument: str, name: str) -> Path:
        path = Path(os.path.abspath(path))  # it must have a name, also as `.`
        if path in (place for place, _ in self._places):
            raise OutputError(f"{argument} must be a path of its own, got {path} twice")
        try:
            missing = [parent for parent in path.parents if not parent.exists()]
            for parent in reversed(missing):
                parent.mkdir()
                self._parents.append(parent)
            hidden = Path(tempfile.mkdtemp(prefix=f".{path.name[:100]}.", dir=path.parent))
            self._hidden.append(hidden)
            (hidden / path.name).touch()  # says whether the file system takes the name
            (hidden / path.name).unlink()
        except OSError as error:
            raise OutputError(
                f"{argument} must be a path that can be written, got {path} ({error.strerror})"
            ) from error
        self._places.append((path, hidden / name))
        return hidden / name

    def put_in_place(self):
        """Moves every output to its place. A folder that exists keeps its other files."""
        for path, made in self._places:
            if made.is_dir() and path.is_dir():
                for file in made.iterdir():
                    file.replace(path / file.name)
            elif made.exists():
                made.replace(path)

    def clear(self):
        """Removes the hidden folders, and the parents that were made for nothing."""
        for folder in self._hidden:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in reversed(self._parents):
            if not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def outputs() -> Iterator[Outputs]:
    """Makes outputs in a block: at its end they are all put in place; where it raises there is nothing of them."""
    making = Outputs()
    try:
        yield making
        making.put_in_place()
    finally:
        making.clear()


def check_folder(path: Path, argument: str):
    """Raises `OutputError` unless a folder can be made at `path`, or is there and takes files."""
    making = Outputs()
    try:
        making.folder(path, argument)
    finally:
        making.clear()
