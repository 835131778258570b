# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import pytest
from pipeline_workers import count_rows
from processes import run_ranks

from modeling_attnres.parallel.count_bytes import build_parser, format_table, main


DOCUMENT = (Path(__file__).parents[2] / "docs/pipeline.md").read_text(encoding="utf-8")


def test_the_documents_table_is_what_is_counted(tmp_path):
    (command,) = re.findall(r"`python -m modeling_attnres.parallel.count_bytes ([^`]*)`", DOCUMENT)
    options = build_parser().parse_args(command.split())
    rows = run_ranks(count_rows, options.ranks, tmp_path, options)[0]
    assert format_table(rows) in DOCUMENT
    for row in rows:
        assert row["summaries"] == row["formula"]


@pytest.mark.slow
def test_command_prints_the_table(capfd):
    assert main(["--ranks", "2", "--virtual-stages", "3", "--sublayers-per-block", "1"]) == 0
    assert "| `received` | 18 | 18 | 1 | 19 | 4 |" in capfd.readouterr().out


def test_command_refuses_blocks_that_do_not_divide_a_stage(capsys):
    with pytest.raises(SystemExit):
        main(["--sublayers-per-block", "3"])
    assert "must divide the 2 sublayers of a stage, got 3" in capsys.readouterr().err
