# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from modeling_attnres.eval.outputs import OutputError, check_folder, outputs


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_outputs_appear_together_at_the_end(tmp_path):
    with outputs() as making:
        (making.folder(tmp_path / "a" / "new", "--output") / "one").write_text("1")
        made = making.file(tmp_path / "b" / "two.csv", "--json")
        assert made.name == "two.csv"
        made.write_text("2")
        assert not (tmp_path / "a" / "new").exists()
        assert not (tmp_path / "b" / "two.csv").exists()
    assert names(tmp_path) == ["a", "a/new", "a/new/one", "b", "b/two.csv"]


def test_what_was_there_is_replaced_or_kept(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("old", "one"):
        (tmp_path / "folder" / name).write_text("old")
    (tmp_path / "file").write_text("old")
    with outputs() as making:
        (making.folder(tmp_path / "folder", "--output") / "one").write_text("new")
        making.file(tmp_path / "file", "--json").write_text("new")
    assert names(tmp_path) == ["file", "folder", "folder/old", "folder/one"]
    found = [(tmp_path / name).read_text() for name in ("file", "folder/old", "folder/one")]
    assert found == ["new", "old", "new"]


def make_and_raise(folder, error):
    with outputs() as making:
        (making.folder(folder / ".hidden" / "a" / "b", "--output") / "one").write_text("1")
        making.file(folder / "c" / "two", "--json").write_text("2")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_where_work_ends_early(tmp_path, error):
    (tmp_path / ".hidden").mkdir()
    with pytest.raises(error):
        make_and_raise(tmp_path, error)
    assert names(tmp_path) == [".hidden"]


def test_a_file_that_was_not_written_does_not_appear(tmp_path):
    with outputs() as making:
        making.file(tmp_path / "a" / "one", "--json")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "path", "rule"),
    [
        ("folder", "file", "--output must be a folder, got the file "),
        ("file", "folder", "--output must be a file, got the folder "),
        ("folder", "file/below", "--output must be a path that can be written, got .*Not a directory"),
        ("folder", "n" * 300, "--output must be a path that can be written, got .*File name too long"),
        ("file", "new/" + "n" * 300, "--output must be a path that can be written, got .*File name too long"),
        ("folder", "/proc/new", "--output must be a path that can be written, got /proc/new "),
    ],
)
def test_places_that_take_nothing(tmp_path, kind, path, rule):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=rule), outputs() as making:
        getattr(making, kind)(tmp_path / path, "--output")
    assert names(tmp_path) == ["file", "folder"]


def test_two_outputs_in_one_place(tmp_path):
    with outputs() as making:
        making.file(tmp_path / "report", "--json")
        with pytest.raises(OutputError, match=r"--markdown must be a path of its own, got .*report twice"):
            making.file(tmp_path / "x" / ".." / "report", "--markdown")
    assert names(tmp_path) == []


def test_checking_a_folder_leaves_nothing(tmp_path):
    check_folder(tmp_path / "a" / "b", "--output")
    assert names(tmp_path) == []
    with pytest.raises(OutputError, match="--output must be a path that can be written"):
        check_folder(Path("/proc/x"), "--output")
