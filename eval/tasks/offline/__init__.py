# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Tasks whose data is shipped in this package, generated from a seed, or read from an installed wheel."""
