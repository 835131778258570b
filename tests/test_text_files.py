# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What `--text` names: a file, or a folder of files."""

import pytest

from modeling_attnres.text_files import load_text, load_texts, split_at_marks, write_text


def test_a_file_or_a_folder(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in (("b/c.txt", "drei"), ("a.txt", "eins ü"), ("notes.md", "no")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert load_texts(tmp_path) == ["eins ü", "drei"]
    assert load_texts(tmp_path / "notes.md") == ["no"]
    assert load_text(tmp_path / "a.txt") == "eins ü"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", r"must be text in UTF-8, got .*a\.txt \("),
        (b"a\0b", r"must be text in UTF-8, got .*a\.txt, which has zero bytes"),
        (b"", r"must be a text file or a folder with \*\.txt files, got .*a\.txt"),
    ],
)
def test_what_is_no_text_is_refused(content, message, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"`--text` {message}"):
        load_texts(tmp_path / "a.txt")


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`--text` must be a file that can be read, got .*nowhere \(No such file"):
        load_texts(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must be a text file or a folder with \*\.txt files"):
        load_texts(tmp_path)


def test_a_file_is_written_in_one_piece(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "ü\n")
    assert path.read_bytes() == "ü\n".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert path.read_text(encoding="utf-8") == "ü\n"


def test_a_page_is_split_at_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a<b>c<d>e", encoding="utf-8")
    assert split_at_marks(page, "<b>", "<d>") == ("a<b>", "c", "<d>e")
    with pytest.raises(ValueError, match=r"`--document` must hold <d> and <b>, got .*page\.md"):
        split_at_marks(page, "<d>", "<b>")
    with pytest.raises(ValueError, match=r"`--document` must be a file, got .*nowhere"):
        split_at_marks(tmp_path / "nowhere", "<b>", "<d>")
