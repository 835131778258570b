# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""lm-eval tasks of this project: `paper/` (the report's benchmarks) and `offline/` (data shipped in the package)."""

from pathlib import Path


TASKS_PATH = Path(__file__).parent
"""The folder to give to lm-eval's `--include_path` or `TaskManager(include_path=...)`."""
