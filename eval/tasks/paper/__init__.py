# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the report's main table, and the two that lm-eval lacks: CMath and an MGSM group."""
