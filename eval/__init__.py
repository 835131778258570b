# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Evaluation: `attnres-eval run` (lm-eval with this project's tasks) and `attnres-eval compare` (paired statistics)."""
